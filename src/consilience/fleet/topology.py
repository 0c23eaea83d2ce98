"""Who exchanges with whom where there is no server, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from consilience.core.errors import ConfigError, nearest

NAMES = ("complete", "ring", "star", "torus", "exponential")
Weights = Mapping[int, Mapping[int, float]]


def neighbours(name: str, n: int) -> list[set[int]]:
    """The neighbours of each of ``n`` nodes, without the node itself. Raises ConfigError."""
    if name == "complete":
        return [set(range(n)) - {i} for i in range(n)]
    if name == "ring":
        return [{(i - 1) % n, (i + 1) % n} - {i} for i in range(n)]
    if name == "star":
        return [set(range(1, n)) if i == 0 else {0} for i in range(n)]
    if name == "torus":
        rows = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        cols = n // rows
        return [_around(i, rows, cols) - {i} for i in range(n)]
    if name == "exponential":
        hops = [2**k for k in range(max(1, n - 1).bit_length())]
        return [{(i + s * h) % n for h in hops for s in (1, -1)} - {i} for i in range(n)]
    raise ConfigError(f"unknown topology '{name}'{nearest(name, NAMES)}")


def _around(i: int, rows: int, cols: int) -> set[int]:
    r, c = divmod(i, cols)
    below, above, left, right = (r + 1) % rows, (r - 1) % rows, (c - 1) % cols, (c + 1) % cols
    return {below * cols + c, above * cols + c, r * cols + right, r * cols + left}


def mixing(name: str, n: int) -> Weights:
    """Mixing weights by node and neighbour, itself included; rows and columns sum to 1.

    On a complete graph exactly 1/n. Otherwise Metropolis-Hastings: W_ij = 1 / (1 + max(deg_i, deg_j)) on edges,
    W_ii the rest.
    """
    around = neighbours(name, n)
    if name == "complete":
        return {i: dict.fromkeys(range(n), 1.0 / n) for i in range(n)}
    weights: dict[int, dict[int, float]] = {}
    for i in range(n):
        row = {j: 1.0 / (1 + max(len(around[i]), len(around[j]))) for j in around[i]}
        row[i] = 1.0 - math.fsum(row.values())
        weights[i] = dict(sorted(row.items()))
    return weights
