"""Accuracy per megabyte of everything that sends less, and EControl against EF under high compression, on digits.

    python benchmarks/compression.py              every run that has no result yet, then the tables
    python benchmarks/compression.py --part 0/2   the first half of them (for a second process beside this one)
    python benchmarks/compression.py --table      the results as Markdown tables

"all": FedAvg by each scheme and onebyte, 10 clients with Dirichlet 0.3, an MLP of 51 thousand parameters, 80 rounds of
one local epoch with everybody, three seeds. "lora": cellm with all, a quarter and a 16th of what a small transformer
with adapters of rank 8 trains, 60 such rounds; its frozen part is drawn, not trained before as the paper's are.
"feedback": the setting of error feedback's theory, one step with a batch of 32 a round, two classes a client, a
logistic model, 400 rounds; the loss is that of all test rows.

Results are kept run by run in ``benchmarks/results/compression.json``. Settings were fixed before the first run: lr
0.05, EControl's feedback 0.1 and, as in its theory far smaller, 0.01, lr 0.02 of onebyte. Nothing was tuned, and a
claim that did not hold stays in the table.
"""

from __future__ import annotations

import datetime as dt
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from kept import Kept

import consilience
from consilience.config import parse_method
from consilience.methods import get

KEPT = Kept("compression")
SEEDS = (0, 1, 2)
TARGET = 0.85
"""Accuracy that bytes are counted to."""
UP = "fedavg:form=delta,compress="
ALL = (
    "fedavg:form=delta",
    *(UP + f"{rule}topk:{share}" for share in ("0.01", "0.001") for rule in ("", "ef:", "ef21:", "econtrol:")),
    *(UP + text for text in ("randk:0.01", "ef:randk:0.01", "bits:16", "bits:8", "qsgd:8", "qsgd:4", "sign")),
    *(UP + text for text in ("ef:sign", "lowrank:2", "ef:lowrank:2", "ef21:lowrank:2")),
    UP + "qsgd:8,compress_down=qsgd:8",
    UP + "ef:topk:0.01,compress_down=topk:0.05",
    "onebyte:lr=0.02",
)
LORA = tuple(f"cellm:density_down={share},density_up={share}" for share in ("1", "0.25", "0.0625"))
RULES = ("identity", *(f"{rule}topk:{share}" for share in ("0.05", "0.01") for rule in (
    "", "ef:", "ef21:", "econtrol@0.01:", "econtrol@0.1:")))  # fmt: skip
SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "all": (ALL, {"partition": "dirichlet:0.3"}, {"model": "mlp:256x128", "rounds": 80, "eval_every": 4}),
    "feedback": (
        tuple(f"{UP}{rule},local_steps=1" for rule in RULES),
        {"partition": "shards:2"},
        {"model": "logistic", "rounds": 400, "eval_every": 40},
    ),
    "lora": (LORA, {"partition": "dirichlet:0.3"}, {"model": "transformer+lora:8", "rounds": 60, "eval_every": 3}),
}


def go(setting: str, text: str, seed: int) -> dict[str, Any]:
    """The evaluations of a run: accuracy, loss and bytes up and down of everybody together."""
    _, data, options = SETTINGS[setting]
    name, own = parse_method(text)
    fed = consilience.make_federation("digits", clients=10, seed=seed, **data)
    made = {**options, "seed": seed, "executor": "serial", "eval_clients_every": 0, "participation": 1.0}
    lines = consilience.run(get(name).make(own), fed, **made).history
    return {
        "accuracy": [round(line["global"]["accuracy"], 4) for line in lines],
        "loss": [float(f"{line['global']['loss']:.5g}") for line in lines],
        "up": [line["bytes_up"] for line in lines],
        "down": [line["bytes_down"] for line in lines],
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "versions": {"consilience": consilience.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def work(part: int, parts: int) -> None:
    """Do what is missing, a seed of everything first."""
    todo = [(setting, text, seed) for seed in SEEDS for setting in SETTINGS for text in SETTINGS[setting][0]]
    for setting, text, seed in todo[part::parts]:
        key = f"{setting}/{text}/{seed}"
        if key not in KEPT.stored():
            KEPT.keep(key, go(setting, text, seed))
            print(key, KEPT.stored()[key]["accuracy"][-1], file=sys.stderr)


def numbers(found: Mapping[str, Any], setting: str, text: str, of: Callable[[Any], float | None]) -> list[float]:
    """A number of each seed's run that is there and has it."""
    runs = [found.get(f"{setting}/{text}/{seed}") for seed in SEEDS]
    return [value for run in runs if run is not None for value in [of(run)] if value is not None]


def final(run: Mapping[str, Any]) -> float:
    """Accuracy at the end, the mean of the last three evaluations, in %."""
    return 100 * statistics.fmean(run["accuracy"][-3:])


def end_loss(run: Mapping[str, Any]) -> float:
    """Loss at the end, the mean of the last three evaluations."""
    return statistics.fmean(run["loss"][-3:])


def megabytes(way: str) -> Callable[[Mapping[str, Any]], float]:
    """Sent in a whole run, "up" or "down"."""

    def of(run: Mapping[str, Any]) -> float:
        sent: int = run[way][-1]
        return sent / 1e6

    return of


def to_target(way: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Megabytes until the first evaluation at or above the target."""

    def of(run: Mapping[str, Any]) -> float | None:
        ways = ("up", "down") if way == "both" else (way,)
        reached = [i for i, accuracy in enumerate(run["accuracy"]) if accuracy >= TARGET]
        return sum(run[w][reached[0]] for w in ways) / 1e6 if reached else None

    return of


@dataclass(frozen=True)
class Claim:
    """What is claimed; of which runs, by which number; whether it holds for their means."""

    says: str
    setting: str
    texts: tuple[str, ...]
    number: Callable[[Any], float]
    holds: Callable[[Sequence[float]], bool]


def _rule(rule: str, share: str) -> str:
    return f"{UP}{rule}topk:{share},local_steps=1"


CLAIMS = (
    *(
        Claim(
            f"EControl ends with less loss than EF, Top {100 * float(share):g} % (Gao et al., 2024)", "feedback",
            (_rule("econtrol@0.01:", share), _rule("econtrol@0.1:", share), _rule("ef:", share)), end_loss,
            lambda n: min(n[:2]) < n[2],
        )
        for share in ("0.05", "0.01")
    ),
    *(
        Claim(
            f"EControl ends more accurate than EF with local epochs, Top {100 * float(share):g} %", "all",
            (f"{UP}econtrol:topk:{share}", f"{UP}ef:topk:{share}"), final, lambda n: n[0] > n[1],
        )
        for share in ("0.01", "0.001")
    ),
    Claim(
        "error feedback helps Top 1 %: EF above no feedback (Karimireddy et al., 2019)", "all",
        (f"{UP}ef:topk:0.01", f"{UP}topk:0.01"), final, lambda n: n[0] > n[1],
    ),
    Claim(
        "EF21 ends with less loss than EF, Top 5 % (Richtarik et al., 2021)", "feedback",
        (_rule("ef21:", "0.05"), _rule("ef:", "0.05")), end_loss, lambda n: n[0] < n[1],
    ),
    Claim(
        "QSGD with 4 bits within a point of no compression (Alistarh et al., 2017)", "all",
        (f"{UP}qsgd:4", ALL[0]), final, lambda n: n[0] > n[1] - 1,
    ),
    Claim(
        "CELLM: a 16th of the numbers loses nothing against all (Vavekanand, Sam, 2024)", "lora",
        (LORA[2], LORA[0]), final, lambda n: n[0] >= n[1],
    ),
    Claim(
        "rank 2 with EF within a point of no compression (Vogels et al., 2019)", "all",
        (f"{UP}ef:lowrank:2", ALL[0]), final, lambda n: n[0] > n[1] - 1,
    ),
)  # fmt: skip


def short(text: str) -> str:
    """A run's name in a table."""
    name = text.removeprefix("fedavg:form=delta").removeprefix(",compress=").removesuffix(",local_steps=1")
    return f"`{name or 'identity'}`".replace(",compress_down=", "` down `")


def cells(*values: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, values))} |"


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and each seed's value; nothing of none."""
    each = ", ".join(format(value, form) for value in values)
    return f"{format(statistics.fmean(values), form)} ({each})" if values else ""


HEAD = (
    "sent", "accuracy % (each seed)", "MB up", "MB down", f"MB up to {TARGET:.0%}", "MB both ways to it",
    "runs that reach it",
)  # fmt: skip


def costs(found: Mapping[str, Any], setting: str) -> list[str]:
    """Accuracy and bytes of each run of a setting; nothing where there is none."""
    lines = []
    for text in SETTINGS[setting][0]:
        accuracy = numbers(found, setting, text, final)
        if accuracy:
            sent = [statistics.fmean(numbers(found, setting, text, megabytes(way))) for way in ("up", "down")]
            reached = [numbers(found, setting, text, to_target(way)) for way in ("up", "both")]
            to = [f"{statistics.fmean(values):.3g}" if values else "" for values in reached]
            counts = f"{len(reached[0])} of {len(accuracy)}"
            lines.append(cells(short(text), spread(accuracy, ".1f"), *(f"{b:.3g}" for b in sent), *to, counts))
    return ["", cells(*HEAD), cells(*["---"] * len(HEAD)), *lines] if lines else []


def tables(found: Mapping[str, Any]) -> str:
    """What held, then accuracy and bytes of everything, then losses by rule."""
    lines = [cells("claim", "numbers (means)", "first less last, each seed", "held"), cells(*["---"] * 4)]
    for claim in CLAIMS:
        each = [numbers(found, claim.setting, text, claim.number) for text in claim.texts]
        if all(each):
            means = [statistics.fmean(values) for values in each]
            shown = ", ".join(f"{short(t)} {m:.4g}" for t, m in zip(claim.texts, means, strict=True))
            apart = ", ".join(f"{a - b:+.2g}" for a, b in zip(each[0], each[-1], strict=False))
            lines.append(cells(claim.says, shown, apart, "yes" if claim.holds(means) else "**no**"))
    for setting in ("all", "lora"):
        lines += costs(found, setting)
    lines += losses(found)
    return "\n".join(lines)


def losses(found: Mapping[str, Any]) -> list[str]:
    """Where error feedback alone is looked at, the loss that each rule ends with; nothing where there is none."""
    lines = []
    for text in SETTINGS["feedback"][0]:
        loss = numbers(found, "feedback", text, end_loss)
        if loss:
            accuracy = numbers(found, "feedback", text, final)
            up = statistics.fmean(numbers(found, "feedback", text, megabytes("up")))
            lines.append(cells(short(text), spread(loss, ".3f"), f"{statistics.fmean(accuracy):.1f}", f"{up:.3g}"))
    head = cells("sent", "loss at the end (each seed)", "accuracy %", "MB up")
    return ["", head, cells(*["---"] * 4), *lines] if lines else []


if __name__ == "__main__":
    KEPT.command(__doc__, work, tables)
