"""Checkpoints that are either the old one or the new one: two generations, each checked by its hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from consilience.core.encode import Encoder, decode, memory
from consilience.core.errors import CheckpointError
from consilience.core.failpoint import reach
from consilience.core.tree import Tree

GENERATIONS = 2
"""Checkpoints kept."""


def write_atomically(path: Path, data: bytes | bytearray | str | Iterator[Any]) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part. data: the content,
    or its pieces."""
    pieces = data if isinstance(data, Iterator) else [data.encode() if isinstance(data, str) else data]
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save(folder: Path, version: int, state: Tree, notes: dict[str, Any]) -> None:
    """Write a generation: the state, then a note of its hash that makes it count. Older ones are removed last.

    Raises OSError (a full disk, say); the generations written before stay.
    """
    reach("checkpoint-before")
    folder.mkdir(parents=True, exist_ok=True)
    name, digest = f"{version:08d}", hashlib.sha256()
    write_atomically(folder / f"{name}.safetensors", _hashed(Encoder(state).pieces(), digest))
    reach("checkpoint-middle")
    note = {**notes, "round": version, "sha256": digest.hexdigest()}
    note["note_sha256"] = _note_hash(note)
    write_atomically(folder / f"{name}.json", json.dumps(note, indent=1))
    for old in sorted(folder.glob("*.json"), reverse=True)[GENERATIONS:]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    reach("checkpoint-after")


def _hashed(pieces: Iterator[Any], digest: Any) -> Iterator[Any]:
    """The pieces, each fed to ``digest`` as it passes."""
    for piece in pieces:
        digest.update(piece)
        yield piece


def _note_hash(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def notes(folder: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Name and note of each generation, the newest first; None where the note is damaged."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        note = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_text())
            if found.pop("note_sha256") == _note_hash(found):
                note = found
        yield path.stem, note


T = TypeVar("T")


def load(folder: Path, whole: Callable[[Tree, dict[str, Any]], T]) -> tuple[T, dict[str, Any]]:
    """The newest generation that is whole, with its notes. Raises CheckpointError, naming what is wrong.

    whole: makes of a state and its notes what is returned, and raises CheckpointError or OSError where files that the
    notes name are damaged.
    """
    wrong: list[str] = []
    for name, note in notes(folder):
        if note is None:
            wrong.append(f"{name}: its note is damaged")
            continue
        try:
            data = read_whole(folder / f"{name}.safetensors")
            if hashlib.sha256(data).hexdigest() == note["sha256"]:
                return whole(decode(data, copy=False), note), note
            wrong.append(f"{name}: its hash is not the one noted")
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            wrong.append(f"{name}: {error}")
    if not wrong:
        raise CheckpointError(f"{folder}: no checkpoint there")
    raise CheckpointError(f"{folder}: no whole checkpoint ({'; '.join(wrong)})")


def read_whole(path: Path) -> memoryview:
    """A file's content, writable, in one copy."""
    data = memory(path.stat().st_size)
    with path.open("rb") as file:
        got = file.readinto(data)
    return data if got == len(data) else data[:got]
