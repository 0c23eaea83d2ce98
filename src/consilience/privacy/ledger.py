"""What was spent: a line on disk for every release, there before its noise is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from consilience.core.errors import CheckpointError

LEDGER = "privacy.jsonl"


class Ledger:
    """The releases of a run, each with an id. Nothing is ever taken back: a run that is killed and resumed finds what
    it had spent. A release with an id that stands there already is the same numbers with the same noise, made again,
    and costs nothing; any other is one more. path: of the file; None keeps the ledger in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, int] = {}
        self._by_version: dict[int, int] = {}
        if path is not None and path.exists():
            self._read(path)

    def spend(self, version: int, release: str, **about: Any) -> None:
        """Write a release down, and return when the disk has it."""
        if release in self._known:
            return
        if self._path is not None:
            line = json.dumps({"round": version + 1, "release": release, **about})
            new = not self._path.exists()
            with self._path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                _sync(self._path.parent)
        self._enter(version, release)

    def spent(self, version: int, more: str | None = None) -> tuple[int, int]:
        """(rounds released, releases beside) of the rounds up to ``version``; more: as if this one were added."""
        counts = {v: n for v, n in self._by_version.items() if v <= version}
        if more is not None and more not in self._known:
            counts[version] = counts.get(version, 0) + 1
        return len(counts), sum(counts.values()) - len(counts)

    def _enter(self, version: int, release: str) -> None:
        self._known[release] = version
        self._by_version[version] = self._by_version.get(version, 0) + 1

    def _read(self, path: Path) -> None:
        """What stands there. A last line that was cut off was no release yet: its noise was not used."""
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(path, len(whole.encode()))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._enter(int(entry["round"]) - 1, str(entry["release"]))
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: line {number} is damaged, so what was spent is not known") from error


def _sync(folder: Path) -> None:
    """A new file's name is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
