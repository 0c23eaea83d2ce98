"""What privacy costs: accuracy on digits against epsilon, by mechanism.

    python benchmarks/privacy.py            every run that has no result yet, then the table
    python benchmarks/privacy.py --table    the results as a Markdown table

200 clients with 7 rows each, i.i.d., a fifth of them a round, 40 rounds of FedAvg with an MLP of 32 units, clipping
norm 0.5, delta 1e-4, two seeds; nothing is tuned. Results are kept run by run in ``benchmarks/results/privacy.json``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from typing import Any

from kept import Kept

from consilience.data.datasets import make_federation
from consilience.methods import make
from consilience.privacy.options import Privacy
from consilience.simulate import run

KEPT = Kept("privacy")
EPSILONS = (None, 32.0, 8.0, 2.0)
MECHANISMS = ("poisson", "fixed", "tree")
SEEDS = (0, 1)


def named(epsilon: float | None) -> str:
    """What a run's epsilon is called."""
    return "none" if epsilon is None else f"{epsilon:g}"


def measure(mechanism: str, epsilon: float | None, seed: int) -> dict[str, float]:
    """One run: accuracy, and the noise multiplier that it needed."""
    federation = make_federation("digits", clients=200, partition="iid", seed=seed)
    options = {"epsilon": epsilon} if epsilon is not None else {"noise": 0.0}
    done = run(
        make("fedavg", {"lr": 0.1, "batch_size": 8}), federation, model="mlp:32", rounds=40, participation=0.2,
        privacy=Privacy(delta=1e-4, clip="0.5", mechanism=mechanism, **options), eval_every=40, eval_clients_every=0,
        eval_clients=1, executor="serial", seed=seed,
    )  # fmt: skip
    last = done.history[-1]
    return {"accuracy": last["global"]["accuracy"], "noise": last["privacy"]["noise"]}


def work(part: int, parts: int) -> None:
    """Measure what is missing."""
    todo = [(m, e, s) for s in SEEDS for e in EPSILONS for m in MECHANISMS]
    for mechanism, epsilon, seed in todo[part::parts]:
        key = f"{mechanism} {named(epsilon)} {seed}"
        if key not in KEPT.stored():
            KEPT.keep(key, measure(mechanism, epsilon, seed))
            print(key, KEPT.stored()[key], file=sys.stderr)


def tables(found: Mapping[str, Any]) -> str:
    """Accuracy (mean of the seeds), with the noise multiplier in brackets."""
    lines = ["| mechanism | no noise | " + " | ".join(f"epsilon {named(e)}" for e in EPSILONS[1:]) + " |"]
    lines.append("|---" * (1 + len(EPSILONS)) + "|")
    for mechanism in MECHANISMS:
        cells = []
        for epsilon in EPSILONS:
            runs = [found.get(f"{mechanism} {named(epsilon)} {seed}") for seed in SEEDS]
            there = [run for run in runs if run is not None]
            if not there:
                cells.append("")
                continue
            mean = 100 * statistics.fmean(run["accuracy"] for run in there)
            cells.append(f"{mean:.1f} %" + (f" ({there[0]['noise']:.2f})" if epsilon is not None else ""))
        lines.append(f"| `{mechanism}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    KEPT.command(__doc__, work, tables)
