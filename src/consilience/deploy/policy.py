"""What a site's owner allows, in policy.yaml; the site itself enforces it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.config import read_yaml
from consilience.core.errors import ConfigError, ConsilienceError, nearest
from consilience.core.events import cohort_size
from consilience.privacy.numbers import threshold
from consilience.privacy.options import Privacy

Seen = Literal["sizes", "statistics", "updates", "sums", "losses", "scores", "groups"]


class Policy(BaseModel):
    """The rules of one site."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: list[str] | None = Field(None, description="sources that may be used, as site.yaml names them (any)")
    methods: list[str] | None = Field(None, description="methods that may run (any)")
    rounds: int | None = Field(None, ge=1, description="most rounds of one deployment (any number)")
    minimum_cohort: int = Field(1, ge=1, description="fewest sites whose updates are combined at once")
    server_sees: list[Seen] = Field(
        ["sizes", "statistics", "updates", "sums", "losses", "scores", "groups"],
        description="what may leave: sizes and the task, statistics of columns, updates, updates within secret sums, "
        "training losses, scores of models here, scores by sensitive group",
    )
    epsilon: float | None = Field(None, gt=0, description="most that all deployments may spend on a row here (any)")
    delta: float = Field(1e-5, gt=0, lt=1, description="at which epsilon is told")


class PolicyError(ConsilienceError):
    """Something that a site's owner does not allow."""


def read(path: Path) -> Policy:
    """A site's policy; without a file everything is allowed. Raises ConfigError."""
    if not path.exists():
        return Policy.model_validate({})
    values = read_yaml(path)
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = nearest(key, Policy.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{path}: {key}: {first['msg'].lower()}{known}") from None


def check(policy: Policy, source: str, told: Mapping[str, Any]) -> None:
    """Refuse a deployment that the policy does not allow. told: what the server says of it. Raises PolicyError."""
    if policy.data is not None and source not in policy.data:
        raise PolicyError(f"the policy allows data {_listed(policy.data)}, not {source}")
    if policy.methods is not None and told["method"] not in policy.methods:
        raise PolicyError(f"the policy allows methods {_listed(policy.methods)}, not {told['method']}")
    rounds = told["config"]["rounds"]
    if policy.rounds is not None and rounds > policy.rounds:
        raise PolicyError(f"the policy allows {policy.rounds} rounds, not {rounds}")
    least = smallest(told)
    if least < policy.minimum_cohort:
        raise PolicyError(f"the policy wants {policy.minimum_cohort} sites combined at once; here it may be {least}")
    if policy.epsilon is not None and told["options"].get("row_noise", "none") == "none":
        raise PolicyError(f"the policy's epsilon of {policy.epsilon:g} for a row needs a method with row_noise")
    secret = told["config"]["secure"] is not None
    for what in ("sizes", "sums" if secret and "updates" not in policy.server_sees else "updates"):
        if what not in policy.server_sees:
            raise PolicyError(f"the policy lets no {what} leave, without which nothing can be trained")


def smallest(told: Mapping[str, Any]) -> int:
    """Of how many sites at least an update is made: if all answer, or of a secret sum."""
    from consilience import methods

    config = told["config"]
    cohort = cohort_size(config["participation"], len(told["sites"]))
    if config["secure"] is not None:
        return threshold(config["secure"], cohort)
    if Privacy.of(config).asked and config["dp_mechanism"] == "poisson" and cohort < len(told["sites"]):
        return 1
    schedule = config["schedule"] or methods.make(told["method"], told["options"]).default_schedule()
    kind, _, number = schedule.partition(":")
    if kind in ("async", "interval", "tiered", "deadline"):
        return 1
    return min(len(told["sites"]), int(number)) if kind == "buffered" else cohort


def _listed(words: list[str]) -> str:
    return ", ".join(words) or "none"
