"""The report of a large comparison stays small."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from consilience.report.html import write_report

LABELS = [("local", "local"), ("centralised", "centralised"), ("fedavg", "fedavg"), ("fedavg", "fedavg:lr=0.1")]
LABELS += [("scaffold", "scaffold"), ("scaffold", "scaffold:lr=0.1")]
LABELS += [("fedprox", f"fedprox:mu={mu}") for mu in (0.01, 0.1, 1, 10)]


@pytest.mark.slow
def test_ten_methods_five_seeds_five_hundred_rounds_a_hundred_clients(
    make_compare: Callable[..., Path], add_run: Callable[..., Path]
) -> None:
    folder = make_compare([], 0)
    for method, label in LABELS:
        for seed in range(5):
            add_run(
                folder / f"{label.replace(':', '_')}-seed{seed}", method, seed, label=label, rounds=500, clients=100
            )
    page = write_report(folder)
    assert page.stat().st_size < 7_000_000
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    blob = json.loads(found[1])
    assert len(blob["methods"]) == 10
    for label in ("fedavg", "fedprox:mu=10"):  # nothing was left out to make it small
        assert blob["curves"]["of"]["global"][label]["round"][-1] == 500
        assert len(blob["strip"]["dots"][label]) == 500
