"""The report's section on personal models and clusters, and the line on who loses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from consilience.cli import main
from consilience.report.answer import losers
from consilience.report.clusters import clusters_of, personal
from consilience.report.facts import gather
from consilience.report.html import write_report
from consilience.report.load import RunFolder
from consilience.report.terminal import run_summary, show_comparison

OPTIONS = [
    "--model", "logistic", "--clients", "8", "--partition", "permute:2", "--unseen", "0.25", "--split", "0.7,0,0.3",
    "--lr", "0.3", "--rounds", "6", "--eval-clients-every", "6", "--executor", "serial",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs") / "c"
    with pytest.raises(SystemExit) as end:
        main(["compare", "local", "fedavg", "ifca:clusters=2", *OPTIONS, "--out", str(made)])
    assert not end.value.code
    return made


def section(page: str, anchor: str) -> str:
    text = page[page.index(f'<section id="{anchor}"') :].replace("<wbr>", "")
    return re.sub(r"&[a-z]+;", " ", text[: text.index("</section>")])


def texts(html: str, tag: str) -> list[str]:
    return [re.sub(r"<[^>]*>", "", found) for found in re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html)]


def plain(show: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_clusters_are_set_against_the_true_groups(folder: Path) -> None:
    facts = gather(folder)
    assert personal(facts)
    entry = next(e for e in facts.entries if e.name.startswith("IFCA"))
    (run,) = entry.runs
    groups = json.loads((run.path / "federation.json").read_text())["groups"]
    inside = section(write_report(folder).read_text(), "clusters")
    first, second = inside.split("<details>")
    row = re.search(r"<tr><th[^>]*>(?:<svg.*?</svg>)?IFCA clusters=2</th>(.*?)</tr>", first)
    assert row is not None
    last = run.history[-1]
    percent = [f"{100 * last[k]['mean']:.1f}" for k in ("clients", "unseen")]
    seen, once, unseen, count, rand, rand_unseen = texts(row[1], "td")
    assert [seen, unseen] == percent
    assert once == f"{100 * last['clients']['after']['mean']:.1f}"
    assert float(count) == last["clusters"]["count"]
    assert float(rand) == pytest.approx(last["clusters"]["rand"], abs=5e-4)
    assert float(rand_unseen) == pytest.approx(last["clusters"]["rand_unseen"], abs=5e-4)
    body = re.findall(r"<tr><th scope=\"row\"[^>]*>(\d+)</th>(.*?)</tr>", second)
    assert [k for k, _ in body] == list(clusters_of(run))
    alone = {line["client"]: line["accuracy"] for line in facts.local.runs[0].clients} if facts.local else {}
    rows = {line["client"]: line for line in run.clients if line["round"] == 6}
    assert len(rows) == 8
    for k, cells in body:
        found = texts(cells, "td")
        own = [c for c, line in rows.items() if line["cluster"] == int(k)]
        gains = [rows[c]["accuracy"] - alone[c] for c in own if rows[c]["seen"]]
        assert int(found[0]) == len(own)
        assert float(found[1]) == pytest.approx(100 * sum(rows[c]["accuracy"] for c in own) / len(own), abs=0.06)
        signed = float(found[3].replace("\u2212", "-"))
        assert signed == pytest.approx(100 * sum(gains) / len(gains), abs=0.06)
        assert [int(n) if n != "\u2013" else 0 for n in found[4:]] == [sum(groups[c] == g for c in own) for g in (0, 1)]


def test_one_line_warns_of_those_who_lose(folder: Path) -> None:
    facts = gather(folder)
    counts = {e.name: sum(dot.value < 0 for dot in e.gains) for e in facts.entries if e.gains}
    assert counts["FedAvg"] > 0
    assert f"FedAvg {counts['FedAvg']} of 6" in losers(facts)
    said = re.sub(r"<[^>]*>", "", losers(facts))
    assert said.startswith("Warning, losing by joining: ")
    assert said in section(write_report(folder).read_text(), "clients").replace("<b>", "").replace("</b>", "")
    rows = json.loads((folder / "leaderboard.json").read_text())
    assert said in plain(lambda console: show_comparison(console, rows, folder))
    for entry in facts.entries:
        entry.gains = [dot._replace(value=0.1) for dot in entry.gains]
    assert losers(facts) == "No client loses by joining, with any method."


def test_a_runs_summary_tells_its_clusters(folder: Path) -> None:
    run = RunFolder.read(next(p for p in folder.iterdir() if p.name.startswith("ifca")))
    told = plain(lambda console: console.print(run_summary(run)))
    for k, of in clusters_of(run).items():
        assert f"Cluster {k} {of['clients']} clients, {100 * of['mean']:.1f} %" in told.replace("\u00a0", " ")
    assert "Clients, trained once more" in told
    assert "Clusters against true groups adjusted Rand" in told
