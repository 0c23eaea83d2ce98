"""How the cost of a round grows with participants, registered clients, model size and workers.

    python benchmarks/growth.py

Everything runs by the command line, as a user would; a round's cost is the median over the judged rounds of a run,
of which the first is left out. Takes a few minutes. Results go to ``benchmarks/results/growth.json``, from which
``docs/generate.py`` draws the picture in ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from speed import consilience
from workloads import WORKLOADS

from consilience.core.checkpoint import write_atomically
from consilience.models import architecture

RESULTS = Path(__file__).parent / "results" / "growth.json"
EVERY = 3
"""Rounds between judgements of the global model."""


def seconds_a_round(options: Sequence[str], rounds: int) -> float:
    """Median seconds a round of ``consilience run fedavg`` with these options."""
    ended, _, _ = consilience(["fedavg", *options, "--eval-every", str(EVERY)], rounds)
    return statistics.median(b - a for a, b in itertools.pairwise(ended)) / EVERY


def images(model: str = "mlp", participants: int = 100) -> list[str]:
    """Fashion-MNIST among 1,000 clients."""
    data = ["--data", "fashion-mnist", "--clients", "1000", "--partition", "dirichlet:0.3:equal", "--split", "1,0,0"]
    return [*data, "--batch-size", "20", "--model", model, "--participation", str(participants)]


def population(clients: int) -> list[str]:
    """Clients whose rows are drawn when they take part; 100 do in a round."""
    data = ["--data", "synthetic-ondemand", "--clients", str(clients)]
    return [*data, "--participation", "100", "--local-steps", "5", "--eval-clients", "100"]


def parameters(model: str) -> int:
    """How many numbers a model for 28 x 28 images and ten classes has."""
    return sum(p.numel() for p in architecture(model, (1, 28, 28), 10).build().parameters())


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=18, help=f"of each run, at least {2 * EVERY}")
    rounds = parser.parse_args().rounds
    models = [f"mlp:{width}" for width in (32, 128, 512, 2048)]
    cores = os.cpu_count() or 1
    workers = sorted({1, cores, 2 * cores})
    sweeps = {
        "participants": [(n, images(participants=n)) for n in (10, 30, 100, 300, 1000)],
        "registered clients": [(n, population(n)) for n in (1_000, 10_000, 100_000, 1_000_000)],
        "parameters": [(parameters(model), images(model)) for model in models],
        "workers": [(n, [*WORKLOADS["w1"].options(), "--workers", str(n)]) for n in workers],
    }
    found: dict[str, object] = {"cores": cores}
    for name, points in sweeps.items():
        found[name] = line = []
        for x, options in points:
            line.append((x, seconds_a_round(options, rounds)))
            print(f"{name:20} {x:>10,}  {line[-1][1]:.4f} s a round", flush=True)
    write_atomically(RESULTS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
