"""When clients can be reached."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.core.errors import ConfigError, DataError
from consilience.fleet.availability import DAY, SLOT, Coins, Diurnal, Markov, Periods, parse, rates, read_trace

ALL = np.arange(6)
TRACE = "client,on,off\n0,0,10\n0,10,20\n1,5,15\n2,0,30\n4,12,14\n5,0,8\n5,20,30\n3,1,2\n"


def trace(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


@pytest.fixture(params=["markov:20:10", "diurnal:7", "trace"])
def periods(request: pytest.FixtureRequest, tmp_path: Path) -> Periods:
    name = str(trace(tmp_path, TRACE)) if request.param == "trace" else request.param
    found = parse(name, 6, seed=3)
    assert isinstance(found, Periods)
    return found


def test_online_until_it_leaves_and_from_when_it_returns(periods: Periods) -> None:
    """A walk along each client's time: online exactly between what returns and leaves say."""
    scale = DAY / 8 if isinstance(periods, Diurnal) else 3.0
    rng = np.random.default_rng(0)
    for client in range(6):
        for time in np.sort(rng.uniform(0, 40 * scale, 60)):
            here = bool(periods.online(np.array([client]), time, 0)[0])
            back = periods.returns(client, time, 0)
            assert (back == time) == here
            if not here:
                middle = (time + back) / 2
                assert not periods.online(np.array([client]), middle, 0)[0]
                assert periods.online(np.array([client]), back, 0)[0]
            gone = periods.leaves(client, back)
            assert gone > back
            if gone < math.inf:
                assert periods.online(np.array([client]), (back + gone) / 2, 0)[0]
                assert not periods.online(np.array([client]), gone, 0)[0]


def test_the_same_answer_in_any_order(periods: Periods) -> None:
    again = parse("markov:20:10", 6, seed=3) if isinstance(periods, Markov) else periods
    times = [70.0, 3.0, 900.0, 41.0, 5.5]
    forwards = [periods.returns(c, t, 0) for c in range(6) for t in times]
    backwards = [again.returns(c, t, 0) for c in reversed(range(6)) for t in reversed(times)]
    assert forwards == backwards[::-1]


def test_markov_is_on_for_its_share_of_the_time() -> None:
    when = Markov(20.0, 10.0, 0)
    away = [sum(b - a for a, b in when.offline(c, 5000.0)) / 5000 for c in range(40)]
    assert np.mean(away) == pytest.approx(1 / 3, abs=0.03)


def test_a_trace_begins_anew_after_its_end(tmp_path: Path) -> None:
    when = read_trace(trace(tmp_path, TRACE), 6)
    assert when.leaves(0, 3.0) == 20.0  # two periods that touch are one
    assert when.returns(0, 25.0, 0) == 30.0
    assert when.returns(1, 16.0, 0) == 35.0
    assert when.leaves(2, 7.0) == math.inf  # always there, round after round
    assert when.leaves(5, 25.0) == 38.0  # over the end of the trace
    assert when.offline(1, 40.0) == [(0.0, 5.0), (15.0, 35.0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("client,on,off\n0,0,10\n0,9,20\n", r"line 3: client 0 comes online at 9 but was so until 10"),
        ("client,on,off\n0,0,10\n1,20,12\n", r"line 3: on 20 to off 12 is no period"),
        ("client,on,off\n0,5,5\n", "no period"),
        ("client,on,off\n0,-5,5\n", "no period"),
        ("client,on,off\n0,0,inf\n", "no period"),
        ("client,on,off\n6,0,10\n", "client is 6; clients are 0 to 5"),
        ("client,on,off\n1.5,0,10\n", r"client is 1\.5"),
        ("client,on,off\n0,zero,10\n", "line 2, on: 'zero' is not a number"),
        ("client,begin,end\n0,0,10\n", "a trace has client, on, off"),
        ("client,on,off\n", "nobody is ever online"),
        ("client,on,off\n0,1,2,3\n", "line 2: more values than columns"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as found:
        read_trace(trace(tmp_path, text), 6)
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    ["bernoulli", "bernoulli:0", "bernoulli:1.1", "bernoulli:x", "markov:1", "markov:0:5", "markov:5:nan", "diurnal:23",
     "always:1", "sometimes", "markov:3:3:labels", "bernoulli:0.5:labels"],
)  # fmt: skip
def test_bad_rules(text: str) -> None:
    with pytest.raises(ConfigError, match="availability"):
        parse(text, 6, seed=0)


def test_coins_are_thrown_for_each_update_and_minute() -> None:
    when = Coins(np.full(6, 0.5), seed=1)
    seen = {tuple(when.online(ALL, t * SLOT, v)) for t in range(4) for v in range(4)}
    assert len(seen) > 8
    assert tuple(when.online(ALL, 0.0, 1)) == tuple(when.online(ALL, SLOT / 2, 1))
    for client in range(6):
        back = when.returns(client, 10.0, 2)
        assert back == 10.0 or back % SLOT == 0
        assert when.online(ALL, back, 2)[client]
    never = Coins(np.array([0.0, 1.0]), seed=1)
    assert never.returns(0, 0.0, 0) == math.inf
    assert never.returns(1, 5.0, 0) == 5.0


@settings(max_examples=30, deadline=None)
@given(p=st.floats(0.01, 0.5), seed=st.integers(0, 1000))
def test_rates_by_label_have_the_mean_asked_for(p: float, seed: int) -> None:
    pure = np.eye(10, dtype=int) * 7
    found = rates(p, pure, seed)
    assert found.mean() == pytest.approx(p)
    assert sorted(found) == pytest.approx(list(p * np.linspace(0.2, 1.8, 10)))
    mixed = rates(p, np.ones((3, 10), dtype=int), seed)
    assert mixed == pytest.approx([p] * 3)


def test_who_has_the_same_labels_is_online_at_the_same_time_of_day() -> None:
    labels = np.eye(4, dtype=int)[[0, 0, 2, 2]]
    when = parse("diurnal:6:labels", 4, seed=0, labels=labels)
    hours = np.arange(0, 3 * DAY, 900.0)
    online = np.array([when.online(np.arange(4), t, 0) for t in hours])
    together = (online[:, 0] & online[:, 1]).sum() / online[:, 0].sum()
    apart = (online[:, 0] & online[:, 2]).sum() / online[:, 0].sum()
    assert together > 0.6
    assert apart == 0
