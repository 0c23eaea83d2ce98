"""A model's numbers in blocks, of which a client holds some."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consilience.core.model import Architecture, Params


@dataclass(frozen=True)
class Blocks:
    """Each parameter, flattened, in up to ``pieces`` runs of equal length, of which the last may be shorter.

    shapes: of the parameters, by name. sizes: ``(blocks,)`` int64. first: ``(blocks,)``, whether a block begins its
    parameter. linear: ``(blocks,)``, whether it is of a linear layer.
    """

    shapes: Mapping[str, torch.Size]
    sizes: Tensor
    first: Tensor
    linear: Tensor

    def spread(self, values: Tensor) -> Params:
        """A number for each block ``(blocks,)`` at each of its places, shaped as the parameters."""
        every = values.repeat_interleave(self.sizes)
        parts = every.split_with_sizes([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def choose(self, scores: Tensor, share: float) -> Tensor:
        """The blocks to keep ``(blocks,)``, with at most ``share`` of all numbers of linear layers, and of all others:
        the first of each parameter always (be it too much), then those with the highest score for their size, as long
        as they fit (the greedy solution of the knapsack problem)."""
        chosen = self.first.clone()
        if share >= 1:
            return torch.ones_like(chosen)
        for group in (self.linear, ~self.linear):
            room = math.floor(share * int(self.sizes[group].sum()) + 1e-9) - int(self.sizes[group & self.first].sum())
            rest = (group & ~self.first).nonzero().flatten().tolist()
            value = (scores.double() / self.sizes).tolist()
            for i in sorted(rest, key=lambda i: (-value[i], i)):
                if self.sizes[i] <= room:
                    chosen[i] = True
                    room -= int(self.sizes[i])
        return chosen

    def take(self, params: Params, chosen: Tensor) -> Tensor:
        """The numbers of the blocks chosen, one after another."""
        every = torch.cat([params[name].reshape(-1) for name in self.shapes])
        return every[chosen.repeat_interleave(self.sizes)]

    def put(self, values: Tensor, chosen: Tensor, params: Params) -> Params:
        """``params`` with these numbers in the blocks chosen."""
        every = torch.cat([params[name].reshape(-1) for name in self.shapes])
        every[chosen.repeat_interleave(self.sizes)] = values
        parts = every.split_with_sizes([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape).clone() for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def count(self, chosen: Tensor) -> int:
        """How many numbers the blocks chosen hold."""
        return int(self.sizes[chosen].sum())


@functools.lru_cache(maxsize=64)
def blocks(model: Architecture, pieces: int) -> Blocks:
    """The blocks of a model's parameters."""
    layers = dict(model.build().named_modules())
    shapes = {name: p.shape for name, p in model.spec.params.items()}
    sizes: list[int] = []
    first: list[bool] = []
    linear: list[bool] = []
    for name, shape in shapes.items():
        size = math.ceil(shape.numel() / min(pieces, shape.numel()))
        runs = [size] * (shape.numel() // size) + [shape.numel() % size] * (shape.numel() % size > 0)
        sizes += runs
        first += [True, *[False] * (len(runs) - 1)]
        linear += [isinstance(layers[name.rpartition(".")[0]], nn.Linear)] * len(runs)
    return Blocks(shapes, torch.tensor(sizes), torch.tensor(first), torch.tensor(linear))
