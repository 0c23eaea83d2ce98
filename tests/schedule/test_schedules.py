"""Schedules, on devices of known speed: who is started when, and what is combined with what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
from helpers import Memory

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.core.events import Instant, Schedule
from consilience.core.messages import Device, Job, Trip
from consilience.core.run import run as run_loop
from consilience.core.setup import Setup
from consilience.execute.serial import Serial
from consilience.fleet.availability import Trace
from consilience.fleet.clock import Fleet
from consilience.measure.metrics import Standard
from consilience.methods import DPSGD, FedAvg, FedProx, Scaffold
from consilience.schedule.buffered import Buffered
from consilience.schedule.compass import Compass
from consilience.schedule.deadline import Deadline
from consilience.schedule.gossip import Gossip
from consilience.schedule.immediate import Immediate
from consilience.schedule.interval import Interval
from consilience.schedule.names import NAMES, make
from consilience.schedule.rounds import Rounds
from consilience.schedule.tiered import Tiered

N = 6
DELTA = FedAvg(form="delta", local_steps=4, batch_size=1)


@dataclass(frozen=True)
class Steps(Instant):
    """Client i takes ``pace[i]`` seconds for a sample (a step of one row), and nothing for transfers."""

    pace: tuple[float, ...]

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        return Trip(compute=self.pace[job.client] * samples)


def play(
    schedule: Schedule, clock: Any, rounds: int = 12, cohort: int = N, method: Any = DELTA, seed: int = 0
) -> list[dict[str, Any]]:
    """The timeline of a run on six clients of 8 rows."""
    memory = Memory()
    at = helpers.worker(method, helpers.federation((8,) * N), seed=seed)
    setup = Setup(rounds, cohort, schedule, clock, Standard(), memory, checkpoint_every=0)
    run_loop(Serial(at), setup)
    return memory.timeline


def combined(timeline: Sequence[dict[str, Any]]) -> dict[int, list[tuple[int, float]]]:
    """(client, arrival) of each update's replies."""
    found: dict[int, list[tuple[int, float]]] = {}
    for lap in timeline:
        if lap["state"] == "combined":
            found.setdefault(lap["round"], []).append((lap["client"], lap["end"]))
    return found


PACE = Steps((1.0, 2.0, 3.0, 5.0, 7.0, 11.0))


def test_rounds_wait_for_the_slowest() -> None:
    rounds = combined(play(Rounds(), PACE, rounds=3))
    assert {r: max(end for _, end in found) for r, found in rounds.items()} == {1: 44.0, 2: 88.0, 3: 132.0}
    assert all(sorted(c for c, _ in found) == list(range(N)) for found in rounds.values())


def test_immediate_combines_each_reply_and_refills() -> None:
    timeline = play(Immediate(), PACE, rounds=30)
    rounds = combined(timeline)
    assert all(len(found) == 1 for found in rounds.values())
    ends = [found[0][1] for _, found in sorted(rounds.items())]
    assert ends == sorted(ends)
    starts = Counter(lap["start"] for lap in timeline)
    assert starts[0.0] == N
    assert all(start in {0.0, *ends} for start in starts)
    few = play(Immediate(2), PACE, rounds=30)
    for lap in few:
        beside = [o for o in few if o is not lap and o["start"] < lap["end"] and lap["start"] < o["end"]]
        at_once = max((sum(o["start"] <= t < o["end"] for o in beside) for t in [lap["start"]]), default=0)
        assert at_once <= 1


def test_buffered_combines_every_k_in_order_of_arrival() -> None:
    timeline = play(Buffered(3), PACE, rounds=10)
    rounds = combined(timeline)
    assert all(len(found) == 3 for found in rounds.values())
    by_arrival = sorted((lap for lap in timeline if lap["state"] == "combined"), key=lambda lap: lap["end"])
    assert [lap["round"] for lap in by_arrival] == sorted(lap["round"] for lap in by_arrival)
    assert {lap["staleness"] for lap in timeline} > {0, 1}


def test_a_buffer_that_cannot_fill_is_combined_as_it_is() -> None:
    rounds = combined(play(Buffered(4, concurrency=2), PACE, rounds=4, cohort=2))
    assert [len(found) for found in rounds.values()] == [4] * 4
    assert [len(f) for f in combined(play(Buffered(99), PACE, rounds=2)).values()] == [N, N]


def test_interval_combines_at_ticks_what_has_come() -> None:
    """4 samples at pace 1, 2, 3, 5, 7, 11: jobs of 4, 8, 12, 20, 28, 44 s; ticks every 10 s."""
    rounds = combined(play(Interval(10.0), PACE, rounds=8))
    assert [sorted(c for c, _ in found) for found in rounds.values()] == [
        [0, 1], [0, 1, 2, 3], [0, 1, 4], [0, 1, 2, 3], [0, 1, 5], [0, 1, 2, 3, 4], [0, 1], [0, 1, 2, 3],
    ]  # fmt: skip
    half = combined(play(Interval(share=0.5), PACE, rounds=2))
    assert [max(end for _, end in found) for found in half.values()] == [20.0, 44.0]


def test_a_deadline_closes_a_round() -> None:
    timeline = play(Deadline(15.0), PACE, rounds=3)
    assert [sorted(c for c, _ in found) for found in combined(timeline).values()] == [[0, 1, 2]] * 3
    late = [lap for lap in timeline if lap["state"] == "cancelled"]
    assert {(lap["client"], lap["end"] - lap["start"]) for lap in late} == {(3, 15.0), (4, 15.0), (5, 15.0)}
    assert {lap["start"] for lap in timeline} == {0.0, 15.0, 30.0}


def test_a_deadline_before_the_first_reply_waits_for_it() -> None:
    assert [sorted(found) for found in combined(play(Deadline(1.0), PACE, rounds=2)).values()] == [
        [(0, 4.0)],
        [(0, 8.0)],
    ]


def test_over_selection_ends_with_enough_replies() -> None:
    timeline = play(Deadline(100.0, over=2.0), PACE, rounds=4, cohort=3)
    assert all(sorted(c for c, _ in found) == [0, 1, 2] for found in combined(timeline).values())
    assert {lap["start"] for lap in timeline} == {0.0, 12.0, 24.0, 36.0}


def test_partial_work_is_done_by_the_deadline() -> None:
    timeline = play(Deadline(15.0, late="partial"), PACE, rounds=2)
    assert {lap["client"]: lap["steps"] for lap in timeline} == {0: 4, 1: 4, 2: 4, 3: 3, 4: 2, 5: 1}
    assert {lap["state"] for lap in timeline} == {"combined"}
    assert all(lap["end"] - lap["start"] <= 15.0 for lap in timeline)


def test_tiers_do_not_wait_for_each_other() -> None:
    timeline = play(Tiered(3), PACE, rounds=12)
    rounds = combined(timeline)
    for found in rounds.values():
        assert sorted(c for c, _ in found) in ([0, 1], [2, 3], [4, 5])
    of = {r: min(c for c, _ in found) // 2 for r, found in rounds.items()}
    ends = {tier: [max(e for _, e in rounds[r]) for r in rounds if of[r] == tier] for tier in range(3)}
    assert ends[0][:3] == [8.0, 16.0, 24.0]
    assert ends[1][:2] == [20.0, 40.0]
    assert ends[2][0] == 44.0


# --- compass -----------------------------------------------------------------------------------------------------


def test_compass_on_equal_devices_is_one_group_with_the_most_steps() -> None:
    timeline = play(Compass(2, 8, 1.2), Steps((1.0,) * N), rounds=N + 3)
    rounds = combined(timeline)
    assert [len(found) for found in rounds.values()] == [1] * N + [N] * 3
    assert {lap["steps"] for lap in timeline if lap["round"] > N} == {8}
    assert {lap["steps"] for lap in timeline if lap["round"] <= N} == {2}


def test_compass_lets_a_group_arrive_together() -> None:
    """After each client's first job, members of a group arrive within a step of each other."""
    timeline = play(Compass(2, 20, 1.2), Steps((1.0, 1.5, 2.0, 2.5, 3.0, 4.0)), rounds=40)
    sizes = Counter(len(found) for r, found in combined(timeline).items() if r > N)
    assert sizes[1] < sum(sizes.values())  # there are groups
    for r, found in combined(timeline).items():
        if r > N and len(found) > 1:
            ends = [end for _, end in found]
            assert max(ends) - min(ends) <= 0.2 * 20 * 4.0 + 4.0  # slack of the longest group, and a step


@pytest.mark.parametrize("pace", [(1.0,) * N, (1.0, 2.0, 3.0, 5.0, 7.0, 11.0), (1.0, 1.0, 1.0, 1.0, 1.0, 30.0)])
@pytest.mark.parametrize("slack", [1.0, 1.2, 3.0])
def test_compass_combines_every_job_once_within_its_bounds(pace: tuple[float, ...], slack: float) -> None:
    timeline = play(Compass(2, 9, slack), Steps(pace), rounds=60)
    assert all(2 <= lap["steps"] <= 9 for lap in timeline if lap["state"] == "combined")
    assert Counter(lap["job"] for lap in timeline).most_common(1)[0][1] == 1
    assert {lap["state"] for lap in timeline} <= {"combined", "unfinished"}
    jobs = sorted(lap["job"] for lap in timeline)
    assert jobs == list(range(len(jobs)))
    busy: dict[int, float] = {}
    for lap in sorted(timeline, key=lambda lap: lap["job"]):
        assert lap["start"] >= busy.get(lap["client"], 0.0)  # never two jobs of a client at once
        busy[lap["client"]] = lap["end"]
    assert sum(lap["state"] == "unfinished" for lap in timeline) <= 2 * N


def test_compass_with_one_client_is_sequential_training() -> None:
    at = helpers.worker(DELTA, helpers.federation((8,)))
    memory = Memory()
    run_loop(Serial(at), Setup(5, 1, Compass(2, 6, 1.2), Steps((1.0,)), Standard(), memory, checkpoint_every=0))
    assert [lap["steps"] for lap in memory.timeline] == [2, 6, 6, 6, 6]
    assert {lap["staleness"] for lap in memory.timeline} == {0}


def test_a_slowing_client_comes_late_and_is_not_lost() -> None:
    """A client whose pace doubles after its group is made misses it; its reply joins the next group."""

    @dataclass(frozen=True)
    class Slowing(Steps):
        def trip(
            self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
        ) -> Trip:
            slower = 3.0 if job.client == 2 and job.number == 2 else 1.0
            return Trip(compute=slower * self.pace[job.client] * samples)

    timeline = play(Compass(2, 8, 1.2), Slowing((1.0,) * N), rounds=N + 4)
    late = next(lap for lap in timeline if lap["client"] == 2 and lap["end"] - lap["start"] == 24.0)
    assert late["state"] == "combined"
    beside = [lap for lap in timeline if lap["round"] == late["round"] and lap is not late]
    assert beside
    assert all(lap["start"] > late["start"] for lap in beside)


# --- availability and drops --------------------------------------------------------------------------------------


def fleet(periods: dict[int, list[tuple[float, float]]], drops: float = 0.0) -> Fleet:
    return Fleet([Device(1.0, 1e9, 1e9, rate=1.0)] * N, Trace(periods), [1.0] * N, drops, seed=0)


SCHEDULES = [
    Rounds(), Deadline(30.0, over=1.5), Buffered(2), Interval(10.0), Tiered(2), Immediate(), Compass(2, 6, 1.2),
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_clients_come_and_go(schedule: Schedule) -> None:
    """No job runs while its client is offline; jobs that are cut off are lost and never combined."""
    periods = {c: [(10.0 * c, 10.0 * c + 9), (70 + c, 100 + 3.0 * c)] for c in range(N)}
    timeline = play(schedule, fleet(periods), rounds=25, cohort=4)
    states = Counter(lap["state"] for lap in timeline)
    assert states["combined"]
    trace = Trace(periods)
    for lap in timeline:
        if lap["state"] in ("combined", "lost"):
            begin = lap["start"] + lap["wait"]
            assert trace.returns(lap["client"], begin, 0) == begin
            assert trace.leaves(lap["client"], begin) >= lap["end"] - 1e-9
    assert [lap["round"] for lap in timeline] == sorted(lap["round"] for lap in timeline)
    assert Counter(lap["job"] for lap in timeline).most_common(1)[0][1] == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_lost_jobs_do_not_stop_a_run(schedule: Schedule) -> None:
    always = {c: [(0.0, 1e6)] for c in range(N)}
    timeline = play(schedule, fleet(always, drops=0.4), rounds=20, cohort=4)
    assert sum(lap["state"] == "lost" for lap in timeline) > 5
    assert max(lap["round"] for lap in timeline if lap["state"] == "combined") == 20


def test_nobody_comes_back() -> None:
    class Once(Trace):
        def period(self, client: int, time: float) -> tuple[float, float]:
            return (0.0, 20.0) if time < 20 else (float("inf"), float("inf"))

    with pytest.raises(ConsilienceError, match="no client comes online any more after") as found:
        play(Rounds(), Fleet([Device(1.0, 1e9, 1e9)] * N, Once({0: [(0.0, 20.0)]}), [1.0] * N), rounds=25)
    assert len(str(found.value).splitlines()) == 1


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["round", "rounds:3", "deadline", "deadline:0", "deadline:-1", "deadline:soon", "deadline:inf", "buffered:0",
     "buffered:1.5", "interval:0%", "tiered:", "compass:5", "compass:9:3:1", "compass:2:3:0.5", "async:4", "gossip:3"],
)  # fmt: skip
def test_bad_schedules(text: str) -> None:
    with pytest.raises(ConfigError) as found:
        make(text)
    assert len(str(found.value).splitlines()) == 1


def test_names() -> None:
    assert make("deadline:2.5", over_selection=1.3, late="partial") == Deadline(2.5, None, 1.3, "partial")
    assert make("interval:50%", concurrency=3) == Interval(None, 0.5, 3)
    assert make("compass:2:8:1.5") == Compass(2, 8, 1.5)
    assert make("gossip", concurrency=3) == Gossip(3)
    assert {name.partition(":")[0] for name in NAMES} == {
        "rounds", "deadline", "buffered", "interval", "tiered", "async", "compass", "gossip"
    }  # fmt: skip
    for options in ({"over_selection": 2.0}, {"late": "partial"}, {"concurrency": 3}):
        with pytest.raises(ConfigError, match="is for"):
            make("rounds", **options)  # type: ignore[arg-type]


def test_phases_that_wait_for_each_other_need_rounds() -> None:
    with pytest.raises(ConfigError, match="dpsgd has 2 phases that wait for each other"):
        consilience.run(DPSGD(), helpers.federation(), model="logistic", schedule="async")
    with pytest.raises(ConfigError, match="a buffer of 6 never fills with 5 clients"):
        consilience.run(DELTA, helpers.federation(), model="logistic", schedule="buffered:6")


@pytest.mark.parametrize(
    "method", [FedAvg(batch_size=2), FedProx(mu=0.1, batch_size=2), Scaffold(batch_size=2)], ids=lambda m: m.name
)
@pytest.mark.parametrize("late", ["discard", "partial"])
def test_methods_under_deadlines(method: Any, late: Any) -> None:
    fed = helpers.federation((40, 40, 40, 40, 40))
    result = consilience.run(
        method, fed, model="logistic", fleet=[Device(1e3 * 3**c, 1e6, 1e6) for c in range(5)], schedule="deadline:20%",
        late=late, rounds=6, executor="serial",
    )  # fmt: skip
    states = Counter(lap["state"] for lap in result.timeline)
    assert (states["cancelled"] > 0) == (late == "discard")
    assert result.history[-1]["virtual_s"] > 0
    if method.name == "scaffold":  # c stays the mean of all c_i, whoever was too late
        kept = list(result.states.values())
        mean = {k: sum(c[k] for c in kept) / 5 for k in result.server.control}
        assert tr.norm(tr.sub(mean, result.server.control)) < 1e-6


def test_cancelled_work_is_counted_as_far_as_it_went() -> None:
    """Client 1 would need 16 s for its 4 samples; at the deadline of 9 s it has computed two of them."""
    at = helpers.worker(DELTA, helpers.federation((8, 8)))
    memory = Memory()
    clock = Steps((1.0, 4.0))
    run_loop(Serial(at), Setup(1, 2, Deadline(9.0), clock, Standard(), memory, checkpoint_every=0))
    assert (memory.lines[-1]["samples"], memory.lines[-1]["steps"]) == (4 + 2, 4 + 2)
    assert memory.lines[-1]["bytes_up"] * 2 < memory.lines[-1]["bytes_down"] * 1.2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_only_what_is_combined_is_remembered(schedule: Schedule) -> None:
    """A client's state counts its combined jobs; of lost, cancelled and refused ones nothing is left."""
    at = Serial(
        helpers.worker(helpers.Remembers(form="delta", local_steps=4, batch_size=1), helpers.federation((8,) * N))
    )
    memory = Memory()
    clock = fleet({c: [(0.0, 1e6)] for c in range(N)}, drops=0.3)
    last = run_loop(at, Setup(15, 4, schedule, clock, Standard(), memory, checkpoint_every=0))
    counts = Counter(lap["client"] for lap in memory.timeline if lap["state"] == "combined")
    assert {client: state["count"] for client, state in last.states.items()} == counts
    assert not last.pending
    assert not at.pending()
