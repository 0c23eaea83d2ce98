"""Losses between what two networks say of the same rows. What is learned from takes no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL( softmax(teacher / T) || softmax(scores / T) ), mean over rows; both ``(b, classes)``.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    target = (teacher.detach() / temperature).softmax(-1)
    return kl_to(scores, target, temperature)


def kl_to(scores: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """The same towards probabilities ``(b, classes)``."""
    found = (scores / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(found, target.detach(), reduction="batchmean")


def squared(scores: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of scores (Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014)."""
    return F.mse_loss(scores, teacher.detach())


def absolute(scores: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of scores."""
    return F.l1_loss(scores, teacher.detach())


def mutual(scores: Tensor, peers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Mean over peers of :func:`kl` towards them; 0 without peers (Zhang, Xiang, Hospedales, Lu, "Deep Mutual
    Learning", CVPR 2018)."""
    if not peers:
        return scores.new_zeros(())
    return torch.stack([kl(scores, peer, temperature) for peer in peers]).mean()


def features(z: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of || z / |z| - t / |t| ||^2; both ``(b, width)``."""
    return (F.normalize(z, dim=1) - F.normalize(teacher.detach(), dim=1)).square().sum(1).mean()


def relation(z: Tensor, teacher: Tensor) -> Tensor:
    """Huber difference of the matrices of distances between rows, each divided by its own mean; the widths may differ,
    and scale and rotation of either do not matter (Park et al., "Relational Knowledge Distillation", CVPR 2019)."""
    return F.smooth_l1_loss(_relative(z), _relative(teacher.detach()))


def _relative(z: Tensor) -> Tensor:
    squares = (z[:, None, :] - z[None, :, :]).square().sum(2)
    apart = ~torch.eye(len(z), dtype=torch.bool)
    found = (squares[apart] + torch.finfo(z.dtype).eps).sqrt()
    return found / found.mean()
