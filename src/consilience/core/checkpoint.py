"""Checkpoints that are either the old one or the new one: two generations, each checked by its hash."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from consilience.core.encode import DecodeError, decode, encode
from consilience.core.errors import CheckpointError
from consilience.core.failpoint import reach
from consilience.core.tree import Tree

GENERATIONS = 2
"""Checkpoints kept."""


def write_atomically(path: Path, data: bytes | bytearray | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
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
    data = encode(state)
    name = f"{version:08d}"
    write_atomically(folder / f"{name}.safetensors", data)
    reach("checkpoint-middle")
    note = {**notes, "round": version, "sha256": hashlib.sha256(data).hexdigest()}
    note["note_sha256"] = _note_hash(note)
    write_atomically(folder / f"{name}.json", json.dumps(note, indent=1))
    for old in sorted(folder.glob("*.json"), reverse=True)[GENERATIONS:]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    reach("checkpoint-after")


def _note_hash(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def load(folder: Path) -> tuple[Tree, dict[str, Any]]:
    """The newest generation that is whole, with its notes. Raises CheckpointError, naming what is wrong."""
    wrong: list[str] = []
    for note_path in sorted(folder.glob("*.json"), reverse=True):
        try:
            notes = json.loads(note_path.read_text())
            if notes.pop("note_sha256") != _note_hash(notes):
                wrong.append(f"{note_path.stem}: its note is damaged")
                continue
            data = note_path.with_suffix(".safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != notes["sha256"]:
                wrong.append(f"{note_path.stem}: its hash is not the one noted")
                continue
            return decode(data), notes
        except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
            wrong.append(f"{note_path.stem}: {error}")
    if not wrong:
        raise CheckpointError(f"{folder}: no checkpoint there")
    raise CheckpointError(f"{folder}: no whole checkpoint ({'; '.join(wrong)})")
