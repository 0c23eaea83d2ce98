"""Fairness between groups of people, from counts: ``counts[z, y, p]`` rows of group z with label y predicted as p.

Counts are all that a client has to send for any of these, and they add up over clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]


def stacked(tables: Sequence[Any]) -> Counts:
    """Tables of several clients as ``counts[s, z, y, p]``; a client that lacks the last groups gets zeros for them."""
    arrays = [np.asarray(table, dtype=np.float64) for table in tables]
    if not arrays:
        raise ValueError("no table of counts")
    shape = np.max([a.shape for a in arrays], axis=0)
    out = np.zeros((len(arrays), *shape))
    for i, a in enumerate(arrays):
        out[i, : a.shape[0], : a.shape[1], : a.shape[2]] = a
    return out


def selection_rates(counts: Counts) -> Counts:
    """P(predicted p | group z), ``(z, p)``; nan for a group without rows."""
    rows = counts.sum(axis=1)
    return _shares(rows)


def conditional_rates(counts: Counts) -> Counts:
    """P(predicted p | group z, label y), ``(z, y, p)``; nan where there are no rows."""
    return _shares(counts)


def _shares(counts: Counts) -> Counts:
    total = counts.sum(axis=-1, keepdims=True)
    return np.asarray(np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0))


def demographic_parity(counts: Counts) -> float:
    """The largest difference between two groups of P(predicted p | group), over p; for two classes that of the
    positive rate. Dwork et al., ITCS 2012. nan where fewer than two groups have rows."""
    return _gap(selection_rates(counts))


def equal_opportunity(counts: Counts) -> float:
    """The largest difference between two groups of the true positive rate P(predicted y | group, label y): of class
    1 where there are two classes, of the worst class where there are more. Hardt et al., NeurIPS 2016."""
    rates = conditional_rates(counts)
    classes = range(1, 2) if counts.shape[1] == 2 else range(counts.shape[1])
    return _gap(np.stack([rates[:, y, y] for y in classes], axis=1))


def equalised_odds(counts: Counts) -> float:
    """The largest difference between two groups of P(predicted p | group, label y), over y and p; for two classes
    the larger of the differences in true and in false positive rate. Hardt et al., NeurIPS 2016."""
    return _gap(conditional_rates(counts).reshape(len(counts), -1))


def _gap(rates: Counts) -> float:
    """The largest range over groups of any column, among columns that two groups have; nan if there is none."""
    known = (~np.isnan(rates)).sum(axis=0) >= 2
    if not known.any():
        return math.nan
    return float((np.nanmax(rates[:, known], axis=0) - np.nanmin(rates[:, known], axis=0)).max())


def gaps(counts: Counts) -> dict[str, float]:
    """The three differences by name, each between 0 and 1."""
    return {
        "demographic_parity": demographic_parity(counts),
        "equal_opportunity": equal_opportunity(counts),
        "equalised_odds": equalised_odds(counts),
    }


def mutual_information(joint: Any) -> float:
    """I(A;B) in bits of counts or probabilities ``(a, b)``."""
    p = np.asarray(joint, dtype=np.float64)
    total = p.sum()
    if total <= 0:
        return 0.0
    p = p / total
    outer = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    held = p > 0
    return max(0.0, float((p[held] * np.log2(p[held] / outer[held])).sum()))


def global_disparity(counts: Counts) -> float:
    """I(Z;prediction) in bits of ``counts[s, z, y, p]``: what a prediction tells about the group, over everybody."""
    return mutual_information(counts.sum(axis=(0, 2)))


def local_disparity(counts: Counts) -> float:
    """I(Z;prediction | S) in bits of ``counts[s, z, y, p]``: the same within clients, weighted by their rows."""
    rows = counts.sum(axis=2)
    total = rows.sum()
    if total <= 0:
        return 0.0
    held = rows > 0
    whole, groups, said = (np.broadcast_to(rows.sum(axis=a, keepdims=True), rows.shape) for a in ((1, 2), 2, 1))
    ratio = rows[held] * whole[held] / (groups[held] * said[held])
    return max(0.0, float((rows[held] * np.log2(ratio)).sum() / total))


def chance(counts: Counts) -> tuple[float, float]:
    """About what global and local disparity would read if predictions told nothing, in bits: with few rows,
    frequencies differ between groups by chance. The bias of the plug-in estimate, (|Z|-1)(|P|-1) / (2 n ln 2), over
    all rows and summed over clients (Miller, 1955)."""
    rows = counts.sum(axis=2)
    n = rows.sum()

    def freedom(table: Counts) -> float:
        return float(max(0, (table.sum(1) > 0).sum() - 1) * max(0, (table.sum(0) > 0).sum() - 1))

    if not n:
        return math.nan, math.nan
    unit = 1 / (2 * n * math.log(2))
    return freedom(rows.sum(0)) * unit, sum(freedom(r) for r in rows) * unit


def summary(tables: Sequence[Any]) -> dict[str, Any]:
    """What a line of history says of one attribute, from the clients' tables ``[z, y, p]``.

    The three differences over all clients' rows together; ``clients``: the mean and the largest over clients of
    each; and global and local disparity in bits.
    """
    counts = stacked(tables)
    own = [gaps(c) for c in counts]
    clients = {}
    for name in own[0]:
        known = [g[name] for g in own if not math.isnan(g[name])]
        clients[name] = {"mean": float(np.mean(known)), "worst": max(known)} if known else None
    return {
        **gaps(counts.sum(axis=0)),
        "global_bits": global_disparity(counts),
        "local_bits": local_disparity(counts),
        "clients": clients,
    }


def entropy(values: NDArray[np.float64]) -> float:
    """How even values that are not negative are: the entropy of their shares over that of equal shares, 0 to 1
    (Wang et al., 2021). 1 for a single value, and where all are 0."""
    total = float(values.sum())
    if len(values) < 2 or total <= 0:
        return 1.0
    shares = values[values > 0] / total
    return float(-(shares * np.log2(shares)).sum() / math.log2(len(values)))


def accuracy(counts: Counts) -> float:
    """Share of rows predicted right, of ``counts[..., y, p]``; nan without rows."""
    total = counts.sum()
    return float(np.trace(counts, axis1=-2, axis2=-1).sum() / total) if total else math.nan


def per_group(counts: Counts, words: Sequence[str]) -> list[Mapping[str, Any]]:
    """For each group of ``counts[z, y, p]``: its name, rows, accuracy, rate of each prediction, and rate at which
    each class is recognised."""
    rates, recognised = selection_rates(counts), conditional_rates(counts)
    return [
        {
            "group": words[z] if z < len(words) else str(z),
            "rows": int(counts[z].sum()),
            "accuracy": accuracy(counts[z]),
            "predicted": rates[z].tolist(),
            "recognised": [float(recognised[z, y, y]) for y in range(counts.shape[1])],
        }
        for z in range(len(counts))
    ]
