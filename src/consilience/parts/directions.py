"""Gradients, or an operator's directions, as means over a round's rows, and sums of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from consilience.core import tree as tr
from consilience.core.fit import Batch, Fit, Grad, Plan
from consilience.core.model import Params, Weights
from consilience.core.site import Site


def added(total: Params | None, direction: Params) -> Params:
    """total + direction, in the memory of ``total``; a copy of the direction where there is no total."""
    if total is None:
        return {name: d.clone() for name, d in direction.items()}
    torch._foreach_add_(list(total.values()), list(direction.values()))
    return total


def along(params: Params, length: float, direction: Params) -> Params:
    """params - length * direction; what has no direction, as parameters that the model froze, stays."""
    return {name: p - length * direction[name] if name in direction else p.clone() for name, p in params.items()}


def renewed(control: Params, change: Params) -> Params:
    """control + change; what does not change stays."""
    return {name: c + change[name] if name in change else c for name, c in control.items()}


class _Sums(NamedTuple):
    rows: int
    total: float
    sums: list[Params]


class Means(NamedTuple):
    """Mean gradients at each of several points, and the fit that found them (its weights have not moved, its buffers
    have as in training)."""

    at: list[Params]
    fit: Fit


def means(site: Site, weights: Weights, elsewhere: Sequence[Params] = (), *, whole: bool = False) -> Means:
    """The gradient of the client's loss (or the direction of its operator) at ``weights`` and ``elsewhere``, as means
    over the rows of a round's batches, which are the same for all points; over all rows at once if ``whole``."""

    def step(params: Params, grad: Grad, batch: Batch, carry: _Sums | None) -> tuple[Params, _Sums]:
        found = [grad(), *(grad(point) for point in elsewhere)]
        if carry is None:  # a lone batch counts exactly once
            return tr.zeros_like(found[0]), _Sums(len(batch.rows), 1.0, found)
        share = len(batch.rows) / carry.rows
        for sums, new in zip(carry.sums, found, strict=True):
            torch._foreach_add_(list(sums.values()), [new[name] for name in sums], alpha=share)
        return tr.zeros_like(found[0]), carry._replace(total=carry.total + share)

    plan = Plan(step=step, optimizer="sgd", momentum=0.0)
    if whole:
        plan.steps, plan.batch_size, plan.purpose = 1, len(site.train), "whole"
    fit = site.fit(weights, plan)
    made: _Sums = fit.carry
    return Means([tr.scale(sums, 1 / made.total) for sums in made.sums], fit)
