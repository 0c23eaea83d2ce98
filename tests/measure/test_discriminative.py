"""Terms with inputs, against quadrature and enumeration; and each predictor against naive references."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from consilience.measure import discriminative as d
from consilience.measure.information import Bits, entropy, label_information, mutual_information
from consilience.measure.represent import embed, neighbours, neighbours_within, shares

N = 3000


def measure(x: np.ndarray, y: np.ndarray, c: np.ndarray) -> tuple[dict[str, Bits], d.Terms]:
    """All terms of rows."""
    table = np.zeros((int(c.max()) + 1, int(y.max()) + 1), dtype=np.int64)
    np.add.at(table, (c, y), 1)
    label = label_information(table, np.random.default_rng(0))
    clients, labels = float(entropy(table.sum(axis=1))), float(entropy(table.sum(axis=0)))
    most = {
        "total": clients,
        "feature_skew": clients - label.value,
        "input_skew": clients,
        "concept_shift": min(clients, labels),
    }
    terms = d.information(x.reshape(len(x), -1), y, c, table.T.astype(float), label, most, 0)
    return {"label_skew": label, **terms.bits}, terms


def gaussian_information(means: Sequence[float], widths: Sequence[float]) -> float:
    """I(C; X) of equally likely clients with normal inputs, by quadrature."""

    def mixture(x: float) -> float:
        return float(np.mean([norm.pdf(x, m, s) for m, s in zip(means, widths, strict=True)]))

    def part(x: float, m: float, s: float) -> float:
        own = float(norm.pdf(x, m, s))
        return own * math.log2(own / mixture(x)) if own > 1e-290 else 0.0

    found = [quad(part, m - 12 * s, m + 12 * s, (m, s), limit=200)[0] for m, s in zip(means, widths, strict=True)]
    return float(np.mean(found))


def test_quadrature_is_right() -> None:
    assert gaussian_information([0, 100], [1, 1]) == pytest.approx(1.0, abs=1e-6)
    assert gaussian_information([0, 0], [1, 1]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("means", "widths"),
    [((0, 1, 2, 3), (1, 1, 1, 1)), ((0, 0, 0, 0), (0.5, 1, 2, 4)), ((0, 4, 8, 12), (1, 1, 1, 1))],
    ids=["shifted", "scaled", "apart"],
)
def test_gaussian_features(means: Sequence[float], widths: Sequence[float]) -> None:
    """Feature and input skew are that of quadrature; labels say nothing."""
    rng = np.random.default_rng(1)
    c, y = rng.integers(0, 4, N), rng.integers(0, 3, N)
    x = rng.standard_normal(N) * np.array(widths)[c] + np.array(means)[c]
    bits, terms = measure(x, y, c)
    truth = gaussian_information(means, widths)
    for name in ("feature_skew", "input_skew", "total"):
        # sampling, of which the interval tells, and what a classifier misses or finds too much
        assert bits[name].value == pytest.approx(truth, abs=0.03 + (bits[name].high - bits[name].low)), name
    assert bits["label_skew"].low == bits["concept_shift"].low == 0.0
    assert bits["concept_shift"].value < 0.01
    assert_identities(terms)


def assert_identities(terms: d.Terms) -> None:
    assert set(terms.gaps) == {"label_skew + feature_skew", "input_skew + concept_shift"}
    for name, (gap, half) in terms.gaps.items():
        assert abs(gap) <= max(half, 0.01), name


def corners(code: np.ndarray, apart: float, rng: np.random.Generator) -> np.ndarray:
    """Inputs in four clouds."""
    return rng.standard_normal((len(code), 2)) + apart * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[code]


def test_four_groups_of_permuted_labels_give_two_bits() -> None:
    rng = np.random.default_rng(2)
    meant, c = rng.integers(0, 4, N), rng.integers(0, 4, N)
    bits, terms = measure(corners(meant, 7, rng), (meant + c) % 4, c)
    assert bits["concept_shift"].value == pytest.approx(2.0, abs=0.06)
    assert bits["feature_skew"].value == pytest.approx(2.0, abs=0.06)  # the same bits, since classes balance
    assert bits["label_skew"].low == bits["input_skew"].low == 0.0
    assert bits["input_skew"].value < 0.02
    assert terms.explained < 0.02  # label skew explains none of it
    assert_identities(terms)


@pytest.mark.parametrize("apart", [7, 2], ids=["classes apart", "classes overlap"])
def test_label_skew_is_concept_shift_only_where_classes_overlap(apart: float) -> None:
    rng = np.random.default_rng(3)
    law = np.array([[7, 1, 1, 1], [1, 7, 1, 1], [1, 1, 7, 1], [1, 1, 1, 7]]) / 10
    c = rng.integers(0, 4, N)
    y = (law[c].cumsum(axis=1) < rng.random((N, 1))).sum(axis=1)
    bits, terms = measure(corners(y, apart, rng), y, c)
    truth = float(mutual_information(law))
    assert bits["label_skew"].low <= truth <= bits["label_skew"].high
    assert bits["total"].value == pytest.approx(truth, abs=0.06)
    assert bits["feature_skew"].value < 0.02
    if apart == 7:
        assert bits["concept_shift"].value < 0.03
    else:
        assert bits["concept_shift"].value == pytest.approx(overlapping(law, apart), abs=0.05)
        assert terms.explained == pytest.approx(bits["concept_shift"].value, abs=0.05)
    assert_identities(terms)


def overlapping(law: np.ndarray, apart: float) -> float:
    """I(C; Y | X) = I(C; Y) - I(C; X) when C - Y - X is a chain; I(C; X) by a million draws of the true densities."""
    rng = np.random.default_rng(4)
    y = rng.integers(0, 4, 200_000)  # the pooled labels are balanced
    x = corners(y, apart, rng)
    centres = apart * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    density = np.exp(-0.5 * ((x[:, None] - centres) ** 2).sum(axis=2))
    posterior = density / density.sum(axis=1, keepdims=True)
    clients = posterior @ law.T  # p(c | x) = sum_y p(y | x) p(c | y), with p(c | y) = law[c, y]
    return float(mutual_information(law)) - float(2 - entropy(clients).mean())


def test_iid_reads_nothing() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        y, c = rng.integers(0, 4, 1200), rng.integers(0, 12, 1200)
        bits, terms = measure(corners(y, 3, rng), y, c)
        for name, found in bits.items():
            assert found.value < 0.03, name
            assert found.low < 0.005, name
        assert_identities(terms)


def test_nulls_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    y, c = rng.integers(0, 3, 500), rng.integers(0, 5, 500)
    found = d.within(y, c, rng)
    assert (found != c).any()
    for label in range(3):
        assert (np.bincount(found[y == label], minlength=5) == np.bincount(c[y == label], minlength=5)).all()
    sure = np.eye(5, dtype=np.float32)[c]
    assert (d.drawn(sure, rng) == c).all()
    often = np.bincount(d.drawn(np.tile(np.float32([0.2, 0.8]), (20_000, 1)), rng)) / 20_000
    assert often == pytest.approx([0.2, 0.8], abs=0.02)


def test_stacking_weights_maximise_the_likelihood() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.random(400), rng.random(400)
    weights = d.stack([p, q])
    grid = np.linspace(0, 1, 1001)
    best = max(grid, key=lambda w: float(np.log(w * p + (1 - w) * q).sum()))
    assert weights[0] == pytest.approx(best, abs=0.01)
    assert d.stack([np.full(50, 0.9), np.full(50, 0.1)])[0] > 0.99


def test_table_without_the_row_itself() -> None:
    """Against counting again without each row."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    c = np.where(rng.random(60) < 0.5, y, rng.integers(0, 4, 60))
    table = np.zeros((3, 4))
    np.add.at(table, (y, c), 1)
    whole, held = d.by_label(y, c, table)
    assert whole.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    prior = table.sum(axis=0) / 60

    def naive(i: int, strength: float) -> np.ndarray:
        rest = np.delete(np.arange(60), i)
        counts = np.bincount(c[rest][y[rest] == y[i]], minlength=4)
        return np.asarray((counts + strength * prior) / (counts.sum() + strength))

    fits = {s: sum(math.log(naive(i, s)[c[i]]) for i in range(60)) for s in d.STRENGTHS}
    strength = max(fits, key=lambda s: fits[s])
    assert strength < 100  # otherwise the row itself would not matter
    for i in (0, 17, 59):
        assert held[i] == pytest.approx(naive(i, strength), abs=1e-5)


def test_where_the_label_is_sure_both_networks_say_the_same() -> None:
    rng = np.random.default_rng(0)
    y, c = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    view = dataclasses.replace(d.look(corners(y, 3, rng), y, 0), posterior=np.eye(3, dtype=np.float32)[y])
    both, alone = d._networks(view, c, 3, 0)
    assert both.sum(axis=1) == pytest.approx(np.ones(200), abs=1e-5)
    assert alone == pytest.approx(both, abs=1e-6)


def test_no_term_is_much_below_nothing() -> None:
    """A mixture is no worse than what it is compared with, also where labels cut the rows into small parts."""
    rng = np.random.default_rng(0)
    c, y = rng.integers(0, 3, 600), rng.integers(0, 40, 600)
    x = rng.standard_normal((600, 1)) + 3 * c[:, None]
    found = d.ratios(d.look(x, y, 0), c, 3, 0)
    assert (found.bits.mean(axis=0) > -0.005).all()
    for q in (found.by_input, found.by_both):
        assert q.sum(axis=1) == pytest.approx(np.ones(600), abs=0.02)  # of few neighbours none may have the label


def test_neighbours_are_the_nearest_others() -> None:
    rng = np.random.default_rng(0)
    z, y = rng.standard_normal((90, 4)).astype(np.float32), rng.integers(0, 3, 90)
    distance = np.linalg.norm(z[:, None] - z, axis=2) + 1e9 * np.eye(90)
    assert (neighbours(z, 5) == np.argsort(distance, axis=1)[:, :5]).all()
    same = np.where(y[:, None] == y, distance, 1e9)
    assert (neighbours_within(z, y, 5) == np.argsort(same, axis=1)[:, :5]).all()
    few = neighbours_within(z[:3], np.array([0, 0, 1]), 2)
    assert few.tolist() == [[1, -1], [0, -1], [-1, -1]]
    assert shares(few, np.array([0, 1, 1]), 2).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert neighbours(z[:1], 4).shape == (1, 0)


def test_embedding_of_constant_and_of_narrow_inputs() -> None:
    assert embed(np.ones((5, 3)))[0].shape == (5, 1)
    z, metric = embed(np.random.default_rng(0).standard_normal((50, 2)))
    assert z.shape == metric.shape == (50, 2)
    assert z.std(axis=0) == pytest.approx([1, 1], abs=1e-5)
