"""One method on one setting: tuned, then run on every seed; kept as JSON."""

from __future__ import annotations

import datetime as dt
import fcntl
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.reproduction.rows import BASELINES, ROWS, Row
from benchmarks.reproduction.settings import (
    ROUNDS,
    SEEDS,
    SETTINGS,
    TRIAL_ROUNDS,
    TRIALS,
    TUNED_ON,
    options,
)
from consilience import experiment
from consilience.config import settle
from consilience.core.checkpoint import write_atomically
from consilience.folder import versions
from consilience.tuning import RECORD, tune

RESULTS = Path(__file__).parent / "results"
WORK = Path(tempfile.gettempdir()) / "consilience-reproduction"
LAST = 5
"""Rounds whose mean is a run's score."""


def needed(row: Row) -> list[tuple[str, str]]:
    """What a row needs: (setting, label) of the method and of the baselines."""
    return [(row.setting, label) for label in (*(Row(b, row.setting, "").label for b in BASELINES), row.label)]


def kept(setting: str, label: str) -> Path:
    """Where a result is."""
    return RESULTS / f"{setting}--{re.sub(r'[^A-Za-z0-9._=-]+', '_', label)}.json"


def stored(setting: str, label: str) -> dict[str, Any] | None:
    """A result, if it is there."""
    path = kept(setting, label)
    return json.loads(path.read_text()) if path.exists() else None


def spec(setting: str, label: str, seed: int, rounds: int, data_of: int) -> experiment.RunSpec:
    """A run on the rows of seed ``data_of``."""
    given = {**options(setting, data_of, rounds, WORK), "seed": seed}
    (found,) = experiment.specs(settle(given), [label])
    return found


def go(setting: str, label: str) -> bool:
    """Tune and run; False where another process is at it. What was interrupted goes on where it was."""
    folder = WORK / f"{kept(setting, label).stem}-{_digest(SETTINGS[setting], ROUNDS, TRIALS, TRIAL_ROUNDS)}"
    folder.mkdir(parents=True, exist_ok=True)
    with (WORK / f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if stored(setting, label) is not None:
            return True
        (folder / "tuning").mkdir(exist_ok=True)
        # trials are on the seed after that of the run they are for
        (tuned,) = tune([spec(setting, label, TUNED_ON - 1, TRIAL_ROUNDS, TUNED_ON)], TRIALS, folder / "tuning", _tell)
        record = json.loads((folder / "tuning" / RECORD).read_text())["methods"][label]
        histories = []
        runs = folder / _digest(sorted(tuned.options.items()))
        runs.mkdir(exist_ok=True)
        for seed in SEEDS:
            plain = spec(setting, label, seed, ROUNDS, seed)
            run = experiment.RunSpec(label, plain.method, tuned.options, plain.config)
            done = runs / f"seed{seed}.json"
            if not done.exists():
                result = _history(run, runs / f"seed{seed}")
                write_atomically(done, json.dumps(result))
            histories.append(json.loads(done.read_text()))
        text = {
            "setting": setting,
            "method": label,
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "versions": versions(),
            "tuned": {**record, "trials_of_rounds": TRIAL_ROUNDS},
            "rounds": ROUNDS,
            "seeds": list(SEEDS),
            "accuracy": [_score(h, "accuracy") for h in histories],
            "ece": [_score(h, "ece") for h in histories],
            "curve": [[round(line["accuracy"], 4) for line in h[4::5]] for h in histories],
        }
        RESULTS.mkdir(exist_ok=True)
        write_atomically(kept(setting, label), json.dumps(text, indent=1) + "\n")
        shutil.rmtree(folder)
    return True


def _digest(*what: object) -> str:
    """What began with other settings, or with other options, is not gone on with."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:8]


def _history(run: experiment.RunSpec, folder: Path) -> list[dict[str, float]]:
    """Accuracy and calibration error of every round."""
    resume = (folder / "config.yaml").exists()
    result = experiment.execute(run, folder, resume=resume)
    return [{key: line["global"][key] for key in ("accuracy", "ece")} for line in result.history]


def _score(history: list[dict[str, float]], key: str) -> float:
    return round(sum(line[key] for line in history[-LAST:]) / LAST, 5)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def work(names: list[str]) -> None:
    """Do what rows want that is not there yet, row by row, so that there are whole rows early."""
    for row in ROWS:
        if names and row.name not in names:
            continue
        for setting, label in needed(row):
            if stored(setting, label) is None and go(setting, label):
                print(setting, label, (stored(setting, label) or {}).get("accuracy"), file=sys.stderr, flush=True)
