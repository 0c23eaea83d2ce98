"""How the cost of a round grows with the number of registered clients, 100 of them taking part in each.

    python benchmarks/population.py --repeats 3 --json

Runs take turns over the populations, since machines are not equally fast all the time. Clients are made from their
ids (``synthetic-ondemand``), and their sizes are heavy-tailed: cohorts of different populations do not have equally
many rows, so what is compared is seconds for the same number of rows trained, and seconds a round are told beside it.
Set-up is a whole command of one round. CPU seconds, of all processes, are the same beside other programs; seconds
are not. Memory is the largest sum of proportional set sizes (PSS). Results go to `benchmarks/results/population.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speed import watched

from consilience.core.checkpoint import write_atomically

RESULTS = Path(__file__).parent / "results" / "population.json"
POPULATIONS = (1_000, 10_000, 100_000, 1_000_000)
COHORT = 100


@dataclass
class Sample:
    """One measured run. round_s, rows: a round's seconds and trained rows, after the first two. setup_s, setup_cpu_s:
    of a whole command of one round. cpu_s: CPU seconds of a round beyond the first. pss_mb: peak memory."""

    round_s: float
    rows: float
    setup_s: float
    setup_cpu_s: float
    cpu_s: float
    pss_mb: float


def command(method: str, clients: int, rounds: int, seed: int, out: Path) -> tuple[float, float, float]:
    """Run it; (seconds, CPU seconds, peak MB)."""
    options = {
        "data": "synthetic-ondemand", "model": "logistic", "clients": clients, "participation": COHORT,
        "eval-clients": COHORT, "rounds": rounds, "seed": seed, "out": out,
    }  # fmt: skip
    text = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    _, memory = watched([sys.executable, "-m", "consilience", "run", method, *text])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - began, cpu, memory


def sample(method: str, clients: int, rounds: int, seed: int) -> Sample:
    """A run of one round, and one of ``rounds``."""
    with tempfile.TemporaryDirectory() as folder:
        setup, setup_cpu, _ = command(method, clients, 1, seed, Path(folder) / "one")
        _, cpu, memory = command(method, clients, rounds, seed, Path(folder) / "run")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "history.jsonl").read_text().splitlines()]
    first, last = lines[1], lines[-2]  # a line is finished while the next round is trained; the last has none
    counted = last["round"] - first["round"]
    return Sample(
        (last["wall_s"] - first["wall_s"]) / counted,
        (lines[-1]["samples"] - first["samples"]) / (lines[-1]["round"] - first["round"]),
        setup,
        setup_cpu,
        (cpu - setup_cpu) / (rounds - 1),
        memory,
    )


def summary(found: dict[int, list[Sample]]) -> dict[str, Any]:
    """Medians by population, and how much more a row costs than with the fewest clients."""
    rows: dict[str, Any] = {}
    for clients, samples in found.items():
        rows[str(clients)] = {
            "seconds_a_round": statistics.median(s.round_s for s in samples),
            "seconds_for_10000_rows": statistics.median(1e4 * s.round_s / s.rows for s in samples),
            "cpu_seconds_for_10000_rows": statistics.median(1e4 * s.cpu_s / s.rows for s in samples),
            "setup_s": statistics.median(s.setup_s for s in samples),
            "setup_cpu_s": statistics.median(s.setup_cpu_s for s in samples),
            "peak_mb": max(s.pss_mb for s in samples),
            "samples": [asdict(s) for s in samples],
        }
    base = rows[str(min(found))]
    for row in rows.values():
        for key in ("seconds_for_10000_rows", "cpu_seconds_for_10000_rows"):
            row[key.replace("seconds", "ratio", 1)] = row[key] / base[key]
    return rows


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["fedavg", "scaffold"])
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    kept: dict[str, Any] = {"cores": os.cpu_count(), "cohort": COHORT, "rounds": options.rounds}
    found: dict[str, dict[int, list[Sample]]] = {m: {n: [] for n in POPULATIONS} for m in options.methods}
    for seed in range(options.repeats):
        for clients in POPULATIONS:
            for method in options.methods:
                found[method][clients].append(sample(method, clients, options.rounds, seed))
    kept["methods"] = {method: summary(populations) for method, populations in found.items()}
    write_atomically(RESULTS, json.dumps(kept, indent=1) + "\n")
    if options.json:
        print(json.dumps(kept))
        return
    for method, rows in kept["methods"].items():
        for clients, row in rows.items():
            numbers = "   ".join(f"{key} {value:.3g}" for key, value in row.items() if key != "samples")
            print(f"{method:9} {clients:>8} clients   {numbers}")


if __name__ == "__main__":
    main()
