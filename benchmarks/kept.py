"""Results of a benchmark, kept run by run so that it can be stopped, shared by processes, and gone on with."""

from __future__ import annotations

import argparse
import fcntl
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from consilience.core.checkpoint import write_atomically


class Kept:
    """A file ``results/NAME.json`` of results by key."""

    def __init__(self, name: str) -> None:
        self._path = Path(__file__).parent / "results" / f"{name}.json"

    def stored(self) -> dict[str, Any]:
        """The results until now."""
        found: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return found

    def keep(self, key: str, value: Any) -> None:
        """Add a result, whatever another process has added meanwhile."""
        with (self._path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_atomically(
                self._path, json.dumps(dict(sorted({**self.stored(), key: value}.items())), indent=1) + "\n"
            )

    def command(
        self, about: str | None, work: Callable[[int, int], None], tables: Callable[[Mapping[str, Any]], str]
    ) -> None:
        """The command line of a benchmark: work(part, parts) does what is missing, and then its tables are printed."""
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--table", action="store_true", help="print the results")
        parser.add_argument("--part", default="0/1", help="K/N: the K-th of N parts of the runs")
        given = parser.parse_args()
        if not given.table:
            part, _, parts = given.part.partition("/")
            work(int(part), int(parts))
        print(tables(self.stored()))
