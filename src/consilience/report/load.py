"""Reading the files of a run, or of a comparison's runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from consilience.core.errors import DataError

NEEDED = ("round", "wall_s", "virtual_s", "bytes_up", "bytes_down", "samples")
"""What every line of ``history.jsonl`` has."""
TIMES = ("wait", "download", "compute", "upload", "steps", "staleness")
"""What every line of ``timeline.jsonl`` has, beside who, when and what became of it."""


@dataclass(frozen=True)
class RunFolder:
    """One run as its folder tells it. ``clients`` is read when first asked for: it is the largest file."""

    path: Path
    config: Mapping[str, Any]
    federation: Mapping[str, Any]
    history: list[dict[str, Any]]
    digests: Mapping[str, str]

    @classmethod
    def read(cls, path: Path | str) -> RunFolder:
        """Read a run's folder; a missing or damaged file is refused with its name and line."""
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise DataError(f"{path} is not a run: it has no config.yaml")
        history = _lines(path / "history.jsonl", NEEDED)
        if not history:
            raise DataError(f"{path} has no evaluated round yet")
        federation = _json(path / "federation.json")
        if not isinstance(federation, dict):
            raise DataError(f"{path / 'federation.json'} is not a JSON object")
        return cls(path, read_yaml(path / "config.yaml"), federation, history, _digests(path))

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config.get("method", self.path.name))

    @property
    def label(self) -> str:
        """The method's name in a comparison, which tells two settings of one method apart."""
        return str(self.config.get("label") or self.method)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("seed", 0))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, which is when its digests are written."""
        return bool(self.digests)

    @cached_property
    def clients(self) -> list[dict[str, Any]]:
        """The lines of ``clients.jsonl``; none if clients were never evaluated."""
        path = self.path / "clients.jsonl"
        return _lines(path, ("round", "client")) if path.is_file() else []

    @cached_property
    def timeline(self) -> list[dict[str, Any]]:
        """The lines of ``timeline.jsonl``; none if no virtual time was simulated."""
        path = self.path / "timeline.jsonl"
        return _lines(path, ("client", "state", "start", "end", *TIMES)) if path.is_file() else []

    @cached_property
    def refused(self) -> list[dict[str, Any]]:
        """The lines of ``refused.jsonl``: updates that were dropped before anything was combined."""
        path = self.path / "refused.jsonl"
        return _lines(path, ("round", "client", "reason")) if path.is_file() else []

    @cached_property
    def fleet(self) -> dict[str, Any]:
        """What ``fleet.json`` says; nothing before a run is finished."""
        path = self.path / "fleet.json"
        found = _json(path) if path.is_file() else {}
        return found if isinstance(found, dict) else {}


def read_runs(path: Path | str) -> list[RunFolder]:
    """The run in a folder, or the runs in a comparison's folder that have an evaluated round."""
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"there is no folder {path}")
    if (path / "config.yaml").is_file():
        return [RunFolder.read(path)]
    folders = sorted(p for p in path.iterdir() if (p / "config.yaml").is_file())
    if not folders:
        raise DataError(f"{path} holds no run: neither it nor a folder in it has a config.yaml")
    begun = [p for p in folders if (p / "history.jsonl").is_file() and (p / "history.jsonl").stat().st_size]
    if not begun:
        raise DataError(f"none of the {len(folders)} runs in {path} has an evaluated round yet")
    return sorted((RunFolder.read(p) for p in begun), key=lambda run: (run.label, run.seed))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, or a refusal that names the file."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a YAML mapping")
    return value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path.parent} has no {path.name}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is damaged: it is not text") from None
    lines = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            value = json.loads(line)
        except ValueError:
            raise DataError(f"{path} line {number} is damaged: not JSON") from None
        missing = [key for key in needed if key not in value] if isinstance(value, dict) else list(needed)
        if missing:
            raise DataError(f"{path} line {number} is damaged: it has no {missing[0]}")
        lines.append(value)
    return lines


def _digests(path: Path) -> dict[str, str]:
    file = path / "digest.txt"
    if not file.is_file():
        return {}
    return dict(line.split(None, 1) for line in file.read_text("utf-8").splitlines() if len(line.split()) == 2)
