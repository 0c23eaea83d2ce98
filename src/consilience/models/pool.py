"""Pools of scales and shifts of a frozen network, of which each input takes its own mixture."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.core.model import Architecture, Factory, SplitModel

BASE = "base."
"""How the names of the frozen network's numbers begin."""


class Pool(nn.Module):
    """A frozen split model whose linear, convolutional and group-norm layers' outputs are scaled and shifted, and whose
    head is replaced, by the mean over the ``top`` entries of a pool whose keys are nearest to the input's plain
    features.

    entries: L. Parameters: ``keys (L, width)``; ``scales.i`` and ``shifts.i`` ``(L, channels)`` for the i-th layer of
    the features, which begin as 1 and 0; ``weight (L, outputs, width)`` and ``bias (L, outputs)``; and the frozen
    ``base``, which is always in evaluation mode.
    """

    def __init__(self, factory: Factory, entries: int, top: int, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        base = factory(input_shape, outputs)
        if not isinstance(base, SplitModel):
            raise ValueError("pools of scales and shifts stand in a split model (features and head)")
        self.base, self.top = base.requires_grad_(False), top
        self.keys = nn.Parameter(torch.rand(entries, base.width))
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for layer in base.features.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm):
                channels = layer.weight.shape[0]
                layer.register_forward_hook(functools.partial(self._adapt, len(self.scales)))
                self.scales.append(nn.Parameter(torch.ones(entries, channels)))
                self.shifts.append(nn.Parameter(torch.zeros(entries, channels)))
        bound = base.width**-0.5
        self.weight = nn.Parameter(torch.empty(entries, outputs, base.width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(entries, outputs).uniform_(-bound, bound))
        self._chosen: Tensor | None = None

    def train(self, mode: bool = True) -> Pool:
        """The base stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def _adapt(self, number: int, layer: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        if self._chosen is None:
            return out
        scale, shift = (part[number][self._chosen].mean(1) for part in (self.scales, self.shifts))
        shape = (*scale.shape, *[1] * (out.dim() - 2))
        adapted: Tensor = out * scale.view(shape) + shift.view(shape)
        return adapted

    def likeness(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines of the plain features of ``x`` and the nearest keys, and which these are: ``(b, top)`` both."""
        with torch.no_grad():
            query = self.base.features(x)
        cosines = F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T
        best = cosines.topk(self.top, dim=1)
        return best.values, best.indices

    def features(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Features ``(b, width)`` by the mean of the entries ``(b, top)``."""
        self._chosen = chosen
        try:
            out: Tensor = self.base.features(x)
        finally:
            self._chosen = None
        return out

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``(b, outputs)``, and the cosines of the entries that they are made with ``(b, top)``."""
        cosines, chosen = self.likeness(x)
        z = self.features(x, chosen)
        scores = torch.einsum("bow,bw->bo", self.weight[chosen].mean(1), z) + self.bias[chosen].mean(1)
        return scores, cosines

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(b, outputs)``."""
        return self.both(x)[0]


def pool(model: Architecture, entries: int, top: int, name: str = "pool") -> Architecture:
    """The pool over a model."""
    factory = functools.partial(Pool, model.factory, entries, top)
    return Architecture(name, factory, model.input_shape, model.outputs, model.dtype)
