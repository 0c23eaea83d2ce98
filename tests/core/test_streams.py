"""Streams that nothing can shift, and the one canonical sum."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from consilience.core import tree as tr
from consilience.core.events import cohort_size, draw_cohort
from consilience.core.reduce import (
    BLOCK,
    add_term,
    sample_weights,
    sum_blocks,
    uniform_weights,
    weighted_sum,
)
from consilience.core.streams import Streams, philox, torch_fork


def first(streams: Streams, *purpose: str | int) -> bytes:
    return streams.rng("batches", *purpose).bytes(16)


def test_one_key_one_stream() -> None:
    assert first(Streams(1, 2, 3, "train")) == first(Streams(1, 2, 3, "train"))
    streams = Streams(1, 2, 3, "train")
    streams.rng("batches").random(100)
    assert first(streams) == first(Streams(1, 2, 3, "train"))  # drawing moves no other stream of the same name


def test_other_keys_other_streams() -> None:
    keys = [Streams(s, c, n, p) for s, c, n, p in itertools.product((0, 1), (-1, 0, 1), (0, 1), ("", "train"))]
    found = [first(key) for key in keys] + [first(keys[0], "1"), first(keys[0], 1), keys[0].rng("other").bytes(16)]
    assert len(set(found)) == len(found)
    assert philox(0, "a", "b").bytes(8) != philox(0, "ab").bytes(8)
    assert philox(1, 11).bytes(8) != philox(11, 1).bytes(8)
    assert philox(1).bytes(8) != philox("1").bytes(8)


@pytest.mark.parametrize("fails", [False, True])
def test_a_fork_leaves_the_global_generator_as_it_was(fails: bool) -> None:
    before = torch.random.get_rng_state()
    try:
        with torch_fork(7):
            inside = torch.rand(5)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch_fork(7):
        assert torch.equal(torch.rand(5), inside)


def test_cohorts_are_sorted_distinct_and_uniform() -> None:
    clients = np.array([1, 4, 5, 8, 9, 12])
    drawn = [draw_cohort(philox(0, "cohort", i), clients, 2) for i in range(900)]
    assert all(a < b and {a, b} <= set(clients.tolist()) for a, b in drawn)
    counts = np.array([sum(c in cohort for cohort in drawn) for c in clients])
    assert abs(counts - 300).max() < 60  # 4 standard deviations of a binomial
    assert draw_cohort(philox(0), clients, 6) == clients.tolist()
    assert [cohort_size(p, 10) for p in (0.01, 0.25, 1.0, 1, 4, 99)] == [1, 2, 10, 1, 4, 10]


def test_the_sum_goes_left_to_right_in_blocks_of_sixteen() -> None:
    assert BLOCK == 16
    for n in (1, 15, 16, 17, 33):
        rng = np.random.default_rng(n)
        values = rng.standard_normal((n, 9)) * 10.0 ** rng.integers(-8, 8, (n, 9))  # the order shows in the last bits
        wanted = []
        for column in values.T.tolist():
            blocks = [sum(column[i + 1 : i + 16], column[i]) for i in range(0, n, 16)]
            wanted.append(sum(blocks[1:], blocks[0]))
        found = weighted_sum([{"x": torch.from_numpy(row)} for row in values], [1.0] * n)["x"]
        assert found.tolist() == wanted, n


@pytest.mark.parametrize("n", [15, 16, 17, 33])
def test_blocks_reduced_elsewhere_give_the_same_bits(n: int) -> None:
    rng = np.random.default_rng(0)
    trees = [{"x": torch.from_numpy(rng.standard_normal(37).astype("f4")), "s": float(rng.normal())} for _ in range(n)]
    weights = sample_weights([int(k) for k in rng.integers(1, 99, n)])
    parts: list[Any] = []
    for i in range(n):
        if i % 16 == 0:
            parts.append(None)
        parts[-1] = add_term(parts[-1], trees[i], weights[i])
    found = weighted_sum(trees, weights)
    assert tr.digest(found) == tr.digest(sum_blocks(parts))
    naive = sum(w * t["x"].double() for w, t in zip(weights, trees, strict=True))
    torch.testing.assert_close(found["x"].double(), naive, rtol=1e-5, atol=1e-6)


def test_a_sum_changes_no_term() -> None:
    trees = [{"x": torch.ones(3), "n": torch.tensor([5]), "f": 1.0, "s": "a"} for _ in range(3)]
    before = tr.digest(*trees)
    total = weighted_sum(trees, [0.5, 0.25, 0.25])
    total["x"].zero_()
    total["n"].zero_()
    assert tr.digest(*trees) == before
    weighted_sum(trees[:1], [1.0])["n"].zero_()
    assert tr.digest(*trees) == before


def test_integers_and_words_are_those_of_the_first() -> None:
    trees = [{"n": torch.tensor(7 + i), "f": float(i), "s": str(i), "none": None} for i in range(2)]
    found = weighted_sum(trees, [0.5, 0.5])
    assert (int(found["n"]), found["f"], found["s"], found["none"]) == (7, 0.5, "0", None)


def test_terms_are_matched_by_name() -> None:
    a = {"p": torch.tensor([1.0]), "q": torch.tensor([10.0])}
    b = {"q": torch.tensor([20.0]), "p": torch.tensor([2.0])}
    try:
        found = weighted_sum([a, b], [1.0, 1.0])
    except ValueError:
        return  # refusing is as good
    assert (float(found["p"]), float(found["q"])) == (3.0, 30.0)


def test_weights_are_exact() -> None:
    for n in (1, 3, 7, 49):
        assert uniform_weights(n) == [1 / n] * n
    assert sample_weights([1, 2, 4]) == [1 / 7, 2 / 7, 4 / 7]
    with pytest.raises(ValueError, match="nothing"):
        weighted_sum([], [])
