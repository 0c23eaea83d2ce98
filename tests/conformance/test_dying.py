"""The same bits after dying: every method and place in this process, real kills for each shape of state, damaged
files, and disks that are full at any write."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LINEAR, SHAPES, SpoiledScaffold, federation, shaped

from consilience import experiment, simulate
from consilience.config import settle
from consilience.core import failpoint

from .test_conformance import CASES, run

# --- every method and place, in this process -------------------------------------------------------------------

IN_PROCESS = {
    "client-before": 4, "client-after": 8, "work": 2, "aggregate": 2, "evaluate": 3, "state": 5,
    "checkpoint-before": 3, "states-sealed": 3, "checkpoint-middle": 3, "checkpoint-after": 3,
}  # fmt: skip


def test_every_place_is_tried() -> None:
    assert set(IN_PROCESS) == set(failpoint.NAMES)


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("place", IN_PROCESS)
@pytest.mark.parametrize("name", CASES)
def test_every_method_goes_on_after_dying_anywhere(
    name: str, place: str, digests: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in digests:
        digests[name] = run(CASES[name]).digest
    with monkeypatch.context() as patch:
        saving = place.startswith(("checkpoint", "states"))
        # its first three replies come, and are combined, at one instant: of its two checkpoints there is no third
        count = 2 if saving and name == "fedcompass" else IN_PROCESS[place]
        patch.setenv("CONSILIENCE_FAILPOINT", f"{place}:{count}:raise")
        try:
            result = run(CASES[name], out=tmp_path, client_state_memory=0)
        except failpoint.Died:
            result = None
    if result is not None:  # a method without such work, or without states, never gets there
        assert place in ("client-before", "client-after", "state")
        assert result.digest == digests[name]
        return
    assert run(CASES[name], out=tmp_path, resume=True, client_state_memory="5KB").digest == digests[name]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_method_on_any_number_of_workers(name: str, workers: int, digests: dict[str, str]) -> None:
    if name not in digests:
        digests[name] = run(CASES[name]).digest
    assert run(CASES[name], "processes", workers=workers, client_state_memory=0).digest == digests[name]


# --- real kills ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh() -> Any:
    """Processes that begin without a past: here autograd may have run, after which a fork cannot train."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["consilience.execute.processes", "helpers"])
    return context


def shape_digest(fresh: Any, shape: str, folder: Path, failpoint: str = "", executor: str = "serial") -> int:
    """The exit code of a run in a process of its own."""
    process = fresh.Process(target=shaped, args=(shape, folder, failpoint, executor))
    process.start()
    process.join(timeout=240)
    assert process.exitcode is not None
    return int(process.exitcode)


def killed_and_resumed(fresh: Any, shape: str, place: str, executor: str, folder: Path) -> None:
    """A run that was killed at a place, and resumed, has the digest of one that was not."""
    whole = folder / "whole"
    assert shape_digest(fresh, shape, whole) == 0
    killed = folder / "killed"
    assert shape_digest(fresh, shape, killed, place, executor) == -signal.SIGKILL
    assert not (killed / "digest.txt").exists()
    assert shape_digest(fresh, shape, killed, executor=executor) == 0
    assert (killed / "digest.txt").read_text() == (whole / "digest.txt").read_text()


ONE_EACH = [
    ("stateless", "aggregate:3"), ("server", "checkpoint-middle:3"), ("clients", "state:8"),
    ("buffers", "checkpoint-after:2"), ("all", "states-sealed:3"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "place"), ONE_EACH)
def test_a_real_kill_for_each_shape_of_state(fresh: Any, shape: str, place: str, tmp_path: Path) -> None:
    killed_and_resumed(fresh, shape, place, "serial", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["serial", "processes"])
@pytest.mark.parametrize("place", IN_PROCESS)
@pytest.mark.parametrize("shape", SHAPES)
def test_real_kills_everywhere(fresh: Any, shape: str, place: str, executor: str, tmp_path: Path) -> None:
    if place == "state" and shape in ("stateless", "server"):
        pytest.skip("has no state of clients")
    if place.startswith("client") and executor == "processes":
        pytest.skip("kills workers, which are replaced: see tests/execute/test_processes.py")
    killed_and_resumed(fresh, shape, f"{place}:{IN_PROCESS[place]}", executor, tmp_path)


# --- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its files is cut or flipped, the run goes on from the one before it, to the same bits."""
    shaped(shape, tmp_path / "whole")
    expected = (tmp_path / "whole" / "digest.txt").read_text()
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setenv("CONSILIENCE_FAILPOINT", "checkpoint-before:4:raise")
        with pytest.raises(failpoint.Died):
            shaped(shape, out)
    newest = max((out / "checkpoint").glob("*.json"))
    states = [out / "checkpoint" / "states" / name for name, *_ in json.loads(newest.read_text())["states"]["files"]]
    assert bool(states) == (shape not in ("stateless", "server"))
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path in [newest, newest.with_suffix(".safetensors"), *states]:
        for damage in ("cut", "flip"):
            for other in [p for p in out.rglob("*") if p.is_file()]:
                other.unlink()
            for other, data in kept.items():
                other.write_bytes(data)
            at = len(kept[path]) // 3
            damaged = kept[path][:at] + (
                bytes([kept[path][at] ^ 16]) + kept[path][at + 1 :] if damage == "flip" else b""
            )
            path.write_bytes(damaged)
            shaped(shape, out)
            assert (out / "digest.txt").read_text() == expected, (path, damage)


# --- full disks ------------------------------------------------------------------------------------------------

PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory whose size can be set."""
    where = tmp_path / "disk"
    where.mkdir()
    if os.geteuid() or mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)):
        pytest.skip("needs the right to mount a file system")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def mount(*arguments: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode
    return 1


def fill(out: Path, **more: Any) -> str:
    """A run that writes every kind of file but a report: states, and refused updates too."""
    begun = (out / "config.yaml").exists()
    return simulate.run(
        SpoiledScaffold(batch_size=4), federation(), model=LINEAR, rounds=4, participation=3, eval_clients_every=1,
        checkpoint_every=1, executor="serial", client_state_memory=0, out=out, resume=begun, **more,
    ).digest  # fmt: skip


def full_at(disk: Path, pages: int, expected: str) -> bool:
    """Whether a disk of this size was too small; if so, nothing but the round under way was lost."""
    mount("-o", f"remount,size={pages * PAGE}", str(disk))
    out, lines = disk / f"run{pages}", list[int]()
    with contextlib.suppress(OSError):
        assert fill(out, on_line=lambda line: lines.append(line["round"])) == expected
        return False
    saved = [int(path.stem) for path in out.glob("checkpoint/*.json")]
    assert max(saved, default=0) >= len(lines) - 1, "more than a round was lost"
    assert not list(out.rglob("*.part"))
    mount("-o", "remount,size=4m", str(disk))
    assert fill(out) == expected, pages
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return True


def test_a_disk_that_is_full_at_any_write(disk: Path, tmp_path: Path) -> None:
    """Every size up to the one that suffices, a page at a time."""
    expected = fill(tmp_path / "roomy")
    kinds = {path.suffix for path in (tmp_path / "roomy").rglob("*") if path.is_file()}
    assert kinds == {".yaml", ".json", ".jsonl", ".safetensors", ".states", ".txt"}
    sizes = itertools.count(1)
    while full_at(disk, next(sizes), expected):
        pass
    assert next(sizes) > len(kinds)


def test_a_disk_too_small_for_the_report(disk: Path) -> None:
    """The run is done; only its report is missing, and is made when there is room."""
    settings = settle({"rounds": 2, "model": "logistic", "executor": "serial"})
    (spec,) = experiment.specs(settings, ["scaffold"])
    data = experiment.make_federation(spec.config)
    experiment.execute(spec, disk / "run", federation=data)
    used = sum(path.stat().st_blocks * 512 for path in (disk / "run").rglob("*"))
    mount("-o", f"remount,size={used + 2 * PAGE}", str(disk))
    with pytest.raises(OSError, match="space"):
        experiment.resume(disk / "run", lambda label, line: None)
    assert not (disk / "run" / "report.html").exists()
    mount("-o", "remount,size=8m", str(disk))
    experiment.resume(disk / "run", lambda label, line: None)
    assert (disk / "run" / "report.html").exists()
