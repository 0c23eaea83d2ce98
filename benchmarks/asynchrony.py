"""Claims about asynchrony, deadlines and participation, on Fashion-MNIST in virtual time.

    python benchmarks/asynchrony.py            every run that has no result yet, then the table
    python benchmarks/asynchrony.py --table    the results as a Markdown table

Four claims, three seeds each; one of them again on slower silos, which was added when the first had been seen. Results
are kept in ``benchmarks/results/asynchrony.json`` run by run, so that it can be interrupted. Settings were fixed before
the first run and are not tuned; a claim that did not hold stays in the table.

Target: 70 % of the accuracy of centralised training (two passes over all rows), reached when the mean of three
evaluations in a row is at least that. Whoever does not reach it in its budget counts with the time spent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import consilience
from consilience.config import parse_method
from consilience.core.checkpoint import write_atomically
from consilience.core.messages import Device
from consilience.fleet import profiles
from consilience.methods import get

RESULTS = Path(__file__).parent / "results" / "asynchrony.json"
SEEDS = (0, 1, 2)
WINDOW = 3
PHONES = {"fleet": "phones", "participation": 20}


class Reached(Exception):
    """The target is reached: no more is needed of this run."""


@dataclass(frozen=True)
class Claim:
    """What is claimed, the runs that look at it, the number taken from each and how they are judged by its mean."""

    says: str
    counts: str
    clients: int
    methods: tuple[str, ...]
    number: Callable[[list[dict[str, float]]], float]
    holds: Callable[[Mapping[str, float]], bool]
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    to_target: bool = False


def last_time(lines: list[dict[str, float]]) -> float:
    """Virtual seconds at the end of a run that stops at its target."""
    return lines[-1]["virtual_s"]


def accuracy(lines: list[dict[str, float]]) -> float:
    """Mean accuracy of the last ten evaluations."""
    last = [line["accuracy"] for line in lines[-10:]]
    return sum(last) / len(last)


TRAINING = "local_epochs=2,lr=0.05"
BUFFERED = f"fedbuff:buffer=10,{TRAINING}"
ROUNDS = f"fedavg:{TRAINING}"
OVER = f"fedavg:form=delta,{TRAINING}"
ASYNC, MERGING, UNMERGED = f"fedasync:{TRAINING}", f"fedasmu:{TRAINING}", f"fedasmu:mu_b=0,{TRAINING}"
COMPASS, SILOBUFF = "fedcompass:least=20,most=100", "fedbuff:buffer=3,local_steps=100"
SEEN, UNSEEN = (
    "fedau:local_steps=5,batch_size=16,lr=0.1",
    ("fedavg:form=delta,weights=uniform,local_steps=5,batch_size=16,lr=0.1"),
)

CLAIMS: dict[str, Claim] = {
    "buffered": Claim(
        "buffered asynchrony reaches the target in less virtual time than rounds (Nguyen et al., 2022)",
        "virtual seconds to 70 % of centralised accuracy", 100, (BUFFERED, ROUNDS, OVER), last_time,
        lambda n: n[BUFFERED] < n[ROUNDS],
        {**PHONES, "rounds": 80}, {OVER: {"schedule": "deadline:50%", "over_selection": 1.3}}, True,
    ),
    "compass": Claim(
        "FedCompass reaches the target in less virtual time than FedBuff on silos (Li et al., 2024)",
        "virtual seconds to 70 % of centralised accuracy", 20, (COMPASS, SILOBUFF), last_time,
        lambda n: n[COMPASS] < n[SILOBUFF], {"fleet": "silos", "participation": 1.0, "rounds": 100}, {}, True,
    ),
    "compass-slow": Claim(
        "the same where computing takes the time: silos a thousand times slower, as for a model that much larger",
        "virtual seconds to 70 % of centralised accuracy", 20, (COMPASS, SILOBUFF), last_time,
        lambda n: n[COMPASS] < n[SILOBUFF], {"fleet": "asynchrony:slow_silos", "participation": 1.0, "rounds": 100},
        {}, True,
    ),
    "merge": Claim(
        "FedASMU's merge of a fresh model in mid-training helps against FedAsync (Liu et al., 2024)",
        "accuracy after 300 updates", 100, (MERGING, UNMERGED, ASYNC), accuracy,
        lambda n: n[MERGING] > max(n[ASYNC], n[UNMERGED]), {**PHONES, "rounds": 300, "eval_every": 5},
    ),
    "participation": Claim(
        "with participation that goes with labels FedAU ends above FedAvg (Wang and Ji, 2024)",
        "accuracy after 300 rounds", 100, (SEEN, UNSEEN), accuracy, lambda n: n[SEEN] > n[UNSEEN],
        {"availability": "bernoulli:0.1:labels", "participation": 1.0, "fleet": "phones", "rounds": 300,
         "eval_every": 5},
    ),
}  # fmt: skip


def slow_silos(n: int, rng: np.random.Generator) -> list[Device]:
    """Devices of the profile ``silos``, a thousand times slower, on the same links."""
    drawn = profiles.draw("silos", n, int(rng.integers(2**31)))
    return [device._replace(speed=device.speed / 1000) for device in drawn]


def federation(clients: int, seed: int) -> Any:
    """Fashion-MNIST over so many clients, Dirichlet 0.1."""
    return consilience.make_federation("fashion-mnist", clients=clients, partition="dirichlet:0.1", seed=seed)


def go(text: str, fed: Any, seed: int, target: float | None, options: Mapping[str, Any]) -> list[dict[str, float]]:
    """The evaluations of a run, to its end or until the target is reached."""
    name, own = parse_method(text)
    lines: list[dict[str, float]] = []

    def on_line(line: dict[str, Any]) -> None:
        lines.append(
            {"virtual_s": line["virtual_s"], "accuracy": line["global"]["accuracy"], "bytes": line["bytes_up"]}
        )
        last = [found["accuracy"] for found in lines[-WINDOW:]]
        if target is not None and len(last) == WINDOW and sum(last) / WINDOW >= target:
            raise Reached

    with contextlib.suppress(Reached):
        consilience.run(get(name).make(own), fed, eval_clients_every=0, seed=seed, on_line=on_line, **options)
    return lines


def centralised(fed: Any, seed: int) -> float:
    """Accuracy of training on everybody's rows at once, two passes."""
    return go("centralised", fed, seed, None, {"rounds": 2, "eval_every": 2})[-1]["accuracy"]


def work() -> dict[str, Any]:
    """Do what is missing, keeping each result at once."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}, "centralised": {}}
    for name, claim in CLAIMS.items():
        for seed in SEEDS:
            todo = [m for m in claim.methods if f"{name}/{m}/{seed}" not in found["runs"]]
            if not todo:
                continue
            fed, key = federation(claim.clients, seed), f"{claim.clients}/{seed}"
            if key not in found["centralised"]:
                found["centralised"][key] = centralised(fed, seed)
            target = 0.7 * found["centralised"][key] if claim.to_target else None
            for method in todo:
                lines = go(method, fed, seed, target, {**claim.options, **claim.own.get(method, {})})
                last = [line["accuracy"] for line in lines[-WINDOW:]]
                found["runs"][f"{name}/{method}/{seed}"] = {
                    "number": round(claim.number(lines), 4),
                    "reached": target is None or sum(last) / WINDOW >= target,
                    "virtual_s": round(lines[-1]["virtual_s"], 2),
                    "evaluations": len(lines),
                    "megabytes_up": round(lines[-1]["bytes"] / 1e6, 1),
                }
                write_atomically(RESULTS, json.dumps(found, indent=1) + "\n")
                print(f"{name} {method} seed {seed}: {found['runs'][f'{name}/{method}/{seed}']}", file=sys.stderr)
    return found


def table(found: Mapping[str, Any]) -> str:
    """All claims as Markdown."""
    rows = ["| claim | what is counted | mean over seeds (each) | held |", "|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        numbers: dict[str, list[float]] = {}
        told = []
        for method in claim.methods:
            runs = [found["runs"].get(f"{name}/{method}/{seed}") for seed in SEEDS]
            if None in runs:
                break
            numbers[method] = [run["number"] for run in runs]
            missed = sum(not run["reached"] for run in runs)
            own = " ".join(f"{key}={value}" for key, value in claim.own.get(method, {}).items())
            told.append(
                f"`{method}{' ' + own if own else ''}` {statistics.fmean(numbers[method]):.3g} "
                f"({', '.join(f'{v:.3g}' for v in numbers[method])}{f'; {missed} did not reach it' if missed else ''})"
            )
        else:
            held = claim.holds({method: statistics.fmean(values) for method, values in numbers.items()})
            rows.append(f"| {claim.says} | {claim.counts} | {'; '.join(told)} | {'yes' if held else '**no**'} |")
    return "\n".join(rows)


def main() -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the results")
    if not parser.parse_args().table:
        work()
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
