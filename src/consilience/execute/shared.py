"""Memory that processes of one run share: files in a folder of their own, mapped by whoever needs them.

Ordinary files (in RAM where the system has /dev/shm) work on every system, have no limit but that of their file
system, and vanish with their folder.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PAGE = 1 << 16
_RAM = Path("/dev/shm")


def make_folder() -> Path:
    """A private folder for segments, in RAM if there is room. Folders whose process has died are cleared away."""
    roomy = _RAM.is_dir() and os.access(_RAM, os.W_OK) and shutil.disk_usage(_RAM).free > 1 << 30
    parent = _RAM if roomy else Path(tempfile.gettempdir())
    for old in parent.glob("consilience-*-*"):
        if old.name.split("-")[1].isdigit() and not _alive(int(old.name.split("-")[1])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"consilience-{os.getpid()}-", dir=parent))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it exists, but is not ours
    return True


class Segments:
    """Segments that this process writes. One that was given back is used again."""

    def __init__(self, folder: Path, owner: str) -> None:
        self._folder, self._owner, self._made = folder, owner, 0
        self._maps: dict[str, mmap.mmap] = {}
        self._free: list[tuple[int, str]] = []

    def take(self, size: int) -> tuple[str, mmap.mmap]:
        """A segment of at least ``size`` bytes. Raises OSError where there is no room."""
        fitting = [entry for entry in self._free if size <= entry[0] <= 2 * size + PAGE]
        if fitting:
            self._free.remove(best := min(fitting))
            return best[1], self._maps[best[1]]
        name, room = f"{self._owner}-{self._made}", -(-size // PAGE) * PAGE
        self._made += 1
        with (self._folder / name).open("x+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, room)  # a full disk is an error here, not a crash later
            else:
                file.truncate(room)
            self._maps[name] = mmap.mmap(file.fileno(), room)
        return name, self._maps[name]

    def give(self, name: str) -> None:
        """Take a segment back that nobody reads any more."""
        self._free.append((len(self._maps[name]), name))


class Mapped:
    """Segments that other processes write, mapped here once each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}

    def view(self, name: str, size: int) -> memoryview:
        """The first ``size`` bytes of a segment."""
        if name not in self._maps:
            with (self._folder / name).open("r+b") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0)
        return memoryview(self._maps[name])[:size]

    def watched(self, name: str, size: int, gone: list[str]) -> memoryview:
        """The same; when nothing looks at it any more, ``name`` is appended to ``gone``."""
        view = self.view(name, size)
        weakref.finalize(view, gone.append, name)
        return view
