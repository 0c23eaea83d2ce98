"""Clients whose architectures differ, on Fashion-MNIST: which method beats training alone, by how much, at what cost.

    python benchmarks/architectures.py              every run that has no result yet, then the tables
    python benchmarks/architectures.py --part 0/2   the first half of them (for a second process beside this one)
    python benchmarks/architectures.py --table      the results as Markdown tables

20 clients of 300 training and 200 test rows, 40 rounds with everybody, three seeds, two kinds of label skew. In the
first suite clients have four architectures with 64 features each, in the second four widths of LeNet. Results are kept
run by run in ``benchmarks/results/architectures.json``. Settings were fixed before the first run (one local epoch,
batches of 32, lr 0.05, each method's own defaults) and nothing was tuned; a claim that did not hold stays in the table.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from kept import Kept

import consilience
from consilience.architectures import assign
from consilience.config import parse_method
from consilience.core.training import option
from consilience.data import from_arrays, load
from consilience.methods import FedAvg, get

KEPT = Kept("architectures")
CLIENTS, ROWS, SEEDS = 20, 500, (0, 1, 2)
PUBLIC = "public_rows=200"
SKEWS = {"dirichlet": "dirichlet:0.1:equal", "classes": "shards:2"}
COMMON: dict[str, Any] = {"rounds": 40, "eval_every": 40, "eval_clients_every": 10, "fleet": "phones"}
MIXED = {"model": "lenet", "models": "lenet,cnn@0.25,mlp,resnet8@0.25", "feature_dim": 64, **COMMON}
WIDTHS = {"model": "lenet", "models": "lenet@1.0,0.5,0.25,0.125", **COMMON}


@dataclass(frozen=True)
class Large(FedAvg):
    """FedAvg without the clients whose device is too small for the whole model."""

    name = "large-only"

    who: tuple[int, ...] = option((), "clients that have the whole model")

    def select(self, server: Any, view: Any) -> list[int]:
        """Those."""
        return list(self.who)


SUITES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mixed": (
        MIXED,
        (
            "local", "fedproto", "feddistill", "lgfedavg", "fedgh", "fedtgp", "fedsa", "fml", "fedkd",
            "fedgen:share=head", f"fedmd:{PUBLIC}", "feddf:server_steps=50", f"knfu:{PUBLIC}", f"mhd:{PUBLIC}",
        ),
    ),
    "widths": (WIDTHS, ("local", "large-only", "heterofl", "fedrolex", "feddropout")),
}  # fmt: skip


def federation(skew: str, seed: int) -> Any:
    """A random 10,200 rows of Fashion-MNIST: 20 clients of 500 each, and 200 public ones."""
    raw = load("fashion-mnist")
    rows = np.random.default_rng(seed).permutation(len(raw.y))[: CLIENTS * ROWS + 200]
    test = (raw.test_x[:2000], raw.test_y[:2000])
    return from_arrays(
        raw.x[rows], raw.y[rows], test=test, name="fashion-mnist", clients=CLIENTS, partition=SKEWS[skew],
        split=(0.6, 0.0, 0.4), public=200, seed=seed,
    )  # fmt: skip


def go(suite: str, text: str, fed: Any, seed: int) -> dict[str, Any]:
    """What a run gave and cost."""
    options = dict(SUITES[suite][0])
    if text == "large-only":
        dealt = assign(options.pop("models"), fed, seed)
        method: Any = Large(who=tuple(c for c in range(CLIENTS) if dealt[c].name == "lenet"))
    else:
        name, own = parse_method(text)
        method = get(name).make(own)
    result = consilience.run(method, fed, seed=seed, executor="serial", **options)
    last = result.history[-1]
    rows = [row for row in result.clients if row["round"] == last["round"]]
    return {
        "clients": {line["round"]: round(line["clients"]["mean"], 4) for line in result.history if "clients" in line},
        "each": [round(row["accuracy"], 4) for row in rows],
        "models": {row["client"]: row.get("model") for row in rows},
        "global": round(last["global"]["accuracy"], 4) if "global" in last else None,
        "method": last.get("method"),
        "megabytes": round((last["bytes_up"] + last["bytes_down"]) / 1e6, 3),
        "gigaflop": round(last["flops"] / 1e9, 1),
        "virtual_s": round(last["virtual_s"], 1),
    }


def work(part: int, parts: int) -> None:
    """Do what is missing, keeping each result at once; seed by seed, so that there is something whole early."""
    todo = [
        (suite, skew, seed, method)
        for seed in SEEDS
        for suite, (_, methods) in SUITES.items()
        for skew in SKEWS
        for method in methods
    ]
    for suite, skew, seed, method in todo[part::parts]:
        key = f"{suite}/{skew}/{method}/{seed}"
        if key not in KEPT.stored():
            KEPT.keep(key, go(suite, method, federation(skew, seed), seed))
            print(key, KEPT.stored()[key]["clients"], file=sys.stderr)


def numbers(found: Mapping[str, Any], suite: str, skew: str, method: str, of: Callable[[Any], Any]) -> list[float]:
    """A number of each seed's run that is there."""
    runs = [found.get(f"{suite}/{skew}/{method}/{seed}") for seed in SEEDS]
    return [of(run) for run in runs if run is not None and of(run) is not None]


def mean_accuracy(run: Any) -> float:
    """Mean over clients at the last round, in per cent."""
    return 100 * float(run["clients"]["40"])


def tables(found: Mapping[str, Any]) -> str:
    """Both suites, and what of the claims held."""
    lines: list[str] = []
    for suite, (_, methods) in SUITES.items():
        for skew in SKEWS:
            lines += [
                f"\n**{suite}, {SKEWS[skew]}**\n",
                "| method | clients, mean % (each seed) | gain over local | clients that gain | global % | MB | "
                "GFLOP | virtual s |",
                "|---|---|---|---|---|---|---|---|",
            ]
            alone = numbers(found, suite, skew, "local", mean_accuracy)
            for method in methods:
                own = numbers(found, suite, skew, method, mean_accuracy)
                if not own:
                    continue
                gains = [a - b for a, b in zip(own, alone, strict=False)]
                winners = [
                    sum(x > y for x, y in zip(found[f"{suite}/{skew}/{method}/{s}"]["each"],
                                              found[f"{suite}/{skew}/local/{s}"]["each"], strict=True))
                    for s in SEEDS[: len(gains)]
                ]  # fmt: skip
                whole = numbers(found, suite, skew, method, lambda run: run["global"])
                costs = [statistics.fmean(numbers(found, suite, skew, method, lambda run, k=k: run[k]))
                         for k in ("megabytes", "gigaflop", "virtual_s")]  # fmt: skip
                lines.append(
                    f"| {method} | {statistics.fmean(own):.1f} ({', '.join(f'{v:.1f}' for v in own)}) | "
                    f"{statistics.fmean(gains):+.1f} | {statistics.fmean(winners):.1f} of {CLIENTS} | "
                    f"{f'{100 * statistics.fmean(whole):.1f}' if whole else ''} | {costs[0]:.3g} | {costs[1]:.4g} | "
                    f"{costs[2]:.3g} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    KEPT.command(__doc__, work, tables)
