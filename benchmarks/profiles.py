"""Profiles of small federations and what methods reached on them: the rows that ``consilience profile`` cites.

    python benchmarks/profiles.py           every row that is missing
    python benchmarks/profiles.py --anew    all of them
    python benchmarks/profiles.py --table   as a Markdown table

Rows are written to ``src/consilience/measure/files/profiles.json``, one after another, so that an interrupted run goes
on. A row is a federation (its profile is that of seed 0) and the accuracy of each method: mean over clients, each on
its own test rows, at the last round, mean over seeds, with its interval. Every method gets the same options; none is
tuned. All rows together take about ten minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from consilience import methods
from consilience.core.checkpoint import write_atomically
from consilience.core.federation import Federation
from consilience.data.datasets import load
from consilience.data.federation import build
from consilience.data.raw import RawData
from consilience.measure.profile import profile
from consilience.measure.statistics import mean_interval
from consilience.simulate import run

FILE = Path(__file__).parents[1] / "src" / "consilience" / "measure" / "files" / "profiles.json"
METHODS = ("local", "fedavg", "fedadam", "scaffold")
TRAINING = {"lr": 0.1, "batch_size": 32, "local_epochs": 3}
PARTITIONS = ("iid", "dirichlet:0.1", "dirichlet:1", "shards:2", "rotate:4", "noise:0.5", "permute:4", "power:1.5")
DATA = {"digits": (10, 30, 3), "fashion-mnist": (20, 15, 3)}
"""Of each data set: clients, rounds, seeds."""
FASHION_ROWS = 4_000


def rows_of(data: str) -> RawData:
    """A data set; of Fashion-MNIST the first rows."""
    raw = load(data)
    if data != "fashion-mnist":
        return raw
    return replace(
        raw, x=raw.x[:FASHION_ROWS], y=raw.y[:FASHION_ROWS], test_x=raw.test_x[:500], test_y=raw.test_y[:500]
    )


def federation(raw: RawData, partition: str, clients: int, seed: int) -> Federation:
    """The federation of one seed: a fifth of each client's rows are for its test."""
    return build(raw, clients=clients, partition=partition, split=(0.7, 0.1, 0.2), seed=seed)


def row(data: str, raw: RawData, partition: str) -> dict[str, Any]:
    """Profile a federation and run every method on it."""
    clients, rounds, seeds = DATA[data]
    found = profile(federation(raw, partition, clients, 0))
    accuracy, interval = {}, {}
    for name in METHODS:
        scores = []
        for seed in range(seeds):
            result = run(
                methods.get(name).make(dict(TRAINING)),
                federation(raw, partition, clients, seed),
                model="mlp",
                rounds=rounds,
                seed=seed,
                eval_every=rounds,
                eval_clients_every=rounds,
                executor="serial",
            )
            scores.append(float(result.history[-1]["clients"]["mean"]))
        accuracy[name] = round(sum(scores) / len(scores), 4)
        between = mean_interval(scores)
        interval[name] = None if between is None else [round(v, 4) for v in between]
    size = "" if data != "fashion-mnist" else f", first {FASHION_ROWS:,} rows"
    return {
        "id": f"{data}/{partition}/{clients}",
        "data": f"{data}{size}",
        "partition": partition,
        "clients": clients,
        "rows": found["federation"]["rows"],
        "rounds": rounds,
        "model": "mlp",
        "seeds": seeds,
        "training": TRAINING,
        "bits": {
            name: {key: values[key] for key in ("value", "low", "high", "max")}
            for name, values in found["bits"].items()
        },
        "accuracy": accuracy,
        "interval": interval,
    }


def main() -> None:
    """Make the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="make all rows again")
    parser.add_argument("--table", action="store_true", help="print the rows as a Markdown table")
    given = parser.parse_args()
    about = {"file": "src/consilience/measure/files/profiles.json", "command": "python benchmarks/profiles.py"}
    done = {} if given.anew or not FILE.exists() else {r["id"]: r for r in json.loads(FILE.read_text())["rows"]}
    if given.table:
        print_table(list(done.values()))
        return
    for data, (clients, _, _) in DATA.items():
        raw = rows_of(data)
        for partition in PARTITIONS:
            if f"{data}/{partition}/{clients}" in done:
                continue
            made = row(data, raw, partition)
            done[made["id"]] = made
            FILE.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(FILE, json.dumps({**about, "rows": list(done.values())}, indent=1) + "\n")
            print(made["id"], made["accuracy"], flush=True)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows in Markdown: bits of each kind of skew, and accuracies in percent."""
    kinds = ("label_skew", "feature_skew", "concept_shift", "quantity_skew")
    print("| federation |", " | ".join(k.replace("_", " ") for k in kinds), "|", " | ".join(METHODS), "|")
    print("|---|" + "---:|" * (len(kinds) + len(METHODS)))
    for r in rows:
        bits = [f"{r['bits'][k]['value']:.2f} of {r['bits'][k]['max']:.2f}" for k in kinds]
        print(
            f"| {r['id']} |", " | ".join(bits), "|", " | ".join(f"{100 * r['accuracy'][m]:.1f}" for m in METHODS), "|"
        )


if __name__ == "__main__":
    main()
