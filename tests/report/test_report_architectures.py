"""The report's section on clients whose models differ."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import pytest

from consilience.cli import main
from consilience.report.architectures import architectures, group
from consilience.report.facts import gather
from consilience.report.html import write_report
from consilience.report.words import flop_unit

OPTIONS = ["--clients", "6", "--rounds", "2", "--eval-clients-every", "1", "--executor", "serial", "--local-steps", "2"]


def compared(folder: Path, *more: str) -> Path:
    with pytest.raises(SystemExit) as end:
        main(["compare", "local", "feddistill", *OPTIONS, *more, "--out", str(folder)])
    assert not end.value.code
    return folder


def test_a_table_for_each_architecture(tmp_path: Path) -> None:
    folder = compared(tmp_path / "c", "--models", "mlp:16*0.5,logistic*0.5")
    facts = gather(folder)
    assert architectures(facts) == ["logistic", "mlp:16"]
    entry = next(e for e in facts.ranked if e.name == "FedDistill")
    found = group(facts, entry, "logistic")
    assert found is not None
    lines = [line for line in entry.runs[0].clients if line["round"] == 2 and line["model"] == "logistic"]
    assert found.clients == len(lines) == 3
    assert found.score == pytest.approx(fmean(line["accuracy"] for line in lines))
    assert found.traffic == pytest.approx(fmean(line["bytes_up"] + line["bytes_down"] for line in lines))
    assert found.flops == pytest.approx(fmean(line["flops"] for line in lines))
    local = facts.local
    assert local is not None
    alone = {line["client"]: line["accuracy"] for line in local.runs[0].clients if line["round"] == 2}
    assert found.gain == pytest.approx(fmean(line["accuracy"] - alone[line["client"]] for line in lines))
    assert group(facts, entry, "lenet") is None
    page = write_report(folder).read_text()
    section = page[page.index('<section id="architectures"') :]
    section = section[: section.index("</section>")]
    assert re.findall(r"<h3 class=part>(.*?)</h3>", section) == ["logistic", "mlp:16"]
    assert section.count("FedDistill") >= 2


def test_it_is_absent_where_all_have_one(tmp_path: Path) -> None:
    assert '<section id="architectures"' not in write_report(compared(tmp_path / "c", "--model", "mlp:16")).read_text()


def test_units_of_work() -> None:
    assert flop_unit([2e6]).text(2e6) == "2.00\u00a0MFLOP"
    assert flop_unit([3e9]).name == "GFLOP"
    assert flop_unit([5e12]).name == "TFLOP"
