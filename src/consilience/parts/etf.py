"""Simplex equiangular tight frames: class vectors that are as far from each other as they can be, and do not learn."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.core.model import Architecture, Factory, SplitModel, Weights
from consilience.core.streams import philox


def frame(width: int, classes: int) -> Tensor:
    """M = sqrt(C / (C - 1)) U (I - 1 1^T / C), ``(width, classes)`` in float64, with U^T U = I from one fixed draw:
    columns of length 1, whose inner products are -1 / (C - 1). Raises ValueError if ``width`` is below ``classes`` or
    there is one class."""
    if not 2 <= classes <= width:
        raise ValueError(f"a frame of {classes} classes wants 2 classes or more, and as many features; it has {width}")
    drawn = philox("etf", width, classes).standard_normal((width, classes))
    u, _ = np.linalg.qr(drawn)
    centred = np.eye(classes) - 1 / classes
    return torch.from_numpy(math.sqrt(classes / (classes - 1)) * u @ centred)


class ETFHead(nn.Module):
    """beta M^T z / max(|z|, 1e-12) of z, the model's own head's outputs. beta begins as 1. M is no part of the state,
    unless it is ``learned``."""

    def __init__(self, projection: nn.Module, classes: int, *, learned: bool) -> None:
        super().__init__()
        self.projection = projection
        self.beta = nn.Parameter(torch.ones(()))
        fixed = frame(classes, classes)
        self.frame: Tensor
        if learned:
            self.frame = nn.Parameter(fixed)
        else:
            self.register_buffer("frame", fixed, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """``(b, width)`` -> ``(b, classes)``."""
        return self.beta * F.normalize(self.projection(features)) @ self.frame


def fixed(model: Architecture, name: str, *, learned: bool = False) -> Architecture:
    """A split model with an :class:`ETFHead` around its head."""
    return Architecture(
        name, functools.partial(_build, model.factory, learned), model.input_shape, model.outputs, model.dtype
    )


def _build(factory: Factory, learned: bool, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    model = factory(input_shape, outputs)
    assert isinstance(model, SplitModel)
    return SplitModel(model.features, ETFHead(model.head, outputs, learned=learned), model.width)


def wrapped(weights: Weights, spec: Weights) -> Weights:
    """A split model's weights as those of its :func:`fixed` form, whose first ones ``spec`` has."""

    def inner(name: str) -> str:
        return name.replace("head.projection.", "head.", 1)

    return Weights(
        {name: weights.params.get(inner(name), p) for name, p in spec.params.items()},
        {name: weights.buffers.get(inner(name), b) for name, b in spec.buffers.items()},
    )
