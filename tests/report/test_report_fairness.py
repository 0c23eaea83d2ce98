"""Sections on certainty, targets, groups and tuning, and the page over several federations, from fabricated runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from consilience.core.errors import DataError
from consilience.measure.ranks import rank_methods
from consilience.report.facts import gather
from consilience.report.groups import plane_blob
from consilience.report.html import write_report
from consilience.report.overview import rank_plot, verdict, write_overview

Make = Callable[..., Path]


def told(path: Path) -> str:
    """Visible text with one kind of space."""
    body = re.sub(r"<(script|style).*?</\1>", " ", path.read_text("utf-8"), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).replace("\u00a0", " ").split())


def ask(folder: Path, **more: Any) -> Path:
    """Add to what a comparison was asked for."""
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **more}))
    return folder


def with_groups(folder: Path) -> Path:
    """Give every client of every run counts by sex: 20 rows, predicted 1 more often for group 1."""
    for run in (path for path in folder.iterdir() if path.is_dir()):
        lines = [json.loads(line) for line in (run / "clients.jsonl").read_text().splitlines()]
        for line in lines:
            right = round(line["accuracy"] * 5)
            own = [[right, 5 - right], [5 - right, right]]
            line["groups"] = {"sex": [own, [[max(0, right - 1), 6 - right], [5 - right, right]]]}
        (run / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        federation = json.loads((run / "federation.json").read_text())
        federation |= {"sensitive": {"sex": ["f", "<m>"]}, "classes": ["no", "yes"]}
        federation["counts"] = [row[:2] for row in federation["counts"]]
        (run / "federation.json").write_text(json.dumps(federation))
    return folder


def test_differences_from_a_reference(make_compare: Make) -> None:
    folder = ask(make_compare(["fedavg", "scaffold", "local"], 5), reference="fedavg")
    text = told(write_report(folder))
    assert "Against FedAvg: SCAFFOLD is" in text
    assert "points better" in text
    # four sign flips of five pairs: 2 of 32, twice that after Holm over two methods
    assert "with 5 seeds they cannot give less than p = 0.06, or p = 0.12 after Holm" in text
    assert "what is said rests on the t-test" in text


def test_no_reference_shows_all_pairs(make_compare: Make) -> None:
    text = told(write_report(make_compare(["fedavg", "fedprox", "scaffold"], 5)))
    assert "2 of 3 pairs of methods differ" in text
    assert "Name a method with --reference" in text


def test_one_seed_is_said_to_test_nothing(make_compare: Make) -> None:
    folder = ask(make_compare(["fedavg", "fedprox"], 1), reference="fedavg")
    assert "One seed cannot tell a difference from chance." in told(write_report(folder))


def test_a_target_that_some_never_reach(make_compare: Make) -> None:
    folder = ask(make_compare(["fedavg", "scaffold"], 3), target=0.84)
    text = told(write_report(folder))
    assert "Cost to reach 84.0 %" in text
    assert re.search(r"SCAFFOLD reaches 84\.0 % first, after \d+ rounds", text)
    assert "1 method did not in most runs" in text
    assert "0 of 3 > 50" in text


def test_groups_are_shown(make_compare: Make) -> None:
    folder = with_groups(make_compare(["fedavg", "scaffold"], 2))
    path = write_report(folder)
    text = told(path)
    assert "By sex: f, <m>" in text
    assert "<m>" not in re.sub(r"<script.*?</script>", "", path.read_text(), flags=re.S)  # escaped
    assert "groups by sex differ by" in text
    assert 'id="plane"' in path.read_text()


def test_no_method_lies_above_the_bound(make_compare: Make) -> None:
    facts = gather(with_groups(make_compare(["fedavg", "scaffold"], 1)))
    plane = plane_blob(facts)["sex"]
    for i, along in enumerate(("global", "local")):
        for curve in plane["curves"][along].values():
            assert curve == sorted(curve)
        oracle = plane["curves"][along]["oracle"]
        for dot in plane["dots"].values():
            below = [y for x, y in oracle if x <= dot[i]]
            assert dot[2] <= (max(y for _, y in oracle) if not below else 100.0) + 1e-6


def test_without_attributes_the_section_says_what_to_add(make_run: Make) -> None:
    assert "No sensitive attribute: add --sensitive COLUMN" in told(write_report(make_run("fedavg")))


def test_tuning_says_what_each_was_given(make_compare: Make) -> None:
    folder = make_compare(["fedavg", "fedprox"], 2)
    trials = [{"options": {"lr": 0.05}, "value": 0.7}, {"options": {"lr": 0.2}, "value": None}]
    methods = {
        name: {"space": {"lr": "0.001 to 1, log"}, "trials": trials, "best": 0} for name in ("fedavg", "fedprox")
    }
    record = {"budget": 2, "seed": 2, "metric": "global", "lower": False, "methods": methods}
    (folder / "tuning.json").write_text(json.dumps(record))
    text = told(write_report(folder))
    assert "Every method had 2 trials on validation data." in text
    assert "lr (0.001 to 1, log)" in text
    assert "diverged" in text
    (folder / "tuning.json").write_text("{")
    with pytest.raises(DataError, match="tuning"):
        write_report(folder)


def test_the_page_over_federations(tmp_path: Path) -> None:
    scores = {f"f{i}": {"fedavg": 0.8, "fedprox:mu=1": 0.7, "scaffold": 0.9} for i in range(6)}
    boards = {
        part: [
            {"method": m, "metric": "global", "accuracy": v, "seeds": 3}
            for m, v in sorted(own.items(), key=lambda pair: -pair[1])
        ]
        for part, own in scores.items()
    }
    ranks = rank_methods(scores)
    text = told(write_overview(tmp_path, {part: f"partition={part}" for part in boards}, boards, ranks))
    assert "SCAFFOLD has the best mean rank over 6 federations (1.00)" in text
    assert "ranks better than FedProx mu=1; between it and FedAvg none was found" in text
    assert "partition=f3" in text
    plot = rank_plot(ranks)
    assert plot.count('stroke="var(--ink3)"') == len(ranks.cliques) == 2
    few = rank_methods({k: scores[k] for k in ("f0", "f1")})
    assert "so few federations cannot show a difference between 3 methods" in verdict(few)


def test_evenness_between_clients(make_compare: Make) -> None:
    folder = make_compare(["fedavg", "local"], 2)
    facts = gather(folder)
    text = told(write_report(folder))
    best = facts.best
    std = [run.history[-1]["clients"]["std"] for run in best.runs]
    assert f"{sum(s * s for s in std) / 2 * 1e4:.1f}" in text
    assert f"{len(best.losers)} of {len(best.gains)}" in text
    assert "Worst gain" in text
