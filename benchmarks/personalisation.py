"""Clients that differ in what they see and in what it means, on Fashion-MNIST: whom does a model of its own help?

    python benchmarks/personalisation.py              every run that has no result yet, then the tables
    python benchmarks/personalisation.py --part 0/2   the first half of them (for a second process beside this one)
    python benchmarks/personalisation.py --table      the results as Markdown tables

24 clients that train and 6 that never do, 250 rows each (175 to train on, 75 to test), 40 rounds with everybody, three
seeds, an MLP. Results are kept run by run in ``benchmarks/results/personalisation.json`` with the date and versions.
Settings were fixed before the first run (one local epoch, batches of 32, lr 0.05, each method's own defaults):
nothing was tuned, and a claim that did not hold stays in the table. One exception: CFL's thresholds
are norms of updates and have no meaning without a model and a step size; they were read off one run of FedAvg with
another seed (means of updates below 0.1, single ones above 0.3), where the defaults would never split. FedRC and FedEM
with four components were added after the first seed, since their three cannot hold four groups.
"""

from __future__ import annotations

import datetime as dt
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from kept import Kept

import consilience
from consilience.config import parse_method
from consilience.data import from_arrays, load
from consilience.methods import get

KEPT = Kept("personalisation")
CLIENTS, ROWS, ROUNDS, SEEDS = 30, 250, 40, (0, 1, 2)
SETTINGS = {
    "concept": ("permute:4", "labels permuted in 4 groups"),
    "feature": ("rotate:4", "inputs rotated in 4 groups"),
    "labels": ("shards:2", "two classes a client"),
    "all": ("shards:2+rotate:4+permute:4", "all three"),
    "mixed": ("dirichlet:0.5:equal+rotate:4+permute:4", "the same with milder labels, Dirichlet 0.5"),
}
COMMON: dict[str, Any] = {"rounds": ROUNDS, "eval_every": ROUNDS, "eval_clients_every": ROUNDS}
CFL = "cfl:eps1=0.1,eps2=0.3"
SAME = ("fedrc:components=4", "fedem:components=4")
"""With as many models as there are groups, which ifca has by default."""
FIRST = ("local", "fedavg", "fedrc", "fedem", "ifca", CFL, "fedalt", "fedsim")
SECOND = ("fedgmm", "ahc", "scool", "fedper", "fedrep", "ditto", "pfedme", "apfl", "perfedavg", "spectral", "pfedgate")
DEEPER, FROZEN = "@mlp:200x100", "@frozen"
THIRD = (
    *(f"{name}{DEEPER}" for name in ("local", "fedavg", "fedd2s")),
    *(f"{name}{FROZEN}" for name in ("local", "fedavg", "fedins")),
)
"""Methods that need another model, beside the baselines with that model."""
METHODS = (*FIRST, *SAME, *SECOND, *THIRD)


def federation(setting: str, seed: int) -> Any:
    """A random 7,500 rows of Fashion-MNIST: 30 clients of 250 each, of whom 6 never train."""
    raw = load("fashion-mnist")
    rows = np.random.default_rng(seed).permutation(len(raw.y))[: CLIENTS * ROWS]
    return from_arrays(
        raw.x[rows], raw.y[rows], name="fashion-mnist", clients=CLIENTS, partition=SETTINGS[setting][0],
        split=(0.7, 0.0, 0.3), unseen=0.2, seed=seed,
    )  # fmt: skip


def go(text: str, fed: Any, seed: int) -> dict[str, Any]:
    """What a run gave and cost."""
    text, _, model = text.partition("@")
    name, own = parse_method(text)
    begun = time.perf_counter()
    result = consilience.run(get(name).make(own), fed, seed=seed, executor="serial", model=model or "mlp", **COMMON)
    last = result.history[-1]
    rows = [row for row in result.clients if row["round"] == last["round"]]
    clusters = last.get("clusters", {})
    return {
        "seen": round(last["clients"]["mean"], 4),
        "worst10": round(last["clients"]["worst10"], 4),
        "before": round(last["clients"]["before"]["mean"], 4),
        "after": round(last["clients"]["after"]["mean"], 4),
        "unseen": round(last["unseen"]["mean"], 4),
        "each": [round(row["accuracy"], 4) for row in rows if row["seen"]],
        "clusters": clusters.get("count"),
        "rand": clusters.get("rand"),
        "rand_unseen": clusters.get("rand_unseen"),
        "megabytes": round((last["bytes_up"] + last["bytes_down"]) / 1e6, 1),
        "gigaflop": round(last["flops"] / 1e9, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "versions": {"consilience": consilience.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def work(part: int, parts: int) -> None:
    """Do what is missing, keeping each result at once: first what claims are about on all
    seeds, then one seed of everything."""
    todo = [
        (setting, seed, method)
        for group, seeds in (
            ((*FIRST, *SAME), SEEDS),
            (SECOND, SEEDS[:1]),
            (("fedgmm",), SEEDS[1:]),
            (THIRD, SEEDS[:1]),
            ((*SECOND, *THIRD), SEEDS[1:]),
        )
        for seed in seeds
        for setting in SETTINGS
        for method in group
    ]
    for setting, seed, method in todo[part::parts]:
        key = f"{setting}/{method}/{seed}"
        if key not in KEPT.stored():
            KEPT.keep(key, go(method, federation(setting, seed), seed))
            print(key, KEPT.stored()[key]["seen"], KEPT.stored()[key]["seconds"], file=sys.stderr)


def numbers(found: Mapping[str, Any], setting: str, method: str, of: Callable[[Any], Any]) -> list[float]:
    """A number of each seed's run that is there."""
    runs = [found.get(f"{setting}/{method}/{seed}") for seed in SEEDS]
    return [of(run) for run in runs if run is not None and of(run) is not None]


def gains(found: Mapping[str, Any], setting: str, method: str) -> list[list[float]]:
    """By seed, what each client that trains gains over training the same model alone, in points."""
    rows, model = [], method.partition("@")[1:]
    for seed in SEEDS:
        own, alone = (found.get(f"{setting}/{name}/{seed}") for name in (method, "".join(("local", *model))))
        if own is None or alone is None:
            continue
        rows.append([100 * (x - y) for x, y in zip(own["each"], alone["each"], strict=True)])
    return rows


def mean(values: Sequence[float], form: str) -> str:
    """Of the seeds there are, written so; nothing of none."""
    return format(statistics.fmean(values), form) if values else ""


HEAD = (
    "method", "seen clients, mean % (each seed)", "worst tenth %", "gain over local", "clients that lose", "unseen %",
    "trained once more %", "clusters", "adjusted Rand", "MB", "GFLOP",
)  # fmt: skip
FORMS = {"worst10": ".1%", "unseen": ".1%", "after": ".1%", "clusters": ".1f", "rand": ".2f", "megabytes": ".3g",
         "gigaflop": ".4g"}  # fmt: skip


def row(found: Mapping[str, Any], setting: str, method: str) -> list[str]:
    """A method's line of a setting's table; no cells where it has no run."""
    own = numbers(found, setting, method, lambda run: run["seen"])
    if not own:
        return []
    won = gains(found, setting, method)
    cells = {
        key: mean(numbers(found, setting, method, lambda run, key=key: run[key]), form).rstrip("%")
        for key, form in FORMS.items()
    }
    return [
        method,
        f"{100 * statistics.fmean(own):.1f} ({', '.join(f'{100 * value:.1f}' for value in own)})",
        cells.pop("worst10"),
        mean([value for line in won for value in line], "+.1f"),
        f"{mean([sum(value < 0 for value in line) for line in won], '.1f')} of 24",
        *cells.values(),
    ]


def tables(found: Mapping[str, Any]) -> str:
    """One for each setting."""
    lines: list[str] = []
    for setting, (partition, words) in SETTINGS.items():
        rows = [row(found, setting, method) for method in METHODS]
        if not any(rows):
            continue
        lines += [f"\n**{setting}: {words}** (`{partition}`)\n"]
        lines += [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *rows) if cells]
    return "\n".join(lines)


if __name__ == "__main__":
    KEPT.command(__doc__, work, tables)
