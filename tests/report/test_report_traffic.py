"""The report shows what score every method reaches with what it sends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from statistics import fmean, median

import pytest
import yaml

from consilience.report.facts import gather
from consilience.report.html import render
from consilience.report.load import read_runs
from consilience.report.traffic import NEAR, finding, goal, lines

Make = Callable[..., Path]


def part(page: str) -> str:
    found = page[page.index('<section id="traffic"') :]
    return found[: found.index("</section>")]


def text(page: str) -> str:
    inner = re.sub(r"<svg.*?</svg>", "", part(page), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", inner)).replace("\xa0", " ").split())


def paths(page: str) -> list[list[tuple[float, float]]]:
    """The curves, from the last drawn to the first."""
    drawn = re.findall(r'<path d="M([^"]*)" fill="none"', part(page))
    return [[(float(x), float(y)) for x, y in (p.split() for p in d.split("L"))] for d in reversed(drawn)]


def target_of(folder: Path, target: float) -> None:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "target": target}))


def test_curves_are_drawn_over_bytes_on_a_logarithmic_axis(make_compare: Make) -> None:
    """SCAFFOLD sends twice as much a round as FedAvg does, so its curve lies a constant length to the right."""
    page = render(gather(make_compare(["scaffold", "fedavg"], 2)))
    first, second = paths(page)  # scaffold is ahead
    assert len(first) == len(second) == 50
    shifts = [a[0] - b[0] for a, b in zip(first, second, strict=True)]
    assert min(shifts) > 10
    assert max(shifts) - min(shifts) < 0.25  # as far as places have one decimal
    assert second[1][0] - second[0][0] == pytest.approx(shifts[0], abs=0.25)  # from round 1 to round 2
    for curve in (first, second):
        assert all(0 < x < 760 and 0 < y < 340 for x, y in curve)
        assert curve[-1][1] < curve[0][1]  # up
    assert "NaN" not in part(page)
    assert len(re.findall(r"<g transform=.*?<title>(.*?)</title>", part(page))) == 2


def test_bytes_are_counted_to_the_target(make_compare: Make) -> None:
    folder = make_compare(["scaffold", "fedavg"], 3)
    for target in (0.7, 0.85):
        target_of(folder, target)
        facts = gather(folder)
        assert goal(facts) == target
        needed = {}
        for label in ("scaffold", "fedavg"):
            each = [
                next((line["bytes_up"] + line["bytes_down"] for line in run.history
                      if line["global"]["accuracy"] >= target), None)
                for run in read_runs(folder) if run.label == label
            ]  # fmt: skip
            needed[label] = None if None in each else median(of for of in each if of is not None) / 20e6
        told = text(render(facts))
        assert needed["scaffold"] is not None
        assert f"To {100 * target:.1f} % (the target)" in told
        if target == 0.7:
            assert needed["fedavg"] is not None
            assert f"FedAvg reaches 70.0 % with the fewest bytes, {needed['fedavg']:.1f} MB per client" in told
            assert f"SCAFFOLD takes the most of those that do, {needed['scaffold']:.1f} MB" in told
        else:
            assert needed["fedavg"] is None
            assert f"SCAFFOLD reaches 85.0 % with the fewest bytes, {needed['scaffold']:.1f} MB" in told
            assert "1 method did not in most runs" in told
            assert re.search(r"FedAvg [\d.]+ 10.5 10.5 21.0 > 21.0", told)


def test_without_a_target_it_is_a_share_of_the_best(make_compare: Make) -> None:
    facts = gather(make_compare(["scaffold", "fedavg"], 2))
    assert goal(facts) == pytest.approx(NEAR * facts.best.mean)
    assert "(95 % of the best method)" in text(render(facts))
    runs = [run.history[-1]["global"]["accuracy"] for run in facts.best.runs]
    assert goal(facts) == pytest.approx(0.95 * fmean(runs))


def test_small_amounts_keep_two_digits(make_compare: Make) -> None:
    folder = make_compare(["scaffold", "fedavg"], 1)
    path = folder / "fedavg-seed0" / "history.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["bytes_up"] //= 3000
        row["bytes_down"] //= 3000
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert re.search(r"FedAvg [\d.]+ 0\.0035 0\.0035 0\.0070", text(render(gather(folder))))


def test_of_losses_and_of_lone_runs(make_compare: Make, make_run: Make) -> None:
    facts = gather(make_compare(["scaffold", "fedavg"], 2, regression=True))
    assert goal(facts) is None
    page = render(facts)
    assert finding(facts).startswith("FedAvg sends least: ")
    assert "Loss against bytes" in text(page)
    assert " To " not in text(page)
    alone = gather(make_run("fedavg"))
    assert len(lines(alone)) == 1
    assert '<section id="traffic"' not in render(alone)


def test_what_sends_nothing_is_not_there(make_compare: Make, add_run: Callable[..., Path]) -> None:
    folder = make_compare(["local", "centralised"], 2)
    assert '<section id="traffic"' not in render(gather(folder))
    for seed in (0, 1):
        add_run(folder / f"fedavg-seed{seed}", "fedavg", seed)
    assert [len(curve) for curve in paths(render(gather(folder)))] == [5]  # of clients, who were judged five times
