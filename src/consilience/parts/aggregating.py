"""What all aggregators share: one update in the place of several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.messages import Kind, kinds
from consilience.core.reduce import weighted_sum


class Aggregator(ABC):
    """Combines updates."""

    differences: bool = False
    """Whether updates must be differences, since the result depends on where 0 is."""

    @abstractmethod
    def combine(
        self, updates: Sequence[Any], weights: Mapping[str, Sequence[float]], rng: np.random.Generator | None = None
    ) -> Any:
        """One update in the place of several, of the same record type, in the order of the sorted cohort. weights: of
        each field; where an aggregator's own weights take their place, they have the same sum. rng: for rules that
        draw."""


class Reweighed(Aggregator):
    """Finds new weights for whole updates, from their models or differences, or from all their numbers if they hold
    neither (scores, prototypes)."""

    def combine(
        self, updates: Sequence[Any], weights: Mapping[str, Sequence[float]], rng: np.random.Generator | None = None
    ) -> Any:
        """Sums with the new weights: as they are for the field that they were found from, else normalised."""
        field = looked_at(type(updates[0])) or updates[0]._fields[0]
        total = math.fsum(weights[field])
        found = self.weights(vectors_of(updates), [w / total for w in weights[field]])
        whole = math.fsum(found)
        made = {}
        for name in updates[0]._fields:
            scale = math.fsum(weights[name]) / (1.0 if name == field else whole)
            made[name] = weighted_sum([getattr(u, name) for u in updates], [w * scale for w in found])
        return type(updates[0])(**made)

    @abstractmethod
    def weights(self, vectors: Tensor, shares: Sequence[float]) -> list[float]:
        """A weight for each of ``(n, d)`` vectors of float64; shares sum to 1."""


def looked_at(update: type) -> str | None:
    """The field by which updates of a type are compared: their difference or model, or None."""
    return next((name for name, kind in kinds(update).items() if kind in (Kind.DELTA, Kind.MODEL)), None)


def vectors_of(updates: Sequence[Any]) -> Tensor:
    """Parameters of models or differences, or all numbers of other updates, as rows ``(n, d)`` of float64. Buffers of
    models are not looked at."""
    field = looked_at(type(updates[0]))
    trees = list(updates) if field is None else [getattr(update, field) for update in updates]
    chosen = [getattr(tree, "params", tree) for tree in trees]
    rows = [[t.double().flatten() for t in tr.tensors(tree) if t.is_floating_point()] for tree in chosen]
    return torch.stack([torch.cat(row) for row in rows])
