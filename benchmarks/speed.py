"""How fast simulations are: Consilience against the plain-PyTorch floor and against other frameworks, in one run.

    python benchmarks/speed.py --workload w1 --against floor
    python benchmarks/speed.py --workload w2 --against flower --pairs 3 --json

Both sides do the same work on the same data, and take turns, since machines are not equally fast all the time;
what counts is the ratio of the medians. Consilience runs as a user runs it, with its history, its judgement of the
global model, its bytes, its checkpoints and its report. Seconds a round are those after the first two rounds.
Start-up is a whole command of one round. Memory is the largest sum of proportional set sizes (PSS) of all processes.
Results go to ``benchmarks/results/speed.json``. Other frameworks are installed on first use, each in an
environment of its own in ``benchmarks/.cache``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workloads import WORKLOADS, Workload, save

from consilience.core.checkpoint import write_atomically

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.json"


@dataclass
class Sample:
    """One measured run. start: seconds of a command of one round, if measured. pss_mb: peak memory."""

    round_s: float
    pss_mb: float
    accuracy: float
    start_s: float | None = None


Side = Callable[[str, int], tuple[list[float], float, float]]
"""(workload, rounds) -> (seconds at which rounds ended, accuracy, peak MB)."""


def ours(name: str, rounds: int, extra: Sequence[str] = ()) -> tuple[list[float], float, float]:
    """Consilience, by its command line."""
    workload = WORKLOADS[name]
    method = "scaffold" if workload.scaffold else "fedavg"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "consilience", "run", method, *workload.options(), "--rounds", str(rounds)]
        _, memory = watched([*command, "--eval-clients-every", "0", "--out", str(out), *extra])
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    ended = {line["round"]: line["wall_s"] for line in lines}
    return [ended[r] for r in sorted(ended)], lines[-1]["global"]["accuracy"], memory


def floor(name: str, rounds: int, layout: str = "contiguous") -> tuple[list[float], float, float]:
    """The plain-PyTorch floor."""
    command = [sys.executable, str(HERE / "floor.py"), name, "--rounds", str(rounds), "--layout", layout]
    return reported(command)


def channels_last(name: str, rounds: int) -> tuple[list[float], float, float]:
    """The floor with its convolutions laid out channels-last."""
    return floor(name, rounds, "channels_last")


def reported(command: Sequence[str]) -> tuple[list[float], float, float]:
    """A side that prints its times as a line of JSON."""
    text, memory = watched(command)
    found = json.loads(text.strip().splitlines()[-1])
    return found["ended"], found["accuracy"], memory


AGAINST: dict[str, Side] = {"floor": floor, "channels-last": channels_last}


def watched(command: Sequence[str]) -> tuple[str, float]:
    """Run a command; returns what it printed and its peak memory in MB. Raises RuntimeError if it fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            peak[0] = max(peak[0], tree_pss(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    over.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{err}")
    return out, peak[0]


def tree_pss(root: int) -> float:
    """Proportional set size of a process and all its descendants, in MB."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, waiting = 0.0, [root]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) / 1024
    return total


def sample(side: Side, name: str, rounds: int) -> Sample:
    """One run of a side. Evaluated rounds may be fewer than rounds."""
    every = WORKLOADS[name].every
    ended, accuracy, memory = side(name, rounds)
    first = max(2, every)  # the first line after two rounds
    if len(ended) == rounds:
        seconds = (ended[-1] - ended[first - 1]) / (rounds - first)
    else:
        seconds = (ended[-1] - ended[0]) / (rounds - every)
    return Sample(seconds, memory, accuracy)


def started(side: Side, name: str) -> float:
    """Seconds of a whole command of one round."""
    began = time.perf_counter()
    side(name, 1)
    return time.perf_counter() - began


def compare(name: str, against: str, rounds: int, pairs: int) -> dict[str, object]:
    """Interleaved pairs of both sides."""
    sides = {"consilience": ours, against: AGAINST[against]}
    samples: dict[str, list[Sample]] = {side: [] for side in sides}
    for _ in range(pairs):
        for key, side in sides.items():
            samples[key].append(sample(side, name, rounds))
            samples[key][-1].start_s = started(side, name)
    middle = {key: statistics.median(s.round_s for s in found) for key, found in samples.items()}
    trained = WORKLOADS[name].samples
    return {
        "workload": name,
        "against": against,
        "ratio": middle["consilience"] / middle[against],
        "seconds_a_round": middle,
        "samples_a_second": {key: trained / value for key, value in middle.items()},
        "start_s": {key: statistics.median(s.start_s or 0.0 for s in found) for key, found in samples.items()},
        "peak_mb": {key: max(s.pss_mb for s in found) for key, found in samples.items()},
        "accuracy": {key: statistics.mean(s.accuracy for s in found) for key, found in samples.items()},
        "samples": {key: [asdict(s) for s in found] for key, found in samples.items()},
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*WORKLOADS], required=True)
    parser.add_argument("--against", choices=[*AGAINST], default="floor")
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    workload: Workload = WORKLOADS[options.workload]
    save(workload)
    found = compare(options.workload, options.against, options.rounds, options.pairs)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[f"{options.workload}-{options.against}"] = found
    write_atomically(RESULTS, json.dumps(kept, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
        return
    for key in ("seconds_a_round", "samples_a_second", "start_s", "peak_mb", "accuracy"):
        print(f"{key:18}", "   ".join(f"{side} {value:.4g}" for side, value in found[key].items()))
    print(f"ratio of medians   {found['ratio']:.3f}")


if __name__ == "__main__":
    main()
