"""Robust aggregation against its definitions in float64, and what it promises against liars."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from helpers import federation, loop, worker
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import DeltaUpdate
from consilience.core.reduce import weighted_sum
from consilience.methods import FedAvg, FedDistill, FedMD, FedProto, Scaffold
from consilience.parts import aggregators
from consilience.parts.compose import composed
from consilience.parts.prototypes import Prototypes, combined

ROBUST = ("median", "trimmed:0.2", "krum:0.2", "multikrum:0.2", "rfa", "cclip", "nnm:0.2+median", "nnm:0.2+rfa")


def updates(rows: Any) -> list[DeltaUpdate]:
    return [DeltaUpdate({"p": torch.tensor(np.asarray(row, dtype=np.float64))}, {}) for row in rows]


def together(name: str, rows: Any, shares: Any = None, rng: Any = None) -> Any:
    how = aggregators.parse(name)
    assert how is not None
    own = [1 / len(rows)] * len(rows) if shares is None else list(shares)
    return how.combine(updates(rows), {"delta": own, "buffers": own}, rng).delta["p"].numpy()


def clouds(seed: int, n: int = 10, d: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + 3.0


# --- definitions -----------------------------------------------------------------------------------------------


def krum_scores(rows: np.ndarray, f: int) -> list[float]:
    found = []
    for i, a in enumerate(rows):
        away = sorted(float(((a - b) ** 2).sum()) for j, b in enumerate(rows) if j != i)
        found.append(sum(away[: max(1, len(rows) - f - 2)]))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_krum_and_multikrum_are_those_of_the_paper(seed: int) -> None:
    rows = clouds(seed)
    order = np.argsort(krum_scores(rows, 2))
    np.testing.assert_array_equal(together("krum:0.2", rows), rows[order[0]])
    np.testing.assert_allclose(together("multikrum:0.2", rows), rows[order[:8]].mean(0), rtol=1e-12)
    shares = np.arange(1.0, 11) / 55
    kept = order[:8]
    expected = (shares[kept, None] * rows[kept]).sum(0) / shares[kept].sum()
    np.testing.assert_allclose(together("multikrum:0.2", rows, shares), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_centred_clipping_is_that_of_the_paper(seed: int) -> None:
    rows = clouds(seed)
    away = [sum(float(np.linalg.norm(a - b)) for b in rows) for a in rows]
    v = rows[int(np.argmin(away))]
    for _ in range(3):
        v = v + sum((u - v) * min(1.0, 1.5 / max(float(np.linalg.norm(u - v)), 1e-12)) for u in rows) / len(rows)
    np.testing.assert_allclose(together("cclip:1.5", rows), v, rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_mixing_is_that_of_the_paper(seed: int) -> None:
    rows = clouds(seed)
    mixed = [rows[np.argsort([((a - b) ** 2).sum() for b in rows])[:8]].mean(0) for a in rows]
    np.testing.assert_allclose(together("nnm:0.2+median", rows), np.median(mixed, axis=0), rtol=1e-10)


def test_buckets_are_shuffled_and_their_weights_add_up() -> None:
    rows, shares = clouds(0), np.arange(1.0, 11) / 55
    order = np.random.default_rng(5).permutation(10)
    pairs = [order[i : i + 3] for i in range(0, 10, 3)]
    means = [(shares[p, None] * rows[p]).sum(0) / shares[p].sum() for p in pairs]
    expected = together("median", means, [shares[p].sum() for p in pairs])
    np.testing.assert_allclose(together("bucketing:3+median", rows, shares, np.random.default_rng(5)), expected)


# --- reductions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multikrum:0", "bucketing:1+mean"])
def test_neutral_settings_are_the_mean_bit_for_bit(name: str) -> None:
    rows, shares = clouds(1, n=20), [k / 210 for k in range(1, 21)]
    mean = weighted_sum(updates(rows), shares)
    assert together(name, rows, shares).tolist() == mean.delta["p"].tolist()


def test_neutral_settings_are_the_mean_in_exact_arithmetic() -> None:
    rows, shares = clouds(1), np.arange(1.0, 11) / 55
    for name in ("cclip:1e9", "bucketing:3+mean"):
        np.testing.assert_allclose(together(name, rows, shares), shares @ rows, rtol=1e-10)
    np.testing.assert_allclose(together("nnm:0+krum:0.2", rows), rows.mean(0), rtol=1e-12)


# --- promises --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ROBUST), st.sampled_from([1e3, -1e6, 1e9, -1e30]))
def test_two_liars_of_ten_move_no_robust_rule_beyond_the_honest(seed: int, name: str, lie: float) -> None:
    """Below its breakdown point a rule stays within a bound that does not depend on the lie: here a small multiple of
    the honest updates' diameter."""
    rng = np.random.default_rng(seed)
    rows = clouds(seed)
    liars = rng.choice(10, 2, replace=False)
    honest = np.delete(rows, liars, axis=0)
    rows[liars] = lie * (1 + 0.1 * rng.standard_normal((2, 4)))
    diameter = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)
    assert np.linalg.norm(together(name, rows) - honest.mean(0)) <= 2 * diameter


def test_the_mean_breaks_with_one_liar_and_every_rule_with_a_majority() -> None:
    rows = clouds(0)
    rows[3] = 1e9
    assert np.abs(together("bucketing:1+mean", rows)).max() > 1e7
    rows[:6] = 1e9
    for name in ("median", "krum:0.2", "rfa", "cclip"):
        assert np.abs(together(name, rows)).max() > 1e7


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(("median", "krum:0.2", "krum:0.4", "multikrum:0.2", "cclip", "rfa")))
def test_who_comes_first_changes_nothing(seed: int, name: str) -> None:
    """Coordinates and choices are the same bits in any order; sums are made in the order of the cohort, so they are
    compared as sums. Ties (n = 4, where Krum looks at one neighbour, and doubles) included."""
    rng = np.random.default_rng(seed)
    rows = clouds(seed, n=int(rng.integers(4, 9)))
    rows[1] = rows[0]
    order = rng.permutation(len(rows))
    one, other = together(name, rows), together(name, rows[order])
    if name in ("median", "krum:0.2", "krum:0.4"):
        assert one.tobytes() == other.tobytes()
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_the_two_nearest_of_four_tie_in_krum_and_the_same_one_wins_in_any_order() -> None:
    rows = clouds(0, n=4)
    found = {together("krum:0.25", rows[list(order)]).tobytes() for order in permutations(range(4))}
    assert len(found) == 1


@pytest.mark.parametrize("name", ["krum:0.4", "multikrum:0.3", "cclip"])
def test_weights_are_the_same_bits_in_any_order(name: str) -> None:
    how: Any = aggregators.parse(name)
    vectors = torch.from_numpy(clouds(2, n=9))
    found = how.weights(vectors, [1 / 9] * 9)
    order = torch.from_numpy(np.random.default_rng(0).permutation(9))
    assert how.weights(vectors[order], [1 / 9] * 9) == [found[i] for i in order.tolist()]


# --- scores and prototypes -------------------------------------------------------------------------------------


def test_prototypes_are_combined_class_by_class_among_those_who_have_it() -> None:
    def sent(classes: list[int], means: list[list[float]], counts: list[int]) -> Prototypes:
        return Prototypes(torch.tensor(classes), torch.tensor(means), torch.tensor(counts))

    found = [sent([0, 2], [[1.0], [5.0]], [9, 1]), sent([0], [[2.0]], [1]), sent([0, 1], [[1e9], [7.0]], [999, 1])]
    how = aggregators.parse("median")
    assert how is not None
    made = combined(found, lambda rows: how.combine(*rows))
    assert made.classes.tolist() == [0, 1, 2]
    assert made.means.flatten().tolist() == [2.0, 7.0, 5.0]


@pytest.mark.parametrize("method", [FedProto, FedDistill, FedMD])
def test_methods_that_share_scores_or_prototypes_take_robust_rules(method: Any) -> None:
    fed = consilience.make_federation("digits", clients=6, public=30, seed=0)
    usual: dict[str, Any] = {"model": "mlp:8", "rounds": 2, "executor": "serial", "attack": "gaussian:0.17:1e6"}
    plain, robust = (consilience.run(method(aggregator=a), fed, **usual) for a in ("mean", "median"))
    size = [max(float(t.abs().max()) for t in tr.tensors(r.server) if t.numel()) for r in (plain, robust)]
    assert size[0] > 1e4
    assert size[1] < 1e3


def test_a_client_s_part_cannot_be_taken_out_of_a_median() -> None:
    with pytest.raises(ConfigError, match="exclude_own"):
        FedDistill(exclude_own=True, aggregator="median")


# --- in a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["krum", "multikrum:0.2", "cclip", "bucketing:2+rfa", "nnm:0.2+trimmed:0.2"])
def test_rules_go_in_front_of_methods(name: str) -> None:
    for method in (FedAvg(aggregator=name), Scaffold(aggregator=name)):
        first, again = (loop(worker(composed(method), federation()), 2).snapshots[2].server for _ in range(2))
        assert tr.digest(first) == tr.digest(again)
        assert all(math.isfinite(float(t.sum())) for t in tr.tensors(first))


@pytest.mark.parametrize(
    "name", ["krum:0.5", "krum:x", "cclip:0", "bucketing:0+krum", "nnm:0.7+rfa", "median+krum", "nnm:0.2"]
)
def test_rules_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="aggregator"):
        composed(FedAvg(aggregator=name))
