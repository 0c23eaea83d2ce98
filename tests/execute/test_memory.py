"""A large message passes without copies that double it: peaks of memory as the system counts them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import federation, worker

from consilience.core import checkpoint
from consilience.core.encode import decode, encode, memory
from consilience.core.messages import Job, Work
from consilience.core.states import States
from consilience.core.tree import Tree
from consilience.core.worker import Call, Worker
from consilience.execute.processes import Processes
from consilience.methods.fedavg import FedAvg

LARGE = 256_000_000
SLACK = LARGE // 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"),
]


def status(key: str, process: int | str = "self") -> int:
    """A number of bytes that the system tells of a process."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


@contextlib.contextmanager
def grows(limit: int, process: int | str = "self") -> Iterator[None]:
    """The process's memory grows by at most ``limit`` bytes inside, at any instant."""
    Path(f"/proc/{process}/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS", process)
    yield
    grown = status("VmHWM", process) - before
    assert grown <= limit, f"{grown / LARGE:.2f} messages, {limit / LARGE:.2f} allowed"


def large() -> Tree:
    return {"a": torch.ones(LARGE // 8), "b": torch.ones(LARGE // 8)}


def test_encoding_and_decoding() -> None:
    message = large()
    with grows(LARGE + SLACK):
        data = encode(message)
    with grows(LARGE + SLACK):
        decode(data)
    aligned = memory(len(data))
    aligned[:] = data
    with grows(SLACK):
        decode(aligned, copy=False)


def test_a_checkpoint_of_it(tmp_path: Path) -> None:
    message = large()
    with grows(SLACK):
        checkpoint.save(tmp_path, 1, message, {})
    del message
    with grows(LARGE + SLACK):
        found, _ = checkpoint.load(tmp_path, lambda tree, note: tree)
    assert float(found["b"].sum()) == LARGE // 8


def test_a_client_state_of_it(tmp_path: Path) -> None:
    state = large()
    states = States(lambda: tmp_path, 0)
    with grows(SLACK):
        states.put(1, state)
    del state
    with grows(LARGE + SLACK):
        found = states[1]
    assert float(found["b"].sum()) == LARGE // 8
    del found
    with grows(LARGE + SLACK):
        states.save()
        states.saved()
        states.save()


class Echo(Worker):
    """Sends back what it got, and keeps it too if its job says so."""

    def do_train(self, message: Tree, job: Job, state: Tree) -> tuple[Work, Tree]:
        return Work(message, 1, 1, 0.0), message if job.steps else None


@pytest.mark.parametrize("stateful", [False, True])
def test_through_a_worker_process(stateful: bool) -> None:
    """The parent holds the broadcast, in shared memory; the worker the broadcast and its replies, there as well. New
    states are the parent's own, and leave shared memory one by one."""
    base = worker(FedAvg(), federation())
    executor = Processes(Echo(base.place, base.federation, base.program), 1)
    try:
        executor.run(Call("train", (Job(0, 0, 1, 0, 0, 0), None), {"a": torch.ones(3)}))  # everything is imported
        child = executor._hands[0].process.pid
        message, jobs = large(), [Job(c, c, 1, 0, 0, 0, int(stateful) or None) for c in range(4)]
        kept, waiting = (4 * LARGE, 2 * LARGE) if stateful else (0, 0)
        # a state is mapped while it is copied: at most those of the calls that are out at once
        with grows(LARGE + kept + kept + SLACK), grows(LARGE + 4 * LARGE + waiting + SLACK, child):
            tickets = [executor.submit(job, message) for job in jobs]
            works = list(executor.collect(jobs, tickets))
        assert [float(work.update["b"].sum()) for work in works] == [LARGE // 8] * 4
        shared = sum(path.stat().st_blocks * 512 for path in executor._folder.iterdir())
        assert shared <= LARGE + 4 * LARGE + waiting + SLACK
    finally:
        executor.close()
