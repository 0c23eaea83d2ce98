"""What a round on Ray costs in objects, bytes and the driver's time, and what it would cost on more workers.

    python benchmarks/cluster.py --rounds 6

Measured on a Ray of this machine, with clients of four rows, so that little but the moving of things is left. Objects
and bytes are counted by the executor and follow from the sizes of messages; the formulas in :func:`expected` are held
against every count. The driver's CPU seconds a round (all its threads; beside other programs they mean more than
seconds do) are fitted by ``a + b calls + c bytes moved``, coefficients not below 0, and relative errors weigh the same
for small and for large rounds. Results go to `benchmarks/results/cluster.json`; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

import consilience
from consilience.core.checkpoint import write_atomically
from consilience.core.encode import encoded_size
from consilience.core.method import sums_suffice
from consilience.core.reduce import BLOCK
from consilience.data.federation import from_arrays
from consilience.execute import ray as on_ray
from consilience.execute.pooled import EACH

RESULTS = Path(__file__).parent / "results" / "cluster.json"
METHODS = ("fedavg", "scaffold")
WORKERS = (1, 2)
CLIENTS = (8, 32, 112)
WIDTHS = (100, 3_000, 30_000)
INLINE = 100_000
"""Bytes up to which an argument or a result is no object of its own in Ray's store."""
LARGEST = 1_000_000
"""Clients times width that are measured at most: a round of more moves gigabytes."""
ROWS, FEATURES, CLASSES = 4, 64, 10


class Watched(on_ray.Ray):
    """Keeps the last executor that was made."""

    last: Watched

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        Watched.last = self


def federation(clients: int) -> consilience.Federation:
    """Clients of a few rows, all for training, and as many rows to test on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(clients * ROWS, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, clients * ROWS)
    return from_arrays(x, y, clients=clients, split=(1.0, 0.0, 0.0), test=(x[:100], y[:100]))


def measure(method: str, workers: int, clients: int, width: int, rounds: int) -> dict[str, Any]:
    """A run: counts and seconds of a round, between the second line and the last but one."""
    seen: list[tuple[on_ray.Moved, float, float]] = []

    def note(line: dict[str, Any]) -> None:
        seen.append((dataclasses.replace(Watched.last.moved), time.process_time(), time.perf_counter()))

    made = consilience.methods.get(method)(batch_size=ROWS, local_steps=1)
    options: dict[str, Any] = {"model": f"mlp:{width}", "rounds": rounds + 3, "eval_clients_every": 0}
    result = consilience.run(
        made, federation(clients), **options, eval_clients=1, executor="ray", workers=workers, on_line=note
    )
    (first, cpu, wall), (last, cpu_end, wall_end) = seen[1], seen[-2]
    moved = last.since(first)
    found = {key: value / rounds for key, value in dataclasses.asdict(moved).items()}
    state = next(iter(result.states.values()), None)
    sizes = {"model_bytes": encoded_size(result.server.model), "state_bytes": encoded_size(state)}
    about = {"method": method, "workers": workers, "clients": clients, "width": width, **sizes}
    return {**about, **found, "driver_cpu_s": (cpu_end - cpu) / rounds, "wall_s": (wall_end - wall) / rounds}


MESSAGES = {"fedavg": (1, 1, 0), "scaffold": (2, 2, 1)}
"""How many models a method broadcasts, has in an update, and keeps as a client's state."""


def expected(method: str, workers: int, clients: int, model: float) -> dict[str, float]:
    """Objects, calls and bytes of a round: a model is ``model`` bytes; jobs and scores are neglected.

    Placed: the broadcast and the model that is judged. Up: an update (in blocks, a sum for 16 clients) and a state
    for each client. Down: a state for each client.
    """
    down, up, state = MESSAGES[method]
    blocks = sums_suffice(consilience.methods.get(method)()) and clients >= EACH * BLOCK * workers
    calls = math.ceil(clients / BLOCK) if blocks else clients
    return {
        "placed": 2,
        "placed_bytes": (down + 1) * model,
        "calls": calls + 1,  # and the test rows
        "call_bytes": clients * state * model,
        "result_bytes": (calls * up + clients * state) * model,
    }


def check(row: dict[str, Any]) -> None:
    """Hold what was counted against the formulas; what they neglect is below 2 kB for a call and for a client."""
    slack = 2_000 * (row["calls"] + row["clients"])
    for key, value in expected(row["method"], row["workers"], row["clients"], row["model_bytes"]).items():
        assert abs(row[key] - value) <= (slack if key.endswith("bytes") else 0), (key, row[key], value, row)


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The driver's seconds: a round, a call, a byte."""
    design = np.array([[1.0, row["calls"], moved(row)] for row in rows])
    seconds = np.array([row["driver_cpu_s"] for row in rows])
    (a, b, c), _ = nnls(design / seconds[:, None], np.ones(len(rows)))
    errors = [abs((a + b * r["calls"] + c * moved(r)) / r["driver_cpu_s"] - 1) for r in rows]
    return {
        "round_s": a, "call_s": b, "byte_s": c, "median_error": statistics.median(errors), "largest_error": max(errors)
    }  # fmt: skip


def moved(row: dict[str, Any]) -> float:
    """All bytes that go through the driver."""
    return float(row["placed_bytes"] + row["call_bytes"] + row["result_bytes"])


def predictions(model: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A round of a cohort of ten, and of 48, for each worker."""
    for name, size in (("LeNet, 62,000 parameters", 0.25e6), ("ResNet-18, 11.2 million", 44.7e6)):
        for method in METHODS:
            for each in (10, EACH * BLOCK):
                for workers in (10, 100, 1000):
                    row = expected(method, workers, each * workers, size)
                    seconds = model["round_s"] + model["call_s"] * row["calls"] + model["byte_s"] * moved(row)
                    about = {"model": name, "method": method, "each": each, "workers": workers}
                    own = [row["call_bytes"] / row["calls"], row["result_bytes"] / row["calls"]]
                    objects = row["placed"] + row["calls"] * sum(size > INLINE for size in own)
                    yield {**about, **row, "objects": objects, "driver_s": seconds}


def keep(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check what was measured, fit, and write it all down."""
    for row in rows:
        check(row)
    fitted = fit(rows)
    kept = {"cores": os.cpu_count(), "measured": rows, "fit": fitted, "predicted": list(predictions(fitted))}
    write_atomically(RESULTS, json.dumps(kept, indent=1) + "\n")
    return kept


def main() -> None:
    """Measure, fit, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    on_ray.Ray = Watched  # type: ignore[misc]
    rows = json.loads(RESULTS.read_text())["measured"] if RESULTS.exists() else []
    done = [tuple(row[key] for key in ("workers", "clients", "width", "method")) for row in rows]
    with on_ray.connected(None, max(WORKERS)):
        for case in itertools.product(WORKERS, CLIENTS, WIDTHS, METHODS):
            workers, clients, width, method = case
            if case not in done and clients * width <= LARGEST:
                rows.append(measure(method, workers, clients, width, options.rounds))
                keep(rows)
                print(json.dumps(rows[-1]), flush=True)
    print(json.dumps(keep(rows)["fit"]))


if __name__ == "__main__":
    main()
