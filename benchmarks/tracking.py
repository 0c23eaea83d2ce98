"""What tracking the gradient is worth among neighbours, and what compression leaves of it:
``python -m benchmarks.tracking``.

Digits, 16 nodes on a ring, labels by Dirichlet 0.1 or two classes each, mlp of 64, five seeds, equal rounds and step
size; every node's model is judged on the global test set, and so is the mean of them.

Claim (Pu and Nedic; Yan et al.): with skewed data tracking removes the bias of D-PSGD, and compressed DProxSGT
keeps that at a fraction of the bytes. Results are kept in ``results/tracking.json``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

import consilience
from benchmarks.kept import Kept
from consilience import methods
from consilience.core.predict import Net

KEPT = Kept("tracking")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpsgd": ("dpsgd", {}),
    "tracking atc": ("tracking", {}),
    "tracking semi": ("tracking", {"order": "semi"}),
    "dproxsgt": ("dproxsgt", {"regularizer": "none"}),
    "dproxsgt topk:0.3": ("dproxsgt", {"regularizer": "none", "compress": "topk:0.3"}),
}
PARTITIONS = ("dirichlet:0.1", "shards:2")
ROUNDS, SEEDS, NODES = 60, 5, 16


def measure(name: str, partition: str, seed: int) -> dict[str, float]:
    """One run: mean accuracy of the nodes' models on the global test set, that of their mean, and bytes."""
    cls, options = METHODS[name]
    federation = consilience.make_federation("digits", clients=NODES, partition=partition, seed=seed)
    method = methods.make(cls, {"lr": 0.1, **options})
    found = consilience.run(
        method, federation, model="mlp:64", topology="ring", rounds=ROUNDS, seed=seed, executor="serial",
        eval_every=ROUNDS, eval_clients_every=0,
    )  # fmt: skip
    host, test = found.worker.host(0, "judge"), federation.test
    models = [state.model for state in found.states.values()]
    mean = {n: torch.stack([m.params[n] for m in models]).mean(0) for n in models[0].params}
    scores = [host.evaluate(Net(m), test).accuracy for m in (*models, models[0]._replace(params=mean))]
    last = found.history[-1]
    return {"nodes": statistics.fmean(scores[:-1]), "mean": scores[-1], "megabytes": last["bytes_up"] / 1e6}


def work(part: int, parts: int) -> None:
    """Every run that is missing."""
    todo = [(p, m, s) for p in PARTITIONS for m in METHODS for s in range(SEEDS)]
    for i, (partition, name, seed) in enumerate(todo):
        key = f"{partition} {name} {seed}"
        if i % parts == part and key not in KEPT.stored():
            KEPT.keep(key, measure(name, partition, seed))


def tables(found: Mapping[str, Any]) -> str:
    """Means and standard deviations over seeds."""
    lines = ["| partition | method | nodes' models | their mean | MB sent by all |", "|---|---|---|---|---|"]
    for partition in PARTITIONS:
        for name in METHODS:
            rows = [found[k] for s in range(SEEDS) if (k := f"{partition} {name} {s}") in found]
            if rows:
                cells = [_cell([100 * row[key] for row in rows]) for key in ("nodes", "mean")]
                lines.append(f"| {partition} | {name} | {' | '.join(cells)} | {rows[0]['megabytes']:.1f} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} +- {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    KEPT.command(__doc__, work, tables)
