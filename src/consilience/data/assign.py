"""Who gets which rows: the partitioners' arithmetic.

Every function is vectorised over rows or bounded by a count known beforehand: none samples until it is lucky.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import DataError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def dirichlet(rng: np.random.Generator, alpha: float, shape: tuple[int, int]) -> Floats:
    """``shape[0]`` draws from the symmetric Dirichlet over ``shape[1]`` outcomes, finite for any alpha > 0.

    In logarithms, since gamma variates underflow for a small alpha: if G ~ Gamma(alpha + 1) and U is uniform
    then G U^(1/alpha) ~ Gamma(alpha).
    """
    log = np.log(rng.standard_gamma(alpha + 1.0, shape)) + np.log1p(-rng.random(shape)) / alpha
    draws = np.exp(log - log.max(axis=1, keepdims=True))
    return np.asarray(draws / draws.sum(axis=1, keepdims=True), dtype=np.float64)


def apportion(total: int, weights: Floats) -> Ints:
    """``total`` cut in whole numbers proportional to ``weights`` (largest remainders, ties to the lower index)."""
    share = weights / weights.sum() * total
    counts: Ints = np.floor(share).astype(np.int64)
    short = total - int(counts.sum())
    counts[np.argsort(counts - share, kind="stable")[:short]] += 1
    return counts


def raise_to(counts: Ints, minimum: int) -> tuple[Ints, list[tuple[int, int]]]:
    """Counts of at least ``minimum``, by moving one at a time from the largest (ties to the lower index).

    Returns the new counts and the moves ``(from, to)`` in order. Needs ``sum >= len * minimum``.
    """
    if int(counts.sum()) < minimum * len(counts):
        raise DataError(
            f"{int(counts.sum())} training rows cannot give each of {len(counts)} clients {minimum}; "
            "use fewer clients or a smaller min_size"
        )
    counts = counts.copy()
    moves: list[tuple[int, int]] = []
    heap = [(-int(count), client) for client, count in enumerate(counts) if count > minimum]
    heapq.heapify(heap)
    for client in np.flatnonzero(counts < minimum).tolist():
        while counts[client] < minimum:
            size, donor = heapq.heappop(heap)
            counts[donor] -= 1
            counts[client] += 1
            moves.append((donor, client))
            if -size - 1 > minimum:
                heapq.heappush(heap, (size + 1, donor))
    return counts, moves


def donate(owner: Ints, clients: int, minimum: int, rng: np.random.Generator) -> Ints:
    """``owner`` of each row, changed so that every client owns at least ``minimum`` rows."""
    _, moves = raise_to(np.bincount(owner, minlength=clients), minimum)
    if not moves:
        return owner
    owner = owner.copy()
    order = np.lexsort((rng.random(len(owner)), owner))  # a client's rows together, in random order
    ends = np.cumsum(np.bincount(owner, minlength=clients))
    for donor, client in moves:
        ends[donor] -= 1
        owner[order[ends[donor]]] = client
    return owner


def by_sizes(rows: int, sizes: Ints, rng: np.random.Generator) -> Ints:
    """Owners at random with the given ``sizes`` (which sum to ``rows``): the same distribution for everybody."""
    owner = np.empty(rows, dtype=np.int64)
    owner[rng.permutation(rows)] = np.repeat(np.arange(len(sizes)), sizes)
    return owner


def label_dirichlet(y: Ints, clients: int, alpha: float, rng: np.random.Generator) -> Ints:
    """Each class is dealt to the clients in proportions drawn from Dir(alpha) (Yurochkin et al. 2019)."""
    owner = np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        edges = np.cumsum(dirichlet(rng, alpha, (1, clients))[0]) * len(rows)
        owner[rows] = np.minimum(np.searchsorted(edges, np.arange(len(rows)) + 0.5), clients - 1)
    return owner


def sized_dirichlet(y: Ints, sizes: Ints, alpha: float, rng: np.random.Generator) -> Ints:
    """Given client sizes; each client's class proportions are drawn from Dir(alpha) (Hsu et al. 2019).

    The wishes of all clients together rarely add up to the rows that exist. They are scaled in turn to the
    clients' sizes and to the class counts (iterative proportional fitting, the closest table in relative
    entropy), and what is left after a fixed number of turns goes to the clients that still have room.
    """
    labels, codes, supply = np.unique(y, return_inverse=True, return_counts=True)
    table = dirichlet(rng, alpha, (len(sizes), len(labels))) + 1e-9
    for _ in range(100):
        table *= (sizes / table.sum(axis=1))[:, None]
        table *= supply / table.sum(axis=0)
        if np.abs(table.sum(axis=1) - sizes).max() < 1e-3:
            break
    table *= np.minimum(1.0, sizes / table.sum(axis=1))[:, None]
    counts = np.floor(table).astype(np.int64)
    room, left = (sizes - counts.sum(axis=1)).tolist(), (supply - counts.sum(axis=0)).tolist()
    cells = np.argsort(-(table - counts), axis=None, kind="stable")
    missing = sum(room)
    for cell, most in ((cells, 1), (np.arange(table.size), len(y))):  # the largest fractions first, then any room
        for client, label in zip((cell // len(labels)).tolist(), (cell % len(labels)).tolist(), strict=True):
            take = min(room[client], left[label], most)
            if take:
                counts[client, label] += take
                room[client] -= take
                left[label] -= take
                missing -= take
                if not missing:
                    break
    owner = np.empty(len(y), dtype=np.int64)
    for label in range(len(labels)):
        rows = rng.permutation(np.flatnonzero(codes == label))
        owner[rows] = np.repeat(np.arange(len(sizes)), counts[:, label])
    return owner


def shards(y: Ints, clients: int, per_client: int, weights: Floats, rng: np.random.Generator) -> Ints:
    """``per_client`` classes for each client (McMahan et al. 2017, with shards that never straddle two classes).

    Classes are cut into ``clients * per_client`` shards, near equal in size; a class's shards go to different
    clients, in proportion to the clients' ``weights``.
    """
    labels, codes, supply = np.unique(y, return_inverse=True, return_counts=True)
    total = clients * per_client
    if per_client > len(labels):
        raise DataError(f"shards:{per_client} asks for more classes than the {len(labels)} there are")
    if total < len(labels):
        raise DataError(
            f"shards:{per_client} with {clients} clients holds at most {total} of {len(labels)} classes; "
            f"use shards:{-(-len(labels) // clients)} or more clients"
        )
    cap = np.minimum(supply, clients)
    if int(cap.sum()) < total:
        raise DataError(
            f"shards:{per_client} needs {total} shards, but classes this small give {int(cap.sum())}; use fewer clients"
        )
    pieces = np.ones(len(labels), dtype=np.int64)  # Webster's method, one shard at a time, at most `cap` a class
    heap = [(-supply[c] / 3.0, c) for c in range(len(labels)) if cap[c] > 1]
    heapq.heapify(heap)
    for _ in range(total - len(labels)):
        _, c = heapq.heappop(heap)
        pieces[c] += 1
        if pieces[c] < cap[c]:
            heapq.heappush(heap, (-supply[c] / (2.0 * pieces[c] + 1.0), c))
    holders: list[list[int]] = [[] for _ in labels]
    for client in rng.permutation(clients).tolist():
        # the classes with most shards left can always be served (Gale and Ryser); ties are broken at random
        for c in np.lexsort((rng.random(len(labels)), -pieces))[:per_client].tolist():
            pieces[c] -= 1
            holders[c].append(client)
    owner = np.empty(len(y), dtype=np.int64)
    for c, who in enumerate(holders):
        rows = rng.permutation(np.flatnonzero(codes == c))
        sizes, _ = raise_to(apportion(len(rows), weights[who]), 1)
        owner[rows] = np.repeat(np.array(who), sizes)
    return owner


def spread(group: Ints, size: Ints, take: Ints, start: Ints) -> NDArray[np.bool_]:
    """Marks ``take[g]`` of the ``size[g]`` rows of each group g, evenly spaced from the offset ``start[g]``.

    group: the rows' groups, ascending. Spacing over rows sorted by label takes each label's share to within one.
    """
    first = np.cumsum(size) - size
    place = (np.arange(len(group)) - first[group] + start[group]) % np.maximum(size[group], 1)
    return np.asarray((place + 1) * take[group] // size[group] > place * take[group] // size[group])


def part_sizes(size: Ints, valid: float, test: float) -> tuple[Ints, Ints]:
    """Validation and test rows of clients with ``size`` rows: rounded, but at least one row stays for training."""
    n_valid = np.floor(size * valid + 0.5).astype(np.int64)
    n_test = np.floor(size * test + 0.5).astype(np.int64)
    excess = np.maximum(n_valid + n_test - np.maximum(size - 1, 0), 0)
    less = np.minimum(n_valid, excess)
    return n_valid - less, n_test - (excess - less)


def split_rows(
    owner: Ints, y: Ints, clients: int, valid: float, test: float, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Every client's own rows in train, validation and test, stratified by label as far as whole rows allow.

    Returns ``order`` (row indices, client by client, train | valid | test in random order) and ``bounds``
    ``(clients, 4)``, where each client's three parts start and its last one ends. Train is never empty.
    """
    by_label = np.lexsort((rng.random(len(owner)), y, owner))
    group = owner[by_label]
    size = np.bincount(owner, minlength=clients)
    n_valid, n_test = part_sizes(size, valid, test)
    start = rng.integers(np.maximum(size, 1))
    held = spread(group, size, n_valid + n_test, start)
    for_test = spread(group[held], n_valid + n_test, n_test, rng.integers(np.maximum(n_valid + n_test, 1)))
    part = np.zeros(len(owner), dtype=np.int64)
    part[held] = np.where(for_test, 2, 1)
    order = by_label[np.lexsort((rng.random(len(owner)), part, group))]
    ends = np.cumsum(size)
    bounds = np.stack([ends - size, ends - n_valid - n_test, ends - n_test, ends], axis=1)
    return order, bounds


def hold_out(strata: Ints, fraction: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Marks ``fraction`` of the rows at random, the same share of every stratum as far as whole rows allow."""
    order = np.lexsort((rng.random(len(strata)), strata))
    one = np.array([len(strata)])
    take = np.array([int(len(strata) * fraction + 0.5)])
    marked = np.zeros(len(strata), dtype=np.bool_)
    marked[order] = spread(np.zeros(len(strata), dtype=np.int64), one, take, rng.integers(one))
    return marked


def long_tail(y: Ints, ratio: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Marks the rows that stay when class c keeps at most max_count * ratio^(-c / (C - 1)) (Cao et al. 2019)."""
    counts = np.bincount(y)
    power = np.arange(len(counts)) / max(len(counts) - 1, 1)
    most = np.maximum(np.floor(counts.max() * ratio**-power), 1.0)
    order = np.lexsort((rng.random(len(y)), y))
    place = np.arange(len(y)) - (np.cumsum(counts) - counts)[y[order]]
    keep = np.zeros(len(y), dtype=np.bool_)
    keep[order] = place < most[y[order]]
    return keep
