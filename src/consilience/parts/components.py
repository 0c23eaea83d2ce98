"""Several models of one architecture at once: how clients choose among them, or mix them, and how they combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError
from consilience.core.federation import Split
from consilience.core.messages import Stat
from consilience.core.method import Method
from consilience.core.model import Weights
from consilience.core.predict import Ensemble, Net, Predictor
from consilience.core.shapes import Expected, Wrong, compare
from consilience.core.site import Host, Place, Site
from consilience.core.tree import record


@record
class Components(NamedTuple):
    """All components, on the server and down: models of the server's architecture."""

    models: Stat


def draw(host: Host, count: int) -> tuple[Weights, ...]:
    """The usual initial model, and others drawn like it: equal components would stay equal for ever."""
    return tuple(host.initial(component=m) for m in range(count))


def losses(site: Site, models: Sequence[Weights]) -> Tensor:
    """Loss of each training row under each model, in evaluation mode: ``(rows, models)``."""

    def of_rows(module: nn.Module, rows: Split) -> Tensor:
        return site.task.losses(module(rows.x), rows.y)

    return torch.stack([torch.cat(site.map(of_rows, model)) for model in models], 1)


def estimate(scores: Tensor, prior: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """EM on the mixing weights alone. scores: log-likelihoods ``(rows, components)``; prior: weights to begin with.
    Returns responsibilities ``(rows, components)`` of the last step and the weights ``(components,)`` after it."""
    q = scores
    for _ in range(steps):
        q = (prior.log() + scores).softmax(1)
        prior = q.mean(0)
    return q, prior


def fitting(place: Place, model: str, count: int) -> Expected:
    """That a field holds ``count`` models of this architecture."""
    spec = place.architectures[model].spec

    def wrong(found: Any) -> Wrong | None:
        if not isinstance(found, tuple) or len(found) != count:
            return "", f"is not {count} models"
        for m, weights in enumerate(found):
            if not isinstance(weights, Weights):
                return str(m), f"is {type(weights).__name__}, not a model"
            bad = compare(weights.params, spec.params) or compare(weights.buffers, spec.buffers)
            if bad is not None:
                return f"{m}.{bad[0]}", bad[1]
        return None

    return wrong


def mixture(models: Sequence[Weights], shares: Sequence[float], model: str) -> Predictor:
    """Class probabilities mixed; one component is that network itself."""
    if len(models) == 1:
        return Net(models[0], model)
    return Ensemble(tuple(Net(weights, model) for weights in models), tuple(shares))


def check_buffers(method: Method) -> None:
    """Refuse buffers that stay at clients, where clients train several models."""
    if method.buffers != "average":
        raise ConfigError(f"{method.name}: buffers=local has no meaning for several models; use buffers=average")
