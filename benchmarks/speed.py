"""How fast simulations are: Consilience against the plain-PyTorch floor and against other frameworks, in one run.

    python benchmarks/speed.py --workload w1 --against floor
    python benchmarks/speed.py --workload w2 --against flower --pairs 3 --json
    python benchmarks/speed.py --workload compare    # runs side by side against one after another

Both sides do the same work on the same data, and take turns, since machines are not equally fast all the time;
what counts is the ratio of the medians. Consilience runs as a user runs it, with its history, its judgement of the
global model, its bytes, its checkpoints and its report. Seconds a round are those after the first two rounds.
Start-up is a whole command of one round; of ``compare``, whole commands are timed. Memory is the largest sum of
proportional set sizes (PSS) of all processes.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peers.environment import PEERS, command, environment
from workloads import WORKLOADS, save

from consilience.core.checkpoint import write_atomically

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.json"


@dataclass
class Sample:
    """One measured run. seconds: a round, or the whole command. pss_mb: peak memory. start_s: seconds of a command
    of one round, if measured."""

    seconds: float
    pss_mb: float
    accuracy: float
    start_s: float | None = None


Side = Callable[[int], tuple[list[float], float, float]]
"""rounds -> (seconds at which rounds ended, accuracy, peak MB)."""


def consilience(options: Sequence[str], rounds: int) -> tuple[list[float], float, float]:
    """Consilience, by its command line: ``consilience run`` with these options."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "consilience", "run", *options, "--rounds", str(rounds)]
        _, memory = watched([*command, "--eval-clients-every", "0", "--out", str(out)])
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    ended = {line["round"]: line["wall_s"] for line in lines}
    return [ended[r] for r in sorted(ended)], lines[-1].get("global", {}).get("accuracy", 0.0), memory


def ours(name: str) -> Side:
    """Consilience on a workload."""
    workload = WORKLOADS[name]
    method = "scaffold" if workload.scaffold else "fedavg"
    return lambda rounds: consilience([method, *workload.options()], rounds)


def floor(name: str, layout: str) -> Side:
    """The plain-PyTorch floor."""
    command = [sys.executable, str(HERE / "floor.py"), name, "--layout", layout, "--rounds"]
    return lambda rounds: reported([*command, str(rounds)])


def peer(name: str, against: str) -> Side:
    """Another framework, in its own environment."""
    script = [*command(against), name]
    return lambda rounds: reported([*script, "--rounds", str(rounds)], environment())


def reported(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[list[float], float, float]:
    """A side that prints its times as a line of JSON."""
    text, memory = watched(command, env)
    found = json.loads(text.strip().splitlines()[-1])
    return found["ended"], found["accuracy"], memory


def opponent(name: str, against: str) -> Side:
    """What Consilience is measured against."""
    if against in PEERS:
        return peer(name, against)
    return floor(name, "channels_last" if against == "channels-last" else "contiguous")


AGAINST = ("floor", "channels-last", *PEERS)


def comparison(script: Sequence[str]) -> Side:
    """Four methods with three seeds each, by a command that takes the arguments of ``consilience compare``."""
    methods = ["fedavg", "fedprox", "scaffold", "fedadam", "--seeds", "3"]
    data = ["--data", "fashion-mnist", "--model", "mlp", "--clients", "100", "--partition", "dirichlet:0.3"]

    def run(rounds: int) -> tuple[list[float], float, float]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "runs"
            began = time.perf_counter()
            rest = ["--participation", "10", "--rounds", str(rounds), "--out", str(out)]
            _, memory = watched([sys.executable, *script, *methods, *data, *rest])
            took = time.perf_counter() - began
            rows = json.loads((out / "leaderboard.json").read_text())
        return [took], rows[0]["accuracy"], memory

    return run


def watched(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[str, float]:
    """Run a command; returns what it printed and its peak memory in MB. Raises RuntimeError if it fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
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


def a_round(every: int) -> Callable[[list[float], int], float]:
    """Seconds a round, from when rounds ended, if the model is judged every so many. Judged rounds may be all that
    is known."""

    def seconds(ended: list[float], rounds: int) -> float:
        if len(ended) < rounds:
            return (ended[-1] - ended[0]) / (rounds - every)
        first = max(2, every)  # the first judged one after two rounds
        return (ended[-1] - ended[first - 1]) / (rounds - first)

    return seconds


def race(
    sides: Mapping[str, Side], seconds: Callable[[list[float], int], float], rounds: int, pairs: int, start: bool
) -> dict[str, object]:
    """Let the sides take turns, ours first. start: whether to measure commands of one round too."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(pairs):
        for name, side in sides.items():
            ended, accuracy, memory = side(rounds)
            samples[name].append(Sample(seconds(ended, rounds), memory, accuracy))
            if start:
                began = time.perf_counter()
                side(1)
                samples[name][-1].start_s = time.perf_counter() - began
    middle = {name: statistics.median(s.seconds for s in found) for name, found in samples.items()}
    mine, other = middle.values()
    starts = {name: [s.start_s for s in found if s.start_s is not None] for name, found in samples.items()}
    return {
        "ratio": mine / other,
        "seconds_a_round" if start else "seconds": middle,
        "start_s": {name: statistics.median(found) for name, found in starts.items() if found},
        "peak_mb": {name: max(s.pss_mb for s in found) for name, found in samples.items()},
        "accuracy": {name: statistics.mean(s.accuracy for s in found) for name, found in samples.items()},
        "samples": {name: [asdict(s) for s in found] for name, found in samples.items()},
        "cores": os.cpu_count(),
    }


def measure(workload: str, against: str, rounds: int, pairs: int) -> tuple[str, dict[str, object]]:
    """One workload against one opponent: the result and its name."""
    if workload == "compare":
        other = [str(HERE / "one_after_another.py")]
        sides = {"side by side": comparison(["-m", "consilience", "compare"]), "one after another": comparison(other)}
        return workload, {"workload": workload, **race(sides, lambda ended, _: ended[-1], rounds, pairs, start=False)}
    save(WORKLOADS[workload])
    sides = {"consilience": ours(workload), against: opponent(workload, against)}
    found = race(sides, a_round(WORKLOADS[workload].every), rounds, pairs, start=True)
    speeds = {name: WORKLOADS[workload].samples / value for name, value in found["seconds_a_round"].items()}
    return f"{workload}-{against}", {"workload": workload, "against": against, "samples_a_second": speeds, **found}


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*WORKLOADS, "compare"], required=True)
    parser.add_argument("--against", choices=AGAINST, default="floor", help="for w1, w2 and w3")
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    if options.workload == "w3" and options.against in PEERS:
        parser.error(f"w3 is SCAFFOLD, which is not written for {options.against} here; against: floor, channels-last")
    name, found = measure(options.workload, options.against, options.rounds, options.pairs)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[name] = found
    write_atomically(RESULTS, json.dumps(kept, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
        return
    for key in ("seconds", "seconds_a_round", "samples_a_second", "start_s", "peak_mb", "accuracy"):
        if found.get(key):
            print(f"{key:18}", "   ".join(f"{side} {value:.4g}" for side, value in found[key].items()))
    print(f"ratio of medians   {found['ratio']:.3f}")


if __name__ == "__main__":
    main()
