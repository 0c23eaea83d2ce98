"""Who exchanges with whom where there is no server, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from consilience.core.errors import ConfigError, DataError, nearest
from consilience.core.streams import philox

NAMES = ("complete", "ring", "star", "torus", "exponential")
DRAWN = ("regular:K", "er:P", "smallworld:K:P")
TRIES = 100
"""Graphs drawn until one is connected."""
Weights = Mapping[int, Mapping[int, float]]
Graph = list[set[int]]
"""The neighbours of each node, without the node itself."""


def neighbours(name: str, n: int, seed: int = 0) -> Graph:
    """The neighbours of each of ``n`` nodes: a graph by name, one drawn with ``seed`` until it is connected, or a file
    of edges. Raises ConfigError or DataError."""
    kind, _, rest = name.partition(":")
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
    if kind in ("regular", "er", "smallworld"):
        return _connected(name, _drawer(name, kind, rest.split(":"), n), seed)
    if Path(name).suffix or Path(name).exists():
        return read_edges(Path(name), n)
    raise ConfigError(f"unknown topology '{name}'{nearest(name, (*NAMES, *DRAWN))} (or a file of edges)")


def _around(i: int, rows: int, cols: int) -> set[int]:
    r, c = divmod(i, cols)
    below, above, left, right = (r + 1) % rows, (r - 1) % rows, (c - 1) % cols, (c + 1) % cols
    return {below * cols + c, above * cols + c, r * cols + right, r * cols + left}


def _drawer(name: str, kind: str, parts: list[str], n: int) -> Callable[[np.random.Generator], Graph | None]:
    """How to draw a graph of this kind, its numbers checked."""
    try:
        k = int(parts[0]) if kind != "er" else 0
        p = float(parts[-1]) if kind != "regular" else 0.0
    except ValueError:
        k, p = -1, -1.0
    if len(parts) != (2 if kind == "smallworld" else 1) or k < 0 or not 0 <= p <= 1:
        usage = {"regular": "regular:K", "er": "er:P", "smallworld": "smallworld:K:P"}[kind]
        raise ConfigError(f"--topology {name}: write {usage}, K neighbours, P a chance")
    if kind == "regular" and (not 0 < k < n or n * k % 2):
        raise ConfigError(f"--topology {name}: {n} nodes cannot all have {k} neighbours; K < nodes, K x nodes even")
    if kind == "smallworld" and (k < 2 or k % 2 or k >= n):
        raise ConfigError(f"--topology {name}: K must be even, at least 2 and below the number of nodes, {n}")
    if kind == "regular":
        return lambda rng: _regular(n, k, rng)
    if kind == "er":
        return lambda rng: _erdos_renyi(n, p, rng)
    return lambda rng: _small_world(n, k, p, rng)


def _connected(name: str, draw: Callable[[np.random.Generator], Graph | None], seed: int) -> Graph:
    for attempt in range(TRIES):
        graph = draw(philox(seed, "topology", name, attempt))
        if graph is not None and components(graph) == 1:
            return graph
    raise ConfigError(f"--topology {name}: none of {TRIES} graphs drawn was connected; give more neighbours")


def components(graph: Graph) -> int:
    """How many parts there are that cannot reach each other."""
    left, parts = set(range(len(graph))), 0
    while left:
        frontier = {left.pop()}
        parts += 1
        while frontier:
            frontier = set().union(*(graph[i] for i in frontier)) & left
            left -= frontier
    return parts


def _regular(n: int, k: int, rng: np.random.Generator) -> Graph | None:
    """Stubs are paired at random; pairs that would be loops or double are drawn again (Steger and Wormald, 1999)."""
    graph: Graph = [set() for _ in range(n)]
    stubs = np.repeat(np.arange(n), k)
    while len(stubs):
        rng.shuffle(stubs)
        left = []
        for a, b in zip(stubs[::2].tolist(), stubs[1::2].tolist(), strict=True):
            if a == b or b in graph[a]:
                left += [a, b]
            else:
                graph[a].add(b)
                graph[b].add(a)
        if len(left) == len(stubs):
            return None  # no pair of these can be made any more, or only by luck: begin anew
        stubs = np.array(left, dtype=np.int64)
    return graph


def _erdos_renyi(n: int, p: float, rng: np.random.Generator) -> Graph:
    a, b = np.nonzero(np.triu(rng.random((n, n)) < p, 1))
    return _of_edges(n, zip(a.tolist(), b.tolist(), strict=True))


def _small_world(n: int, k: int, p: float, rng: np.random.Generator) -> Graph:
    """A ring with k neighbours each, every edge of which is moved with chance p (Watts and Strogatz, 1998)."""
    graph = _of_edges(n, ((i, (i + h) % n) for h in range(1, k // 2 + 1) for i in range(n)))
    for h in range(1, k // 2 + 1):
        for i in range(n):
            j, free = (i + h) % n, [v for v in range(n) if v != i and v not in graph[i]]
            if rng.random() < p and free and j in graph[i]:
                new = free[int(rng.integers(len(free)))]
                graph[i].remove(j)
                graph[j].remove(i)
                graph[i].add(new)
                graph[new].add(i)
    return graph


def _of_edges(n: int, edges: object) -> Graph:
    graph: Graph = [set() for _ in range(n)]
    for a, b in edges:  # type: ignore[attr-defined]
        if a != b:
            graph[a].add(b)
            graph[b].add(a)
    return graph


def read_edges(path: Path, n: int) -> Graph:
    """A graph from a file with an edge in each line, two nodes apart by a comma or space; ``#`` begins a comment.
    Nodes are 0 .. n - 1, in the order of the clients that may train. Raises DataError with the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable: {error}") from None
    edges = []
    for number, line in enumerate(lines, 1):
        parts = line.partition("#")[0].replace(",", " ").split()
        if not parts:
            continue
        if len(parts) != 2 or not all(part.isdigit() and int(part) < n for part in parts):
            raise DataError(f"{path} line {number}: '{line.strip()}' is not two nodes of 0 to {n - 1}")
        a, b = map(int, parts)
        if a == b:
            raise DataError(f"{path} line {number}: node {a} is no neighbour of itself")
        edges.append((a, b))
    if not edges:
        raise DataError(f"{path}: no edges in it")
    return _of_edges(n, edges)


def mixing(name: str, n: int, rule: str = "metropolis", seed: int = 0) -> Weights:
    """Mixing weights by node and neighbour, itself included; symmetric, rows and columns sum to 1.

    On a complete graph exactly 1/n. Otherwise, with W_ii the rest, on edges by ``rule``:
    "metropolis": W_ij = 1 / (1 + max(deg_i, deg_j)). "uniform": W_ij = 1 / (1 + the largest degree).
    """
    around = neighbours(name, n, seed)
    if all(len(near) == n - 1 for near in around):
        return {i: dict.fromkeys(range(n), 1.0 / n) for i in range(n)}
    largest = max(len(near) for near in around)
    weights: dict[int, dict[int, float]] = {}
    for i in range(n):
        degrees = {j: largest if rule == "uniform" else max(len(around[i]), len(around[j])) for j in around[i]}
        row = {j: 1.0 / (1 + degree) for j, degree in degrees.items()}
        row[i] = 1.0 - math.fsum(row.values())
        weights[i] = dict(sorted(row.items()))
    return weights


def spectral_gap(weights: Weights) -> float:
    """1 - rho, rho the second largest absolute eigenvalue: how much of a disagreement one mixing removes. 1 on a
    complete graph, 0 on one that is not connected."""
    n = len(weights)
    if n == 1:
        return 1.0
    matrix = np.zeros((n, n))
    for i, row in weights.items():
        for j, w in row.items():
            matrix[i, j] = w
    found = np.sort(np.abs(np.linalg.eigvalsh(matrix)))
    return float(min(1.0, max(0.0, 1.0 - found[-2])))


def summary(name: str, n: int, rule: str = "metropolis", seed: int = 0) -> dict[str, object]:
    """A topology in numbers: ``topology``, ``nodes``, ``edges``, ``least_degree``, ``most_degree``, ``parts`` and
    ``spectral_gap``."""
    around = neighbours(name, n, seed)
    degrees = [len(near) for near in around]
    return {
        "topology": name, "nodes": n, "edges": sum(degrees) // 2, "least_degree": min(degrees),
        "most_degree": max(degrees), "parts": components(around),
        "spectral_gap": spectral_gap(mixing(name, n, rule, seed)),
    }  # fmt: skip
