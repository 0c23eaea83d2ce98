"""Real time: a clock that notes when what came, and one that replays such notes in a simulation."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError
from consilience.core.events import TICK, Instant, RealTime
from consilience.core.messages import Job, Trip


class Notes:
    """When which job came back and which clients could be reached, as ``arrivals.jsonl`` has it.

    A line is ``{"job", "phase", "client", "sent", "time", "compute"}`` (compute: seconds of work, null if the client
    did not answer), or ``{"online": [clients], "time"}`` from then on. Times are in seconds.
    """

    def __init__(self) -> None:
        self.jobs: dict[tuple[int, int], dict[str, Any]] = {}
        self.seen: list[tuple[float, frozenset[int]]] = []
        self._of: dict[int, list[tuple[float, float]]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """One more line. Raises KeyError or TypeError if it is none."""
        if "online" in line:
            self.seen.append((float(line["time"]), frozenset(map(int, line["online"]))))
            return
        self.jobs[int(line["job"]), int(line["phase"])] = dict(line)
        if line["compute"] is not None:
            self._of.setdefault(int(line["client"]), []).append((line["time"], line["time"] - line["sent"]))

    def trip(self, job: Job) -> Trip:
        """A job's way; of one that never came, without end."""
        line = self.jobs.get((job.id, job.phase))
        if line is None:
            return Trip(compute=math.inf)
        seconds = line["time"] - line["sent"]
        if line["compute"] is None:
            return Trip(wait=seconds + TICK, lost=seconds)  # nothing was done that could be counted
        work = min(seconds, _tick(line["compute"]))
        return Trip(download=seconds - work, compute=work)

    def expected(self, client: int, at: float) -> Trip:
        """A job's way as the client's last one was before ``at``; nothing is known of the first."""
        done = self._of.get(client, [])
        before = bisect.bisect_right(done, (at, math.inf))
        return Trip(compute=done[before - 1][1]) if before else Trip()

    def online(self, clients: np.ndarray, at: float) -> np.ndarray:
        """Which clients could be reached then; all, if nothing is noted."""
        before = bisect.bisect_right([t for t, _ in self.seen], at)
        if not before:
            return np.ones(len(clients), dtype=bool)
        there = self.seen[before - 1][1]
        return np.array([int(client) in there for client in clients], dtype=bool)

    def returns(self, client: int, at: float) -> float:
        """When a client could be reached again after ``at``; inf if nothing is noted."""
        if self.online(np.array([client]), at)[0]:
            return at
        return next((t for t, there in self.seen if t > at and client in there), math.inf)


class Replay(Instant):
    """A deployment's arrivals once more, in virtual time: the same replies are combined in the same order."""

    def __init__(self, path: str | Path) -> None:
        self._notes = read(Path(path))
        self.name = f"replay of {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        """As long as it took."""
        return self._notes.trip(job) if job.id >= 0 else self._notes.expected(job.client, start)

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """Who could be reached."""
        return self._notes.online(clients, time)

    def returns(self, client: int, time: float, version: int) -> float:
        """When it could be reached."""
        return self._notes.returns(client, time)


class Wall(RealTime):
    """The clock on the wall, counted from the beginning of a run (from ``begin`` when it is resumed), and its notes,
    which go to ``path`` too. there: the clients that can be reached now."""

    def __init__(
        self,
        there: Callable[[], frozenset[int]],
        path: Path,
        begin: float = 0.0,
        ticks: Callable[[], float] | None = None,
    ) -> None:
        self._notes, self._path, self._there = Notes(), path, there
        self._ticks = ticks or time.monotonic
        self._start = self._ticks() - begin
        if path.exists():
            kept = [line for line in _lines(path) if line["time"] <= begin]  # later ones happen once more
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
            for line in kept:
                self._notes.add(line)

    def now(self) -> float:
        """Seconds since the beginning."""
        return _tick(self._ticks() - self._start)

    def came(self, job: Job, sent: float, time: float, compute: float | None) -> None:
        """Note it."""
        self._note(
            {"job": job.id, "phase": job.phase, "client": job.client, "sent": sent, "time": time, "compute": compute}
        )

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        """As long as it took, or as the client's last job took."""
        return self._notes.trip(job) if job.id >= 0 else self._notes.expected(job.client, start)

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """Who can be reached; what is asked for once holds for that time."""
        there = self._there()
        last, known = self._notes.seen[-1] if self._notes.seen else (-1.0, None)
        if there != known and time > last:
            self._note({"online": sorted(there), "time": time})
        return self._notes.online(clients, time)

    def returns(self, client: int, time: float, version: int) -> float:
        """Now if it is there, else nobody knows."""
        noted = self._notes.returns(client, time)
        if noted == math.inf and client in self._there():
            noted = max(self.now(), time + TICK)
            self._note({"online": sorted(self._there()), "time": noted})
        return noted

    def _note(self, line: dict[str, Any]) -> None:
        self._notes.add(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> Notes:
    """The notes in a file. Raises ConfigError."""
    notes = Notes()
    try:
        for line in _lines(path):
            notes.add(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--replay {path}: not the arrivals of a deployment ({type(error).__name__}: {error})"
        ) from None
    if not notes.jobs:
        raise ConfigError(f"--replay {path}: no job came back there")
    return notes


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _tick(seconds: float) -> float:
    """The last tick not after so many seconds."""
    return math.floor(seconds / TICK) * TICK
