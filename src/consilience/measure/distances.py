"""Distances between clients: Jensen-Shannon between label distributions, sliced Wasserstein between inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilience.measure.information import Floats, Ints, entropy

DIRECTIONS = 64
"""Directions on which inputs are projected."""
QUANTILES = 32
"""Points at which two projected samples are compared."""


def jensen_shannon(p: NDArray[np.generic]) -> Floats:
    """Jensen-Shannon divergence in bits, 0 to 1, between all rows of ``p`` ``(n, k)`` (counts or probabilities).

    A row without mass is taken to be the pooled distribution.
    """
    q = np.asarray(p, dtype=np.float64)
    total = q.sum(axis=1, keepdims=True)
    q = np.where(total > 0, q / np.maximum(total, 1e-300), q.sum(axis=0) / max(q.sum(), 1e-300))
    own = entropy(q)
    found = np.zeros((len(q), len(q)))
    for i in range(len(q)):  # a row at a time: n * n * k numbers at once would be too many
        found[i] = entropy((q[i] + q) / 2) - (own[i] + own) / 2
    found = np.asarray(np.clip((found + found.T) / 2, 0.0, 1.0), dtype=np.float64)
    np.fill_diagonal(found, 0.0)
    return found


def directions(dimension: int, count: int, rng: np.random.Generator) -> Floats:
    """``count`` unit vectors ``(count, dimension)``, uniform on the sphere."""
    found = rng.standard_normal((count, dimension))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def sliced_wasserstein(
    x: NDArray[np.floating], group: Ints, groups: int, rng: np.random.Generator, count: int = DIRECTIONS
) -> Floats:
    """Sliced 2-Wasserstein distance between the rows of all pairs of groups, in the units of ``x``.

    x: ``(n, d)``. group: ``(n,)`` codes 0 .. groups - 1. Returns ``(groups, groups)``, nan for groups without rows.

    The squared distance is a mean over directions of one-dimensional squared distances, compared at
    ``QUANTILES`` mid-point quantiles. Three control variates make that mean less random: the squared difference of
    means and the two variances along a direction, whose means over the sphere are known exactly. They are the terms
    of the lower and the upper bound of Nguyen and Ho (ICLR 2024), fitted by least squares as Leluc et al. (2024) do,
    so that a shift of the mean is measured exactly.
    """
    d = x.shape[1]
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    if d == 1:
        count = 1
    theta = directions(d, count, rng)
    projected = np.asarray(x, dtype=np.float64) @ theta.T
    quantiles = np.full((groups, count, QUANTILES), np.nan)
    mean, variance, average = np.full((groups, d), np.nan), np.full((groups, count), np.nan), np.full(groups, np.nan)
    for g in range(groups):
        rows = np.flatnonzero(group == g)
        if len(rows):
            quantiles[g] = np.quantile(projected[rows], levels, axis=0).T
            mean[g], variance[g] = x[rows].mean(axis=0), projected[rows].var(axis=0)
            average[g] = x[rows].var(axis=0).sum() / d
    found = np.zeros((groups, groups))
    for g in range(groups):
        squared = ((quantiles[g] - quantiles) ** 2).mean(axis=2)
        if d == 1:
            found[g] = squared[:, 0]
            continue
        shift = mean[g] - mean
        controls = np.stack(
            [
                (shift @ theta.T) ** 2 - (shift**2).sum(axis=1, keepdims=True) / d,
                variance - average[:, None],
                np.broadcast_to(variance[g] - average[g], variance.shape),
            ],
            axis=2,
        )
        found[g] = _intercepts(squared, controls)
    found = np.asarray(np.sqrt(np.maximum((found + found.T) / 2, 0.0)), dtype=np.float64)
    np.fill_diagonal(found, 0.0)
    found[np.isnan(average), :] = found[:, np.isnan(average)] = np.nan
    return found


def _intercepts(values: Floats, controls: Floats) -> Floats:
    """The intercepts of least-squares fits of ``values`` ``(g, m)`` on ``controls`` ``(g, m, k)`` of mean 0."""
    known = ~np.isnan(values).any(axis=1)
    found = np.full(len(values), np.nan)
    y, z = values[known], controls[known]
    middle = z.mean(axis=1, keepdims=True)
    centred = z - middle
    gram = np.swapaxes(centred, 1, 2) @ centred
    scale = np.trace(gram, axis1=1, axis2=2)[:, None, None]
    gram = gram + (1e-9 * scale + 1e-300) * np.eye(z.shape[2])  # a control may be constant
    slope = np.linalg.solve(gram, np.swapaxes(centred, 1, 2) @ (y - y.mean(axis=1, keepdims=True))[..., None])
    found[known] = y.mean(axis=1) - (middle @ slope)[:, 0, 0]
    return found


def plane(distance: Floats) -> Floats:
    """Positions ``(n, 2)`` whose distances come near to ``distance`` ``(n, n)`` (classical scaling, Torgerson 1952).

    An axis points to the side on which its largest coordinate lies, so that the picture does not flip.
    """
    n = len(distance)
    if n == 0:
        return np.zeros((0, 2))
    squared = np.nan_to_num(distance) ** 2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    found = np.zeros((n, 2))
    for axis in range(min(2, n)):
        column = vectors[:, -1 - axis] * np.sqrt(max(values[-1 - axis], 0.0))
        found[:, axis] = column * (1.0 if column[np.argmax(np.abs(column))] >= 0 else -1.0)
    return found
