"""How much inputs and labels together tell about the client: conditional information from held-out log-ratios.

Write C for the client, Y for the label, X for the input. If q(c | x, y), q(c | x), q(c | y) and q(c) are
probabilities that were fitted without the row they judge, then the means over rows of

    log2 q(c | x, y) / q(c)        estimate  I(C; X, Y)     total
    log2 q(c | x, y) / q(c | y)              I(C; X | Y)    feature skew
    log2 q(c | x)    / q(c)                  I(C; X)        input skew
    log2 q(c | x, y) / q(c | x)              I(C; Y | X)    concept shift

(the classifier form of conditional information; Mukherjee, Asnani and Kannan, CCMI, UAI 2019). Each q is a mixture of
several predictors, weighted so that the held-out likelihood is largest (stacking: Wolpert 1992; van der Laan, Polley
and Hubbard 2007): shares of clients among the nearest rows, a small neural network, and what needs no input, so
that a federation without heterogeneity reads 0 rather than less. q(c | x) is not fitted apart from q(c | x, y) but
is its mean over the labels that x may have; otherwise the difference of two unlike classifiers would be mistaken for
concept shift.

**Limits.** (1) A classifier finds part of what there is: I(C; X), I(C; X, Y) and, given a good q(c | y), I(C; X | Y)
are underestimated, the more so the fewer rows a client has; the same estimate from half of the rows shows how much.
(2) I(C; Y | X) is a difference of two classifiers and can err to both sides. It is at most H(Y | X): where inputs do
not settle the label, or the classifier cannot tell, label skew looks like concept shift. (3) No estimate from n rows
can vouch for much more than log2(n) bits (McAllester and Stratos 2020), which here is far above the maximum, H(C).
(4) Intervals are those of the rows that were held out; they know nothing of (1) and (2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from consilience.core.streams import philox
from consilience.measure.information import Bits, Floats, Ints, bounded
from consilience.measure.represent import Floats32, embed, neighbours, neighbours_within, shares

NEAREST = (4, 16, 64)
"""Numbers of neighbours whose clients are counted."""
FOLDS = 3
LABELS = 10
"""So many of the likeliest labels of an input are averaged over."""
PRODUCTS = 160
"""At most so many products of label probabilities and labels are given to the network."""
RESAMPLES = 400
TERMS = ("total", "feature_skew", "input_skew", "concept_shift")
STRENGTHS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1e3, 1e4, 1e6, 1e9)
"""Pseudo-counts with which a table of clients by label may be smoothed towards the clients' sizes."""


@dataclass(frozen=True)
class View:
    """Rows as the predictors see them; nothing in it knows the clients, so that it serves every null too.

    z: inputs of the network ``(n, d)``. y: labels ``(n,)``. fold: ``(n,)``. near, near_same: nearest rows, of any and
    of the same label. posterior: held-out label probabilities ``(n, labels)``.
    """

    z: Floats32
    y: Ints
    fold: Ints
    near: Ints
    near_same: Ints
    posterior: Floats32

    @property
    def labels(self) -> int:
        """Number of labels."""
        return int(self.posterior.shape[1])

    def overlap(self) -> float:
        """H(Y | X) in bits, of the held-out label probabilities: what the classifier cannot tell about labels."""
        p = self.posterior[np.arange(len(self.y)), self.y].astype(np.float64)
        return float(-np.log2(np.maximum(p, 1e-12)).mean())


class Ratios(NamedTuple):
    """Held-out log-ratios of each row in bits ``(n, 4)``, in the order of ``TERMS``; client probabilities.

    by_input: q(c | x) ``(n, clients)``. by_both: q(c | x, y) ``(n, clients)``.
    """

    bits: Floats
    by_input: Floats32
    by_both: Floats32


def look(x: Any, y: Ints, seed: int) -> View:
    """Represent rows ``x`` ``(n, d)`` with labels ``y`` ``(n,)``, codes from 0."""
    n, labels = len(y), int(y.max()) + 1
    z, metric = embed(x)
    rng = philox(seed, "profile", "folds")
    order = np.lexsort((rng.random(n), y))
    fold = np.empty(n, dtype=np.int64)
    fold[order] = np.arange(n) % FOLDS
    near = neighbours(metric, max(NEAREST))
    near_same = neighbours_within(metric, y, max(NEAREST))
    prior = np.broadcast_to((np.bincount(y, minlength=labels) / n).astype(np.float32), (n, labels))
    members = [prior, *(shares(near[:, :k], y, labels) for k in NEAREST)]
    if labels > 1:
        network = np.zeros((n, labels), dtype=np.float32)
        for f in range(FOLDS):
            held = np.flatnonzero(fold == f)
            rest = np.flatnonzero(fold != f)
            if len(held) and len(rest) > 1:
                network[held] = train(z[rest], y[rest], labels, (seed, "label", f)).predict_proba(z[held])
        members.append(network)
    weights = stack([member[np.arange(n), y] for member in members])
    return View(z, y, fold, near, near_same, _mixed(members, weights))


def train(z: Floats32, target: Ints, outputs: int, key: tuple[Any, ...]) -> Any:
    """scikit-learn's network of one hidden layer for ``target`` codes, as good as it was on a held-out eighth."""
    from sklearn.neural_network import MLPClassifier  # type: ignore[import-untyped]

    rng = philox(*key, "network")
    order = rng.permutation(len(z))
    valid, rest = order[: max(len(z) // 8, 1)], order[max(len(z) // 8, 1) :]
    net = MLPClassifier(
        (64,),
        alpha=1e-3,
        learning_rate_init=3e-3,
        batch_size=min(128, len(rest)),
        random_state=int(rng.integers(2**31)),
    )
    best, kept, waited = np.inf, None, 0
    for _ in range(40):
        net.partial_fit(z[rest], target[rest], classes=np.arange(outputs))
        p = net.predict_proba(z[valid])[np.arange(len(valid)), target[valid]]
        loss = float(-np.log(np.maximum(p, 1e-12)).mean())
        if loss < best - 1e-4:
            best, waited = loss, 0
            kept = [a.copy() for a in net.coefs_], [a.copy() for a in net.intercepts_]
        else:
            waited += 1
            if waited == 4:
                break
    if kept is not None:
        net.coefs_, net.intercepts_ = kept
    return net


def stack(likelihoods: list[Any]) -> Floats:
    """Weights of a mixture of predictors that maximise its likelihood (expectation-maximisation).

    likelihoods: for each predictor, the probabilities ``(n,)`` that it gave to what happened.
    """
    p = np.stack([np.asarray(values, dtype=np.float64) for values in likelihoods], axis=1)
    weights = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(100):
        part = p * weights
        weights = (part / np.maximum(part.sum(axis=1, keepdims=True), 1e-300)).mean(axis=0)
        weights = weights / weights.sum()
    return weights


def _mixed(members: list[Any], weights: Floats) -> Floats32:
    found = np.zeros(members[0].shape, dtype=np.float32)
    for member, weight in zip(members, weights, strict=True):
        found += np.float32(weight) * member
    return found


def by_label(y: Ints, c: Ints, table: Floats) -> tuple[Floats32, Floats32]:
    """q(c | y) smoothed towards the clients' sizes, as strongly as leaving rows out says.

    table: counts ``(labels, clients)`` of the rows, or of more rows than these. Returns q(c | y) for every label
    ``(labels, clients)``, and for every row without that row itself ``(n, clients)``.
    """
    rows, prior = table.sum(axis=1), table.sum(axis=0) / table.sum()

    def fit(strength: float) -> float:
        return float(np.log((table[y, c] - 1 + strength * prior[c]) / (rows[y] - 1 + strength)).sum())

    strength = max(STRENGTHS, key=fit)
    whole = (table + strength * prior) / (rows + strength)[:, None]
    own = table[y]
    own[np.arange(len(y)), c] -= 1
    own = (own + strength * prior) / (rows[y] - 1 + strength)[:, None]
    return whole.astype(np.float32), own.astype(np.float32)


def _design(view: View, rows: Ints, y: Ints) -> Floats32:
    """The network's inputs: x, label probabilities of x, the label, and products of the last two.

    The factors put the parts on scales at which they are learned in a few epochs.
    """
    posterior = view.posterior[rows]
    label = np.zeros((len(rows), view.labels), dtype=np.float32)
    label[np.arange(len(rows)), y] = 1
    few = max(1, min(view.labels, PRODUCTS // view.labels))
    top = np.argsort(-np.bincount(view.y, minlength=view.labels), kind="stable")[:few]
    products = (posterior[:, top, None] * label[:, None, :]).reshape(len(rows), -1)
    return np.concatenate([view.z[rows], 2 * posterior, 2 * label, 3 * products], axis=1)


def _networks(view: View, c: Ints, clients: int, seed: int) -> tuple[Floats32, Floats32]:
    """Held-out q(c | x, y) of the network, and its mean over the likeliest labels of x."""
    n = len(c)
    both, alone = np.zeros((n, clients), np.float32), np.zeros((n, clients), np.float32)
    design = _design(view, np.arange(n), view.y)
    likely = np.argsort(-view.posterior, axis=1, kind="stable")[:, :LABELS]
    weight = np.take_along_axis(view.posterior, likely, axis=1)
    weight = weight / weight.sum(axis=1, keepdims=True)
    for f in range(FOLDS):
        held, rest = np.flatnonzero(view.fold == f), np.flatnonzero(view.fold != f)
        if not len(held) or len(rest) < 2:
            continue
        net = train(design[rest], c[rest], clients, (seed, "client", f))
        both[held] = net.predict_proba(design[held])
        for j in range(likely.shape[1]):
            alone[held] += weight[held, j : j + 1] * net.predict_proba(_design(view, held, likely[held, j]))
    return both, alone


def ratios(view: View, c: Ints, clients: int, seed: int, table: Floats | None = None) -> Ratios:
    """Held-out log-ratios for clients ``c`` ``(n,)``, codes 0 .. clients - 1.

    table: counts ``(labels, clients)`` of all rows, where ``view`` holds a part of them.
    """
    n = len(c)
    at = np.arange(n)
    if table is None:
        table = np.zeros((view.labels, clients))
        np.add.at(table, (view.y, c), 1)
    prior = (table.sum(axis=0) / table.sum()).astype(np.float32)
    labels, labels_held = by_label(view.y, c, table)
    both, alone = _networks(view, c, clients, seed)
    of_label = view.posterior @ labels
    of_label += view.posterior[at, view.y][:, None] * (labels_held - labels[view.y])  # without the row itself
    size = np.broadcast_to(prior, (n, clients))
    members = [size, of_label, alone, *(shares(view.near[:, :k], c, clients) for k in NEAREST)]
    by_input = _mixed(members, stack([m[at, c] for m in members]))
    members = [by_input, labels_held, both, *(shares(view.near_same[:, :k], c, clients) for k in NEAREST)]
    by_both = _mixed(members, stack([m[at, c] for m in members]))
    size_log, label_log, input_log, both_log = (
        np.log2(np.maximum(q[at, c].astype(np.float64), 1e-12)) for q in (size, labels_held, by_input, by_both)
    )
    differences = [both_log - size_log, both_log - label_log, input_log - size_log, both_log - input_log]
    return Ratios(np.stack(differences, axis=1), by_input, by_both)


def within(y: Ints, c: Ints, rng: np.random.Generator) -> Ints:
    """``c`` permuted among the rows of each label: then I(C; X | Y) = 0, and I(C; Y) as it was."""
    order = np.argsort(y, kind="stable")
    shuffled = np.lexsort((rng.random(len(y)), y))
    found = np.empty_like(c)
    found[order] = c[shuffled]
    return found


def drawn(by_input: Floats32, rng: np.random.Generator) -> Ints:
    """Clients drawn from q(c | x): then I(C; Y | X) = 0, and I(C; X) much as it was."""
    edges = np.cumsum(by_input.astype(np.float64), axis=1)
    u = rng.random((len(by_input), 1)) * edges[:, -1:]
    return np.asarray(np.minimum((edges < u).sum(axis=1), by_input.shape[1] - 1), dtype=np.int64)


def _resampled(bits: Floats, rng: np.random.Generator) -> Floats:
    """Bootstrap means ``(RESAMPLES, terms)`` of rows of log-ratios; the predictors are not fitted again."""
    n = len(bits)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.asarray(counts @ bits / n)


class Terms(NamedTuple):
    """The four terms that involve inputs.

    bits: by name. half: the values that half of the rows give. real: log-ratios and probabilities. gaps: by how much
    total differs from the sum of its parts, as (gap, half of its 95 % interval), before anything is cut to its range.
    overlap: H(Y | X) of the classifier. explained: the concept shift that label skew alone gives where classes overlap
    (the reading when clients are permuted within labels).
    """

    bits: dict[str, Bits]
    half: dict[str, float]
    real: Ratios
    gaps: dict[str, tuple[float, float]]
    overlap: float
    explained: float


def information(x: Any, y: Ints, c: Ints, table: Floats, label: Bits, most: Mapping[str, float], seed: int) -> Terms:
    """Total, feature skew, input skew and concept shift of rows of clients, each less what chance gives.

    x: ``(n, d)``. y, c: ``(n,)`` codes from 0. table: counts ``(labels, clients)`` of all rows, of which these may be
    a part. label: I(C; Y), for the identities. most: each term's maximum.

    What chance gives is measured by the same estimator on clients permuted (total, input skew), permuted within
    labels (feature skew), and drawn from q(c | x) (concept shift). Intervals are 95 % percentile bootstraps of the
    log-ratios, of the data and of the null.
    """
    clients = table.shape[1]
    view = look(x, y, seed)
    real = ratios(view, c, clients, seed, table)
    rng = philox(seed, "profile", "null")
    free = ratios(view, rng.permutation(c), clients, seed).bits
    inside = ratios(view, within(y, c, rng), clients, seed).bits
    alike = ratios(view, drawn(real.by_input, rng), clients, seed).bits
    null = np.stack([free[:, 0], inside[:, 1], free[:, 2], alike[:, 3]], axis=1)
    value = real.bits.mean(axis=0) - null.mean(axis=0)
    draws = _resampled(real.bits, rng) - _resampled(null, rng)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    half = _from_half(x, y, c, null.mean(axis=0), seed)
    return Terms(
        {name: bounded(value[i], low[i], high[i], most[name]) for i, name in enumerate(TERMS)},
        {name: min(half[i], most[name]) for i, name in enumerate(TERMS)},
        real,
        _gaps(value, draws, label),
        view.overlap(),
        float(min(max(inside[:, 3].mean() - null[:, 3].mean(), 0.0), most["concept_shift"])),
    )


def _gaps(value: Floats, draws: Floats, label: Bits) -> dict[str, tuple[float, float]]:
    """Both ways to add up to the total: by how much they miss it, and half of that number's 95 % interval."""
    sums = {
        "label_skew + feature_skew": (value[1] + label.value, draws[:, 1], (label.high - label.low) / 2),
        "input_skew + concept_shift": (value[2] + value[3], draws[:, 2] + draws[:, 3], 0.0),
    }
    found = {}
    for name, (parts, moved, more) in sums.items():
        below, above = np.quantile(moved - draws[:, 0], (0.025, 0.975))
        found[name] = (float(parts - value[0]), float(np.hypot((above - below) / 2, more)))
    return found


def _from_half(x: Any, y: Ints, c: Ints, null: Floats, seed: int) -> list[float]:
    """The four terms from a random half of the rows, less the same null."""
    rows = np.sort(philox(seed, "profile", "half").permutation(len(y))[: max(len(y) // 2, 2)])
    _, y_half = np.unique(y[rows], return_inverse=True)
    present, c_half = np.unique(c[rows], return_inverse=True)
    if len(present) < 2:
        return [0.0] * len(TERMS)
    bits = ratios(look(x[rows], y_half, seed), c_half, len(present), seed).bits
    return [max(float(v), 0.0) for v in bits.mean(axis=0) - null]
