"""Small reproductions of what papers claim for their methods, on data that needs no download.

    python benchmarks/reproduce.py            every claim that has no result yet
    python benchmarks/reproduce.py scaffold   these claims anew
    python benchmarks/reproduce.py --table    the results as a Markdown table

Each claim is one comparison whose leaderboard is kept in ``benchmarks/results/NAME.json`` with what was claimed,
whether it held, and the command. Nothing here is tuned until it holds: settings follow the papers as far as the
data and an hour of two cores allow, and a claim that did not hold stays in the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience import experiment
from consilience.config import settle
from consilience.core.checkpoint import write_atomically
from consilience.report.load import read_runs

RESULTS = Path(__file__).parent / "results"
Histories = Mapping[str, list[list[dict[str, Any]]]]
"""Histories of each method, one per seed."""


@dataclass(frozen=True)
class Claim:
    """What a paper says, the comparison that looks at it, and how it is judged from the histories."""

    says: str
    methods: tuple[str, ...]
    options: Mapping[str, Any]
    number: Callable[[list[dict[str, Any]]], float]
    counts: str
    holds: Callable[[Mapping[str, float]], bool]


def accuracy(history: list[dict[str, Any]]) -> float:
    """Mean accuracy of the global model over the last ten evaluated rounds."""
    last = [line["global"]["accuracy"] for line in history[-10:]]
    return sum(last) / len(last)


def final_loss(history: list[dict[str, Any]]) -> float:
    """Mean loss of the global model over the last ten evaluated rounds."""
    last = [line["global"]["loss"] for line in history[-10:]]
    return sum(last) / len(last)


def rounds_to(target: float) -> Callable[[list[dict[str, Any]]], float]:
    """Rounds until the global model's accuracy reaches ``target`` (those run plus one, if never)."""

    def count(history: list[dict[str, Any]]) -> float:
        reached = (line["round"] for line in history if line["global"]["accuracy"] >= target)
        return float(next(reached, history[-1]["round"] + 1))

    return count


SKEWED = {
    "data": "digits",
    "clients": 20,
    "participation": 0.5,
    "partition": "shards:2",
    "seeds": 3,
    "weights": "uniform",
}

CLAIMS: dict[str, Claim] = {
    "fedavg": Claim(
        "FedAvg needs 10 to 100 times fewer rounds than FedSGD (McMahan et al., 2017, abstract)",
        ("fedavg:local_epochs=5,batch_size=10,lr=0.1", "fedavg:local_steps=1,batch_size=100000,lr=0.5"),
        {"data": "digits", "clients": 20, "participation": 0.5, "rounds": 400, "seeds": 3, "eval_clients_every": 0},
        rounds_to(0.9),
        "rounds to 90 %",
        lambda n: 10 * n["fedavg:local_epochs=5,batch_size=10,lr=0.1"]
        <= n["fedavg:local_steps=1,batch_size=100000,lr=0.5"],
    ),
    "fedprox": Claim(
        "with 90 % stragglers on Synthetic(1,1), mu = 1 ends at a lower loss than mu = 0 (Li et al., 2020, figure 1)",
        ("fedprox:mu=0,stragglers=0.9", "fedprox:mu=1,stragglers=0.9"),
        {
            "data": "synthetic:1:1", "clients": 30, "participation": 10, "model": "logistic", "rounds": 100, "seeds": 3,
            "lr": 0.01, "batch_size": 10, "local_epochs": 20, "eval_clients_every": 0,
        },
        final_loss,
        "loss",
        lambda n: n["fedprox:mu=1,stragglers=0.9"] < n["fedprox:mu=0,stragglers=0.9"],
    ),
    "scaffold": Claim(
        "on skewed labels with several local epochs SCAFFOLD needs fewer rounds than FedAvg (Karimireddy et al., 2020)",
        ("fedavg:form=delta", "scaffold"),
        {**SKEWED, "rounds": 200, "local_epochs": 5, "eval_clients_every": 0},
        rounds_to(0.85),
        "rounds to 85 %",
        lambda n: n["scaffold"] < n["fedavg:form=delta"],
    ),
    "moon": Claim(
        "MOON ends above FedAvg with 10 parties on Dirichlet 0.5 (Li et al., 2021, table 1)",
        ("fedavg", "moon:mu=1"),
        {
            "data": "fashion-mnist", "clients": 10, "partition": "dirichlet:0.5", "model": "lenet", "rounds": 10,
            "local_epochs": 2, "batch_size": 64, "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5, "seeds": 3,
            "eval_clients_every": 0,
        },
        accuracy,
        "accuracy",
        lambda n: n["moon:mu=1"] > n["fedavg"],
    ),
    "fedopt": Claim(
        "adaptive server optimisers and server momentum end above FedAvg on skewed data (Reddi et al., 2021, table 1)",
        ("fedavg:form=delta", "fedavgm", "fedadagrad", "fedadam", "fedyogi"),
        {**SKEWED, "rounds": 100, "eval_clients_every": 0},
        accuracy,
        "accuracy",
        lambda n: min(n[m] for m in ("fedavgm", "fedadagrad", "fedadam", "fedyogi")) > n["fedavg:form=delta"],
    ),
    "fednova": Claim(
        "FedNova ends above FedAvg where clients of unequal size do equal epochs (Wang et al., 2020)",
        ("fedavg:form=delta", "fednova"),
        {
            "data": "digits", "clients": 16, "partition": "dirichlet:0.1", "rounds": 60, "local_epochs": 5, "seeds": 3,
            "eval_clients_every": 0,
        },
        accuracy,
        "accuracy",
        lambda n: n["fednova"] > n["fedavg:form=delta"],
    ),
    "feddyn": Claim(
        "on skewed labels FedDyn needs fewer rounds than FedAvg and SCAFFOLD (Acar et al., 2021)",
        ("fedavg:form=delta", "scaffold", "feddyn:alpha=0.1"),
        {**SKEWED, "rounds": 100, "local_epochs": 5, "eval_clients_every": 0},
        rounds_to(0.85),
        "rounds to 85 %",
        lambda n: n["feddyn:alpha=0.1"] < min(n["fedavg:form=delta"], n["scaffold"]),
    ),
    "fedsam": Claim(
        "FedSAM ends above FedAvg on skewed labels (Qu et al., 2022)",
        ("fedavg", "fedsam:rho=0.05"),
        {**SKEWED, "rounds": 60, "local_epochs": 2, "eval_clients_every": 0},
        accuracy,
        "accuracy",
        lambda n: n["fedsam:rho=0.05"] > n["fedavg"],
    ),
}  # fmt: skip


def reproduce(name: str) -> dict[str, Any]:
    """Run one claim's comparison and keep what came of it."""
    claim = CLAIMS[name]
    folder = Path(tempfile.gettempdir()) / f"consilience-reproduce-{name}"
    settings = settle(claim.options)
    resumed = (folder / "compare.yaml").exists()
    experiment.compare(
        settings, claim.methods, folder, command="", resume=resumed,
        on_line=lambda label, line: print(f"\r{label} round {line['round']}   ", end="", file=sys.stderr),
    )  # fmt: skip
    histories: dict[str, list[list[dict[str, Any]]]] = {}
    for run in read_runs(folder):
        histories.setdefault(run.label, []).append(list(run.history))
    numbers = {label: [claim.number(history) for history in found] for label, found in histories.items()}
    means = {label: sum(values) / len(values) for label, values in numbers.items()}
    result = {
        "claim": claim.says,
        "counts": claim.counts,
        "numbers": {label: [round(v, 4) for v in numbers[label]] for label in claim.methods},
        "means": {label: round(means[label], 4) for label in claim.methods},
        "holds": bool(claim.holds(means)),
        "options": dict(claim.options),
    }
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder)
    return result


def table() -> str:
    """All results as Markdown."""
    rows = ["| claim | what is counted | mean over seeds | held |", "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "claim" not in result:
            continue
        numbers = "; ".join(f"`{label}` {value:g}" for label, value in result["means"].items())
        rows.append(
            f"| {result['claim']} | {result['counts']} | {numbers} | {'yes' if result['holds'] else '**no**'} |"
        )
    return "\n".join(rows)


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help="claims to look at anew")
    parser.add_argument("--table", action="store_true", help="print the results")
    asked = parser.parse_args()
    if not asked.table:
        for name in asked.claims or [n for n in CLAIMS if not (RESULTS / f"{n}.json").exists()]:
            result = reproduce(name)
            print(f"\n{name}: {result['means']} -> {'held' if result['holds'] else 'did not hold'}", file=sys.stderr)
    print(table())


if __name__ == "__main__":
    main()
