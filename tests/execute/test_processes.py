"""Worker processes: the same bits as here, through deaths and errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LINEAR, NOISY, Breaks, Dies, architecture, federation, loop, worker

import consilience.core.run as run_module
from consilience.core import tree as tr
from consilience.core.errors import ClientError, WorkerError
from consilience.core.evaluate import Evaluation
from consilience.core.method import Method
from consilience.execute import shared
from consilience.execute.processes import INLINE, Processes
from consilience.execute.shared import PAGE, Mapped, Segments
from consilience.methods.centralised import Centralised
from consilience.methods.fedavg import FedAvg
from consilience.methods.moon import Moon
from consilience.methods.scaffold import Scaffold
from consilience.models.small import MLP
from consilience.simulate import run

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}


def digest(method: Method, executor: str, workers: int | None = None, model: Any = NOISY) -> str:
    return run(
        method, federation(), model=model, rounds=3, participation=3, eval_clients_every=2, executor=executor,
        workers=workers,
    ).digest  # fmt: skip


@pytest.mark.parametrize("method", [FedAvg(**USUAL), Scaffold(**USUAL), Moon(**USUAL)], ids=lambda m: m.name)
def test_any_number_of_workers_gives_the_same_bits(method: Method) -> None:
    here = digest(method, "serial")
    assert len(here.splitlines()) == 3
    for workers in (1, 2, 4):
        assert digest(method, "processes", workers) == here, workers


def test_trees_too_large_for_a_pipe_give_the_same_bits() -> None:
    large = architecture(MLP, dtype=torch.float64)
    assert tr.nbytes(large.initial(0)) < INLINE < 2 * tr.nbytes(large.initial(0))  # only pairs of them do not fit
    assert digest(Scaffold(**USUAL), "processes", 2, large) == digest(Scaffold(**USUAL), "serial", None, large)


def test_a_method_that_trains_on_the_server_gives_the_same_bits() -> None:
    here = digest(Centralised(**USUAL), "serial", None, LINEAR)
    assert digest(Centralised(**USUAL), "processes", 1, LINEAR) == here


def test_a_worker_killed_in_its_work_changes_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    result = run(
        Dies(marker=str(marker), **USUAL), federation(), model=NOISY, rounds=3, executor="processes", workers=2
    )
    assert marker.exists()
    plain = run(FedAvg(**USUAL), federation(), model=NOISY, rounds=3, executor="serial")
    assert result.digest == plain.digest


def test_workers_killed_between_rounds_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Processes(worker(Scaffold(**USUAL), model=NOISY), 2)
    before = {child.pid for child in multiprocessing.active_children()}
    killed: list[int] = []
    reach = run_module.reach

    def kill(name: str) -> None:
        reach(name)
        ours = [child.pid for child in multiprocessing.active_children() if child.pid in before]
        if name == "aggregate" and len(killed) < 2 and ours:
            killed.append(ours[0])
            os.kill(ours[0], signal.SIGKILL)

    monkeypatch.setattr(run_module, "reach", kill)
    try:
        found = loop(executor, 4)
    finally:
        executor.close()
    assert len(killed) == 2
    monkeypatch.setattr(run_module, "reach", reach)
    straight = loop(worker(Scaffold(**USUAL), model=NOISY), 4)
    assert tr.digest(found.snapshots[4]) == tr.digest(straight.snapshots[4])


def test_work_that_kills_every_worker_ends_the_run() -> None:
    with pytest.raises(WorkerError, match="died") as caught:
        run(Dies(), federation(), model=LINEAR, rounds=2, executor="processes", workers=2)
    assert "serial" in str(caught.value)
    assert not multiprocessing.active_children()


def test_a_client_that_fails_is_named_with_its_own_traceback() -> None:
    with pytest.raises(ClientError) as caught:
        run(Breaks(), federation(), model=LINEAR, rounds=3, executor="processes", workers=1)
    assert str(caught.value) == "client 1, round 2, phase train, in client_update: ValueError: boom"
    assert "in broken_loss" in caught.value.trace


def test_nothing_is_left_behind() -> None:
    executor = Processes(worker(FedAvg()), 2)
    folder = executor._folder
    loop(executor, 1, evaluation=Evaluation())
    assert folder.exists()
    executor.close()
    executor.close()
    assert not folder.exists()
    assert not multiprocessing.active_children()


HOLDER = """
import sys, tempfile
from pathlib import Path
from consilience.execute import shared
shared._RAM, tempfile.tempdir = Path("/nowhere"), sys.argv[1]
print(shared.make_folder(), flush=True)
sys.stdin.read()
"""


def test_only_folders_that_nobody_holds_are_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds a folder may be in another container, where process ids mean nothing here: no name tells."""
    monkeypatch.setattr(shared, "_RAM", tmp_path / "none")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("consilience-my-notes", "consilience-0999999999-x", "other-1-x"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as lives, subprocess.Popen(command, **pipes) as dies:
        held, left = (Path(child.stdout.readline().strip()) for child in (lives, dies))  # type: ignore[union-attr]
        assert held.parent == left.parent == tmp_path
        held = held.rename(tmp_path / "consilience-0999999999-held")  # no process of this number here
        dies.kill()
        dies.wait()
        assert left.exists()
        made = shared.make_folder()
        assert (held.exists(), left.exists()) == (True, False)
        lives.kill()
    again = shared.make_folder()
    assert made.exists()
    assert not held.exists()
    for folder in (made, again):
        shared.drop_folder(folder)
    assert {path.name for path in tmp_path.iterdir()} == {
        "consilience-my-notes", "consilience-0999999999-x", "other-1-x"
    }  # fmt: skip


def test_segments_are_used_again_and_hold_what_was_written(tmp_path: Path) -> None:
    segments, mapped = Segments(tmp_path, "w"), Mapped(tmp_path)
    name, memory = segments.take(100)
    memory[:3] = b"abc"
    assert bytes(mapped.view(name, 3)) == b"abc"
    other, _ = segments.take(100)
    assert other != name
    segments.give(name)
    assert segments.take(PAGE)[0] == name
    assert segments.take(10 * PAGE)[0] not in (name, other)


def test_a_segment_is_free_when_nobody_looks_at_it(tmp_path: Path) -> None:
    import gc

    segments, mapped = Segments(tmp_path, "w"), Mapped(tmp_path)
    name, _ = segments.take(64)
    gone: list[str] = []
    tensor = torch.frombuffer(mapped.watched(name, 64, gone), dtype=torch.float32)
    part = tensor[3:5]
    del tensor
    gc.collect()
    assert gone == []
    del part
    gc.collect()
    assert gone == [name]
