"""Gradient coding: every pattern of stragglers that a scheme promises to bear is decoded by its deadline, exactly."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core.errors import ConfigError
from consilience.parts.coding import Coded, Key, Multiplexed, Repeating, Scheme, code, make, solve

Pattern = tuple[frozenset[int], ...]
"""Who straggles in each round."""


def bursty(pattern: Pattern, burst: int, window: int, most: int) -> bool:
    """Whether each window of the pattern, the last ones not yet complete included, is as the model says."""
    for start in range(len(pattern)):
        rounds = pattern[start : start + window]
        if len(frozenset().union(*rounds)) > most:
            return False
        for worker in frozenset().union(*rounds):
            at = [r for r, who in enumerate(rounds) if worker in who]
            if at[-1] - at[0] >= burst:
                return False
    return True


def patterns(n: int, rounds: int, burst: int, window: int, most: int) -> Iterator[Pattern]:
    """All that satisfy the model."""
    sets = [frozenset(c) for k in range(min(most, n) + 1) for c in itertools.combinations(range(n), k)]
    found: list[Pattern] = [()]
    for _ in range(rounds):
        found = [(*p, s) for p in found for s in sets if bursty((*p, s)[-window:], burst, window, most)]
    yield from found


def play(scheme: Scheme, pattern: Pattern) -> tuple[list[dict[Key, Any]], list[float]]:
    """What has come of each job by its deadline, each result as its coefficients of all chunks; and the most data that
    a worker passed in each round."""
    done: dict[int, dict[Key, Any]] = {}
    due, loads = [], []
    for t, stragglers in enumerate(pattern):
        tasks = scheme.tasks(t, done)
        loads.append(max(sum(scheme.sizes[c] for task in own for c, _ in task.terms) for own in tasks))
        for worker, own in enumerate(tasks):
            for task in own:
                assert {chunk for chunk, _ in task.terms} <= set(scheme.held(worker))
                if worker not in stragglers:
                    done.setdefault(task.job, {})[worker, task.slot] = vector(len(scheme.sizes), task.terms)
        if t >= scheme.delay:
            due.append(dict(done.get(t - scheme.delay, {})))
    return due, loads


@functools.cache
def vector(chunks: int, terms: Any) -> Any:
    """A result, where each chunk's gradient is a unit vector of its own."""
    found = np.zeros(chunks)
    for chunk, coefficient in terms:
        found[chunk] += coefficient
    return found


def off(scheme: Scheme, done: dict[Key, Any]) -> float:
    """How far the coefficients of the chunks in what is decoded are from 1; at 0 it is the sum whatever the gradients
    are."""
    weights = scheme.weights(done)
    assert weights is not None
    return float(np.abs(sum(w * done[key] for key, w in weights.items()) - 1).max())


CASES = [("sr", 1, 3, 1), ("sr", 1, 3, 2), ("sr", 1, 3, 3), ("sr", 2, 3, 1), ("sr", 2, 3, 2), ("sr", 2, 3, 3),
         ("m", 1, 3, 1), ("m", 1, 3, 2), ("m", 1, 3, 3), ("m", 2, 3, 1), ("m", 2, 3, 2), ("m", 1, 2, 1), ("m", 1, 2, 2),
         ("m", 1, 3, 4)]  # fmt: skip


def bear(kind: str, burst: int, window: int, most: int, share: int) -> None:
    """Every ``share``-th of all patterns over the rounds of three jobs of four workers."""
    scheme = make(kind, 4, most, burst, window)
    exact = 4 % (getattr(scheme, "s", most) + 1) == 0
    for pattern in itertools.islice(patterns(4, 3 + scheme.delay, burst, window, most), 0, None, share):
        due, _ = play(scheme, pattern)
        assert len(due) == 3
        assert max(off(scheme, done) for done in due) <= (0.0 if exact else 1e-8)


@pytest.mark.parametrize(("kind", "burst", "window", "most"), CASES)
def test_bursty_patterns_of_four_workers_are_decoded(kind: str, burst: int, window: int, most: int) -> None:
    bear(kind, burst, window, most, 37)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "burst", "window", "most"), CASES)
def test_every_bursty_pattern_of_four_workers_is_decoded(kind: str, burst: int, window: int, most: int) -> None:
    bear(kind, burst, window, most, 1)


@st.composite
def bursts(draw: st.DrawFn) -> tuple[str, int, int, int, int, Pattern]:
    """A scheme for up to seven workers and a pattern that satisfies the model, as full as it may be."""
    kind = draw(st.sampled_from(["sr", "m"]))
    n, window = draw(st.integers(3, 7)), draw(st.integers(2, 5))
    allowed = [b for b in range(1, window) if kind == "m" or (window - 1) % b == 0]
    burst, most = draw(st.sampled_from(allowed)), draw(st.integers(1, n - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pattern: Pattern = ()
    for _ in range(3 * window + burst + 4):
        who: frozenset[int] = frozenset()
        for worker in rng.permutation(n):
            more = who | {int(worker)}
            if rng.random() < 0.8 and bursty((*pattern, more)[-window:], burst, window, most):
                who = more
        pattern = (*pattern, who)
    return kind, n, burst, window, most, pattern


@settings(max_examples=40, deadline=None)
@given(case=bursts())
def test_bursty_patterns_of_more_workers_are_decoded(case: Any) -> None:
    kind, n, burst, window, most, pattern = case
    scheme = make(kind, n, most, burst, window)
    due, loads = play(scheme, pattern)
    assert max(off(scheme, done) for done in due) <= 1e-8
    assert max(loads) <= scheme.load + 1e-9


@pytest.mark.parametrize(("n", "s"), [(4, 0), (4, 1), (4, 3), (5, 1), (5, 2), (6, 2), (7, 3)])
def test_a_code_bears_any_so_many_stragglers_and_no_more(n: int, s: int) -> None:
    rows = code(n, s)
    assert {int((row != 0).sum()) for row in rows} == {s + 1}
    for here in itertools.combinations(range(n), n - s):
        weights = solve(n, s, here)
        assert weights is not None
        whole = sum(w * rows[worker] for worker, w in weights.items())
        assert np.abs(whole - 1).max() <= (0.0 if n % (s + 1) == 0 else 1e-8)
    assert solve(n, s, range(n - s - 1)) is None


def test_without_stragglers_nothing_is_repeated() -> None:
    for scheme in (make("sr", 6, 2, 2, 3), make("m", 6, 2, 2, 3), make("gc", 6, 2, 1, 2)):
        quiet: Pattern = (frozenset(),) * 8
        due, _ = play(scheme, quiet)
        assert max(off(scheme, done) for done in due) <= 1e-8
        assert len({len(done) for done in due}) == 1
    assert make("gc", 4, 0, 1, 2).tasks(3, {})[2] == [(3, (0, 0), ((2, 1.0),))]  # plain: everybody its own chunk


def test_what_is_done_again_is_the_oldest() -> None:
    """Worker 0 has nothing of its own pieces of job 0 when these have had their turn, worker 1 all of them."""
    done = {0: {(1, (-1, 0)), (1, (-1, 1))}}
    tasks = make("m", 4, 1, 2, 3).tasks(2, done)
    assert [task.slot for task in tasks[0] if task.job == 0] == [(-1, 0)]
    assert [task.slot for task in tasks[1] if task.job == 0] == [(0, 0)]


def test_loads_are_those_of_the_paper() -> None:
    """256 workers."""
    gc, sr, m = make("gc", 256, 15, 1, 2), make("sr", 256, 23, 2, 3), make("m", 256, 27, 1, 2)
    assert isinstance(gc, Coded)
    assert gc.load == 0.0625
    assert isinstance(sr, Repeating)
    assert sr.s == 12
    assert sr.load == pytest.approx(0.0508, abs=5e-5)
    assert isinstance(m, Multiplexed)
    assert m.load == pytest.approx(0.00754, abs=5e-6)
    for scheme in (make("m", 5, 2, 2, 4), make("m", 4, 4, 1, 3), make("sr", 5, 2, 1, 3)):
        assert sum(scheme.sizes) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("gc", 4, 4, 1, 2), "at most 3"),
        (("sr", 4, 1, 2, 4), "divide"),
        (("m", 4, 1, 2, 2), "below"),
        (("m", 4, 5, 1, 2), "most"),
    ],
)
def test_what_there_is_no_code_for_is_refused(given: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make(*given)
