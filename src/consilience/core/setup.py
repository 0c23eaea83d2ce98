"""What the server loop is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from consilience.core.evaluate import Evaluation, Measures
from consilience.core.events import Clock, Schedule
from consilience.core.messages import Refusal, Release, Stage
from consilience.core.snapshot import Snapshot


class Recorder(Protocol):
    """Where lines and checkpoints go."""

    def line(self, record: dict[str, Any], clients: Sequence[dict[str, Any]]) -> None:
        """A round was evaluated."""
        ...

    def refused(self, version: int, refusals: Sequence[Refusal]) -> None:
        """Updates were dropped."""
        ...

    def jobs(self, records: Sequence[dict[str, Any]]) -> None:
        """Jobs ended: the timeline, where there is virtual time."""
        ...

    def checkpoint(self, snapshot: Snapshot) -> None:
        """A good moment to save."""
        ...


@dataclass
class Setup:
    """What :func:`run` is given beside method, federation and executor.

    rounds: server updates to make. cohort: clients a round asks for. checkpoint_every: rounds, 0 for never
    (but the end is always offered to the recorder). release: where the method may see sums alone.
    elapsed: wall seconds spent before, for a run that is resumed. gossip: nodes exchange with neighbours each
    at its own time, as a part of its job, instead of all at once.
    """

    rounds: int
    cohort: int
    schedule: Schedule
    clock: Clock
    measures: Measures
    recorder: Recorder
    stages: Sequence[Stage] = ()
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint_every: int = 10
    elapsed: float = 0.0
    release: Release | None = None
    gossip: bool = False
