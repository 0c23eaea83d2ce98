"""Generators of features by class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.core.model import Architecture


class Latent(nn.Module):
    """Noise beside a one-hot class ``(b, noise + classes)`` -> features ``(b, outputs)``: one hidden layer with
    BatchNorm."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_shape[0], hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def latent(model: Architecture, noise: int) -> Architecture:
    """A generator of the features that a model's head is given."""
    return Architecture("generator", Latent, (noise + model.outputs,), model.width or 0, model.dtype)


def inputs(rng: np.random.Generator, y: Tensor, noise: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a generator's inputs for classes ``(b,)``, the noise in them ``(b, noise)``, uniform on [0, 1))."""
    eps = torch.from_numpy(rng.random((len(y), noise))).to(dtype)
    return torch.cat([eps, F.one_hot(y, classes).to(dtype)], 1), eps
