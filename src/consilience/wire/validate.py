"""Validation before arithmetic: an update that cannot be right costs its client, never the round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.messages import Job, Kind, Refusal, Reply, kinds
from consilience.core.model import Weights
from consilience.core.shapes import misfit
from consilience.core.site import Place
from consilience.core.tree import Tree


class Validation:
    """Drops replies whose models or differences do not fit their client's architecture (names, shapes, dtypes), or
    that hold a number that is not finite; says which client, field and why."""

    def __init__(self, place: Place) -> None:
        self._place, self._program = place, place.method.program()
        self._known: dict[str, Mapping[Any, Any]] = {}

    def __call__(self, replies: Sequence[Reply], server: Tree) -> tuple[list[Reply], list[Refusal]]:
        """The good replies, and the bad ones with reasons."""
        good: list[Reply] = []
        bad: list[Refusal] = []
        for reply in replies:
            wrong = self.wrong(reply.job, reply.update)
            if wrong is None:
                good.append(reply)
            else:
                bad.append(Refusal(reply.job.client, *wrong))
        return good, bad

    def wrong(self, job: Job, update: Tree) -> tuple[str, str] | None:
        """The first thing that is wrong with what a client sent for a job, as (field, reason)."""
        wanted = self._place.method.sends(self._program[job.phase])
        if wanted is not None and type(update) not in (get_args(wanted) or (wanted,)):
            return "update", f"is {type(update).__name__}, not {getattr(wanted, '__name__', wanted)}"
        if tr.is_record(update):
            expected = self._expected(job.client)
            lengths: dict[str, int] = {}
            for name, kind in kinds(type(update)).items():
                if name in expected or kind in expected:
                    found = misfit(getattr(update, name), expected.get(name, expected.get(kind)), lengths)
                    if found is not None:
                        return f"{name}.{found[0]}".rstrip("."), found[1]
        if all(map(_finite, tr.leaves(update))):
            return None
        path, leaf = next((path, leaf) for path, leaf in tr.items(update) if not _finite(leaf))
        return path, "holds numbers that are not finite" if isinstance(leaf, Tensor) else f"is {leaf}"

    def _expected(self, client: int) -> Mapping[Any, Any]:
        """What each field of an update must look like, by its name or by its kind."""
        name = self._place.model_of(client)
        if name not in self._known:
            spec = self._place.architectures[name].spec
            own = self._place.method.expects(self._place, name)
            if self._place.method.buffers == "local":
                spec = spec._replace(buffers={})
                own = {k: v._replace(buffers={}) if isinstance(v, Weights) else v for k, v in own.items()}
            usual: dict[Any, Any] = {
                Kind.MODEL: spec, Kind.BUFFERS: spec.buffers, Kind.DELTA: spec.params, Kind.CONTROL: spec.params
            }  # fmt: skip
            self._known[name] = {**usual, **own}
        return self._known[name]


def _finite(leaf: Any) -> bool:
    """Whether a leaf holds no infinity and no nan."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        # A sum is ten times faster than looking at every number, and only overflow makes it cry wolf.
        return math.isfinite(leaf.sum().item()) or bool(torch.isfinite(leaf).all())
    return not isinstance(leaf, float) or math.isfinite(leaf)
