"""Updates that are added up where they are made: the same bits as when each of them travels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NORMED, Memory, SpoiledScaffold, federation, loop, worker

from consilience import methods
from consilience.core import tree as tr
from consilience.core.evaluate import Evaluation
from consilience.core.messages import Job, Reply
from consilience.core.method import Method, Phase, sums_suffice
from consilience.core.site import Host
from consilience.core.states import States, Stored
from consilience.core.tree import Tree
from consilience.execute.serial import Serial
from consilience.methods.fedavg import FedAvg
from consilience.simulate import run

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.05}
MANY = federation([3 + (7 * i) % 11 for i in range(37)])
"""Two whole blocks and a part of a third."""


class InBlocks(Serial):
    """Gives all work out in blocks, and counts the cohorts that were added up there."""

    pays_from = 1
    added = 0
    redone = 0

    def sums(self, jobs: Sequence[Job]) -> dict[str, Tree] | None:
        found = super().sums(jobs)
        self.added += found is not None
        return found

    def redo(self, job: Job) -> Any:
        self.redone += 1
        return super().redo(job)


def both(method: Method, rounds: int = 3, **more: Any) -> tuple[Memory, Memory, InBlocks]:
    """The run with every update travelling, the run in blocks, and its executor."""
    blocks = InBlocks(worker(method, MANY, NORMED))
    return loop(worker(method, MANY, NORMED), rounds, **more), loop(blocks, rounds, **more), blocks


def same(a: Memory, b: Memory) -> bool:
    last = max(a.snapshots)
    pairs = ((m.snapshots[last].server, dict(m.snapshots[last].states), m.lines) for m in (a, b))
    return len({tr.digest(*map(str, lines), server, states) for server, states, lines in pairs}) == 1


SUMMED = [name for name in methods.NAMES if sums_suffice(methods.get(name)(**USUAL))]


def test_the_methods_that_want_no_more_than_sums() -> None:
    assert SUMMED == [
        "fedavg",
        "fedavgm",
        "fedprox",
        "fedadagrad",
        "fedadam",
        "fedyogi",
        "fedopt",
        "scaffold",
        "moon",
        "fedsam",
        "fedswa",
        "fedmoswa",
        "fedcog",
        "fedloge",
        "curriculum",
        "lgfedavg",
        "fml",
        "fedper",
        "fedrep",
        "fedsim",
        "fedalt",
        "ditto",
        "pfedme",
        "apfl",
        "perfedavg",
        "spectral",
        "fedins",
        "fal",
        "co2",
    ]


@pytest.mark.parametrize("buffers", ["average", "local"])
@pytest.mark.parametrize("name", SUMMED)
def test_blocks_give_the_same_bits(name: str, buffers: str) -> None:
    """A second round goes on from what clients kept in the first; who is judged does not matter."""
    method, few = methods.get(name)(**USUAL, buffers=buffers), Evaluation(clients=5)
    one_by_one, blocks, executor = both(method, 2, cohort=35, evaluation=few)
    assert same(one_by_one, blocks)
    assert (executor.added, executor.redone) == (2, 0)


@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("form", ["model", "delta"])
def test_either_form_and_weights(form: Any, weights: Any) -> None:
    one_by_one, blocks, executor = both(FedAvg(**USUAL, form=form, weights=weights))
    assert same(one_by_one, blocks)
    assert executor.added == 3


def test_one_update_that_is_not_right_costs_only_its_client() -> None:
    one_by_one, blocks, executor = both(SpoiledScaffold(**USUAL))
    assert same(one_by_one, blocks)
    assert one_by_one.dropped == blocks.dropped != []
    assert executor.added == 0  # the first round is spoiled, and from then on updates travel
    assert executor.redone == 37


@dataclass(frozen=True)
class Median(FedAvg):
    """Aggregates otherwise than the class that says that sums suffice."""

    def aggregate(self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Any) -> Tree:
        models = [reply.update.model for reply in replies]
        middle = tr.tree_map(lambda *leaves: torch.stack(leaves).median(0).values, *models)
        return server._replace(model=middle)


def test_a_method_that_aggregates_otherwise_gets_every_update() -> None:
    assert not sums_suffice(Median(**USUAL))
    one_by_one, blocks, executor = both(Median(**USUAL))
    assert same(one_by_one, blocks)
    assert executor.added == 0


def test_worker_processes_do_so_where_it_pays() -> None:
    many = federation([5] * 60)
    options: dict[str, Any] = {"model": NORMED, "rounds": 3, "checkpoint_every": 1}
    method = methods.get("scaffold")(**USUAL)
    digests = {run(method, many, executor=e, workers=n, **options).digest for e, n in (("serial", 1), ("processes", 1))}
    digests.add(run(method, many, executor="processes", workers=2, **options).digest)
    assert len(digests) == 1


def test_a_schedule_that_leaves_some_out_gets_the_rest() -> None:
    """The cohort that begins is not the one that is combined: nothing is added up ahead, and no bit changes."""
    options: dict[str, Any] = {
        "model": NORMED, "rounds": 4, "schedule": "deadline:0.5", "fleet": "lognormal:1.0", "over_selection": 1.5,
        "participation": 40,
    }  # fmt: skip
    many = federation([5] * 60)
    serial = run(FedAvg(**USUAL), many, executor="serial", **options)
    processes = run(FedAvg(**USUAL), many, executor="processes", workers=1, **options)
    assert serial.digest == processes.digest


def test_states_on_file_are_read_only_when_their_block_begins(tmp_path: Path) -> None:
    method = methods.get("scaffold")(**USUAL)
    states = States(lambda: tmp_path, budget=1)
    blocks = InBlocks(worker(method, MANY, NORMED))
    blocks.keep(states)
    assert same(loop(worker(method, MANY, NORMED), 3), loop(blocks, 3))
    assert blocks.added == 3
    jobs = [Job(i, i, 4, 3, 3, 0) for i in range(37)]
    blocks.submit_all(jobs, None, {})
    waiting = [state for call in blocks._queue.values() for state in call.args[1]]
    assert len(waiting) == 37
    assert all(isinstance(state, Stored) for state in waiting)
