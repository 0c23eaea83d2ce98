"""A run's folder: what is written while a run goes on, and read when it is resumed, judged or deployed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from torch import Tensor

from consilience.core import checkpoint
from consilience.core import tree as tr
from consilience.core.errors import CheckpointError
from consilience.core.federation import Federation
from consilience.core.messages import Refusal
from consilience.core.snapshot import Snapshot
from consilience.core.states import States
from consilience.core.tree import Tree

DRAWN = 2000
"""Most clients whose class counts are written for the picture of the partition."""


def versions() -> dict[str, str]:
    """What the bits of a run depend on, beside the configuration."""
    from consilience import __version__

    return {
        "consilience": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
    }


def describe(federation: Federation, content: bool = True) -> dict[str, Any]:
    """A federation for the report: names, sizes, and class counts where there are not too many clients. content:
    whether the rows are here to be counted."""
    n = federation.n_clients
    about: dict[str, Any] = {
        "name": federation.name,
        "clients": n,
        "classes": list(federation.task.classes) or [str(c) for c in range(federation.task.outputs)],
        "unseen": sorted(federation.unseen),
        "groups": None if federation.groups is None else list(federation.groups),
        "names": list(federation.names),
        "sensitive": dict(federation.about.get("sensitive", {})),
    }
    if n <= DRAWN:
        about["sizes"] = [federation.size(client) for client in range(n)]
        if content and federation.task.kind == "classification":
            k = federation.task.outputs
            about["counts"] = [torch.bincount(federation.data(c).train.y, minlength=k).tolist() for c in range(n)]
    return about


class RunFolder:
    """Writes a run's files, and knows how far they went at each checkpoint (a core ``Recorder``). states: where its
    clients' states are to be kept, ``budget`` bytes of them in memory (None: all)."""

    def __init__(self, path: Path, budget: int | None = None) -> None:
        self.path, self._made = path, False
        self.states = _states(path, budget)
        self.lines: list[dict[str, Any]] = []
        self.clients: list[dict[str, Any]] = []
        self.refused_lines: list[dict[str, Any]] = []
        self.timeline: list[dict[str, Any]] = []

    @classmethod
    def create(
        cls, path: Path, config: Mapping[str, Any], federation: Federation, budget: int | None = None
    ) -> RunFolder:
        """A new folder; on any error nothing is left of it."""
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            from consilience.data.federation import save_partition

            save_partition(path / "partition.json", federation)
            checkpoint.write_atomically(path / "federation.json", json.dumps(describe(federation)))
            checkpoint.write_atomically(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        except BaseException:
            if made:
                shutil.rmtree(path, ignore_errors=True)
            raise
        folder = cls(path, budget)
        folder._made = made
        return folder

    def discard(self) -> None:
        """Leave nothing of a run that was refused when it was to start."""
        for name in ("config.yaml", "federation.json", "partition.json"):
            (self.path / name).unlink(missing_ok=True)
        if self._made:
            shutil.rmtree(self.path, ignore_errors=True)

    @classmethod
    def resume(cls, path: Path, budget: int | None = None) -> tuple[RunFolder, Snapshot | None, float]:
        """The folder cut back to its newest whole checkpoint, that checkpoint (None: from the start), and the
        wall seconds spent until then."""
        folder = cls(path, budget)
        snapshot: Snapshot | None = None
        try:
            snapshot, notes = read_snapshot(path, budget)
        except CheckpointError:
            if any((path / "checkpoint").glob("*.json")):
                raise
            notes = {"history_bytes": 0, "clients_bytes": 0, "wall_s": 0.0}
        else:
            folder.states = cast(States, snapshot.states)
        folder.states.tidy()
        folder.lines = _cut(path / "history.jsonl", notes["history_bytes"])
        folder.refused_lines = _cut(path / "refused.jsonl", notes.get("refused_bytes", 0))
        folder.clients = _cut(path / "clients.jsonl", notes["clients_bytes"])
        folder.timeline = _cut(path / "timeline.jsonl", notes.get("timeline_bytes", 0))
        return folder, snapshot, float(notes["wall_s"])

    def line(self, record: dict[str, Any], clients: Sequence[dict[str, Any]]) -> None:
        """Append a round to the history, and its clients."""
        self.lines.append(record)
        self.clients.extend(clients)
        if clients:
            _append(self.path / "clients.jsonl", clients)
        _append(self.path / "history.jsonl", [record])

    def refused(self, version: int, refusals: Sequence[Refusal]) -> None:
        """Append updates that were dropped."""
        _append(self.path / "refused.jsonl", [{"round": version, **refusal._asdict()} for refusal in refusals])

    def jobs(self, records: Sequence[dict[str, Any]]) -> None:
        """Append jobs that ended."""
        self.timeline.extend(records)
        _append(self.path / "timeline.jsonl", records)

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Save a generation: of the clients' states, those that have changed."""
        notes = {
            "states": self.states.save(),
            "history_bytes": _length(self.path / "history.jsonl"),
            "refused_bytes": _length(self.path / "refused.jsonl"),
            "clients_bytes": _length(self.path / "clients.jsonl"),
            "timeline_bytes": _length(self.path / "timeline.jsonl"),
            "wall_s": self.lines[-1]["wall_s"] if self.lines else 0.0,
        }
        checkpoint.save(self.path / "checkpoint", snapshot.version, _packed(snapshot), notes)
        self.states.saved()

    def finish(self, snapshot: Snapshot, fleet: Mapping[str, Any]) -> None:
        """Write the fleet as it was, and the digest: the mark of a run that is done."""
        if fleet:
            checkpoint.write_atomically(self.path / "fleet.json", json.dumps(fleet))
        checkpoint.write_atomically(self.path / "digest.txt", digest_text(snapshot, self.lines))


def _states(path: Path, budget: int | None) -> States:
    return States(lambda: path / "checkpoint" / "states", budget)


def _packed(snapshot: Snapshot) -> Tree:
    """A snapshot as it is written: states have files of their own, and counts of many clients are columns."""
    return snapshot._replace(states={}, numbers=_columns(snapshot.numbers), admitted=_columns(snapshot.admitted))  # type: ignore[arg-type]


def _columns(counts: Mapping[int, int]) -> Tensor:
    return torch.tensor([list(counts), list(counts.values())], dtype=torch.int64)


def _counts(columns: Tensor) -> dict[int, int]:
    return dict(zip(*columns.tolist(), strict=True))


def read_snapshot(path: Path, budget: int | None = None) -> tuple[Snapshot, dict[str, Any]]:
    """A run's newest whole checkpoint, with its notes. Raises CheckpointError. The clients' states stay on file."""
    folder = path / "checkpoint"

    def whole(tree: Any, note: dict[str, Any]) -> Snapshot:
        if "states" not in note:
            raise CheckpointError("it was written by an older version")
        states, version = _states(path, budget), note["round"]
        older = (n["states"] for _, n in checkpoint.notes(folder) if n is not None and n["round"] < version)
        states.load(note["states"], next(older, None))
        return tree._replace(states=states, numbers=_counts(tree.numbers), admitted=_counts(tree.admitted))  # type: ignore[no-any-return]

    return checkpoint.load(folder, whole)


def digest_text(snapshot: Snapshot, lines: Sequence[Mapping[str, Any]]) -> str:
    """Three lines: SHA-256 of the server's state, of all client states, and of the history without wall times."""
    history = hashlib.sha256()
    for line in lines:
        kept = {key: value for key, value in line.items() if key != "wall_s"}
        history.update(_json(kept, sort_keys=True).encode() + b"\n")
    server, clients = tr.digest(snapshot.server), tr.digest_of(snapshot.states)
    return f"server {server}\nclients {clients}\nhistory {history.hexdigest()}\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last line that was cut off is left out."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(_json(record) + "\n" for record in records)


def _json(record: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(_plain(record), sort_keys=sort_keys, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON has no nan; a number that does not exist is null."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cut(path: Path, size: int) -> list[dict[str, Any]]:
    """Truncate to ``size`` bytes and read what is left."""
    if size > _length(path):
        raise CheckpointError(f"{path}: shorter than when its checkpoint was written")
    if path.exists():
        os.truncate(path, min(size, path.stat().st_size))
    return read_lines(path)
