"""A Ray cluster of two nodes on this machine: the same bits as here, through lost workers, lost nodes and errors."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR, NOISY, Breaks, Dies, federation, loop, worker

from consilience import beside
from consilience.beside import Changes, OnRay, write_files
from consilience.cli import main
from consilience.core import tree as tr
from consilience.core.encode import ALIGNMENT
from consilience.core.errors import ClientError, ConfigError, WorkerError
from consilience.core.method import Method
from consilience.execute import ray as on_ray
from consilience.execute.pooled import Pooled
from consilience.execute.ray import Ray, _Hand, connected, pack, unpack, versions
from consilience.methods.fedavg import FedAvg
from consilience.methods.scaffold import Scaffold
from consilience.simulate import run

ray = on_ray.library()
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of which it has many
USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}
MANY = federation([3 + (7 * i) % 11 for i in range(100)])
"""Enough for two workers to be given whole blocks."""


class Nodes:
    """A cluster of two nodes of one CPU each: one that stays, and one that can be killed and comes back."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        health = {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 3}
        self.cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000, "_system_config": health},
        )
        self.second: Any = None

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def whole(self) -> Nodes:
        """With both nodes."""
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        return self

    def kill(self) -> None:
        """SIGKILL all processes of the second node."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None


@pytest.fixture(scope="module")
def running() -> Iterator[Nodes]:
    nodes = Nodes().whole()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with connected(nodes.address):
                yield nodes
    finally:
        nodes.cluster.shutdown()


@pytest.fixture
def nodes(running: Nodes) -> Nodes:
    """Both nodes and no other: for a while after its end a killed one still counts, and its CPU would be waited for."""
    whole = running.whole()
    within(60, lambda: on_ray.cpus() == 2, "a cluster of two CPUs")
    return whole


def within(seconds: float, true: Callable[[], bool], what: str) -> None:
    """Wait until something is true. A test fails rather than wait for ever."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} did not come within {seconds:.0f} s"
        time.sleep(0.1)


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each lost worker had been given."""
    found: list[int] = []
    inner = Pooled._lose

    def noted(self: Any, hand: Any, why: str) -> None:
        found.append(len(hand.busy))
        inner(self, hand, why)

    monkeypatch.setattr(Pooled, "_lose", noted)
    return found


def serial(method: Method, **options: Any) -> str:
    return run(method, model=NOISY, executor="serial", **options).digest


class Killing(Ray):
    """Waits for all its actors before it begins, and kills the second node when all are at work in the second round,
    or (``between``) when none is."""

    nodes: Nodes
    between = False
    summed = 0

    def begin(self, call: Any) -> int:
        while len(self._hands) < self._count and self.nodes.second is not None:
            self._wait()
        if self.between and call.name == "train" and call.args[0].version == 1 and self.nodes.second is not None:
            self.nodes.kill()
        return super().begin(call)

    def _read(self, *answer: Any) -> Any:
        at_work = self.moved.result_bytes and all(hand.busy for hand in self._hands)
        if at_work and not self.between and self.nodes.second is not None:
            self.nodes.kill()
        return super()._read(*answer)

    def sums(self, jobs: Any) -> Any:
        found = super().sums(jobs)
        Killing.summed += found is not None
        return found


KILLED: dict[str, tuple[Method, Any, bool]] = {
    "fedavg": (FedAvg(**USUAL), federation(), False),
    "scaffold": (Scaffold(**USUAL), federation(), False),
    "scaffold-in-blocks": (Scaffold(**USUAL), MANY, False),
    "between-rounds": (FedAvg(**USUAL), federation(), True),
}


@pytest.mark.parametrize("case", KILLED)
def test_a_node_killed_in_mid_run_changes_nothing(
    nodes: Nodes,
    lost: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    case: str,
) -> None:
    method, clients, between = KILLED[case]
    monkeypatch.setattr(on_ray, "Ray", Killing)
    monkeypatch.setattr(Killing, "nodes", nodes, raising=False)
    monkeypatch.setattr(Killing, "between", between)
    monkeypatch.setattr(Killing, "summed", 0)
    found = run(method, clients, model=NOISY, rounds=3, executor="ray")
    assert nodes.second is None
    assert len(lost) == 1
    assert lost[0] > 0
    assert Killing.summed == (3 if "blocks" in case else 0)
    assert found.digest == serial(method, federation=clients, rounds=3)
    assert capfd.readouterr() == ("", "")


def test_a_worker_killed_in_its_work_changes_nothing(nodes: Nodes, lost: list[int], tmp_path: Path) -> None:
    marker = tmp_path / "died"
    found = run(Dies(marker=str(marker), **USUAL), federation(), model=NOISY, rounds=3, executor="ray")
    assert marker.exists()
    assert len(lost) == 1
    assert found.digest == serial(FedAvg(**USUAL), federation=federation(), rounds=3)


def test_work_that_kills_every_worker_ends_the_run(nodes: Nodes) -> None:
    with pytest.raises(WorkerError, match="died") as caught:
        run(Dies(), federation(), model=LINEAR, rounds=2, executor="ray")
    assert "serial" in str(caught.value)


def test_a_client_that_fails_is_named_with_its_own_traceback(nodes: Nodes) -> None:
    with pytest.raises(ClientError) as caught:
        run(Breaks(), federation(), model=LINEAR, rounds=3, executor="ray", workers=1)
    assert str(caught.value) == "client 1, round 2, phase train, in client_update: ValueError: boom"
    assert "in broken_loss" in caught.value.trace


def test_workers_that_get_no_cpu_are_not_waited_for(nodes: Nodes) -> None:
    found = run(FedAvg(**USUAL), federation(), model=NOISY, rounds=2, executor="ray", workers=7)
    assert found.digest == serial(FedAvg(**USUAL), federation=federation(), rounds=2)


def test_what_is_shared_is_placed_once_and_actors_leave(nodes: Nodes) -> None:
    """The data, and then a round's model for training and for judging, whoever asks for it."""
    executor = Ray(worker(FedAvg(**USUAL), model=NOISY))
    actors = [hand.actor for hand in executor._coming]
    try:
        loop(executor, 4)
        assert executor.moved.calls == 4 * (5 + 1) + 5  # clients and the test rows, and in the end clients again
        assert executor.moved.placed == 1 + 4 * (1 + 1) + 1
    finally:
        executor.close()
    assert len(actors) == 2
    for actor in actors:
        within(60, lambda actor=actor: gone(actor), "the end of an actor")


def gone(actor: Any) -> bool:
    """Whether an actor answers no more: Ray kills without waiting for the end, and until then calls are served."""
    try:
        ray.get(actor.do.remote("train", None, None, None), timeout=60)
    except ray.exceptions.RayActorError:
        return True
    return False


# --- comparisons -------------------------------------------------------------------------------------------------

COMPARED = [
    "fedavg", "--seeds", "2", "--rounds", "40", "--model", "mlp:8", "--clients", "5", "--checkpoint-every", "1",
]  # fmt: skip
"""Two runs, for two CPUs."""


def files(folder: Path) -> dict[str, str]:
    """Names of a comparison's files, with the digests of its runs."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() if path.name == "digest.txt" else "" for name, path in found.items()}


def command(*arguments: str) -> int:
    """Run the command line; its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serial") / "out"
    assert command("compare", *COMPARED, "--executor", "serial", "--out", str(folder)) == 0
    return folder


def test_runs_are_spread_and_their_files_come_back(
    nodes: Nodes, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the loss of a node, whose runs go on from their newest checkpoints here."""
    resumed: list[list[str]] = []
    start, news = OnRay.start, OnRay.news

    def noted(self: OnRay, spec: Any) -> None:
        resumed.append(sorted(path.name for path in (self._folder / spec.name).glob("checkpoint/*.json")))
        start(self, spec)

    def kill(self: OnRay) -> Any:
        found = news(self)
        begun = [path.parent.parent.name for path in self._folder.glob("*/checkpoint/*.json")]
        if nodes.second is not None and len(set(begun)) >= 2:
            nodes.kill()
        return found

    monkeypatch.setattr(OnRay, "start", noted)
    monkeypatch.setattr(OnRay, "news", kill)
    out = tmp_path / "out"
    assert command("compare", *COMPARED, "--executor", "ray", "--address", nodes.address, "--out", str(out)) == 0
    assert nodes.second is None
    assert len(resumed) == 3
    assert resumed[:2] == [[], []]
    assert resumed[2]
    assert files(out) == files(compared)


@pytest.mark.slow
def test_few_runs_go_one_after_another_over_all_workers(nodes: Nodes, compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--executor", "ray", "--workers", "3", "--out", str(out)]
    assert command("compare", *COMPARED, *more) == 0
    assert files(out) == files(compared)


def test_a_run_that_fails_elsewhere_is_named(nodes: Nodes, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    options = ["--model", "helpers:Breaking", "--rounds", "2", "--clients", "5", "--executor", "ray"]
    assert command("compare", "fedavg", "scaffold", *options, "--out", str(out)) == 1
    told = capsys.readouterr().err
    assert re.search(
        r"(fedavg|scaffold)-seed0: client 0, round 1, phase train, in client_update: ValueError: boom", told
    )
    assert "helpers.py" in told


def test_files_are_written_so_that_any_stop_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that others are whole comes after them, and what is out of date goes last."""
    here, there = tmp_path / "here", tmp_path / "there"
    run(FedAvg(**USUAL), federation(), model=LINEAR, rounds=3, checkpoint_every=1, executor="serial", out=there)
    changes = Changes(there)
    assert changes.since()[0] == {}
    (there / "digest.txt").write_text("new")
    assert not changes.checkpoint()
    new, names = changes.since()
    assert list(new) == ["digest.txt"]
    write_files(here, {name: (there / name).read_bytes() for name in names}, names)
    written: list[str] = []
    monkeypatch.setattr(beside, "write_atomically", lambda path, data: written.append(path.name))
    write_files(here, dict.fromkeys(reversed(names), b""), names[1:])
    assert written[-4:] == ["config.yaml", "00000002.json", "00000003.json", "digest.txt"]
    assert {path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file()} == set(names[1:])


# --- a Ray of its own --------------------------------------------------------------------------------------------


def session(sid: int) -> list[str]:
    """Names of the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, rest = path.read_text().rsplit(")", 1)
            if int(rest.split()[3]) == sid and rest.split()[0] != "Z":
                found.append(name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed by Linux's /proc")
@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_ray_of_its_own_says_nothing_and_leaves_nothing(tmp_path: Path, interrupted: bool) -> None:
    out, rounds = tmp_path / "out", "10000" if interrupted else "2"
    options = ["--clients", "4", "--model", "mlp:8", "--rounds", rounds, "--executor", "ray", "--json"]
    told = tmp_path / "told"
    with told.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "consilience", "run", "fedavg", *options, "--out", str(out)],
            stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells let what runs beside ignore it
        )  # fmt: skip
        while interrupted and child.poll() is None and not (out / "history.jsonl").exists():
            time.sleep(0.1)
        if interrupted:
            os.killpg(child.pid, signal.SIGINT)  # as a terminal does
        answer, _ = child.communicate()
    assert child.returncode == (1 if interrupted else 0)
    lines = told.read_text().splitlines()
    if interrupted:
        assert lines[-1] == "consilience: interrupted; `consilience resume FOLDER` goes on"
        assert answer == ""
    else:
        assert json.loads(answer)["last"]["round"] == 2
        assert [line.split(",")[0] for line in lines] == ["fedavg: 2 rounds"]
    within(10, lambda: not session(child.pid), "the end of Ray's processes")
    assert not session(child.pid)


# --- what is placed ----------------------------------------------------------------------------------------------


def test_tensors_are_read_where_they_lie() -> None:
    strange = torch.arange(12.0).view(3, 4).t()
    thing = {"x": torch.rand(1000, 3), "y": torch.arange(5), "t": strange, "b": torch.ones(3, dtype=torch.bfloat16)}
    data, arrays = pack(thing)
    assert len(data) < 4000
    aligned = [_aligned(array) for array in arrays]
    again = unpack((data, aligned))
    assert tr.digest(again) == tr.digest(thing)
    assert again["t"].stride() == strange.stride()
    assert again["x"].data_ptr() in {array.ctypes.data for array in aligned}
    for array in aligned:
        array += 1
    assert tr.digest(again["x"]) != tr.digest(thing["x"])


def test_tensors_begin_where_torchs_own_do() -> None:
    data, arrays = pack(torch.rand(100))
    shifted = np.empty(arrays[0].nbytes + 2 * ALIGNMENT, dtype=np.uint8)
    start = 4 + -shifted.ctypes.data % ALIGNMENT
    shifted = shifted[start : start + arrays[0].nbytes]
    shifted[:] = arrays[0]
    assert unpack((data, [shifted])).data_ptr() % ALIGNMENT == 0


def _aligned(array: Any) -> Any:
    """A copy that begins at a multiple of 64 bytes, as in Ray's object store."""
    room = np.empty(array.nbytes + ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    room[start : start + array.nbytes] = array
    return room[start : start + array.nbytes]


# --- what cannot be ----------------------------------------------------------------------------------------------

BAD = {
    "nowhere": "HOST:PORT",
    "127.0.0.1:notaport": "HOST:PORT",
    "ray://127.0.0.1:10001": "HOST:PORT",
    "127.0.0.1:1": "nothing answers",
    "127.0.0.1:99999": "nothing answers",
}


@pytest.mark.parametrize("address", BAD)
@pytest.mark.parametrize("name", ["run", "compare"])
def test_a_bad_address_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str, name: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    names = ["fedavg"] if name == "run" else ["fedavg", "local"]
    assert command(name, *names, "--executor", "ray", "--address", address, "--out", str(tmp_path / "out")) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"consilience: --address {address}: ")
    assert BAD[address] in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["torch", "consilience"])
def test_a_node_of_another_version_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"a node of the Ray cluster has {key} 0.0, this machine "):
        Ray.__new__(Ray)._welcome(_Hand(actor=None), "done", {**versions(), key: "0.0"})


def test_an_address_wants_ray() -> None:
    with pytest.raises(ConfigError, match="--address goes with --executor ray"):
        run(FedAvg(), federation(), model=LINEAR, address="auto")


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'consilience\[ray\]'"):
        run(FedAvg(), federation(), model=LINEAR, executor="ray")
