"""The report says under what attack runs were made, what they refused, and what they spent of privacy."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest
from rich.console import Console

from consilience.cli import main
from consilience.report.facts import gather
from consilience.report.html import render
from consilience.report.load import RunFolder, read_runs
from consilience.report.tables import write_tables
from consilience.report.terminal import run_summary, show_comparison
from consilience.report.trust import conditions

OPTIONS = ["--model", "logistic", "--clients", "10", "--rounds", "2", "--executor", "serial"]


def made(folder: Path, *words: str) -> Path:
    with pytest.raises(SystemExit) as end:
        main([*words, *OPTIONS, "--out", str(folder)])
    assert not end.value.code
    return folder


def text(page: str, anchor: str = "trust") -> str:
    part = page[page.index(f'<section id="{anchor}"') :]
    return " ".join(re.sub(r"<[^>]*>", " ", part[: part.index("</section>")]).split())


def shown(table: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_attack_is_told_wherever_results_are(tmp_path: Path) -> None:
    folder = made(tmp_path / "c", "compare", "fedavg", "fedavg:aggregator=median", "--attack", "gaussian:0.2")
    facts = gather(folder)
    assert conditions(facts.runs) == ["2 of them hostile (gaussian)"]
    page = render(facts)
    assert "10 clients, 2 of them hostile (gaussian), 1 seed" in page
    assert "Of 10 clients, 2 are hostile (gaussian)." in text(page)
    console = Console(file=io.StringIO(), width=100)
    show_comparison(console, json.loads((folder / "leaderboard.json").read_text()), folder)
    assert isinstance(console.file, io.StringIO)
    assert "Of 10 clients, 2 are hostile (gaussian)." in console.file.getvalue()
    rows = [row for run in facts.runs for row in run.clients if row.get("hostile")]
    assert len(rows) == 2 * len(facts.runs)


def test_privacy_is_told_as_it_was_spent(tmp_path: Path) -> None:
    folder = made(tmp_path / "p", "run", "fedavg", "--epsilon", "8", "--delta", "1e-5")
    run = RunFolder.read(folder)
    epsilon = run.history[-1]["privacy"]["epsilon"]
    assert f"ε {epsilon:.3g} at δ 1e-05" in shown(run_summary(run))
    told = text(render(gather(folder)))
    assert f"What the models tell of any one client is bounded by ε {epsilon:.3g} at δ 1e-05." in told
    assert f"{epsilon:.3g} 1e-05 {run.history[-1]['privacy']['noise']:.3g} 1" in told


def test_refusals_are_counted_with_their_reasons(tmp_path: Path) -> None:
    folder = made(tmp_path / "r", "run", "fedavg")
    lines = [{"round": r, "client": 3, "field": "delta.w", "reason": "not finite"} for r in (1, 2)]
    lines.append({"round": 2, "client": 4, "field": "", "reason": "shape <2>"})
    (folder / "refused.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = text(render(gather(folder)))
    assert "Some updates were not what they should be, and were left out." in told
    assert "FedAvg 3 Why, all of 2 reasons" in told
    assert "FedAvg delta.w not finite 2 FedAvg shape &lt;2&gt; 1" in told


def test_without_any_of_it_there_is_no_such_section(tmp_path: Path) -> None:
    folder = made(tmp_path / "n", "run", "fedavg")
    assert '<section id="trust"' not in render(gather(folder))
    assert "Conditions" not in shown(run_summary(RunFolder.read(folder)))
    assert conditions([RunFolder.read(folder)]) == []


def test_changed_inputs_are_told_wherever_results_are(tmp_path: Path) -> None:
    words = ["compare", "fedavg", "fedavg:lr=0.3", "--robustness", "0.02", "--seeds", "2", "--lr", "0.1"]
    folder = made(tmp_path / "h", *words)
    rows = json.loads((folder / "leaderboard.json").read_text())
    runs = {(run.label, run.seed): run.history[-1]["robustness"] for run in read_runs(folder)}
    assert len(runs) == 4
    for row in rows:
        own = [runs[row["method"], seed] for seed in (0, 1)]
        assert row["robustness"]["both"] == pytest.approx(fmean(of["both"] for of in own))
        assert row["robustness"]["std"] == pytest.approx(stdev(of["both"] for of in own))
        assert (row["robustness"]["eps"], row["robustness"]["seeds"]) == (0.02, 2)
    assert len({row["robustness"]["both"] for row in rows} | {0.0}) == 3
    best, other = sorted(rows, key=lambda row: -row["robustness"]["both"])
    told = text(render(gather(folder)))
    name, value = {"fedavg": "FedAvg", "fedavg:lr=0.3": "FedAvg lr=0.3"}, best["robustness"]
    ends = [f"{name[row['method']]} {100 * row['robustness']['both']:.1f}" for row in (best, other)]
    assert f"Inputs moved by at most 0.02 leave {ends[0]} % of test rows right, {ends[1]} %." in told.replace(
        "\xa0", " "
    )
    cells = [f"{100 * value[key]:.1f}" for key in ("clean", "pgd", "square", "both", "std")]
    assert f"{' '.join(cells)} {100 * (value['clean'] - value['both']):.1f}" in told
    console = Console(file=io.StringIO(), width=100)
    show_comparison(console, rows, folder)
    assert isinstance(console.file, io.StringIO)
    shown_rows = " ".join(console.file.getvalue().split())
    assert f"{best['method']} {' '.join(cells)} 2" in shown_rows
    written = {path.name: path for path in write_tables(folder, "csv")}
    lines = written["robustness.csv"].read_text().splitlines()
    assert lines[0] == "method,seed,eps,rows,clean,pgd,square,both"
    assert len(lines) == 5
    assert "robustness" not in written["leaderboard.csv"].read_text()
    one = RunFolder.read(folder / "fedavg-seed0")
    assert f"Inputs moved by 0.02, both {100 * runs['fedavg', 0]['both']:.1f} %" in " ".join(
        shown(run_summary(one)).split()
    )


@pytest.mark.parametrize(
    ("words", "reason"), [(["local"], "global model"), (["fedavg", "--data", "synthetic"], "images")]
)
def test_what_cannot_be_judged_so_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", *words, *OPTIONS, "--robustness", "0.1", "--out", str(tmp_path / "n")])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
    assert not (tmp_path / "n").exists()
