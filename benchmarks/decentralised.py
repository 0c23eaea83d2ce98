"""Two claims about learning without a server, on Fashion-MNIST.

    python benchmarks/decentralised.py              every run that has no result yet, then the tables
    python benchmarks/decentralised.py --part 0/2   the first half of them (for a second process beside this one)
    python benchmarks/decentralised.py --table      the results as Markdown tables

16 nodes, an MLP, local epochs of SGD with lr 0.05 and batches of 32, three seeds; 1,500 rows a node, of which 1,200 are
trained on; all 10,000 test rows. Settings and rules were written before the first run and nothing was tuned; a claim
that did not hold stays in the table. Results are kept in ``benchmarks/results/decentralised.json``.

1. A single final merging comes within a point of server-based accuracy (Zhu et al., ICLR 2026), Dirichlet 0.1, 20
   rounds, and once more with 60. Rule: FedAvg's accuracy less that of the merged model is at most 1 point, on average
   over seeds, where nodes averaged themselves with one other with chance 0.2 a round.
2. Variance correction speeds gossip from different initialisations (Tian et al., 2024), four random neighbours a
   round, 40 rounds. Rule: with it, nodes reach a mean accuracy of 75 % on their own test rows (Dirichlet 0.3: 80 %) in
   fewer rounds, on average over seeds, for both partitions. First runs had 10 rounds, in which hardly any reached its
   target, so that the rule could not tell; nothing but the number of rounds was changed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from kept import Kept

import consilience
from consilience.config import parse_method
from consilience.data import from_arrays, load
from consilience.methods import make

KEPT = Kept("decentralised")
NODES, ROWS, SEEDS = 16, 1500, (0, 1, 2)
MERGING: dict[str, tuple[str, str]] = {
    "FedAvg": ("fedavg:weights=uniform", "complete"),
    "sparse, then merged": ("finalmerge", "pull:0.2"),
    "alone, then merged": ("finalmerge", "none"),
    "a ring, then merged": ("finalmerge", "ring"),
    "sparse, then merged, from models of their own": ("finalmerge:start=own", "pull:0.2"),
}
VARIANCE: dict[str, tuple[str, str]] = {
    "one initial model": ("dpsgd", "anew:regular:4"),
    "own ones": ("dpsgd:start=own", "anew:regular:4"),
    "own ones, corrected": ("vargossip", "anew:regular:4"),
    "own ones, corrected, e = 1e-4": ("vargossip:epsilon_var=0.0001", "anew:regular:4"),
}
SUITES: dict[str, tuple[dict[str, tuple[str, str]], str, str, int]] = {
    "merging": (MERGING, "mlp:128", "dirichlet:0.1", 20),
    "merging-60": (MERGING, "mlp:128", "dirichlet:0.1", 60),
    "variance-iid": (VARIANCE, "mlp:128x64", "iid", 40),
    "variance-dirichlet": (VARIANCE, "mlp:128x64", "dirichlet:0.3", 40),
}
TARGETS = {"variance-iid": 0.75, "variance-dirichlet": 0.80}


def federation(partition: str, seed: int) -> Any:
    """A random 24,000 rows of Fashion-MNIST at 16 nodes, and the test set."""
    raw = load("fashion-mnist")
    rows = np.random.default_rng(seed).permutation(len(raw.y))[: NODES * ROWS]
    return from_arrays(
        raw.x[rows], raw.y[rows], test=(raw.test_x, raw.test_y), name="fashion-mnist", clients=NODES,
        partition=partition, split=(0.8, 0.0, 0.2), seed=seed,
    )  # fmt: skip


def go(suite: str, setting: str, seed: int) -> dict[str, Any]:
    """One run: accuracies of the merged or global model and of nodes on the test set, those of nodes on their own rows
    by round, and megabytes sent."""
    settings, model, partition, rounds = SUITES[suite]
    text, topology = settings[setting]
    name, options = parse_method(text)
    fed = federation(partition, seed)
    result = consilience.run(
        make(name, options), fed, model=model, topology=topology, rounds=rounds, seed=seed, executor="serial",
        eval_every=rounds // 4 if settings is MERGING else 1, eval_clients_every=0 if settings is MERGING else 1,
    )  # fmt: skip
    lines = result.history
    found: dict[str, Any] = {"megabytes": lines[-1]["bytes_up"] / 1e6}
    if "global" in lines[-1]:
        found["global"] = lines[-1]["global"]["accuracy"]
    if "merged" in lines[-1]:
        found["merged"] = {str(line["round"]): line["merged"]["accuracy"] for line in lines}
        found["consensus"] = lines[-1]["merged"]["consensus"]
    if settings is VARIANCE:
        found["nodes"] = {str(line["round"]): line["clients"]["mean"] for line in lines}
    return found


def work(part: int, parts: int) -> None:
    """The runs without a result."""
    todo = [(suite, setting, seed) for seed in SEEDS for suite, (all_, *_) in SUITES.items() for setting in all_]
    for suite, setting, seed in todo[part::parts]:
        key = f"{suite}/{setting}/{seed}"
        if key not in KEPT.stored():
            KEPT.keep(key, go(suite, setting, seed))
            print(key, file=sys.stderr)


def runs(found: Mapping[str, Any], suite: str, setting: str) -> list[dict[str, Any]]:
    """Of each seed that is there."""
    return [found[key] for seed in SEEDS if (key := f"{suite}/{setting}/{seed}") in found]


def delay(run: Mapping[str, Any], target: float, rounds: int) -> int:
    """Rounds until nodes reach the target; one more than there are if they do not."""
    return next((int(r) for r, value in run["nodes"].items() if value >= target), rounds + 1)


def merging(found: Mapping[str, Any], suite: str, gaps: dict[str, float]) -> list[str]:
    """A table of final merging; adds to the gaps how many points it lacks where nodes averaged now and then."""
    rounds = SUITES[suite][3]
    lines = ["", f"| {rounds} rounds | accuracy, % (each seed) | less than FedAvg | MB sent |", "|---|---|---|---|"]
    server = [100 * run["global"] for run in runs(found, suite, "FedAvg")]
    for setting in MERGING:
        done = runs(found, suite, setting)
        values = [100 * run["global"] for run in done]
        if not values:
            continue
        gap = statistics.fmean(a - b for a, b in zip(server, values, strict=False))
        if setting == "sparse, then merged":
            gaps[suite] = gap
        lines.append(
            f"| {setting} | {statistics.fmean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)}) | {gap:.1f} | "
            f"{statistics.fmean(run['megabytes'] for run in done):.1f} |"
        )
    return lines


def tables(found: Mapping[str, Any]) -> str:
    """All suites, and what of the claims held."""
    lines: list[str] = []
    gaps: dict[str, float] = {}
    for suite in ("merging", "merging-60"):
        lines += merging(found, suite, gaps)
    lines += [
        "",
        "| start, partition | rounds to the target (each seed) | nodes after 1, 3, 10, 40 rounds, % |",
        "|---|---|---|",
    ]
    delays: dict[str, dict[str, float]] = {}
    for suite, target in TARGETS.items():
        rounds = SUITES[suite][3]
        for setting in VARIANCE:
            done = runs(found, suite, setting)
            if not done:
                continue
            each = [delay(run, target, rounds) for run in done]
            delays.setdefault(suite, {})[setting] = statistics.fmean(each)
            shown = [100 * statistics.fmean(run["nodes"][str(r)] for run in done) for r in (1, 3, 10, rounds)]
            told = ", ".join(f"{n}" if n <= rounds else f"> {rounds}" for n in each)
            lines.append(
                f"| {setting}, {SUITES[suite][2]} | {told} ({100 * target:.0f} %) | "
                f"{', '.join(f'{value:.1f}' for value in shown)} |"
            )
    lines += ["", "| claim | held | numbers |", "|---|---|---|"]
    for suite, gap in gaps.items():
        says = f"a final merging comes within a point of FedAvg after {SUITES[suite][3]} rounds"
        lines.append(f"| {says} | {'yes' if gap <= 1 else '**no**'} | {gap:.1f} |")
    if delays.keys() == TARGETS.keys() and all(
        "own ones, corrected" in of and "own ones" in of for of in delays.values()
    ):
        pairs = [(of["own ones, corrected"], of["own ones"]) for of in delays.values()]
        held = "yes" if all(a < b for a, b in pairs) else "**no**"
        told = ", ".join(f"{a:.1f} against {b:.1f} rounds" for a, b in pairs)
        lines.append(f"| variance correction speeds gossip from own initial models | {held} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    KEPT.command(__doc__, work, tables)
