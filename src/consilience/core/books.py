"""What a run keeps account of: what was spent, the lines of its history, and its timeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from consilience.core.evaluate import Judge, Line
from consilience.core.events import Instant
from consilience.core.failpoint import reach
from consilience.core.messages import Job, Reply, Score
from consilience.core.method import Method, Phase
from consilience.core.outbox import Outbox
from consilience.core.setup import Setup
from consilience.core.snapshot import Totals
from consilience.core.tree import Tree


class Books:
    """Counts, and writes to the recorder. totals: of the run until now; spent: of each client."""

    def __init__(self, setup: Setup, judge: Judge, outbox: Outbox, method: Method, program: Sequence[Phase]) -> None:
        self._setup, self._judge, self._outbox, self._method, self._program = setup, judge, outbox, method, program
        self.totals = Totals()
        self.spent: dict[int, Totals] = {}
        self._began = time.perf_counter() - setup.elapsed
        self._timed = type(setup.clock) is not Instant
        self._lines: list[Line] = []
        self._laps: list[dict[str, Any]] = []
        self._judged: dict[int, tuple[Score, Score]] = {}

    def spend(self, more: Totals, client: int | None = None) -> None:
        """Count what the server has spent, or a client."""
        self.totals = self.totals.plus(more)
        if client is not None:
            self.spent[client] = self.spent.get(client, Totals()).plus(more)

    def lap(self, reply: Reply, state: str, version: int, end: float | None = None) -> None:
        """A line of the timeline: a job ended, at ``end`` or at its arrival."""
        if not self._timed:
            return
        job, trip = reply.job, reply.trip
        arrived = reply.since + reply.seconds
        self._laps.append({
            "job": job.id, "client": job.client, "phase": self._program[job.phase].name, "state": state,
            "start": reply.since, "end": arrived if end is None else end,
            "wait": trip.wait, "download": trip.download, "compute": trip.compute, "upload": trip.upload,
            "steps": reply.steps, "staleness": reply.staleness, "round": version + 1,
        })  # fmt: skip

    def judged(self, reply: Reply) -> None:
        """Remember what a participant of the round has measured before and after its training."""
        if reply.before is not None and reply.after is not None:
            first = self._judged.get(reply.job.client, (reply.before, reply.after))[0]
            self._judged[reply.job.client] = (first, reply.after)

    def round(
        self,
        version: int,
        now: float,
        server: Tree,
        replies: Sequence[Reply],
        asked: Callable[[int], Job],
        release: Callable[[int], Mapping[str, Any] | None],
    ) -> None:
        """A round was made at the virtual time ``now``: begin its line, if it gets one. asked: a job of a client, as if
        it were asked now. release: what the line says of the sums that were released; where there are any, it says
        nothing of training losses."""
        judged, self._judged = self._judged, {}
        if not self._judge.wants(version):
            return
        self.flush()
        wall = time.perf_counter() - self._began
        line = {"round": version, "wall_s": wall, "virtual_s": now, **self.totals._asdict()}
        privacy = release(version)
        losses = [reply.loss * reply.samples for reply in replies if reply.loss == reply.loss]
        weight = sum(reply.samples for reply in replies if reply.loss == reply.loss)
        if weight and privacy is None:
            line["train_loss"] = sum(losses) / weight
        numbers = self._method.report(server)
        if numbers:
            line["method"] = dict(numbers)
        if privacy is not None:
            line["privacy"] = privacy
        message = partial(self._outbox.deployed, server)
        self._lines.append(self._judge.begin(line, server, message, asked, judged, self.spent))

    def flush(self, over: bool = False) -> None:
        """Finish lines under way. The last one stays open while the next round is computed, so its seconds are those
        at which its round was made; when the run is over, they are those of the run, with its last judgement."""
        for line in self._lines:
            reach("evaluate")
            found, clients = self._judge.finish(line)
            if over:
                found["wall_s"] = time.perf_counter() - self._began
            self._setup.recorder.line(found, clients)
        self._lines = []
        if self._laps:
            self._setup.recorder.jobs(self._laps)
            self._laps = []
