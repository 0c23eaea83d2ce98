"""Aggregators and methods under attack, on digits: 10 clients of whom 2 are hostile.

    python benchmarks/attacks.py              every run that has no result yet, then the tables
    python benchmarks/attacks.py --part 0/2   the first half of them (for a second process beside this one)
    python benchmarks/attacks.py --table      the results as Markdown tables

Everybody takes part in each of 25 rounds of 5 local steps (batches of 16, lr 0.1) of the usual MLP, i.i.d. and with
Dirichlet 1 and 0.1 over labels; one more row on Fashion-MNIST, Dirichlet 1. One seed. Clients and rounds were cut from
20 and 40 after six runs, for time; nothing was tuned on the results that are kept. frl has the step size and momentum
of its paper, since its scores are another thing than weights. Results are kept run by run in
``benchmarks/results/attacks.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from kept import Kept

import consilience
from consilience.config import parse_method
from consilience.methods import get

KEPT = Kept("attacks")
PARTITIONS = ("iid", "dirichlet:1.0", "dirichlet:0.1")
ATTACKS = (
    "none", "gaussian", "signflip", "labelflip", "alie", "ipm", "mimic", "minmax", "minsum", "replace", "backdoor",
)  # fmt: skip
FIRST = ("none", "alie", "signflip", "ipm", "minmax")
SCORES = ("none", "fdla", "pcfdla")
STEPS = "local_steps=5,batch_size=16,lr=0.1"
ROWS = {
    **{
        name: f"fedavg:form=delta,aggregator={name},{STEPS}"
        for name in (
            "mean", "median", "trimmed:0.2", "krum:0.2", "multikrum:0.2", "rfa", "cclip", "nnm:0.2+trimmed:0.2"
        )
    },
    "cclip, client momentum 0.9": f"fedavg:form=delta,aggregator=cclip,client_momentum=0.9,{STEPS}",
    "frl": "frl:local_steps=5,batch_size=16,lr=0.4,momentum=0.9",
}  # fmt: skip
DISTILLED = {name: f"fedmd:aggregator={name},public_rows=50,{STEPS}" for name in ("mean", "median")}
ELSEWHERE = {"Fashion-MNIST, nnm:0.2+trimmed:0.2": ROWS["nnm:0.2+trimmed:0.2"]}


def federation(data: str, partition: str) -> Any:
    """10 clients."""
    return consilience.make_federation(data, clients=10, partition=partition, public=50, seed=0)


def go(text: str, data: str, partition: str, attack: str) -> dict[str, Any]:
    """Accuracy of the global model, or over honest clients where there is none; and what a backdoor reached."""
    name, own = parse_method(text)
    done = consilience.run(
        get(name).make(own), federation(data, partition), model="mlp", rounds=25, eval_every=25, eval_clients_every=0,
        attack=None if attack == "none" else f"{attack}:0.2", executor="serial", seed=0,
    )  # fmt: skip
    last = done.history[-1]
    accuracy = last["global"]["accuracy"] if "global" in last else last["clients"]["mean"]
    return {"accuracy": round(accuracy, 4), "success": last.get("attack", {}).get("success")}


def todo() -> list[tuple[str, str, str, str, str]]:
    """(row, method, data, partition, attack) of every run, the attacks that are told of most first."""
    ordered = (*FIRST, *(a for a in ATTACKS if a not in FIRST))
    found = [(r, m, "digits", p, a) for a in ordered for p in PARTITIONS for r, m in ROWS.items()]
    found += [(f"fedmd, {r}", m, "digits", p, a) for p in PARTITIONS for r, m in DISTILLED.items() for a in SCORES]
    return found + [(r, m, "fashion-mnist", "dirichlet:1.0", a) for r, m in ELSEWHERE.items() for a in ATTACKS]


def key(row: str, partition: str, attack: str) -> str:
    """What a result is kept under."""
    return f"{partition}/{row}/{attack}"


def work(part: int, parts: int) -> None:
    """Do what is missing, keeping each result at once."""
    for row, method, data, partition, attack in todo()[part::parts]:
        name = key(row, partition, attack)
        if name not in KEPT.stored():
            KEPT.keep(name, go(method, data, partition, attack))
            print(name, KEPT.stored()[name], file=sys.stderr)


def tables(found: Mapping[str, Any]) -> str:
    """Accuracy by row and attack, a table a partition, of the attacks whose runs are all there."""
    lines: list[str] = []
    for partition in PARTITIONS:
        rows = [*ROWS, *(ELSEWHERE if partition == "dirichlet:1.0" else ())]
        lines += [f"\n**{partition}**: accuracy in % (of `backdoor` and `replace` also the share that is misled)\n"]
        lines += _table(found, partition, rows, ATTACKS)
        scored = _table(found, partition, [f"fedmd, {name}" for name in DISTILLED], SCORES)
        if scored:
            lines += [f"\n**{partition}, methods that send scores**: mean accuracy of honest clients in %\n", *scored]
    return "\n".join(lines)


def _table(found: Mapping[str, Any], partition: str, rows: list[str], asked: tuple[str, ...]) -> list[str]:
    whole = [row for row in rows if key(row, partition, "none") in found]
    attacks = [attack for attack in asked if all(key(row, partition, attack) in found for row in whole)]
    if not whole:
        return []
    lines = [f"| | {' | '.join(attacks)} |", "|---" * (1 + len(attacks)) + "|"]
    for row in whole:
        cells = []
        for attack in attacks:
            run = found[key(row, partition, attack)]
            cell = f"{100 * run['accuracy']:.1f}"
            if run["success"] is not None:
                cell += f" ({100 * run['success']:.0f})"
            cells.append(cell)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    KEPT.command(__doc__, work, tables)
