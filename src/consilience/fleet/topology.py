"""Who exchanges with whom where there is no server, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from consilience.core.errors import ConfigError, DataError, nearest
from consilience.core.streams import philox

NAMES = ("complete", "ring", "star", "torus", "exponential")
APART = "none"
"""The graph without edges."""
DRAWN = ("regular:K", "er:P", "smallworld:K:P")
TRIES = 100
"""Graphs drawn until one is connected."""
TOLERANCE = 1e-6
"""How far sums of weights in a file may be from 1, since they are printed."""
Weights = Mapping[int, Mapping[int, float]]
Graph = list[set[int]]
"""The neighbours of each node, without the node itself."""


def neighbours(name: str, n: int, seed: int = 0) -> Graph:
    """The neighbours of each of ``n`` nodes: a graph by name, one drawn with ``seed`` until it is connected, or a file
    of edges or weights. Raises ConfigError or DataError."""
    kind, _, rest = name.partition(":")
    if name == APART:
        return [set() for _ in range(n)]
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
    if is_file(name):
        graph, weights = read(Path(name), n)
        return graph if weights is None else [set(row) - {i} for i, row in weights.items()]
    raise ConfigError(f"unknown topology '{name}'{nearest(name, (*NAMES, *DRAWN, APART))} (or a file)")


def is_file(name: str) -> bool:
    """Whether a topology's name is that of a file."""
    return bool(Path(name).suffix) or Path(name).exists()


def drawn_anew(name: str, n: int, seed: int, round: int) -> Graph:
    """The graph of one round of a kind that is drawn; it need not be connected. Raises ConfigError."""
    kind, _, rest = name.partition(":")
    if kind not in ("regular", "er", "smallworld"):
        raise ConfigError(f"--topology anew:{name}: a graph that is drawn: {', '.join(DRAWN)}")
    draw = _drawer(name, kind, rest.split(":"), n)
    graphs = (draw(philox(seed, "topology", name, "round", round, attempt)) for attempt in range(TRIES))
    found = next((graph for graph in graphs if graph is not None), None)
    if found is None:
        raise ConfigError(f"--topology anew:{name}: no such graph in {TRIES} draws; give fewer neighbours")
    return found


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


def read(path: Path, n: int) -> tuple[Graph, Weights | None]:
    """A graph, and weights where there are any, from a text file; nodes are 0 .. n - 1, in the order of the clients
    that may train. Numbers are apart by spaces or commas; ``#`` begins a comment. Either an edge in each line (two
    nodes), or an edge and its weight, the same in both directions, the rest staying at home; or n lines of n weights,
    row i those with which node i averages. Weights must not be negative, and rows and columns sum to 1. Raises
    DataError with the line."""
    lines = _lines(path)
    if len(lines) == n and all(len(parts) == n for _, parts in lines) and not all(_is_edge(p, n) for _, p in lines):
        weights = _matrix(path, lines)
    else:
        edges, given = _edges(path, lines, n)
        if given is None:
            return _of_edges(n, edges), None
        weights = _weighted(path, edges, given, n)
    return [set(row) - {i} for i, row in weights.items()], weights


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that say something, with their numbers."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable: {error}") from None
    split = [(number, line.partition("#")[0].replace(",", " ").split()) for number, line in enumerate(lines, 1)]
    found = [(number, parts) for number, parts in split if parts]
    if not found:
        raise DataError(f"{path}: no edges in it")
    return found


def _is_edge(parts: list[str], n: int) -> bool:
    return len(parts) in (2, 3) and all(part.isdigit() and int(part) < n for part in parts[:2])


def _edges(
    path: Path, lines: list[tuple[int, list[str]]], n: int
) -> tuple[list[tuple[int, int]], dict[tuple[int, int], float] | None]:
    """Edges, and their weights by nodes in order, if lines have them."""
    edges: list[tuple[int, int]] = []
    weights: dict[tuple[int, int], float] = {}
    columns = len(lines[0][1])
    for number, parts in lines:
        where = f"{path} line {number}"
        if not _is_edge(parts, n):
            raise DataError(f"{where}: '{' '.join(parts)}' is not two nodes of 0 to {n - 1} (and a weight)")
        if len(parts) != columns:
            raise DataError(f"{where}: '{' '.join(parts)}': give all edges a weight, or none")
        a, b = sorted(map(int, parts[:2]))
        if a == b:
            raise DataError(f"{where}: node {a} is no neighbour of itself")
        edges.append((a, b))
        if columns == 3:
            weight = _weight(where, parts[2])
            if weights.setdefault((a, b), weight) != weight:
                raise DataError(f"{where}: {a} and {b} have another weight above; weights are the same both ways")
    return edges, weights if columns == 3 else None


def _weight(where: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise DataError(f"{where}: '{text}' is not a weight: a number of at least 0")
    return weight


def _weighted(path: Path, edges: list[tuple[int, int]], given: Mapping[tuple[int, int], float], n: int) -> Weights:
    rows: list[dict[int, float]] = [{} for _ in range(n)]
    for a, b in edges:
        rows[a][b] = rows[b][a] = given[a, b]
    for i, row in enumerate(rows):
        if math.fsum(row.values()) > 1 + TOLERANCE:
            raise DataError(f"{path}: the weights at node {i} sum to {math.fsum(row.values()):.6g}; at most 1")
    return {i: _completed(row, i) for i, row in enumerate(rows)}


def _matrix(path: Path, lines: list[tuple[int, list[str]]]) -> Weights:
    found = [[_weight(f"{path} line {number}", part) for part in parts] for number, parts in lines]
    for (number, _), row in zip(lines, found, strict=True):
        if abs(math.fsum(row) - 1) > TOLERANCE:
            raise DataError(f"{path} line {number}: the weights sum to {math.fsum(row):.6g}, not 1")
    for j, column in enumerate(zip(*found, strict=True)):
        if abs(math.fsum(column) - 1) > TOLERANCE:
            raise DataError(f"{path}: column {j + 1} sums to {math.fsum(column):.6g}, not 1; models' mean would move")
    return {i: _completed({j: w for j, w in enumerate(row) if j != i}, i) for i, row in enumerate(found)}


def _completed(row: Mapping[int, float], i: int) -> dict[int, float]:
    """A row in node order, without zeros, whose rest stays at home."""
    kept = {j: w for j, w in row.items() if w > 0}
    return dict(sorted({**kept, i: max(0.0, 1.0 - math.fsum(kept.values()))}.items()))


def mixing(name: str, n: int, rule: str = "metropolis", seed: int = 0) -> Weights:
    """Mixing weights by node and neighbour, itself included; rows and columns sum to 1. Symmetric, unless a file says
    otherwise. A file with weights is taken as it is.

    On a complete graph exactly 1/n. Otherwise, with W_ii the rest, on edges by ``rule``:
    "metropolis": W_ij = 1 / (1 + max(deg_i, deg_j)). "uniform": W_ij = 1 / (1 + the largest degree).
    """
    if name != APART and name.partition(":")[0] not in (*NAMES, "regular", "er", "smallworld") and is_file(name):
        given = read(Path(name), n)[1]
        if given is not None:
            return given
    return weigh(neighbours(name, n, seed), rule)


def weigh(around: Graph, rule: str = "metropolis") -> Weights:
    """The mixing weights of a graph, as :func:`mixing` says."""
    n = len(around)
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


def spectral_gap(*weights: Weights) -> float:
    """1 - rho: how much of a disagreement one mixing removes; of several weights, used one after another, the share
    that all of them leave is rho to the power of their number. rho is the largest factor by which a difference from the
    mean can be left; for symmetric weights, the second largest absolute eigenvalue. 1 on a complete graph, 0 on one
    that is not connected."""
    n = len(weights[0])
    left = np.eye(n) - 1.0 / n
    for each in weights:
        matrix = np.zeros((n, n))
        for i, row in each.items():
            for j, w in row.items():
                matrix[i, j] = w
        left = matrix @ left
        left -= left.mean(0)
    rho = float(np.linalg.norm(left, 2))
    return 0.0 if rho >= 1 else 1.0 - (rho if rho > 1e-12 else 0.0) ** (1 / len(weights))
