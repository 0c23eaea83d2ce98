"""What a run will cost, before it runs: one client's work is measured, and multiplied."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from consilience import experiment
from consilience.config import Config, Settings
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.events import cohort_size
from consilience.core.messages import ClientInfo, Job
from consilience.core.units import parse_bytes
from consilience.core.worker import Call, Worker, test_ranges
from consilience.execute.processes import cores
from consilience.schedule import names as schedules
from consilience.schedule.buffered import Buffered
from consilience.schedule.deadline import Deadline
from consilience.schedule.immediate import Immediate
from consilience.schedule.tiered import Tiered
from consilience.simulate import single_thread

if TYPE_CHECKING:
    from rich.table import Table

REPEATS, PATIENCE = 5, 1.0
"""Most repetitions of a measurement, and the seconds after which no further one is begun."""
BESIDE = 1.5
"""How much longer a call is allowed to take where every core is busy with another: they share caches and memory."""


def plan(settings: Settings, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per method: seconds, bytes up and down and peak memory of one run, with how sure they can be.

    Bytes are exact for methods whose messages do not change in size, under rounds and tiers of equal devices. An
    asynchronous run also moves what is under way, or has come and is not combined, when it ends: less than one message
    for each job in flight, not counted here. Updates of interval and compass, and rounds with a deadline, are reckoned
    as everybody that may be asked. Seconds scale one measured client of median
    size, the quickest of some repetitions; they are a range up to ``seconds_high``, which holds if all repetitions
    were as slow as the slowest, cores hinder each other, and what else runs on this machine goes on. Memory is data
    plus models, without what Python and torch take.
    """
    rows = []
    for text in dict.fromkeys(names):
        (spec,) = experiment.specs(Settings(settings.config.model_copy(update={"seeds": 1}), settings.training), [text])
        federation = experiment.make_federation(spec.config)
        with single_thread():
            rows.append(_row(spec, experiment.check(spec, federation)))
    return rows


def _row(spec: experiment.RunSpec, worker: Worker) -> dict[str, Any]:
    config, federation = spec.config, worker.federation
    workers = config.workers or (1 if config.executor == "serial" else cores())
    jobs = _jobs(config, worker)
    server = worker.method.init_server(worker.host(0, "init"))
    sizes = sorted((federation.size(int(c)), int(c)) for c in federation.seen[:10_000])
    client = sizes[len(sizes) // 2][1]
    phase = next(i for i, p in enumerate(worker.program) if p.over == "cohort" and p.when == "round")
    place = worker.place
    info = ClientInfo(client, federation.size(client), place.model_of(client), place.architectures)
    message = worker.method.broadcast(worker.program[phase], server, info)
    call = Call("train", (Job(0, client, 1, 0, 0, phase), None), message)
    work, state = worker.run(call)  # once to warm up
    scale = statistics.fmean(size for size, _ in sizes) / max(1, federation.size(client))
    spans = [(config.rounds * jobs * scale, _timed(worker, call)), *_judging(worker, server, config, info)]
    low, high = (sum(times * span[end] for times, span in spans) / workers for end in (0, 1))
    high *= (BESIDE if workers > 1 else 1.0) * _load(workers)
    down = 0 if message is None else encoded_size(message)
    up = 0 if work.update is None else encoded_size(work.update)
    states = min(federation.n_seen, config.rounds * jobs) * tr.nbytes(state)
    held = tr.nbytes(server) * (2 + workers) + jobs * up + min(states, parse_bytes(config.client_state_memory))
    return {
        "method": spec.label,
        "rounds": config.rounds,
        "cohort": jobs,
        "workers": workers,
        "seconds": round(low, 1),
        "seconds_high": round(high, 1),
        "bytes_down": config.rounds * jobs * down,
        "bytes_up": config.rounds * jobs * up,
        "memory": held + _data_bytes(worker),
    }


def _jobs(config: Config, worker: Worker) -> int:
    """Clients whose work one server update takes."""
    seen = worker.federation.n_seen
    cohort = cohort_size(config.participation, seen)
    own = config.schedule is None
    schedule = schedules.make(config.schedule or worker.method.default_schedule())
    if isinstance(schedule, Immediate):
        return 1
    if isinstance(schedule, Buffered):
        return schedule.buffer
    if isinstance(schedule, Tiered):
        return max(1, round(cohort / min(schedule.tiers, seen)))
    if isinstance(schedule, Deadline) and not own:
        return min(seen, math.ceil(config.over_selection * cohort - 1e-9))
    return cohort


def _timed(worker: Worker, call: Call) -> tuple[float, float]:
    """Seconds of the quickest and the slowest of some repetitions."""
    spent: list[float] = []
    while len(spent) < REPEATS and (not spent or sum(spent) < PATIENCE):
        began = time.perf_counter()
        worker.run(call)
        spent.append(time.perf_counter() - began)
    return min(spent), max(spent)


def _judging(
    worker: Worker, server: Any, config: Config, info: ClientInfo
) -> Iterator[tuple[float, tuple[float, float]]]:
    """What evaluation does: how often it does it, and how long once takes."""
    predictor, ranges = worker.method.global_model(server), test_ranges(worker.federation, worker.place.chunk)
    if predictor is not None and ranges:
        lines = -(-config.rounds // config.eval_every)
        yield lines * len(ranges), _timed(worker, Call("chunk", ranges[0], predictor))
    clients = min(worker.federation.n_clients, config.eval_clients or worker.federation.n_clients)
    every = config.eval_clients_every
    message = worker.method.deploy(server, info)
    first = next(i for i, p in enumerate(worker.program) if p.inner)
    job = Job(-1, info.id, 1, 0, 0, first)
    times = (config.rounds - 1) // every if every else 0
    for lines, train in ((times, False), (1, True)):
        if lines:
            yield lines * clients, _timed(worker, Call("judge", (job, None, train), message))


def _load(workers: int) -> float:
    """How much longer everything takes where the machine is busy already: processes that wait, for each core."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1.0, (busy + workers) / (os.cpu_count() or 1))


def _data_bytes(worker: Worker) -> int:
    federation = worker.federation
    rows = getattr(federation, "rows", None)
    return sum(tr.nbytes((split.x, split.y)) for split in (rows, federation.test) if split is not None)


def plan_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    from rich import box
    from rich.table import Table

    each = sorted({row["cohort"] for row in rows})
    clients = f"{each[0]} to {each[-1]}" if len(each) > 1 else f"{each[0]}"
    title = f"One run of {rows[0]['rounds']} rounds with {clients} clients each, on {rows[0]['workers']} workers"
    table = Table(
        title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False, min_width=len(title)
    )
    for head in ("Method", "Time", "Down", "Up", "Memory"):
        table.add_column(head, justify="left" if head == "Method" else "right")
    for row in rows:
        amounts = (_amount(row[key]) for key in ("bytes_down", "bytes_up", "memory"))
        table.add_row(row["method"], _range(row["seconds"], row["seconds_high"]), *amounts)
    return table


def _range(low: float, high: float) -> str:
    """``40 s to 70 s``, or one of them where they read the same."""
    ends = [_duration(low), _duration(high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 10
        else f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _amount(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n < 1e9 else f"{n / 1e9:.2f} GB"
