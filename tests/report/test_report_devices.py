"""The report's section on devices and time, from a timeline written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilience.core.errors import DataError
from consilience.report.devices import _ticks
from consilience.report.html import write_report
from consilience.report.load import RunFolder
from consilience.report.timeline import Timeline

Make = Callable[..., Path]


def job(client: int, start: float, parts: tuple[float, ...], state: str = "combined", **more: Any) -> dict[str, Any]:
    names = dict(zip(("wait", "download", "compute", "upload"), parts, strict=True))
    line = {"job": 0, "client": client, "phase": "train", "state": state, "start": start, "end": start + sum(parts),
            **names, "steps": 4, "staleness": 0, "round": 1}  # fmt: skip
    return {**line, **more}


JOBS = [
    job(0, 0.0, (0.0, 1.0, 2.0, 1.0)),
    job(0, 4.0, (0.0, 1.0, 2.0, 1.0), staleness=3),
    job(1, 0.0, (2.0, 1.0, 6.0, 1.0), staleness=1),
    job(2, 0.0, (0.0, 1.0, 9.0, 9.0), "lost", end=5.0),
    job(3, 0.0, (0.0, 1.0, 9.0, 9.0), "cancelled", end=7.0),
]


def timed(folder: Path, jobs: list[dict[str, Any]] = JOBS, watts: float | None = 2.0) -> Path:
    """A run's folder with virtual time."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    for line in lines:
        line["virtual_s"] = float(line["round"])
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in jobs))
    devices = [{"watts": watts}] * len(json.loads((folder / "federation.json").read_text())["sizes"])
    (folder / "fleet.json").write_text(
        json.dumps({"devices": devices, "offline": [[], [], [[5.0, 9.0]]], "until": 50.0})
    )
    return folder


def test_numbers_by_hand(make_run: Make) -> None:
    line = Timeline(RunFolder.read(timed(make_run(clients=6))))
    assert line.states() == {"combined": 3, "lost": 1, "cancelled": 1}
    assert line.staleness() == {0: 1, 1: 1, 3: 1}
    assert line.heard() == {0: 2, 1: 1}
    assert line.never == [2, 3, 4, 5]
    assert line.joules() == 2.0 * (4 + 4 + 8 + 5 + 7)
    assert line.offline(2) == [[5.0, 9.0]]
    clients, until = line.shown()
    assert clients[:2] == [1, 0]  # the slowest first
    assert until == 50.0
    federation = line.run.federation
    name, share = line.unheard_class() or ("", 0.0)
    k = int(name)
    assert share == sum(federation["counts"][c][k] for c in (2, 3, 4, 5)) / sum(row[k] for row in federation["counts"])


def test_energy_is_not_guessed(make_run: Make) -> None:
    assert Timeline(RunFolder.read(timed(make_run(), watts=None))).joules() is None


def test_the_section(make_run: Make) -> None:
    folder = timed(make_run(clients=6))
    page = write_report(folder).read_text()
    part = page[page.index('id="devices"') :].partition("</section>")[0]
    assert "never heard 4 of 6 clients; they hold" in part
    assert part.count("url(#off)") >= 2
    assert "client 2, lost: 0 to 5 s" in part
    assert "staleness 3: 1 replies" in part
    assert len(re.findall(r'r="3.4"', part)) == 6
    assert 'href="#devices"' in page
    bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="11" fill="var\(--r5\)"', part)
    widths = sorted(float(width) for _, width in bars)
    assert len(widths) == 4  # one computation a job, and none of the one that was cancelled
    assert widths[-1] == pytest.approx(3 * widths[0], rel=0.05)  # 6 s against 2 s


def test_a_topology_is_told(make_run: Make) -> None:
    folder = timed(make_run())
    about = json.loads((folder / "fleet.json").read_text())
    about["topology"] = {"topology": "ring", "nodes": 6, "edges": 6, "least_degree": 2, "most_degree": 2, "parts": 1,
                         "spectral_gap": 0.3333}  # fmt: skip
    (folder / "fleet.json").write_text(json.dumps(about))
    assert "topology ring, 6 edges, 2 neighbours each, spectral gap 0.333." in write_report(folder).read_text()
    about["topology"] |= {"topology": "ring,none", "rounds": 2, "least_degree": 0, "parts": 2}
    (folder / "fleet.json").write_text(json.dumps(about))
    told = "topology ring,none, 6 edges in 2 rounds, 0 to 2 neighbours each in one, spectral gap 0.333, in 2 parts that"
    assert told in write_report(folder).read_text()


def test_no_section_without_virtual_time(make_run: Make) -> None:
    page = write_report(make_run()).read_text()
    assert 'id="devices"' not in page


def test_a_damaged_timeline_is_named(make_run: Make) -> None:
    folder = timed(make_run())
    (folder / "timeline.jsonl").write_text('{"client": 1}\n')
    with pytest.raises(DataError, match=r"timeline.jsonl line 1 is damaged: it has no state"):
        write_report(folder)


def test_ticks_are_round() -> None:
    assert _ticks(10.0, 5) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert _ticks(0.7, 4) == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert _ticks(0.0) == [0.0]
