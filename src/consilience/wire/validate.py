"""Validation before arithmetic: an update that cannot be right costs its client, never the round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.messages import Kind, Refusal, Reply, kinds
from consilience.core.model import Params, Weights
from consilience.core.site import Place
from consilience.core.tree import Tree


class Validation:
    """Drops replies whose models or differences do not fit their client's architecture (names, shapes, dtypes), or
    that hold a number that is not finite; says which client, field and why."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._specs: dict[str, Weights] = {}

    def __call__(self, replies: Sequence[Reply], server: Tree) -> tuple[list[Reply], list[Refusal]]:
        """The good replies, and the bad ones with reasons."""
        good: list[Reply] = []
        bad: list[Refusal] = []
        for reply in replies:
            wrong = self.wrong(reply.job.client, reply.update)
            if wrong is None:
                good.append(reply)
            else:
                bad.append(Refusal(reply.job.client, *wrong))
        return good, bad

    def wrong(self, client: int, update: Tree) -> tuple[str, str] | None:
        """The first thing that is wrong with a client's update, as (field, reason)."""
        wanted = self._place.method.sends()
        if wanted is not None and type(update) is not wanted:
            return "update", f"is {type(update).__name__}, not {wanted.__name__}"
        if tr.is_record(update):
            for name, kind in kinds(type(update)).items():
                found = self._misfit(getattr(update, name), kind, client)
                if found is not None:
                    return f"{name}.{found[0]}", found[1]
        if all(map(_finite, tr.leaves(update))):
            return None
        path, leaf = next((path, leaf) for path, leaf in tr.items(update) if not _finite(leaf))
        return path, "holds numbers that are not finite" if isinstance(leaf, Tensor) else f"is {leaf}"

    def _misfit(self, value: Any, kind: Kind, client: int) -> tuple[str, str] | None:
        spec = self._spec(client)
        local = self._place.method.buffers == "local"
        if kind is Kind.BUFFERS:
            return _compare(value, {} if local else spec.buffers)
        if kind is Kind.MODEL:
            if not isinstance(value, Weights):
                return "", f"is {type(value).__name__}, not a model"
            return _compare(value.params, spec.params) or _compare(value.buffers, {} if local else spec.buffers)
        if kind in (Kind.DELTA, Kind.CONTROL):
            return _compare(value, spec.params)
        return None

    def _spec(self, client: int) -> Weights:
        name = self._place.model_of(client)
        if name not in self._specs:
            self._specs[name] = self._place.architectures[name].initial(0)
        return self._specs[name]


def _finite(leaf: Any) -> bool:
    """Whether a leaf holds no infinity and no nan."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        # A sum is ten times faster than looking at every number, and only overflow makes it cry wolf.
        return math.isfinite(leaf.sum().item()) or bool(torch.isfinite(leaf).all())
    return not isinstance(leaf, float) or math.isfinite(leaf)


def _compare(found: Params, spec: Params) -> tuple[str, str] | None:
    """The first thing about ``found`` that is not as in ``spec``: (name, reason)."""
    if not isinstance(found, dict):
        return "", f"is {type(found).__name__}, not parameters by name"
    for name in [*found, *spec]:
        if name not in found:
            return name, "is missing"
        if name not in spec:
            return name, "is not a parameter of this client's model"
        a, b = found[name], spec[name]
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return name, f"has shape {tuple(getattr(a, 'shape', ()))}, not {tuple(b.shape)}"
        if a.dtype != b.dtype:
            return name, f"has dtype {a.dtype}, not {b.dtype}"
    return None if list(found) == list(spec) else (next(iter(found)), "stands in another order")
