"""Rounds, deadlines and buffers in real time, and the same once more in a simulation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from consilience.core.errors import ConfigError
from consilience.core.messages import Job
from consilience.exporting import digest
from consilience.fleet.real import Replay, Wall
from consilience.folder import read_lines

from .conftest import Make, Slow


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedbuff:buffer=2", {"rounds": "5"}),
        ("fedasmu", {"rounds": "4"}),  # asks the server in the middle of a job
        ("fedfix", {"rounds": "4", "schedule": "interval:0.3"}),
        ("scaffold", {}),
        ("fedavg", {"schedule": "deadline:0.2", "rounds": "4"}),
    ],
)
def test_replayed_to_the_same_bits(method: str, options: dict[str, str], deployed: Make) -> None:
    run = deployed(method, **options)
    folder = run.run(Slow(run.sites)).path
    again = run.simulate(replay=str(folder / "arrivals.jsonl"))
    assert digest(folder).split("\n")[:2] == again.digest.split("\n")[:2]
    if "deadline" not in str(options):  # what late sites did on their own is not known at the server
        assert digest(folder) == again.digest


def test_asynchrony_has_stale_replies(deployed: Make) -> None:
    """Otherwise the test above would show nothing."""
    run = deployed("fedbuff:buffer=1", rounds="6")
    folder = run.run(Slow(run.sites)).path
    assert max(line["staleness"] for line in read_lines(folder / "timeline.jsonl")) > 0


def test_other_arrivals_give_another_answer(deployed: Make) -> None:
    run = deployed("fedbuff:buffer=2", rounds="5")
    folder = run.run(Slow(run.sites)).path
    lines = [json.loads(line) for line in (folder / "arrivals.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "job" in line)
    first["time"] += 3.0
    changed = folder / "changed.jsonl"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = run.simulate(replay=str(changed))
    assert digest(folder).split("\n")[0] != again.digest.split("\n")[0]


def test_the_wall_clock_notes_and_goes_on(tmp_path: Path) -> None:
    there, ticks = {0, 1}, [100.0]
    path = tmp_path / "arrivals.jsonl"
    clock = Wall(lambda: frozenset(there), path, ticks=lambda: ticks[0])
    everybody = np.arange(3)
    assert clock.online(everybody, 0.0, 0).tolist() == [True, True, False]
    ticks[0] = 102.25
    job, late = Job(0, 1, 1, 0, 0, 0), Job(1, 0, 1, 0, 0, 0)
    clock.came(job, 0.5, clock.now(), 1.0)
    trip = clock.trip(job, 0.5, down=1, up=1, samples=1, steps=1)
    assert (trip.download, trip.compute, trip.seconds) == (0.75, 1.0, 1.75)
    assert clock.returns(2, 2.25, 0) == float("inf")
    there.add(2)
    ticks[0] = 103.0
    assert clock.returns(2, 2.25, 0) == 3.0
    clock.came(late, 0.5, 4.0, None)
    for found in (Replay(path), Wall(lambda: frozenset(), path, begin=4.0)):
        assert found.trip(job, 0.5, down=1, up=1, samples=1, steps=1) == trip
        assert found.trip(late, 0.5, down=1, up=1, samples=1, steps=1).lost == 3.5
        assert found.online(everybody, 3.0, 0).all()
        asked = Job(-1, 1, 2, 1, 0, 0)
        assert found.trip(asked, 5.0, down=1, up=1, samples=1, steps=1).seconds == 1.75
    Wall(lambda: frozenset(), path, begin=3.5)
    assert len(path.read_text().splitlines()) == 3  # what came after the checkpoint comes once more


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "other").write_text('{"round": 1}\n')
    for name in ("empty", "other", "missing"):
        with pytest.raises(ConfigError, match="--replay"):
            Replay(tmp_path / name)
