"""Losses that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def model_contrast(z: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """-log( e^{cos(z,z+)/T} / (e^{cos(z,z+)/T} + e^{cos(z,z-)/T}) ), mean over rows; z: ``(n, width)``.

    Source: Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, equation 3.
    """
    to_positive = F.cosine_similarity(z, positive, dim=-1) / temperature
    to_negative = F.cosine_similarity(z, negative, dim=-1) / temperature
    return F.softplus(to_negative - to_positive).mean()


def proximal(params: dict[str, Tensor], anchor: dict[str, Tensor], gradient: dict[str, Tensor], mu: float) -> None:
    """Add mu (y - x), the gradient of (mu / 2) ||y - x||^2, to ``gradient`` in place."""
    pulls = torch._foreach_sub([params[name] for name in gradient], [anchor[name] for name in gradient])
    torch._foreach_add_(list(gradient.values()), pulls, alpha=mu)
