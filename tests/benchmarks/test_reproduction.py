"""The reproduction table: every row can run, verdicts follow from the numbers, papers' configurations are valid."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from consilience import experiment
from consilience.config import settle
from consilience.tuning import space

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.reproduction import run, table  # noqa: E402
from benchmarks.reproduction.rows import BASELINES, ROWS, Row  # noqa: E402
from benchmarks.reproduction.settings import SETTINGS  # noqa: E402

CONFIGS = sorted((ROOT / "benchmarks" / "reproduction" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_papers_configuration_is_valid(path: Path) -> None:
    settings = settle({}, path)
    found = experiment.specs(settings, settings.methods)
    assert len(found) == 3 * len(settings.methods)
    assert settings.reference in settings.methods


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_a_row_searches_lr_and_one_parameter_of_its_own(row: Row) -> None:
    config = {k: v for k, v in SETTINGS[row.setting][1].items() if k != "data"}
    (spec,) = experiment.specs(settle(config), [row.label])
    assert set(space(spec)) == {"lr", row.own} - {None}
    assert set(row.beats) <= set(BASELINES)
    assert sum(other.name == row.name for other in ROWS) == 1


def keep(folder: Path, row: Row, scores: dict[str, list[float]]) -> None:
    for name, (setting, label) in zip((*BASELINES, "own"), run.needed(row), strict=True):
        text = {"seeds": [0, 1, 2], "accuracy": scores[name], "ece": scores[name]}
        text |= {"curve": [[0.1, value] for value in scores[name]]}
        run.kept(setting, label).write_text(json.dumps(text))
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    ("own", "beats", "score", "missing", "verdict"),
    [
        ([0.60, 0.62, 0.61], ("fedavg",), "accuracy", "", "holds"),
        ([0.60, 0.62, 0.61], ("fedavg", "scaffold"), "accuracy", "", "does not"),
        ([0.60, 0.62, 0.61], ("fedavg",), "ece", "", "does not"),
        ([0.40, 0.42, 0.41], ("fedavg",), "ece", "", "holds"),
        ([0.60, 0.62, 0.61], ("fedavg",), "final", "", "holds"),
        ([0.51, 0.70, 0.51], ("fedavg",), "accuracy", "", "does not: higher, but not beyond chance"),
        ([0.60, 0.62, 0.61], ("fedavg",), "accuracy", "no data", "not testable here (no data)"),
    ],
)
def test_verdicts(
    own: list[float], beats: Any, score: str, missing: str, verdict: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    row = Row("fednova", "quantity", "", beats=beats, score=score, missing=missing)
    assert table.compared(row) is None
    keep(tmp_path, row, {"fedavg": [0.50, 0.52, 0.515], "scaffold": [0.70, 0.71, 0.72], "own": own})
    found = table.compared(row)
    assert found is not None
    assert table.verdict(row, found) == verdict
    better = found["fedavg"].mean
    assert better == pytest.approx((-1 if score == "ece" else 1) * 100 * (sum(own) - 1.535) / 3)


def test_results_say_when_and_with_what_and_all_tried_the_same_step_sizes() -> None:
    tried = set()
    for path in sorted(run.RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        assert run.kept(found["setting"], found["method"]) == path
        assert found["date"]
        assert {"torch", "consilience"} <= set(found["versions"])
        assert len(found["tuned"]["trials"]) == 4
        assert len(found["accuracy"]) == len(found["seeds"]) == 3
        search = found["tuned"]["space"]["lr"]
        tried.add((search, *(trial["options"]["lr"] for trial in found["tuned"]["trials"])))
    assert len(tried) <= 1  # or some drew better step sizes than others
