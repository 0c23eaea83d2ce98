"""Every compressor: what it promises, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.streams import philox
from consilience.parts.compressors import (
    KINDS,
    QSGD,
    Coded,
    Compressor,
    LowRank,
    MalformedError,
    RandK,
    Rounded,
    Sign,
    TopK,
    pack,
    parse,
    unpack,
)
from consilience.parts.feedback import shapes_of

ALL: list[Compressor] = [
    TopK(False, 0.2), RandK(False, 0.3), QSGD(False, 2), QSGD(False, 5), Sign(), Rounded(False, 3), Rounded(False, 8),
    Rounded(False, 16), LowRank(False, 1), LowRank(False, 2),
]  # fmt: skip
EACH = pytest.mark.parametrize("compressor", ALL, ids=str)
UNBIASED = [RandK(True, 0.3), QSGD(True, 2), QSGD(True, 5)]
numbers = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


@st.composite
def params(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A matrix that rank 2 may shorten, a vector and a number, in float64."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    n = rows * columns + 4
    flat = torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=torch.float64)
    return {"w": flat[:-4].reshape(rows, columns).clone(), "b": flat[-4:-1].clone(), "s": flat[-1].clone()}


def through(compressor: Compressor, v: Any, *key: int) -> Any:
    coded, _ = compressor.encode(v, philox(0, *key), None)
    return compressor.decode(coded, shapes_of(v), philox(0, *key))


def count(v: Any) -> int:
    return sum(p.numel() for p in v.values())


@EACH
@settings(max_examples=25, deadline=None)
@given(v=params(), seed=st.integers(0, 1000))
def test_what_it_says_of_contraction_holds(compressor: Compressor, v: Any, seed: int) -> None:
    """For each draw where the compressor does not draw or cannot err by more; QSGD's and RandK's is of the mean."""
    error, d = tr.norm(tr.sub(through(compressor, v, seed), v)) ** 2, count(v)
    if isinstance(compressor, (QSGD, RandK)):
        error = float(np.mean([tr.norm(tr.sub(through(compressor, v, seed, i), v)) ** 2 for i in range(100)]))
        assert error <= (1 - 0.3 * compressor.delta(d)) * tr.norm(v) ** 2 + 1e-9  # 100 draws know it so well
    else:
        assert error <= (1 - compressor.delta(d)) * tr.norm(v) ** 2 * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("compressor", UNBIASED, ids=str)
@settings(max_examples=4, deadline=None)
@given(v=params())
def test_unbiased_ones_are(compressor: Compressor, v: Any) -> None:
    draws = 400
    found = [torch.cat([p.reshape(-1) for p in through(compressor, v, i).values()]) for i in range(draws)]
    mean, true = torch.stack(found).mean(0), torch.cat([p.reshape(-1) for p in v.values()])
    variance = float(torch.stack([(f - true).square().sum() for f in found]).mean())
    size = float(true.square().sum())
    assert variance <= compressor.omega(len(true)) * size * 1.6 + 1e-9
    # six standard deviations of the mean of all coordinates
    assert float((mean - true).norm()) <= 6 * math.sqrt(compressor.omega(len(true)) * size / draws) + 1e-9


@EACH
def test_zeros_stay_zeros(compressor: Compressor) -> None:
    v = {"w": torch.zeros(9, 8), "b": torch.zeros(3)}
    assert tr.norm(through(compressor, v)) == 0.0


@EACH
@settings(max_examples=30, deadline=None)
@given(v=params())
def test_twice_the_numbers_is_twice_the_message(compressor: Compressor, v: Any) -> None:
    """Positively homogeneous: what makes EF21-W's iterates EF21's."""
    assert tr.digest(tr.scale(through(compressor, v), 2.0)) == tr.digest(through(compressor, tr.scale(v, 2.0)))


def test_everything_kept_is_everything() -> None:
    v = {"w": torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), "b": torch.randn(3)}
    for whole in (TopK(False, 1.0), RandK(True, 1.0), RandK(False, 1.0), LowRank(False, 8)):
        assert tr.digest(through(whole, v)) == tr.digest(v)


def test_topk_takes_the_largest_and_of_equals_the_first() -> None:
    v = {"a": torch.tensor([1.0, -3.0, 3.0, 0.0, 3.0, 2.0])}
    assert through(TopK(False, 0.34), v)["a"].tolist() == [0, -3, 3, 0, 0, 0]
    assert through(TopK(False, 0.5), v)["a"].tolist() == [0, -3, 3, 0, 3, 0]


def test_low_rank_finds_a_matrix_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    m = torch.from_numpy(rng.standard_normal((20, 2)) @ rng.standard_normal((2, 15)))
    found = through(LowRank(False, 2), {"m": m})["m"]
    assert torch.allclose(found, m, atol=1e-12)
    coded, _ = LowRank(False, 2).encode({"m": m}, philox(0), None)
    assert coded.numbers.numel() == 2 * (20 + 15)


def test_low_rank_begins_where_it_ended() -> None:
    """Again and again on one matrix it comes to the best approximation of its rank (a power iteration)."""
    m = torch.from_numpy(np.random.default_rng(1).standard_normal((12, 10)))
    _, s, _ = torch.linalg.svd(m)
    best, compressor, basis = float(s[2:].square().sum()), LowRank(False, 2), None
    errors = []
    for i in range(200):
        coded, basis = compressor.encode({"m": m}, philox(i), basis)
        errors.append(float((compressor.decode(coded, {"m": (12, 10)}, philox(i))["m"] - m).square().sum()))
    assert errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=40))))
def test_codes_are_packed_bit_by_bit(case: Any) -> None:
    width, codes = case
    packed = pack(np.array(codes, dtype=np.int64), width)
    assert packed.shape == (-(-len(codes) * width // 8),)
    assert unpack(packed, width, len(codes)).tolist() == codes


@EACH
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_messages_are_refused_or_still_parameters(compressor: Compressor, data: st.DataObject) -> None:
    v = {"w": torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), "b": torch.ones(3)}
    coded, _ = compressor.encode(v, philox(0), None)
    part = data.draw(st.sampled_from(["numbers", "packed"]))
    held = getattr(coded, part)
    change = data.draw(st.sampled_from(["cut", "longer", "dtype", "dims", "values"]))
    if change == "values" and held.numel():
        at = data.draw(st.integers(0, held.numel() - 1))
        new = held.clone()
        new[at] = data.draw(st.sampled_from([0, 1, 255])) if part == "packed" else math.nan
    else:
        new = {
            "cut": held[:-1], "longer": torch.cat([held, held.new_zeros(1)]), "dtype": held.to(torch.int32),
            "dims": held.reshape(1, -1), "values": held,
        }[change]  # fmt: skip
    try:
        found = compressor.decode(coded._replace(**{part: new}), shapes_of(v), philox(0))
    except MalformedError:
        return
    assert shapes_of(found) == shapes_of(v)
    assert change in ("values", "dtype") or new.shape == held.shape


def test_indices_that_do_not_fit_are_refused() -> None:
    for index in ([3, 3], [4, 2], [1, 7]):
        bad = Coded(torch.ones(2), pack(np.array(index), 3))
        with pytest.raises(MalformedError, match="ascending"):
            TopK(False, 0.4).decode(bad, {"a": (5,)}, philox(0))


def test_names() -> None:
    assert parse("topk:0.01", True, "") == TopK(False, 0.01)
    assert parse("randk:0.1", True, "") == RandK(True, 0.1)
    assert replace(parse("qsgd:4", False, ""), unbiased=True) == QSGD(True, 4)
    assert {parse(t, True, "").name for t in ("topk:1", "randk:1", "qsgd:8", "sign", "bits:8", "lowrank:3")} == set(
        KINDS
    )
    for wrong in (
        "topk",
        "topk:0",
        "topk:2",
        "randk:x",
        "qsgd:1",
        "qsgd:17",
        "bits:2.5",
        "lowrank:0",
        "sign:3",
        "tpk:1",
    ):
        with pytest.raises(ConfigError, match="topk:F"):
            parse(wrong, True, "--compress")
