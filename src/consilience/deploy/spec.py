"""What a deployment is: run.yaml, the configuration of a run with a section ``deploy``, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from consilience.config import Settings, read_yaml, settle
from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError, NeedsError
from consilience.core.events import cohort_size
from consilience.experiment import RunSpec, specs
from consilience.privacy.options import KEYS, Privacy

ID = "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}"
"""Of deployments, which are folders at the sites."""
PROTOCOL = 3
"""Of our messages; both ends must have the same."""


class Section(BaseModel):
    """The section ``deploy`` of run.yaml."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    id: str = Field("", pattern=f"^({ID})?$", description="names this deployment at the sites")
    sites: dict[str, str] = Field(min_length=1, description="the sites' names and public keys, in order: ids 0, 1, ...")
    key: str = Field("", description="the server's public key")
    target: str | None = Field(None, description="the column to predict, in sites' tables")
    task: Literal["classification", "regression"] | None = Field(None, description="the target's kind (by its values)")
    test: str | None = Field(None, description="at the server: a file to judge the global model on")
    public: str | None = Field(None, description="at the server: a file of unlabelled rows that everybody may see")
    timeout: float = Field(600.0, gt=0, description="seconds in which a site must answer")
    join: float = Field(600.0, gt=0, description="seconds in which every site must have joined")
    max_bytes: int = Field(200_000_000, ge=1_000_000, description="most bytes of a message")

    @field_validator("sites", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {str(name): "" for name in value} if isinstance(value, list) else value

    @field_validator("sites")
    @classmethod
    def _plain(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
                raise ValueError(f"a site's name has letters, digits, '-', '_' and '.' only, not '{name}'")
        return value


@dataclass(frozen=True)
class Deployment:
    """A method, its run's configuration, and who takes part."""

    run: RunSpec
    section: Section

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names by client id."""
        return tuple(self.section.sites)

    def told(self) -> dict[str, Any]:
        """What a site is told of it (no file of the server's, no key)."""
        config = self.run.config
        kept = (
            "model", "models", "feature_dim", "split", "sensitive", "rounds", "participation", "schedule", "topology",
            "mixing", "seed", *KEYS,
        )  # fmt: skip
        return {
            "method": self.run.method,
            "options": dict(self.run.options),
            "config": {key: getattr(config, key) for key in kept},
            "sites": list(self.names),
            "target": self.section.target,
            "task": self.section.task,
        }

    def write(self, path: Path) -> None:
        """Write run.yaml."""
        flat = {**Settings(self.run.config, {}).flat(), "seeds": 1}
        defaults = {**settle({}).flat()}
        own = {key: value for key, value in flat.items() if value != defaults.get(key)}
        whole = {
            "method": self.run.method,
            "label": self.run.label,
            "options": dict(self.run.options),
            **own,
            "deploy": self.section.model_dump(exclude_none=True),
        }
        write_atomically(path, yaml.safe_dump(whole, sort_keys=False))


def read(path: Path, method: str | None = None) -> Deployment:
    """The deployment that a file describes; ``method`` as METHOD:key=value,... where the file names none. Raises
    ConfigError."""
    values = {str(key).replace("-", "_"): value for key, value in read_yaml(path).items()}
    section, named = values.pop("deploy", None), values.pop("method", None)
    options, label = values.pop("options", None) or {}, values.pop("label", None)
    if method is None and not isinstance(named, str):
        raise ConfigError(f"{path}: no method; write `method: NAME`, or name it on the command line")
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: no section deploy; it names the sites, as in deploy: {{sites: [north, south]}}")
    settings = settle(values)
    if method is not None:
        (run,) = specs(settings, [method])
    else:
        (run,) = specs(settings, [str(named)])
        if not isinstance(options, Mapping):
            raise ConfigError(f"{path}: options is a mapping of the method's options to values")
        run = RunSpec(str(label or named), run.method, {**run.options, **options}, run.config)
    return make(run, dict(section), str(path))


def make(run: RunSpec, section: Mapping[str, Any], where: str = "run.yaml") -> Deployment:
    """A deployment, checked. Raises ConfigError or NeedsError."""
    from consilience import methods

    try:
        found = Section.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}: deploy.{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
    config = run.config.model_copy(update={"checkpoint_every": 1, "clients": len(found.sites)})
    default = settle({}).config
    for key in ("unseen", "drops", "fleet_correlation", "availability", "fleet", "replay", "attack", "robustness"):
        if getattr(config, key) != getattr(default, key):
            raise ConfigError(f"{where}: {key} is for simulations; real sites are as they are")
    if config.seeds != 1:
        raise ConfigError(f"{where}: a deployment is one run; leave out seeds")
    privacy = Privacy.of(config.model_dump())
    privacy.check(run.options)
    made = privacy.method(methods.make(run.method, run.options))
    privacy.fits(made, cohort_size(config.participation, len(found.sites)))
    schedule = config.schedule or made.default_schedule()
    if "%" in schedule:
        raise ConfigError(f"{where}: schedule {schedule}: a share of a simulated device's time; give seconds")
    if schedule.partition(":")[0] == "compass" or config.late == "partial":
        raise ConfigError(
            f"{where}: schedule {schedule} plans with simulated devices; use rounds, deadline or buffered"
        )
    if made.needs.pooled_data:
        raise NeedsError(f"{run.method} pools all clients' data, which never leaves real sites; it cannot be deployed")
    return Deployment(RunSpec(run.label, run.method, run.options, config), found)
