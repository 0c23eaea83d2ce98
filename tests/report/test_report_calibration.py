"""The report's section on calibration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from consilience.cli import main
from consilience.report.calibration import finding
from consilience.report.facts import gather
from consilience.report.html import render

OPTIONS = ["--model", "logistic", "--clients", "4", "--rounds", "3", "--seeds", "2", "--executor", "serial"]


def test_the_table_has_the_last_rounds_errors(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(SystemExit) as end:
        main(["compare", "local", "fedavg", "fald:burn_in=1", *OPTIONS, "--out", str(folder)])
    assert not end.value.code
    facts = gather(folder)
    found = {e.label: e.calibration for e in facts.entries if e.calibration}
    assert set(found) == {"fedavg", "fald:burn_in=1"}
    for label, error in found.items():
        lines = [
            json.loads((r.path / "history.jsonl").read_text().splitlines()[-1]) for r in facts.runs if r.label == label
        ]
        assert error.error == pytest.approx(fmean(line["global"]["ece"] for line in lines))
    page = render(facts)
    inside = page[page.index('<section id="calibration"') :]
    row = re.search(r"FedAvg</th><td[^>]*>([\d.]+)</td>", inside)
    assert row is not None
    assert row[1] == f"{100 * found['fedavg'].error:.1f}"
    assert "FA-LD burn_in=1" in finding(facts)


def test_without_a_global_model_there_is_no_such_section(tmp_path: Path) -> None:
    folder = tmp_path / "l"
    with pytest.raises(SystemExit):
        main(["run", "local", *OPTIONS[:-4], "--executor", "serial", "--out", str(folder)])
    assert '<section id="calibration"' not in render(gather(folder))
