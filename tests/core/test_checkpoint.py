"""A checkpoint is the old one or the new one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from consilience.core import tree as tr
from consilience.core.checkpoint import load as load_with
from consilience.core.checkpoint import save, write_atomically
from consilience.core.errors import CheckpointError


def state(version: int) -> dict[str, Any]:
    return {"x": torch.full((7,), float(version)), "round": version}


def notes(version: int) -> dict[str, Any]:
    return {"history_bytes": 100 * version, "wall_s": 1.5 * version}


def saved(folder: Path, *versions: int) -> Path:
    for version in versions:
        save(folder, version, state(version), notes(version))
    return folder


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    return load_with(folder, lambda tree, note: tree)


def loaded(folder: Path) -> int:
    """The version that is loaded, which must be whole, with its own notes."""
    found, its = load(folder)
    version = found["round"]
    assert tr.digest(found) == tr.digest(state(version))
    assert {key: its.get(key) for key in notes(version)} == notes(version)
    return int(version)


def test_the_newest_of_two_generations_is_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", 1, 2, 5)
    assert loaded(folder) == 5
    assert sorted(path.stem for path in folder.glob("*.json")) == ["00000002", "00000005"]
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_damaged_newest_generation_is_passed_over(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path, 1, 2) / f"00000002.{suffix}"
    whole = path.read_bytes()
    for at in range(0, len(whole), 1 if suffix == "json" else 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert loaded(tmp_path) in ((1, 2) if suffix == "json" else (1,)), at
        path.write_bytes(whole[:at])
        assert loaded(tmp_path) == 1, at
    path.unlink()
    assert loaded(tmp_path) == 1


def test_nothing_whole_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load(tmp_path)
    saved(tmp_path, 1, 2)
    (tmp_path / "00000001.safetensors").write_bytes(b"x")
    (tmp_path / "00000002.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"00000001.*hash") as caught:
        load(tmp_path)
    assert "00000002" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_going_on_after_damage_keeps_a_whole_generation_at_all_times(tmp_path: Path) -> None:
    saved(tmp_path, 4, 6)
    (tmp_path / "00000006.safetensors").write_bytes(b"")
    for version in (5, 6, 7):
        saved(tmp_path, version)
        assert loaded(tmp_path) == version


@pytest.mark.parametrize("nth", [1, 2])
def test_a_full_disk_leaves_the_old_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    saved(tmp_path, 1)
    calls = [0]
    sync = os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path, 2)
    assert loaded(tmp_path) == 1
    assert not list(tmp_path.glob("*.part"))
    saved(tmp_path, 2)
    assert loaded(tmp_path) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomically(path, "old")

    def broken(self: Path, target: Path) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_note_names_its_round_and_hash(tmp_path: Path) -> None:
    note = json.loads((saved(tmp_path, 3) / "00000003.json").read_text())
    assert note["round"] == 3
    assert len(note["sha256"]) == 64
