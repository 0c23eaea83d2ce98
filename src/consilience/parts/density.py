"""Mixtures of Gaussians over few linear features of the inputs: their pieces, made from what clients send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus  # type: ignore[import-untyped]
from torch import Tensor

from consilience.core.messages import Stat
from consilience.core.tree import record


@record
class Moments(NamedTuple):
    """Of a client's inputs, flattened to ``d`` numbers: the mean ``(d,)`` and the mean of x x^T ``(d, d)``."""

    mean: Stat
    second: Stat


@record
class Density(NamedTuple):
    """Features z = axes (x - offset), ``offset`` ``(d,)``, ``axes`` ``(k, d)``; Gaussians by number: ``means``
    ``(a, k)``, ``covariances`` ``(a, k, k)``."""

    offset: Tensor
    axes: Tensor
    means: Tensor
    covariances: Tensor


def moments(x: Tensor) -> Moments:
    """Of inputs ``(n, *shape)``, summed in float64."""
    rows = x.flatten(1).double()
    return Moments(rows.mean(0).to(x.dtype), (rows.T @ rows / len(rows)).to(x.dtype))


def blank(count: int, width: int, size: int, dtype: torch.dtype) -> Density:
    """Standard Gaussians over features that are all 0, which tell nothing apart."""
    covariances = torch.eye(width, dtype=dtype).repeat(count, 1, 1)
    zeros = torch.zeros(size, dtype=dtype), torch.zeros(width, size, dtype=dtype)
    return Density(*zeros, torch.zeros(count, width, dtype=dtype), covariances)


def begun(found: Sequence[Moments], shares: Sequence[float], start: Density, rng: np.random.Generator) -> Density:
    """The first density: the principal axes of everybody's inputs, scaled to variance 1 (axes without variance to 0),
    and standard Gaussians around clients' means, chosen by k-means++; if there are too few, also around draws of the
    standard normal."""
    dtype, (count, width) = start.means.dtype, start.means.shape
    means = torch.stack([one.mean.double() for one in found])
    weights = torch.tensor(shares, dtype=torch.float64)
    offset = weights @ means
    second = sum(share * one.second.double() for share, one in zip(shares, found, strict=True))
    values, vectors = torch.linalg.eigh(second - torch.outer(offset, offset))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    scale = torch.where(values > 1e-8 * values[0].clamp_min(1e-300), values.clamp_min(1e-300).rsqrt(), 0.0)
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))  # an eigenvector's sign is anybody's
    axes = (vectors * signs * scale).T
    z = (means - offset) @ axes.T
    taken = min(count, len(found))
    state = np.random.RandomState(int(rng.integers(2**31)))
    near = torch.from_numpy(kmeans_plusplus(z.numpy(), taken, random_state=state)[0])
    drawn = torch.from_numpy(rng.standard_normal((count - taken, width)))
    return Density(offset.to(dtype), axes.to(dtype), torch.cat([near, drawn]).to(dtype), start.covariances)


def embed(density: Density, x: Tensor) -> Tensor:
    """Features ``(n, k)`` of inputs ``(n, *shape)``, in float64."""
    return (x.flatten(1).double() - density.offset.double()) @ density.axes.double().T


def log_normal(density: Density, z: Tensor) -> Tensor:
    """log N(z; mu_a, Sigma_a) ``(n, a)`` of features ``(n, k)``."""
    factor = torch.linalg.cholesky(density.covariances.double())
    apart = z[None] - density.means.double()[:, None]
    whitened = torch.linalg.solve_triangular(factor, apart.mT, upper=False)
    logdet = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    found: Tensor = -0.5 * (whitened.square().sum(1) + logdet[:, None] + z.shape[1] * math.log(2 * math.pi))
    return found.T


def fitted(z: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``(a, k)`` and covariances ``(a, k, k)`` of features ``(n, k)`` with responsibilities ``(n, a)``."""
    total = r.sum(0).clamp_min(1e-300)
    means = r.T @ z / total[:, None]
    apart = z[None] - means[:, None]
    return means, (r.T[:, :, None] * apart).mT @ apart / total[:, None, None]


def pooled(
    old: Density, counts: Tensor, means: Tensor, covariances: Tensor, ridge: float, between: bool
) -> tuple[Tensor, Tensor]:
    """New means and covariances of all clients' rows. counts: rows ``(clients, a)`` that each Gaussian is responsible
    for; means ``(clients, a, k)``; covariances ``(clients, a, k, k)`` around those. ridge is added to variances;
    ``between``: with the scatter of clients' means. A Gaussian that has no rows stays."""
    total = counts.sum(0)
    shares = counts / total.clamp_min(1e-300)
    mean = (shares[..., None] * means).sum(0)
    inside = (shares[..., None, None] * covariances).sum(0)
    if between:
        apart = means - mean
        inside = inside + (shares[..., None, None] * apart[..., :, None] * apart[..., None, :]).sum(0)
    inside = inside + ridge * torch.eye(mean.shape[1], dtype=mean.dtype)
    used = total > 1e-6
    return (
        torch.where(used[:, None], mean, old.means.to(mean.dtype)),
        torch.where(used[:, None, None], inside, old.covariances.to(mean.dtype)),
    )
