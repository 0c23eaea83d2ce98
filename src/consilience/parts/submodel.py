"""Sub-models: slices of a model by units of its layers, and their average where they overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.core.model import OUTPUTS, Architecture, Axes, Params, Weights
from consilience.core.reduce import weighted_sum

Units = Mapping[str, Tensor]
"""By layer, the units that are kept, ``(k,)`` int64; a layer that is not named is kept whole."""


def sizes(architecture: Architecture) -> dict[str, int]:
    """Units of each layer that can be cut."""
    found: dict[str, int] = {}
    for name, dims in architecture.axes.items():
        for length, axis in zip(_shape(architecture.spec, name), dims, strict=True):
            if axis and axis != OUTPUTS:
                found[axis] = min(found.get(axis, length), length)  # behind a flatten each unit has several places
    return found


def _shape(spec: Weights, name: str) -> torch.Size:
    return (spec.params[name] if name in spec.params else spec.buffers[name]).shape


def prefix(whole: Mapping[str, int], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """The first units of each layer."""
    return {axis: torch.arange(kept[axis]) for axis in whole}


def rolling(whole: Mapping[str, int], kept: Mapping[str, int], offset: int) -> dict[str, Tensor]:
    """A window of each layer that has moved on by ``offset`` units, around the end; its units are in their order in the
    whole, so that a window of everything is the whole."""
    return {axis: ((offset + torch.arange(kept[axis])) % n).sort().values for axis, n in whole.items()}


def chance(whole: Mapping[str, int], kept: Mapping[str, int], rng: np.random.Generator) -> dict[str, Tensor]:
    """A random subset of each layer, in order."""
    return {axis: torch.from_numpy(np.sort(rng.permutation(n)[: kept[axis]])) for axis, n in whole.items()}


def _places(length: int, axis: str, units: Units, whole: Mapping[str, int]) -> Tensor:
    """Where along a dimension the kept units lie."""
    if axis not in units:
        return torch.arange(length)
    each = length // whole.get(axis, length)
    return (units[axis][:, None] * each + torch.arange(each)).flatten()


class Slices:
    """How the models of one family of nested widths are cut from the whole."""

    def __init__(self, whole: Architecture) -> None:
        self.axes: Axes = whole.axes
        self.sizes = sizes(whole)
        self.spec = whole.spec

    def grid(self, name: str, units: Units) -> tuple[Tensor, ...]:
        """Index of the kept part of a parameter or buffer, one broadcastable tensor a dimension."""
        shape = _shape(self.spec, name)
        places = [_places(n, axis, units, self.sizes) for n, axis in zip(shape, self.axes[name], strict=True)]
        return tuple(p.view([-1 if i == d else 1 for i in range(len(shape))]) for d, p in enumerate(places))

    def cut(self, weights: Weights, units: Units) -> Weights:
        """The part of the whole's weights that a sub-model has."""
        return Weights(*({n: t[self.grid(n, units)].clone() for n, t in part.items()} for part in weights))

    def noise(self, weights: Weights, units: Units) -> float:
        """The share of the squared parameters that the sub-model lacks: ||x - x m||^2 / ||x||^2."""
        kept = sum(float(t[self.grid(n, units)].double().square().sum()) for n, t in weights.params.items())
        total = sum(float(t.double().square().sum()) for t in weights.params.values())
        return 1 - kept / total if total else 0.0


class Piece(NamedTuple):
    """A sub-model's weights, the units that it has, and its weight in the average. outputs: the rows of the output
    layer that count, ``(m,)``, or None for all."""

    weights: Weights
    units: Units
    share: float
    outputs: Tensor | None = None


def average(slices: Slices, old: Weights, pieces: Sequence[Piece]) -> tuple[Weights, int]:
    """Each number is the mean over the pieces that have it, weighted by their shares; a number that none has keeps its
    old value bit for bit. Also the fewest pieces that any parameter is covered by.

    Shares sum to 1. Where all pieces are whole, this is :func:`consilience.core.reduce.weighted_sum` bit for bit: sums
    are taken of all shares times values, and then divided by the share that is there where it is not all of them.
    """
    shares = [piece.share for piece in pieces]
    made: list[Params] = []
    least = len(pieces)
    for part in ("params", "buffers"):
        olds: Params = getattr(old, part)
        counts, held = _covered(slices, olds, pieces)
        spread = [{name: _spread(slices, olds[name], name, piece, part) for name in olds} for piece in pieces]
        sums: Params = weighted_sum(spread, shares) if olds else {}
        made.append({name: _mean(sums[name], t, counts[name], held[name], len(pieces)) for name, t in olds.items()})
        if part == "params":
            least = min((int(count.min()) for count in counts.values()), default=least)
    return Weights(*made), least


def _where(slices: Slices, name: str, piece: Piece) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Where a piece's numbers lie in the whole, and in the piece."""
    if piece.outputs is None or OUTPUTS not in slices.axes[name]:
        grid = slices.grid(name, piece.units)
        return grid, tuple(torch.arange(g.numel()).view(g.shape) for g in grid)
    grid = slices.grid(name, {**piece.units, OUTPUTS: piece.outputs})
    at = slices.axes[name].index(OUTPUTS)
    inside = [torch.arange(g.numel()).view(g.shape) for g in grid]
    inside[at] = piece.outputs.view(grid[at].shape)
    return grid, tuple(inside)


def _spread(slices: Slices, old: Tensor, name: str, piece: Piece, part: str) -> Tensor:
    value: Tensor = getattr(piece.weights, part)[name]
    if not old.is_floating_point() or not old.dim():
        return value
    grid, inside = _where(slices, name, piece)
    dense = torch.zeros_like(old)
    dense[grid] = value[inside]
    return dense


def _covered(slices: Slices, olds: Params, pieces: Sequence[Piece]) -> tuple[Params, Params]:
    """By parameter and number, how many pieces have it, and their shares together."""
    counts = {name: torch.zeros(old.shape, dtype=torch.int64) for name, old in olds.items()}
    held = {name: torch.zeros(old.shape, dtype=torch.float64) for name, old in olds.items()}
    for piece in pieces:
        for name in olds:
            grid, _ = _where(slices, name, piece)
            counts[name][grid] += 1
            held[name][grid] += piece.share
    return counts, held


def _mean(total: Tensor, old: Tensor, count: Tensor, held: Tensor, most: int) -> Tensor:
    if not old.is_floating_point() or not old.dim():
        return total
    factor = torch.where(count == most, 1.0, 1 / held).to(old.dtype)
    return torch.where(count > 0, total * factor, old)
