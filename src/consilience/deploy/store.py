"""A client's state at its site: a file for each job that may still be rolled back to."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from consilience.core import tree as tr
from consilience.core.checkpoint import read_whole, write_atomically
from consilience.core.encode import DecodeError, Encoder, decode
from consilience.core.errors import CheckpointError
from consilience.core.tree import Elsewhere, Tree

SUFFIX = ".safetensors"
KEY = re.compile(r"\d{10}-\d{2}", re.ASCII)


class Store:
    """States by the key that the server knows them by: ``JOB-PHASE``, numbers of ten digits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, job: int, phase: int, state: Tree) -> Elsewhere | None:
        """Keep a state; it is pending until the server names it. Returns what the server gets instead of it."""
        if state is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        key = f"{job:010d}-{phase:02d}"
        write_atomically(self.folder / f"{key}{SUFFIX}", Encoder(state).pieces())
        return Elsewhere(key, tr.digest(state))

    def get(self, name: Elsewhere | None) -> Tree:
        """A state that was kept. Raises CheckpointError."""
        if name is None:
            return None
        if not isinstance(name.key, str) or not KEY.fullmatch(name.key):
            raise CheckpointError(f"no name of a state: {name.key!r}")
        path = self.folder / f"{name.key}{SUFFIX}"
        try:
            state = decode(read_whole(path), copy=False)
        except (OSError, DecodeError) as error:
            raise CheckpointError(f"this site has lost its state of job {name.key} ({error})") from None
        if name.sha256 and tr.digest(state) != name.sha256:
            raise CheckpointError(f"{path}: not the state that the server was told of")
        return state

    def prune(self, job: int, keep: Collection[str]) -> None:
        """Let go of the states of jobs before ``job`` that are not among ``keep``."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.stem not in keep and int(path.stem.partition("-")[0]) < job:
                path.unlink(missing_ok=True)
