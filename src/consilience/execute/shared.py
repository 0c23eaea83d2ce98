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
from typing import IO

try:
    import fcntl
except ImportError:  # no such locks here: folders are cleared by their owners only
    fcntl = None  # type: ignore[assignment]

PAGE = 1 << 16
_RAM = Path("/dev/shm")
_PREFIX, _LOCK = "consilience-", "lock"
_HELD: dict[Path, IO[str]] = {}
"""The locks of this process's own folders."""


def make_folder(*, ram: bool = True) -> Path:
    """A private folder, in RAM if that is wanted and there is room, else for temporary files. Folders whose owners
    have died are cleared away."""
    roomy = ram and _RAM.is_dir() and os.access(_RAM, os.W_OK) and shutil.disk_usage(_RAM).free > 1 << 30
    parent = _RAM if roomy else Path(tempfile.gettempdir())
    for old in parent.glob(f"{_PREFIX}*"):
        if _abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    if fcntl is not None:
        file = (folder / "making").open("x")
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "making").rename(folder / _LOCK)  # nobody sees the file before it is locked
        _HELD[folder] = file
    return folder


def drop_folder(folder: Path) -> None:
    """Clear one's own folder away."""
    shutil.rmtree(folder, ignore_errors=True)
    if (file := _HELD.pop(folder, None)) is not None:
        file.close()


class Temporary:
    """A private folder on disk, made when it is first asked for; it goes when this does."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def __call__(self) -> Path:
        if self._path is None:
            self._path = make_folder(ram=False)
            weakref.finalize(self, drop_folder, self._path)
        return self._path


def _abandoned(folder: Path) -> bool:
    """Whether nobody holds a folder's lock any more. The system lets go of it when its owner and the owner's forked
    workers have died, whatever their process ids are called in this or another container."""
    if fcntl is None:
        return False
    try:
        with (folder / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, not ours, or no such file
        return False
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
