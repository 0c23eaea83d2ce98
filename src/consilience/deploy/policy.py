"""What a site's owner allows, in policy.yaml; the site itself enforces it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.config import read_yaml
from consilience.core.errors import ConfigError, ConsilienceError, nearest
from consilience.core.events import cohort_size

Seen = Literal["sizes", "statistics", "updates", "losses", "scores", "groups"]


class Policy(BaseModel):
    """The rules of one site."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: list[str] | None = Field(None, description="sources that may be used, as site.yaml names them (any)")
    methods: list[str] | None = Field(None, description="methods that may run (any)")
    rounds: int | None = Field(None, ge=1, description="most rounds of one deployment (any number)")
    minimum_cohort: int = Field(1, ge=1, description="fewest sites whose updates are combined at once")
    server_sees: list[Seen] = Field(
        ["sizes", "statistics", "updates", "losses", "scores", "groups"],
        description="what may leave: sizes and the task, statistics of columns, updates, training losses, "
        "scores of models here, scores by sensitive group",
    )


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
    for what in ("sizes", "updates"):
        if what not in policy.server_sees:
            raise PolicyError(f"the policy lets no {what} leave, without which nothing can be trained")


def smallest(told: Mapping[str, Any]) -> int:
    """Of how many sites at least an update is made, if all answer."""
    from consilience import methods

    config = told["config"]
    cohort = cohort_size(config["participation"], len(told["sites"]))
    schedule = config["schedule"] or methods.make(told["method"], told["options"]).default_schedule()
    kind, _, number = schedule.partition(":")
    if kind in ("async", "interval", "tiered", "deadline"):
        return 1
    return min(len(told["sites"]), int(number)) if kind == "buffered" else cohort


def _listed(words: list[str]) -> str:
    return ", ".join(words) or "none"
