"""Client states: those used last in memory, the others in files, which checkpoints are made of as well.

A **line** is a row of append-only files, each sealed by a list of what it holds. A checkpoint notes the files of one
line with their hashes. The two generations of checkpoints take turns on two lines that share no byte, so damage to
one leaves the other whole. A state is written when it has changed since its line's last checkpoint, never else.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from consilience.core import tree as tr
from consilience.core.encode import DecodeError, Encoder, decode, encode, memory
from consilience.core.errors import CheckpointError
from consilience.core.failpoint import reach
from consilience.core.tree import Tree

OVERHEAD = 2000
"""Bytes that a state is taken to need in memory beside its tensors."""
HASH = 16
"""Bytes of a state's hash (BLAKE2b)."""
SUFFIX = ".states"


class Where(NamedTuple):
    """Where a state is: file, offset, bytes, and its hash."""

    file: str
    offset: int
    size: int
    hash: bytes


class _Sealed(NamedTuple):
    """A finished file: its bytes, the hash of its list, and how many of the bytes are states."""

    size: int
    sha: str
    data: int


@dataclass(frozen=True, eq=False)
class Stored:
    """A state on file as it was when it was asked for, read when it is needed. It stays there until the next
    :meth:`States.save` or :meth:`States.shrink`."""

    states: States
    client: int
    where: Where

    def tree(self) -> Tree:
        """Read it."""
        return self.states.fetch(self.client, self.where)


class Line:
    """Append-only files of states. ``at``: where each client's newest state is, if it is here at all. ``missing``:
    clients whose newest state is not here."""

    def __init__(self, folder: Callable[[], Path], name: str) -> None:
        self.at: dict[int, Where] = {}
        self.missing: set[int] = set()
        self._folder, self.name = folder, name
        self._sealed: dict[str, _Sealed] = {}  # what a checkpoint may name
        self._live: dict[str, int] = {}  # bytes of each file that are somebody's newest state
        self._open, self._end = "", 0
        self._written: list[tuple[int, Where]] = []

    def changed(self, client: int) -> None:
        """The client's state here is no longer its newest."""
        self._forget(client)
        self.missing.add(client)

    def write(self, client: int, pieces: Iterable[Any]) -> None:
        """Append a client's newest state. Raises OSError (a full disk, say)."""
        folder = self._folder()
        if not self._open:
            folder.mkdir(parents=True, exist_ok=True)
            self._open, self._end = _new_name(folder, self.name), 0
        digest, size = hashlib.blake2b(digest_size=HASH), 0
        with (folder / self._open).open("ab") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        where = Where(self._open, self._end, size, digest.digest())
        self._end += size
        self._forget(client)
        self._written.append((client, where))
        self._place(client, where)
        self.missing.discard(client)
        reach("state")

    def raw(self, where: Where) -> memoryview:
        """The bytes of a state. Raises CheckpointError if they are not those that were written."""
        data = memory(where.size)
        path = self._folder() / where.file
        with path.open("rb") as file:
            file.seek(where.offset)
            got = file.readinto(data)
        if got != where.size or hashlib.blake2b(data, digest_size=HASH).digest() != where.hash:
            raise CheckpointError(f"{path}: the client state at byte {where.offset} is damaged")
        return data

    def seal(self) -> list[list[Any]]:
        """Finish the open file, so that a checkpoint may name it; the names, sizes and hashes of all files. What is
        left of files that are mostly out of date moves to it."""
        sparse = {name for name, file in self._sealed.items() if 2 * self._live[name] < file.data}
        for client in [client for client, where in self.at.items() if where.file in sparse] if sparse else ():
            self.write(client, [self.raw(self.at[client])])
        for name in sparse:
            del self._sealed[name], self._live[name]
        if self._open:
            footer = encode(_listing(self._written))
            data = footer + len(footer).to_bytes(8, "little")
            with (self._folder() / self._open).open("ab") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            sha = hashlib.sha256(footer).hexdigest()
            self._sealed[self._open] = _Sealed(self._end + len(data), sha, self._end)
            self._open, self._written = "", []
        reach("states-sealed")
        return [[name, file.size, file.sha] for name, file in self._sealed.items()]

    def load(self, files: Iterable[list[Any]]) -> None:
        """Take over the files of a checkpoint, all checked. Raises CheckpointError or OSError."""
        for name, size, sha in files:
            found = _read_file(self._folder() / name, size, sha)
            self._sealed[name] = _Sealed(size, sha, sum(where.size for _, where in found))
            self._live[name] = 0
            for client, where in found:
                self._forget(client)
                self._place(client, where)

    def tidy(self) -> None:
        """Remove the files of this line that are not in use, as a run that was killed leaves them too."""
        for path in self._folder().glob(f"{self.name}-*{SUFFIX}"):
            if path.name not in self._sealed and path.name != self._open:
                path.unlink(missing_ok=True)

    def _place(self, client: int, where: Where) -> None:
        self.at[client] = where
        self._live[where.file] = self._live.get(where.file, 0) + where.size

    def _forget(self, client: int) -> None:
        where = self.at.pop(client, None)
        if where is not None and where.file in self._live:
            self._live[where.file] -= where.size


class States(Mapping[int, Tree]):
    """Committed client states by client id, in order; at most ``budget`` bytes of them in memory (None: all).

    folder: gives the folder of the files; without one, all stay in memory. A state that was put here must not be
    changed in place. Two lines of files take turns, see :meth:`save`.
    """

    def __init__(self, folder: Callable[[], Path] | None = None, budget: int | None = None) -> None:
        self.folder = folder
        self._budget = budget if folder is not None else None
        self._held: OrderedDict[int, tuple[Tree, int]] = OrderedDict()
        self._bytes = 0
        self._lines = [Line(folder, name) for name in "ab"] if folder is not None else []
        self._turn = 0

    def put(self, client: int, state: Tree) -> None:
        """A client's new state."""
        for line in self._lines:
            line.changed(client)
        self._hold(client, state)

    def pin(self, client: int) -> Tree | Stored:
        """A client's state now, or where it is now; None if it has none."""
        if client in self._held:
            self._held.move_to_end(client)
            return self._held[client][0]
        where = self._where(client)
        return None if where is None else Stored(self, client, where)

    def fetch(self, client: int, where: Where) -> Tree:
        """Read a state, and hold it as one just used if it is still the client's. Raises CheckpointError."""
        line = next(line for line in self._lines if where.file.startswith(f"{line.name}-"))
        try:
            state = decode(line.raw(where), copy=False)
        except DecodeError as error:
            raise CheckpointError(f"the stored state of client {client} cannot be read: {error}") from None
        if client not in self._held and line.at.get(client) == where:
            self._hold(client, state)
        return state

    def save(self) -> dict[str, Any]:
        """Bring the line whose turn it is up to date on disk; what a checkpoint notes of it. Raises OSError."""
        line, other = self._lines[self._turn], self._lines[1 - self._turn]
        for client in sorted(line.missing):
            held = self._held.get(client)
            line.write(client, [other.raw(other.at[client])] if held is None else Encoder(held[0]).pieces())
        return {"line": self._turn, "files": line.seal()}

    def saved(self) -> None:
        """The checkpoint with the last :meth:`save` is in place: what it replaced may go."""
        self._lines[self._turn].tidy()
        self._turn = 1 - self._turn

    def load(self, noted: Mapping[str, Any], older: Mapping[str, Any] | None = None) -> None:
        """Take over what a checkpoint noted, and its predecessor. Raises CheckpointError or OSError if the first is
        damaged; a damaged predecessor is passed over."""
        newest = self._lines[noted["line"]]
        newest.load(noted["files"])
        self._turn = 1 - noted["line"]
        if self.folder is not None and older is not None and older["line"] == self._turn:
            try:
                self._lines[self._turn].load(older["files"])
            except (CheckpointError, OSError):
                self._lines[self._turn] = Line(self.folder, self._lines[self._turn].name)
        line = self._lines[self._turn]
        for client, where in newest.at.items():
            if client not in line.at or line.at[client].hash != where.hash:
                line.changed(client)

    def tidy(self) -> None:
        """Remove files that belong to neither checkpoint."""
        for line in self._lines:
            line.tidy()

    def shrink(self) -> None:
        """Where no checkpoint is made: let go of what is out of date on disk. Raises OSError."""
        for line in self._lines:
            if line.at:
                line.seal()
                line.tidy()

    def whole(self) -> Mapping[int, Tree]:
        """All states as they are now: a dict while none is on file, else this, which goes on changing."""
        if any(line.at for line in self._lines):
            return self
        return {client: self._held[client][0] for client in sorted(self._held)}

    def _where(self, client: int) -> Where | None:
        return next((line.at[client] for line in self._lines if client in line.at), None)

    def _hold(self, client: int, state: Tree) -> None:
        self._bytes -= self._held.pop(client, (None, 0))[1]
        size = tr.nbytes(state) + OVERHEAD
        self._held[client] = state, size
        self._bytes += size
        while self._budget is not None and self._bytes > self._budget:
            oldest, (state, size) = next(iter(self._held.items()))
            if self._where(oldest) is None:
                self._lines[self._turn].write(oldest, Encoder(state).pieces())
            del self._held[oldest]
            self._bytes -= size

    def _ids(self) -> set[int]:
        return set(self._held).union(*(line.at for line in self._lines))

    def __getitem__(self, client: int) -> Tree:
        found = self.pin(client)
        if found is None:
            raise KeyError(client)
        return found.tree() if isinstance(found, Stored) else found

    def __contains__(self, client: object) -> bool:
        return client in self._held or any(client in line.at for line in self._lines)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._ids()))

    def __len__(self) -> int:
        return len(self._ids())


def _listing(written: Sequence[tuple[int, Where]]) -> Tree:
    """What a file holds, in order."""
    return {
        "clients": torch.tensor([client for client, _ in written]),
        "sizes": torch.tensor([where.size for _, where in written]),
        "hashes": torch.frombuffer(bytearray(b"".join(where.hash for _, where in written)), dtype=torch.uint8),
    }


def _read_file(path: Path, size: int, sha: str) -> list[tuple[int, Where]]:
    """What a sealed file holds, every byte checked. Raises CheckpointError or OSError."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) != size:
            raise CheckpointError(f"{path}: not as long as it was written")
        file.seek(size - 8)
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise CheckpointError(f"{path}: damaged at its end")
        file.seek(size - 8 - length)
        footer = bytearray(file.read(length))
        if hashlib.sha256(footer).hexdigest() != sha:
            raise CheckpointError(f"{path}: its list is damaged")
        listing = decode(footer, copy=False)
        hashes = bytes(listing["hashes"].numpy())
        found, offset = [], 0
        file.seek(0)
        for i, (client, bytes_) in enumerate(zip(listing["clients"].tolist(), listing["sizes"].tolist(), strict=True)):
            where = Where(path.name, offset, bytes_, hashes[i * HASH : (i + 1) * HASH])
            if hashlib.blake2b(file.read(bytes_), digest_size=HASH).digest() != where.hash:
                raise CheckpointError(f"{path}: the state of client {client} is damaged")
            found.append((client, where))
            offset += bytes_
    return found


def _new_name(folder: Path, line: str) -> str:
    """A name that no file of a line has had: it counts on from the newest there is."""
    newest = max((path.name for path in folder.glob(f"{line}-*{SUFFIX}")), default=f"{line}-0{SUFFIX}")
    return f"{line}-{int(newest[len(line) + 1 : -len(SUFFIX)]) + 1:08d}{SUFFIX}"
