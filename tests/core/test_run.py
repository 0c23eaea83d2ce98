"""The server loop: resuming, refusing, counting, and that judging changes nothing."""

from __future__ import annotations

import json
import shutil
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from helpers import (
    LINEAR,
    NOISY,
    NORMED,
    Breaks,
    BreaksWhenJudged,
    Careless,
    Chosen,
    Gossip,
    Memory,
    Remembers,
    SpoiledScaffold,
    SpoiledTwice,
    Spoiler,
    federation,
    loop,
    worker,
)

from consilience.core import tree as tr
from consilience.core.encode import decode, encode
from consilience.core.errors import CheckpointError, ClientError, ConfigError
from consilience.core.evaluate import Evaluation
from consilience.core.events import Instant
from consilience.core.messages import Broadcast, ClientInfo, DeltaUpdate, Job, Model, ModelUpdate, Refusal, Stat
from consilience.core.method import Method, Phase
from consilience.core.run import run as run_loop
from consilience.core.setup import Setup
from consilience.core.site import Site
from consilience.core.snapshot import Snapshot
from consilience.core.training import option
from consilience.core.tree import Tree, record
from consilience.core.worker import Call, Worker
from consilience.execute.serial import Serial
from consilience.folder import digest_text
from consilience.measure.metrics import Standard
from consilience.methods.fedavg import FedAvg
from consilience.methods.local import Local
from consilience.methods.moon import Moon
from consilience.methods.scaffold import Down, Scaffold, Up
from consilience.schedule.immediate import Immediate
from consilience.schedule.rounds import Rounds
from consilience.simulate import run

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}
METHODS: list[Method] = [FedAvg(**USUAL), Scaffold(**USUAL), Moon(**USUAL), Local(**USUAL)]
by_name = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def final(memory: Memory) -> str:
    last = memory.snapshots[max(memory.snapshots)]
    return tr.digest(last)


@dataclass(frozen=True)
class Stopwatch(FedAvg):
    """FedAvg that notes when rounds are combined, and takes its time over it."""

    times: ClassVar[list[float]] = []

    def aggregate(self, phase: Any, host: Any, server: Any, replies: Any, cohort: Any) -> Any:
        self.times.append(time.perf_counter())
        time.sleep(0.05)
        return super().aggregate(phase, host, server, replies, cohort)


def test_a_line_has_the_seconds_of_its_own_round() -> None:
    """Not those of the next judged round, during which it is finished."""
    Stopwatch.times.clear()
    began = time.perf_counter()
    found = run(Stopwatch(), federation(), rounds=4, eval_every=2, checkpoint_every=0, executor="serial").history
    assert [line["round"] for line in found] == [2, 4]
    assert found[0]["wall_s"] < Stopwatch.times[2] - began
    assert found[1]["wall_s"] > Stopwatch.times[3] - Stopwatch.times[0]


# --- resuming --------------------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("evaluation", [Evaluation(), Evaluation(2, 1, 3), Evaluation(3, 2)])
def test_a_run_goes_on_from_any_round_with_the_same_bits(method: Method, evaluation: Evaluation) -> None:
    straight = loop(worker(method, model=NOISY), 5, cohort=3, evaluation=evaluation)
    for version in (1, 3, 4):
        snapshot = decode(encode(straight.snapshots[version]))  # as from a file
        resumed = loop(worker(method, model=NOISY), 5, cohort=3, evaluation=evaluation, resume=snapshot)
        assert final(resumed) == final(straight)
        tail = [line for line in straight.lines if line["round"] > version]
        assert json.dumps(resumed.lines) == json.dumps(tail)
        assert resumed.clients == [row for row in straight.clients if row["round"] > version]


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    short, long = (loop(worker(Scaffold(**USUAL), model=NOISY), rounds, cohort=3) for rounds in (2, 4))
    assert tr.digest(short.snapshots[2].server) == tr.digest(long.snapshots[2].server)
    assert short.snapshots[2].totals == long.snapshots[2].totals


def finished(folder: Path, method: Method, **more: Any) -> Any:
    return run(
        method, federation(), model=NOISY, rounds=5, participation=3, executor="serial", checkpoint_every=2,
        out=folder, **more,
    )  # fmt: skip


def without_time(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall_s"} for line in lines]


def cut_back(folder: Path) -> None:
    """Only the checkpoint of round 4 is left, as after a crash in round 5."""
    for path in (folder / "checkpoint").glob("00000005*"):
        path.unlink()
    (folder / "digest.txt").unlink()


@by_name
def test_a_folder_is_resumed_with_the_same_bits(method: Method, tmp_path: Path) -> None:
    straight = finished(tmp_path / "a", method)
    assert (tmp_path / "a" / "digest.txt").read_text() == straight.digest
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    cut_back(tmp_path / "b")
    resumed = finished(tmp_path / "b", method, resume=True)
    assert resumed.digest == straight.digest
    assert (tmp_path / "b" / "digest.txt").read_text() == straight.digest
    for name in ("history.jsonl", "clients.jsonl"):
        assert without_time(tmp_path / "b" / name) == without_time(tmp_path / "a" / name)


def test_a_folder_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    straight = finished(tmp_path / "a", FedAvg(**USUAL))
    shutil.rmtree(tmp_path / "a" / "checkpoint")
    assert finished(tmp_path / "a", FedAvg(**USUAL), resume=True).digest == straight.digest
    assert len(without_time(tmp_path / "a" / "history.jsonl")) == 5


def test_a_folder_is_not_overwritten_nor_resumed_on_other_data(tmp_path: Path) -> None:
    finished(tmp_path / "a", FedAvg(**USUAL))
    with pytest.raises(ConfigError, match="already holds"):
        finished(tmp_path / "a", FedAvg(**USUAL))
    with pytest.raises(CheckpointError, match="other data"):
        run(FedAvg(), federation((8, 9)), model=NOISY, rounds=5, executor="serial", out=tmp_path / "a", resume=True)
    with pytest.raises(CheckpointError, match="no run"):
        finished(tmp_path / "none", FedAvg(), resume=True)


def test_a_folder_is_not_resumed_on_other_inputs(tmp_path: Path) -> None:
    finished(tmp_path / "a", FedAvg(**USUAL))
    other = federation()
    other.parts[0].train.x.add_(1.0)
    with pytest.raises(CheckpointError, match="other data"):
        run(FedAvg(**USUAL), other, model=NOISY, rounds=5, executor="serial", out=tmp_path / "a", resume=True)


@pytest.mark.parametrize("change", [{"seed": 1}, {"participation": 2}, {"model": LINEAR}], ids=lambda c: next(iter(c)))
def test_a_folder_is_not_resumed_as_another_run(tmp_path: Path, change: dict[str, Any]) -> None:
    finished(tmp_path / "a", FedAvg(**USUAL))
    same: dict[str, Any] = {"model": NOISY, "participation": 3, "rounds": 6, "executor": "serial"}
    with pytest.raises(CheckpointError):
        run(FedAvg(**USUAL), federation(), out=tmp_path / "a", resume=True, **{**same, **change})


@pytest.mark.parametrize("method", [FedAvg(lr=0.2), Scaffold(**USUAL)], ids=lambda m: m.name)
def test_a_folder_is_not_resumed_with_another_method(tmp_path: Path, method: Method) -> None:
    finished(tmp_path / "a", FedAvg(**USUAL))
    cut_back(tmp_path / "a")
    with pytest.raises(CheckpointError):
        finished(tmp_path / "a", method, resume=True)


def test_a_history_shorter_than_its_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    straight = finished(tmp_path / "a", FedAvg(**USUAL))
    cut_back(tmp_path / "a")
    history = tmp_path / "a" / "history.jsonl"
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:2]))  # the disk had not got the rest
    try:
        resumed = finished(tmp_path / "a", FedAvg(**USUAL), resume=True)
    except CheckpointError:
        return  # saying so is right; leaving rounds out is not
    assert resumed.digest == straight.digest


# --- bad clients -----------------------------------------------------------------------------------------------


def test_a_bad_update_costs_its_own_client_only() -> None:
    everybody = tuple(range(5))
    bad = run(Spoiler(until=1, **USUAL), federation(), model=LINEAR, rounds=3, executor="serial")
    assert bad.refused == [(1, Refusal(1, "model.params.head.weight", "holds numbers that are not finite"))]
    spoiled = loop(worker(Spoiler(until=1, **USUAL)), 1).snapshots[1]
    without = loop(worker(Chosen(who=(0, 2, 3, 4), **USUAL)), 1).snapshots[1]
    assert tr.digest(spoiled.server) == tr.digest(without.server)
    assert tr.digest(spoiled.server) != tr.digest(loop(worker(Chosen(who=everybody, **USUAL)), 1).snapshots[1].server)
    assert spoiled.admitted == {0: 1, 2: 1, 3: 1, 4: 1}
    assert spoiled.numbers == dict.fromkeys(everybody, 1)


def test_a_round_in_which_nobody_is_good_changes_nothing() -> None:
    at = worker(Spoiler(bad=0, **USUAL), federation((9,)))
    memory = loop(at, 2)
    assert tr.digest(memory.snapshots[2].server.model) == tr.digest(LINEAR.initial(0))
    assert len(memory.dropped) == 2
    assert memory.snapshots[2].admitted == {}


def test_refusals_are_written_once_even_when_a_run_is_resumed(tmp_path: Path) -> None:
    straight = finished(tmp_path / "a", Spoiler(bad=1, **USUAL))
    written = without_time(tmp_path / "a" / "refused.jsonl")
    assert written == [{"round": version, **refusal._asdict()} for version, refusal in straight.refused]
    assert {line["client"] for line in written} == {1}
    cut_back(tmp_path / "a")
    resumed = finished(tmp_path / "a", Spoiler(bad=1, **USUAL), resume=True)
    assert without_time(tmp_path / "a" / "refused.jsonl") == written
    assert resumed.refused == straight.refused


def test_state_of_a_refused_client_rolls_back() -> None:
    memory = loop(worker(SpoiledScaffold(**USUAL)), 2)
    assert 1 not in memory.snapshots[1].states
    assert set(memory.snapshots[1].states) == {0, 2, 3, 4}
    assert 1 in memory.snapshots[2].states


def test_new_state_is_pending_until_its_job_is_admitted() -> None:
    executor = Serial(worker(Remembers()))
    jobs = [Job(10 + client, client, 1, 0, 0, 0) for client in (0, 1)]
    message = Broadcast(LINEAR.initial(0))
    list(executor.collect(jobs, [executor.submit(job, message) for job in jobs]))
    assert executor.states() == {}
    assert executor.pending() == {10: {"count": 1}, 11: {"count": 1}}
    executor.settle(jobs[:1], jobs[1:])
    assert executor.states() == {0: {"count": 1}}
    assert executor.pending() == {}
    again = [job._replace(id=20 + job.client, number=2) for job in jobs]
    list(executor.collect(again, [executor.submit(job, message) for job in again]))
    executor.settle(again)
    assert executor.states() == {0: {"count": 2}, 1: {"count": 1}}


def test_a_client_that_fails_is_named_with_its_own_traceback() -> None:
    with pytest.raises(ClientError) as caught:
        run(Breaks(), federation(), model=LINEAR, rounds=3, executor="serial")
    assert str(caught.value) == "client 1, round 2, phase train, in client_update: ValueError: boom"
    assert "in broken_loss" in caught.value.trace


@pytest.mark.parametrize("stage", ["init_client", "personal_model", "client_update", "trained_model"])
def test_a_failure_in_judging_names_its_own_stage(stage: str) -> None:
    at = worker(BreaksWhenJudged(stage=stage, **USUAL))
    call = Call("judge", (Job(-1, 3, 1, 0, 4, 0), None, True), Broadcast(LINEAR.initial(0)))
    with pytest.raises(ClientError, match=f"client 3, round 5, phase train, in {stage}: ValueError: boom"):
        at.run(call)
    with pytest.raises(ClientError, match=f"in {stage}: ValueError: boom"):
        at.run(Call("train", (Job(0, 3, 1, 0, 4, 0, judge=True), None), call.shared))


def test_a_client_refused_in_one_chain_is_not_in_the_rounds_next() -> None:
    memory = loop(worker(SpoiledTwice(**USUAL)), 2)
    assert [refusal.client for _, refusal in memory.dropped] == [1, 1]
    assert memory.snapshots[2].admitted == {0: 2, 2: 2, 3: 2, 4: 2}
    alone = loop(worker(SpoiledTwice(bad=0, **USUAL), federation((9,))), 2)  # nobody is left for the second chain
    assert alone.snapshots[2].version == 2
    assert alone.snapshots[2].admitted == {}


@pytest.mark.parametrize(("what", "who"), [("message", "client 1"), ("state", "client 1"), ("server", "the server")])
@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_what_was_given_may_not_be_changed_in_place(what: str, who: str, executor: str) -> None:
    with pytest.raises(ClientError, match=f"{who}.* changed in place"):
        run(Careless(what=what, **USUAL), federation(), model=LINEAR, rounds=3, executor=executor, workers=1)


# --- counting --------------------------------------------------------------------------------------------------


def test_bytes_counted_are_bytes_encoded() -> None:
    weights = NOISY.initial(0)
    params = weights.params
    cases = [
        (FedAvg(**USUAL), Broadcast(weights), ModelUpdate(weights)),
        (FedAvg(form="delta", **USUAL), Broadcast(weights), DeltaUpdate(params, weights.buffers)),
        (Scaffold(**USUAL), Down(weights, params), Up(params, params, weights.buffers)),
    ]
    for method, down, up in cases:
        totals = loop(worker(method, model=NOISY), 3, cohort=2).snapshots[3].totals
        assert (totals.bytes_down, totals.bytes_up) == (6 * len(encode(down)), 6 * len(encode(up)))
    refused = loop(worker(Spoiler(**USUAL)), 1).snapshots[1].totals
    assert refused.bytes_up == 5 * len(encode(ModelUpdate(LINEAR.initial(0))))  # they were sent all the same


def test_work_counted_is_work_done() -> None:
    totals = loop(worker(FedAvg(batch_size=4, local_epochs=2)), 2).snapshots[2].totals
    assert totals.samples == 2 * 2 * 55
    assert totals.steps == 2 * 2 * (2 + 3 + 5 + 2 + 3)
    fed = federation()
    fed.unseen = frozenset({2})
    assert loop(worker(FedAvg(batch_size=4), fed), 1).snapshots[1].totals.samples == 35


@pytest.mark.parametrize("control", ["1", "2"])
def test_the_training_loss_is_that_of_training(control: Any) -> None:
    scaffold = loop(worker(Scaffold(control=control, **USUAL)), 1).lines[0]
    plain = loop(worker(FedAvg(form="delta", weights="uniform", **USUAL)), 1).lines[0]
    if control == "2":
        assert scaffold["train_loss"] == plain["train_loss"]
    else:  # weighted by samples, of which each client computed twice as many
        assert scaffold["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-12)


# --- judging ---------------------------------------------------------------------------------------------------


def test_judging_does_not_change_the_run() -> None:
    found = set()
    for evaluation in (Evaluation(), Evaluation(2, 1), Evaluation(3, 0), Evaluation(1, 1, 2, chunk=7)):
        last = loop(worker(Scaffold(**USUAL), model=NOISY), 4, cohort=3, evaluation=evaluation).snapshots[4]
        found.add(digest_text(last, []))
    assert len(found) == 1
    fed = federation()
    fed.test = None
    assert digest_text(loop(worker(Scaffold(**USUAL), fed, NOISY), 4, cohort=3).snapshots[4], []) in found


def test_lines_come_when_they_are_asked_for() -> None:
    memory = loop(worker(FedAvg()), 7, evaluation=Evaluation(3, 6))
    assert [line["round"] for line in memory.lines] == [3, 6, 7]
    assert ["clients" in line for line in memory.lines] == [False, True, True]
    assert [row["client"] for row in memory.clients] == [0, 1, 2, 3, 4] * 2


def test_only_the_rounds_own_participants_are_measured_before_and_after() -> None:
    memory = loop(worker(Chosen(who=(0, 2))), 4, evaluation=Evaluation(2, 1))
    rows = [row for row in memory.clients if row["round"] == 2]
    assert [row["client"] for row in rows if "before" in row] == [0, 2]
    changing = loop(worker(FedAvg()), 5, cohort=2, evaluation=Evaluation(2, 1))
    for version in (2, 4):
        before, after = (changing.snapshots[v].numbers for v in (version - 1, version))
        cohort = [client for client in after if after[client] != before.get(client)]
        rows = [row["client"] for row in changing.clients if row["round"] == version and "before" in row]
        assert rows == cohort  # not those of the round before as well


def test_the_last_line_judges_everybody_and_unseen_clients_apart() -> None:
    fed = federation()
    fed.unseen = frozenset({4})
    memory = loop(worker(FedAvg(), fed), 2)
    rows = {row["client"]: row for row in memory.clients if row["round"] == 2}
    assert set(rows) == set(range(5))
    assert not rows[4]["seen"]
    assert "after" not in rows[4]
    line = memory.lines[-1]
    assert line["clients"]["mean"] == pytest.approx(sum(rows[c]["accuracy"] for c in range(4)) / 4)
    assert line["unseen"]["mean"] == rows[4]["accuracy"]
    assert line["clients"]["after"]["mean"] == pytest.approx(sum(rows[c]["after"] for c in range(4)) / 4)


def test_the_global_line_does_not_depend_on_how_rows_are_chunked() -> None:
    one, two = (loop(worker(FedAvg()), 2, evaluation=Evaluation(chunk=chunk)).lines[-1]["global"] for chunk in (4, 500))
    assert one["accuracy"] == two["accuracy"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


def test_a_model_that_has_diverged_is_still_judged() -> None:
    start = LINEAR.initial(0)
    huge = start._replace(params={name: p.sign() * 3e38 for name, p in start.params.items()})  # finite; scores are not
    result = run(FedAvg(), federation(), model=LINEAR, rounds=2, executor="serial", init=huge)
    assert [line["round"] for line in result.history] == [1, 2]
    assert len(result.digest.splitlines()) == 3


# --- among neighbours


def gossip(method: Method, model: Any = NORMED) -> Memory:
    return loop(worker(method, model=model), 2)


def test_everybody_mixing_with_everybody_is_uniform_fedavg() -> None:
    found = gossip(Gossip(**USUAL), LINEAR).snapshots[2]
    plain = loop(worker(FedAvg(weights="uniform", **USUAL)), 2).snapshots[2]
    assert found.states.keys() == set(range(5))
    for state in found.states.values():
        assert tr.digest(state) == tr.digest(plain.server.model)
    assert found.totals.bytes_up == found.totals.bytes_down == 2 * 5 * 4 * len(encode(LINEAR.initial(0).params))


def test_neighbours_may_keep_their_buffers() -> None:
    kept, plain = gossip(Gossip(buffers="local", **USUAL)), gossip(Gossip(**USUAL))
    assert tr.digest(kept.snapshots[2].states[0].state) == tr.digest(plain.snapshots[2].states[0])


@dataclass(frozen=True)
class MixFirst(Gossip):
    """Neighbours mix before they train, so that in round 1 nobody has a state yet."""

    def program(self) -> tuple[Phase, ...]:
        return tuple(reversed(super().program()))


def test_who_mixes_before_training_may_keep_its_buffers_too() -> None:
    kept, plain = gossip(MixFirst(buffers="local", **USUAL)), gossip(MixFirst(**USUAL))
    assert tr.digest(kept.snapshots[2].states[0].state) == tr.digest(plain.snapshots[2].states[0])


# --- who takes part --------------------------------------------------------------------------------------------


def test_a_method_may_choose_its_clients_and_name_them_with_numpy() -> None:
    plain, numpy = (loop(worker(Chosen(who=(3, 1), numpy=numpy, **USUAL), model=NOISY), 2) for numpy in (False, True))
    assert set(plain.snapshots[2].numbers) == {1, 3}
    assert final(plain) == final(numpy)
    encode(numpy.snapshots[2])  # and it can be saved


def test_unseen_clients_never_train_and_cohorts_change() -> None:
    fed = federation()
    fed.unseen = frozenset({0, 3})
    memory = loop(worker(FedAvg(), fed), 12, cohort=2)
    assert set(memory.snapshots[12].numbers) == {1, 2, 4}
    assert sum(memory.snapshots[12].numbers.values()) == 24


def test_runs_do_not_touch_torchs_generator_or_thread_count() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    run(Moon(), federation(), model=NOISY, rounds=2, executor="serial")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == 2


class Watching(Serial):
    """Counts the broadcasts that are still in memory when a round is settled."""

    def __init__(self, at: Worker) -> None:
        super().__init__(at)
        self.seen: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def submit(self, job: Job, message: Any, *, resumes: bool = False) -> int:
        self.seen.append(weakref.ref(message.model.params["head.weight"]))
        return super().submit(job, message, resumes=resumes)

    def settle(self, admitted: Any, refused: Any = ()) -> None:
        self.alive.append(len({id(ref()) for ref in self.seen if ref() is not None}))
        super().settle(admitted, refused)


class Forgetful(Memory):
    def checkpoint(self, snapshot: Snapshot) -> None: ...


def test_broadcasts_of_past_rounds_are_let_go() -> None:
    executor = Watching(worker(FedAvg()))
    setup = Setup(10, 5, Rounds(), Instant(), Standard(), Forgetful(), checkpoint_every=0)
    run_loop(executor, setup)
    assert max(executor.alive) <= 3, executor.alive


@record
class Named(NamedTuple):
    """A message whose names say as much as its tensors."""

    model: Model
    parts: Stat


@dataclass(frozen=True)
class Naming(FedAvg):
    """Tells each client its number: by a name, or by a number's type."""

    kind: str = option("name", "name or type")

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Named:
        parts = {client.id: server.model.params} if self.kind == "name" else (1, 1.0, True, 0.0, -0.0)[client.id]
        return Named(server.model, parts)

    def init_client(self, site: Site) -> Tree:
        return ""

    def client_update(self, phase: Phase, site: Site, message: Named, state: Tree) -> tuple[Tree, Tree]:
        said = message.parts if self.kind == "type" else list(message.parts)
        return super().client_update(phase, site, message, state)[0], repr(said)


@pytest.mark.parametrize("kind", ["name", "type"])
def test_messages_of_the_same_tensors_under_other_names_are_different(kind: str) -> None:
    found = loop(worker(Naming(**USUAL, kind=kind)), 1).snapshots[1].states
    wanted = [f"[{i}]" for i in range(5)] if kind == "name" else ["1", "1.0", "True", "0.0", "-0.0"]
    assert list(found.values()) == wanted


def test_groups_combined_at_one_instant_do_not_hide_that_a_checkpoint_is_due() -> None:
    """Three replies arrive together, so that versions go 3, 6, 9; every second wants a checkpoint."""
    saved: list[int] = []

    class Watched(Memory):
        def checkpoint(self, snapshot: Snapshot) -> None:
            saved.append(snapshot.version)

    setup = Setup(10, 3, Immediate(), Instant(), Standard(), Watched(), checkpoint_every=2)
    run_loop(Serial(worker(FedAvg(**USUAL))), setup)
    assert saved == [3, 6, 9, 10]
