"""Asynchronous methods: reductions bit for bit, equations by hand, and work that is computed together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import helpers
import pytest
import torch
from helpers import vector
from hypothesis import given, settings
from hypothesis import strategies as st

import consilience
from consilience.core import tree as tr
from consilience.core.errors import CheckpointError, ConfigError, ConsilienceError
from consilience.core.events import Instant
from consilience.core.executor import Executor
from consilience.core.messages import DeltaUpdate, Device, Job, ModelUpdate, Reply, Trip
from consilience.core.method import Method, Phase
from consilience.core.model import Weights
from consilience.execute.serial import Serial
from consilience.fleet.availability import Always
from consilience.fleet.clock import Fleet
from consilience.folder import read_snapshot
from consilience.methods import DPSGD, FedASMU, FedAsync, FedAU, FedAvg, FedBuff, FedCompass, FedFix
from consilience.methods.fedasmu import Down, Merge, Own, Up
from consilience.methods.fedau import Seen, Server
from consilience.parts.staleness import discount, mix
from consilience.schedule.buffered import Buffered
from consilience.schedule.interval import Interval

UNIFORM = FedAvg(form="delta", weights="uniform")


def run(method: Method, fed: Any = None, **more: Any) -> Any:
    options = {"model": helpers.LINEAR, "rounds": 5, "executor": "serial", "clock": Instant(), **more}
    return consilience.run(method, fed or helpers.federation(), **options)


def same(a: Any, b: Any) -> bool:
    return tr.digest(a.server.model) == tr.digest(b.server.model)


# --- reductions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [helpers.LINEAR, helpers.NOISY, helpers.NORMED], ids=lambda m: m.name)
@pytest.mark.parametrize("cohort", [2, 5])
def test_fedbuff_at_equal_speeds_is_uniform_fedavg(model: Any, cohort: int) -> None:
    buffered = run(FedBuff(buffer=cohort), model=model, participation=cohort)
    assert buffered.digest == run(UNIFORM, model=model, participation=cohort).digest
    assert len(buffered.history) == 5


def test_fedbuff_on_equal_devices_with_equal_work_is_uniform_fedavg() -> None:
    """Also where time passes: everybody has as many rows and the same device."""
    fed = helpers.federation((8, 8, 8, 8))
    options = {"participation": 3, "clock": None, "fleet": "uniform"}
    buffered, rounds = run(FedBuff(buffer=3), fed, **options), run(UNIFORM, fed, **options)
    assert buffered.history[-1]["virtual_s"] > 0
    assert buffered.digest == rounds.digest


def test_fedbuff_by_samples_is_fedavg_by_samples() -> None:
    assert same(run(FedBuff(buffer=5, weights="samples")), run(FedAvg(form="delta")))


@pytest.mark.parametrize("staleness", ["constant", "polynomial", "hinge"])
def test_fedasync_replaces_the_model(staleness: Any) -> None:
    """alpha = 1, one client, never stale: training on and on."""
    fed = helpers.federation((9,))
    assert same(run(FedAsync(alpha=1, rho=0, staleness=staleness), fed), run(FedAvg(), fed))


def test_fedasync_of_one_client_is_sequential_training() -> None:
    at = helpers.worker(FedAvg(), helpers.federation((9,)))
    weights = at.place.architectures["linear"].initial(0)
    for number in range(1, 6):
        weights = helpers.site(at, 0, number, number - 1).fit(weights).weights
    found = run(FedAsync(alpha=1, rho=0), helpers.federation((9,)))
    assert tr.digest(found.server.model) == tr.digest(weights)


@pytest.mark.parametrize("interval", ["1000", "100%"])
def test_fedfix_that_waits_for_the_slowest_is_fedavg(interval: str) -> None:
    options = {"clock": None, "fleet": "phones", "model": helpers.NORMED}
    fixed, rounds = run(FedFix(interval=interval), **options), run(FedAvg(form="delta"), **options)
    assert same(fixed, rounds)
    assert {lap["staleness"] for lap in fixed.timeline} == {0}


@pytest.mark.parametrize("interval", ["0.05", "30%"])
def test_fedfix_on_equal_devices_is_fedavg(interval: str) -> None:
    fed = helpers.federation((8, 8, 8))
    options = {"clock": None, "fleet": [Device(1e3, 1e5, 1e5)] * 3}
    assert run(FedFix(interval=interval), fed, **options).history[-1]["round"] == 5
    alike = run(FedFix(interval="100%"), fed, **options)
    assert same(alike, run(FedAvg(form="delta"), fed, **options))


def test_fedau_at_full_participation_is_uniform_fedavg() -> None:
    for model in (helpers.LINEAR, helpers.NORMED):
        assert same(run(FedAU(), model=model), run(UNIFORM, model=model))
    assert same(run(FedAU(cutoff=1)), run(UNIFORM))


def test_fedau_with_a_cutoff_of_one_weighs_everybody_alike() -> None:
    fed = helpers.federation()
    found = run(FedAU(cutoff=1), fed, participation=2, rounds=8)
    assert all(seen.mean == 1.0 for seen in found.server.seen.values())


def test_fedcompass_on_equal_devices_is_fedavg_with_step_alpha() -> None:
    """After the first single replies: one group, ``most`` steps each; at alpha = 1 FedAvg from there."""
    fed = helpers.federation((8, 8, 8, 8))
    clock = Fleet([Device(1e3, 1e9, 1e9)] * 4, Always(), [1.0] * 4)
    found = run(FedCompass(least=2, most=6, alpha=1.0), fed, rounds=7, clock=clock)
    assert [lap["steps"] for lap in found.timeline if lap["round"] > 4] == [6] * 12
    assert {lap["staleness"] for lap in found.timeline if lap["round"] > 4} == {0}
    before = run(FedCompass(least=2, most=6, alpha=1.0), fed, rounds=4, clock=clock).server.model
    at = helpers.worker(FedAvg(local_steps=6, form="delta"), fed)
    for version in range(4, 7):
        ends = [helpers.site(at, c, version - 2, version).fit(before).weights for c in range(4)]
        deltas = [tr.sub(end.params, before.params) for end in ends]
        total = deltas[0]
        total = tr.scale(total, 1 / 4)
        for delta in deltas[1:]:
            total = tr.axpy(1 / 4, delta, total)
        before = Weights(tr.add(before.params, total), ends[0].buffers)
    assert torch.allclose(vector(before.params), vector(found.server.model.params), rtol=0, atol=1e-7)


def test_fedasmu_without_a_newer_model_is_a_plain_job() -> None:
    """In rounds nothing is newer halfway, so devices send what FedAsync's do."""
    at = helpers.worker(FedASMU(local_epochs=3, batch_size=4))
    plain = helpers.worker(FedAvg(local_epochs=3, batch_size=4))
    method: Any = at.method
    for client in range(5):
        site, start = helpers.site(at, client), helpers.site(at, client).initial()
        _, half = method.client_update(Phase("train"), site, Down(start, 4), method.init_client(site))
        up, own = method.client_update(Phase("rest"), helpers.site(at, client), Down(start, 4), half)
        assert tr.digest(up.model) == tr.digest(helpers.site(plain, client).fit(start).weights)
        assert (own.gamma, own.upsilon, own.half) == (1.0, 0.5, None)


@dataclasses.dataclass(frozen=True)
class Fixed(FedASMU):
    """FedASMU whose alpha is fixed."""

    def weight(self, known: Merge, update: int, age: int) -> float:
        xi = 0.4 / (1 - 0.4)
        return xi / (1 + xi)


def test_fedasmu_with_a_fixed_weight_is_fedasync() -> None:
    options = {"clock": None, "fleet": "phones", "rounds": 12, "participation": 3}
    halved = run(Fixed(mu_b=0, meta_lr=0), **options)
    plain = run(FedAsync(alpha=0.4, staleness="constant", rho=0), **options)
    assert halved.server.version == 13
    # the second download makes jobs longer, so orders of arrival may differ: compare in rounds
    options = {"participation": 3, "schedule": "rounds", "rounds": 6}
    assert torch.allclose(
        vector(run(Fixed(mu_b=0, meta_lr=0), **options).server.model),
        vector(run(FedAsync(alpha=0.4, staleness="constant", rho=0), **options).server.model),
        rtol=0, atol=1e-6,
    )  # fmt: skip
    assert plain.history[-1]["round"] == 12


def test_dpsgd_on_a_complete_graph_is_uniform_fedavg() -> None:
    for model in (helpers.LINEAR, helpers.NORMED):
        nodes = run(DPSGD(), model=model)
        plain = run(FedAvg(weights="uniform"), model=model)
        params = {tr.digest(state.model.params) for state in nodes.states.values()}
        assert params == {tr.digest(plain.server.model.params)}


def test_dpsgd_orders() -> None:
    """cta mixes what was there before training: x_i+ = sum_j W_ij x_j + Delta_i, by hand on a ring of five."""
    fed = helpers.federation()
    one, two = (run(DPSGD(order="cta"), fed, rounds=r, topology="ring").states for r in (1, 2))
    at = helpers.worker(FedAvg(), fed)
    for i in range(5):
        near = [one[j].model.params for j in ((i - 1) % 5, i, (i + 1) % 5)]
        mean = tr.scale(tr.add(tr.add(near[0], near[1]), near[2]), 1 / 3)
        end = helpers.site(at, i, 2, 1).fit(one[i].model).weights.params
        expected = tr.add(mean, tr.sub(end, one[i].model.params))
        assert torch.allclose(vector(two[i].model.params), vector(expected), atol=1e-6)
    first = helpers.site(at, 0).fit(helpers.site(at, 0).initial()).weights.params
    assert torch.allclose(vector(one[0].model.params), vector(first), atol=1e-6)  # the mean of equal models


def test_dpsgd_alone_is_local_training(tmp_path: Path) -> None:
    """Two parts that cannot reach each other are two runs."""
    path = tmp_path / "edges.txt"
    path.write_text("0 1\n2 3\n3 4\n")
    apart = run(DPSGD(), topology=str(path), rounds=3).states
    changed = helpers.federation()
    changed.parts = [*changed.parts[:2], *(changed.parts[i] for i in (4, 2, 3))]
    other = run(DPSGD(), changed, topology=str(path), rounds=3).states
    assert tr.digest(apart[0]) == tr.digest(other[0])
    assert tr.digest(apart[2]) != tr.digest(other[2])


# --- equations -------------------------------------------------------------------------------------------------


def reply(client: int, update: Any, samples: int = 1, staleness: int = 0, rings: int = 0) -> Reply:
    found = helpers.reply(client, update, samples)
    return found._replace(staleness=staleness, rings=rings)


def weights(value: float) -> Weights:
    return Weights({"w": torch.full((3,), value, dtype=torch.float64)}, {})


def aggregate(method: Any, server: Any, replies: Sequence[Reply], fed: Any = None) -> Any:
    at = helpers.worker(method, fed)
    return method.aggregate(Phase("train"), at.host(3, "train"), server, replies, [r.job.client for r in replies])


def test_discounts() -> None:
    for kind in ("constant", "polynomial", "hinge"):
        assert discount(kind, 0, 0.7, 3) == 1.0
    assert discount("polynomial", 3, 0.5) == 0.5
    assert discount("constant", 100, 5.0) == 1.0
    assert [discount("hinge", tau, 10.0, 4) for tau in (4, 5, 6)] == [1.0, 1 / 11, 1 / 21]


def test_mixing_in() -> None:
    assert mix(weights(1.0), weights(3.0), 0.25).params["w"].tolist() == [1.5] * 3
    assert mix(weights(-0.0), weights(-0.0), 1.0).params["w"].signbit().all()


def test_fedasync_by_hand() -> None:
    method = FedAsync(alpha=0.5, a=1.0, max_staleness=3)
    server = method.init_server(helpers.worker(method).host(0, "init"))._replace(model=weights(0.0))
    stale = [reply(0, ModelUpdate(weights(4.0))), reply(1, ModelUpdate(weights(8.0)), staleness=1),
             reply(2, ModelUpdate(weights(1e9)), staleness=4)]  # fmt: skip
    assert aggregate(method, server, stale).model.params["w"].tolist() == [2.0 * 0.75 + 8.0 * 0.25] * 3


def test_fedbuff_by_hand() -> None:
    method = FedBuff(buffer=2, server_lr=0.5)
    server = method.init_server(helpers.worker(method).host(0, "init"))._replace(model=weights(1.0))
    both = [reply(0, DeltaUpdate(weights(4.0).params, {})), reply(1, DeltaUpdate(weights(6.0).params, {}), staleness=3)]
    assert aggregate(method, server, both).model.params["w"].tolist() == [1 + 0.5 * (4 / 2 + 6 * 0.5 / 2)] * 3
    against = [reply(0, ModelUpdate(weights(4.0))), reply(1, ModelUpdate(weights(6.0)), staleness=3)]
    current = aggregate(dataclasses.replace(method, form="model"), server, against)
    assert current.model.params["w"].tolist() == [1 + 0.5 * (3 / 2 + 5 * 0.5 / 2)] * 3


def test_fedfix_weighs_what_comes_seldom_more() -> None:
    fed = helpers.federation((10, 30))
    server = FedFix().init_server(helpers.worker(FedFix(), fed).host(0, "init"))._replace(model=weights(0.0))
    slow = [reply(1, DeltaUpdate(weights(2.0).params, {}), samples=30, rings=3)]
    assert aggregate(FedFix(), server, slow, fed).model.params["w"].tolist() == [3 * 0.75 * 2.0] * 3
    assert aggregate(FedFix(weights="uniform"), server, slow, fed).model.params["w"].tolist() == [3 * 0.5 * 2.0] * 3


@dataclasses.dataclass(frozen=True)
class Nothing(FedFix):
    """FedFix that learns nothing, and adds up each client's weight over all updates."""

    def init_server(self, host: Any) -> Any:
        return dict.fromkeys(range(host.clients), 0.0)

    def broadcast(self, phase: Any, server: Any, client: Any) -> Any:
        return None

    def client_update(self, phase: Any, site: Any, message: Any, state: Any) -> Any:
        return None, state

    def aggregate(self, phase: Any, host: Any, server: Any, replies: Any, cohort: Any) -> Any:
        shares = {r.job.client: max(1, r.rings) * r.samples / host.rows for r in replies}
        return {c: total + shares.get(c, 0.0) for c, total in server.items()}

    def global_model(self, server: Any) -> Any:
        return None

    def personal_model(self, site: Any, message: Any, state: Any) -> Any:
        return None


@dataclasses.dataclass(frozen=True)
class Fixed5(Instant):
    """Jobs of 1, 2.3, 3.9, 7 and 12.5 seconds."""

    times: tuple[float, ...] = (1.0, 2.3, 3.9, 7.0, 12.5)

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        return Trip(compute=self.times[job.client])


def test_fedfix_is_unbiased_in_the_long_run() -> None:
    """Over many ticks everybody's weights add up to its share of the rows, however slow it is."""
    at = helpers.worker(Nothing(interval="2"))
    memory = helpers.Memory()
    from consilience.core.evaluate import Evaluation
    from consilience.core.run import Setup
    from consilience.core.run import run as run_loop
    from consilience.measure.metrics import Standard

    ticks = 840
    setup = Setup(ticks, 5, Interval(2.0), Fixed5(), Standard(), memory, (), Evaluation(10**6, 0), 0)
    last = run_loop(Serial(at), setup)
    total = sum(helpers.SIZES)
    for client, size in enumerate(helpers.SIZES):
        assert last.server[client] / ticks == pytest.approx(size / total, rel=0.02)
    spans = {lap["client"]: lap["end"] - lap["start"] for lap in memory.timeline}
    assert spans[4] == pytest.approx(12.5)


def intervals(rounds: Sequence[bool], cutoff: int | None) -> list[float | None]:
    """The weight that a client has in each round of a history of participation, by the rule as it is written."""
    mean, times, gap, used = 1.0, 0, 0, []
    for here in rounds:
        used.append(mean if here else None)
        gap += 1
        if here or gap == cutoff:
            mean, times, gap = (times * mean + gap) / (times + 1), times + 1, 0
    return used


@settings(max_examples=60, deadline=None)
@given(history=st.lists(st.booleans(), min_size=1, max_size=40), cutoff=st.sampled_from([None, 1, 2, 3, 5]))
def test_fedau_intervals(history: list[bool], cutoff: int | None) -> None:
    """Client 0 takes part as the history says, client 1 always; the shares are those of the rule written out."""
    method = FedAU(cutoff=cutoff)
    at = helpers.worker(method, helpers.federation((6, 6)))
    host = at.host(0, "train")
    server = Server(weights(0.0), 0, {})
    zero, one = DeltaUpdate(weights(0.0).params, {}), DeltaUpdate(weights(1.0).params, {})
    for here, expected in zip(history, intervals(history, cutoff), strict=True):
        replies = [reply(0, one)] if here else []
        before = float(server.model.params["w"][0])
        server = method.aggregate(Phase("train"), host, server, [*replies, reply(1, zero)], [])
        moved = float(server.model.params["w"][0]) - before
        assert moved == pytest.approx((expected or 0.0) / 2)
    assert server.updates == len(history)
    assert server.seen[1] == Seen(1.0, len(history), len(history))


def test_fedau_counts_a_client_that_comes_every_third_round_threefold() -> None:
    used = [w for w in intervals([False, False, True] * 4, None) if w is not None]
    assert used == [1.0, 3.0, 3.0, 3.0]


def test_fedasmu_weights_stay_in_their_bounds() -> None:
    method = FedASMU()
    for known in (Merge(1.0, 0.5, 0.0, 0.0, 0, 0), Merge(50.0, 0.0, 3.0, 0.0, 0, 0), Merge(1.0, 0.5, -9.0, 0.0, 0, 0)):
        for update, age in ((1, 1), (7, 4), (1000, 90)):
            assert 0 <= method.weight(known, update, age) < 1
    assert method.weight(Merge(1.0, 0.5, 0.0, 0.0, 0, 0), 4, 4) == pytest.approx((1 / 4) / (1 + 1 / 4))


def test_fedasmu_never_mixes_backwards() -> None:
    """upsilon so large that phi < 0: nothing is mixed in."""
    method = FedASMU()
    own = Own(1.0, 50.0, weights(1.0), 3, None, None)
    mixed, toward, beta = method._mixed(Down(weights(9.0), 5), own)
    assert (mixed is own.half, toward, beta) == (True, None, 0.0)
    assert method._mixed(Down(weights(9.0), 3), own._replace(upsilon=0.0))[2] == 0.0  # not newer


@settings(max_examples=40, deadline=None)
@given(gamma=st.floats(0.3, 2), upsilon=st.floats(0.05, 0.9), fresh=st.integers(2, 40), age=st.integers(1, 5))
def test_fedasmu_learns_along_the_gradient(gamma: float, upsilon: float, fresh: int, age: int) -> None:
    """A step on gamma and upsilon changes beta as the numerical derivative says, for a slope dF/dbeta of 1."""
    method = FedASMU(meta_lr=1e-3, mu_b=0.7)
    old = max(1, fresh - age)

    def beta(g: float, u: float) -> float:
        scaled = 0.7 * method._phi(fresh, old, g, u)
        return scaled / (1 + scaled)

    state = Own(gamma, upsilon, weights(0.0), old, None, None)
    new = method._learned(Down(weights(0.0), fresh), state, beta(gamma, upsilon), 1.0)
    h = 1e-6
    slopes = ((beta(gamma + h, upsilon) - beta(gamma - h, upsilon)) / (2 * h),
              (beta(gamma, upsilon + h) - beta(gamma, upsilon - h)) / (2 * h))  # fmt: skip
    assert new[0] == pytest.approx(gamma - 1e-3 * slopes[0], rel=1e-6)
    assert new[1] == pytest.approx(upsilon - 1e-3 * slopes[1], rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(factor=st.floats(0.5, 2), decay=st.floats(0.1, 1), update=st.integers(1, 40), age=st.integers(1, 9))
def test_fedasmu_s_server_learns_along_the_gradient(factor: float, decay: float, update: int, age: int) -> None:
    method = FedASMU(meta_lr=1e-3, mu_a=1.3)

    def alpha(f: float, d: float, s: float) -> float:
        return method.weight(Merge(f, d, s, 0.0, 0, 0), update, age)

    here = alpha(factor, decay, 0.1)
    known = Merge(factor, decay, 0.1, here, update, age)
    new = method._taught(known, 2.0)
    h, dloss = 1e-6, 2.0 / (1 - here)
    parts = [
        (alpha(factor + h, decay, 0.1) - alpha(factor - h, decay, 0.1)) / (2 * h),
        (alpha(factor, decay + h, 0.1) - alpha(factor, decay - h, 0.1)) / (2 * h),
        (alpha(factor, decay, 0.1 + h) - alpha(factor, decay, 0.1 - h)) / (2 * h),
    ]
    got = (new.factor - factor, new.decay - decay, new.shift - 0.1)
    assert got == pytest.approx([-1e-3 * dloss * part for part in parts], rel=1e-4, abs=1e-12)
    assert method._taught(known, None) == known
    assert method._taught(known, math.nan) == known


def test_fedasmu_learns_nothing_from_a_reply_that_was_left_out() -> None:
    method = FedASMU(max_age=1)
    server = method.init_server(helpers.worker(method).host(0, "init"))
    server = server._replace(version=5, devices={0: Merge(1.0, 0.5, 0.0, 0.3, 2, 1)})
    late = helpers.reply(0, Up(server.model, None))._replace(staleness=3)
    after = method.aggregate(method.program()[1], None, server, [late], [0])  # type: ignore[arg-type]
    assert method._taught(after.devices[0], 2.0) == after.devices[0]


def test_bad_options() -> None:
    for cls, options in (
        (FedAsync, {"alpha": 0}), (FedAsync, {"staleness": "linear"}), (FedAsync, {"form": "delta"}),
        (FedBuff, {"buffer": 0}), (FedFix, {"interval": "soon"}), (FedCompass, {"least": 9, "most": 3}),
        (FedASMU, {"request": 1.0}), (FedAU, {"cutoff": 0}), (DPSGD, {"order": "abc"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            cls.make(options)


# --- what is in flight is computed together ----------------------------------------------------------------------


class Counting(Serial):
    """Remembers how many jobs were computed together."""

    def __init__(self, worker: Any) -> None:
        super().__init__(worker)
        self.batches: list[int] = []

    def collect(self, jobs: Sequence[Job], tickets: Sequence[int]) -> Any:
        self.batches.append(len(jobs))
        return super().collect(jobs, tickets)


def simulated(executor: Executor, schedule: Any, rounds: int = 30) -> Any:
    from consilience.core.run import Setup
    from consilience.core.run import run as run_loop
    from consilience.measure.metrics import Standard

    memory = helpers.Memory()
    clock = Fleet([Device(1.0, 1e6, 1e6, 0.01, rate=100.0 + 7 * c) for c in range(5)], Always(), [1.0] * 5)
    run_loop(executor, Setup(rounds, 5, schedule, clock, Standard(), memory, checkpoint_every=0))
    return memory


def test_asynchronous_jobs_are_computed_together() -> None:
    executor = Counting(helpers.worker(FedBuff(buffer=2)))
    simulated(executor, Buffered(2))
    assert sum(executor.batches) / len(executor.batches) > 2


@dataclasses.dataclass(frozen=True)
class Boastful(FedBuff):
    """Promises more samples than it computes."""

    def least_samples(self, phase: Any, rows: int, steps: int | None) -> int:
        return 2 * self.one_fit(rows, steps)


@dataclasses.dataclass(frozen=True)
class Modest(FedBuff):
    """Promises nothing."""

    def least_samples(self, phase: Any, rows: int, steps: int | None) -> int:
        return 0


def test_what_is_promised_changes_only_what_is_computed_together() -> None:
    plain, modest = Counting(helpers.worker(FedBuff(buffer=2))), Counting(helpers.worker(Modest(buffer=2)))
    one, two = simulated(plain, Buffered(2)), simulated(modest, Buffered(2))
    assert [tr.digest(line["global"]["loss"]) for line in one.lines] == [
        tr.digest(line["global"]["loss"]) for line in two.lines
    ]
    assert one.timeline == two.timeline
    assert len(modest.batches) > len(plain.batches)


def test_a_broken_promise_is_told() -> None:
    with pytest.raises(ConsilienceError, match="fewer than least_samples says"):
        simulated(Serial(helpers.worker(Boastful(buffer=2))), Buffered(2))


def test_a_run_with_devices_from_python_resumes_as_itself(tmp_path: Path) -> None:
    devices = [Device(1e4, 1e6, 1e6)] * 5
    options = {"clock": None, "fleet": devices, "out": tmp_path / "run", "checkpoint_every": 1}
    done = run(FedBuff(buffer=2), **options)
    again = run(FedBuff(buffer=2), **{**options, "fleet": list(devices)}, resume=True)
    assert again.digest == done.digest
    with pytest.raises(CheckpointError, match="another"):
        run(FedBuff(buffer=2), **{**options, "fleet": "phones"}, resume=True)


def test_killed_with_jobs_in_flight(tmp_path: Path) -> None:
    """SIGKILL in the middle of an asynchronous run, with processes; resumed, it ends with the same bits."""
    options = ["--data", "digits", "--clients", "8", "--model", "mlp:16", "--rounds", "12", "--participation", "5",
               "--fleet", "phones", "--drops", "0.1", "--checkpoint-every", "1", "--eval-clients-every",
               "0"]  # fmt: skip
    run = ["run", "fedbuff:buffer=3", *options, "--workers", "2"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert command.here(*run, "--out", "straight", cwd=tmp_path).returncode == 0
    died = command.consilience(*run, "--out", "killed", cwd=tmp_path, env={"CONSILIENCE_FAILPOINT": "aggregate:7"})
    assert died.returncode == -9
    snapshot, _ = read_snapshot(killed)
    assert snapshot.flights or snapshot.arrived
    assert command.here("resume", "killed", cwd=tmp_path).returncode == 0
    for name in ("digest.txt", "timeline.jsonl"):
        assert (killed / name).read_text() == (straight / name).read_text()
