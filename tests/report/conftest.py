"""Fabricated run folders: the files that a run writes, made without running anything."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import yaml

CLIENTS, CLASSES, ROUNDS = 20, 10, 50
SKILL = {"local": 0.72, "fedavg": 0.80, "scaffold": 0.88, "fedprox": 0.803, "centralised": 0.93}


def federation(seed: int, clients: int = CLIENTS) -> dict[str, Any]:
    """A skewed partition, another one for every seed."""
    rng = random.Random(seed)
    counts = [[round(40 * rng.gammavariate(0.4, 1.0)) for _ in range(CLASSES)] for _ in range(clients)]
    for row in counts:
        row[rng.randrange(CLASSES)] += 12
    return {
        "name": "digits, dirichlet:0.4",
        "clients": clients,
        "classes": [str(c) for c in range(CLASSES)],
        "counts": counts,
        "sizes": [sum(row) for row in counts],
        "unseen": [],
        "groups": None,
    }


def write_run(
    folder: Path,
    method: str,
    seed: int,
    *,
    label: str = "",
    rounds: int = ROUNDS,
    clients: int = CLIENTS,
    regression: bool = False,
    finished: bool = True,
    federated: dict[str, Any] | None = None,
    final: float | None = None,
) -> Path:
    """A run's folder whose method learns as well as ``SKILL`` says."""
    folder.mkdir(parents=True)
    rng = random.Random(f"{method}/{seed}")
    luck = random.Random(seed).gauss(0, 0.01)  # shared by the methods of one seed, as a partition is
    skill = SKILL[method] + luck + rng.gauss(0, 0.003)
    partition = federated or federation(seed, clients)
    config = {
        "method": method,
        "label": label or method,
        "seed": seed,
        "data": "digits",
        "model": "mlp",
        "clients": clients,
        "partition": "dirichlet:0.4",
        "rounds": rounds,
        "batch_size": 32,
        "lr": 0.05,
        "options": {"mu": 0.1} if method == "fedprox" else {},
        "versions": {"consilience": "0.1.0", "python": "3.12", "torch": "2.13.0", "cpu_capability": "AVX2"},
        "command": f"consilience run {method} --rounds {rounds} --seed {seed}",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "federation.json").write_text(json.dumps(partition))
    base = [min(1.0, max(0.05, skill + random.Random(f"{seed}/{k}").gauss(0, 0.08))) for k in range(clients)]
    history, lines = [], []
    travels = method not in ("local", "centralised")
    for r in range(rounds + 1):
        share = 1 - 0.9 * 2.718 ** (-r / 7)
        wall = r * (0.21 if method == "scaffold" else 0.17)
        line: dict[str, Any] = {
            "round": r,
            "wall_s": wall,
            "virtual_s": 0.0,
            "steps": 40 * r,
            "samples": 1280 * r,
            "bytes_up": (2 if method == "scaffold" else 1) * 210_000 * clients * r * travels,
            "bytes_down": (2 if method == "scaffold" else 1) * 210_000 * clients * r * travels,
        }
        if method != "local":
            score = skill * share + rng.gauss(0, 0.004)
            line["global"] = {"loss": 1 - score} if regression else {"accuracy": score, "loss": 1 - score}
        if r % 10 == 0:
            values = [min(1.0, max(0.0, b * share + rng.gauss(0, 0.03))) for b in base]
            for k, value in enumerate(values):
                lines.append({"round": r, "client": k, "seen": True, "n": 20, "loss": 1 - value})
                if not regression:
                    lines[-1]["accuracy"] = value
            if regression:
                line["clients"] = {"mean": fmean(1 - v for v in values), "worst10": 0.0, "std": pstdev(values)}
            else:
                low = sorted(values)[: -(-len(values) // 10)]
                line["clients"] = {
                    "mean": fmean(values),
                    "worst10": fmean(low),
                    "std": pstdev(values),
                    "jain": 0.98,
                    "before": {"mean": fmean(values) - 0.05},
                    "after": {"mean": fmean(values)},
                }
        history.append(line)
    if final is not None:
        history[-1]["global"]["accuracy"] = final
    (folder / "history.jsonl").write_text("".join(json.dumps(x) + "\n" for x in history))
    (folder / "clients.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if finished:
        parts = ("server", "clients", "history")
        (folder / "digest.txt").write_text("".join(f"{part} {rng.getrandbits(256):064x}\n" for part in parts))
    return folder


def write_compare(folder: Path, methods: list[str], seeds: int, **more: Any) -> Path:
    """A comparison's folder."""
    folder.mkdir(parents=True)
    command = f"consilience compare {' '.join(methods)} --data digits --partition dirichlet:0.4 --seeds {seeds}"
    (folder / "compare.yaml").write_text(yaml.safe_dump({"methods": methods, "command": command}))
    for method in methods:
        for seed in range(seeds):
            write_run(folder / f"{method}-seed{seed}", method, seed, **more)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(method, seed, **options)`` writes a run and gives its folder."""
    return lambda method="fedavg", seed=0, **more: write_run(tmp_path / f"{method}-{seed}", method, seed, **more)


@pytest.fixture
def add_run() -> Callable[..., Path]:
    """``add_run(folder, method, seed, **options)`` writes a run into a folder."""
    return write_run


@pytest.fixture
def make_compare(tmp_path: Path) -> Callable[..., Path]:
    """``make_compare(methods, seeds, **options)`` writes a comparison and gives its folder."""
    return lambda methods, seeds, **more: write_compare(tmp_path / "compare", methods, seeds, **more)
