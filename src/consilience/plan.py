"""What a run will cost, before it runs: one client's work is measured, and multiplied."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from consilience import experiment
from consilience.config import Config, Settings
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.events import cohort_size
from consilience.core.messages import ClientInfo, Job, Reply, Work
from consilience.core.method import At, Coin, Phase
from consilience.core.tree import Tree
from consilience.core.units import parse_bytes
from consilience.core.worker import Call, Worker, row_ranges
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

    Bytes are exact for methods whose messages do not change in size, under rounds and tiers of equal devices. What
    nodes send to each other and what the server computes is not counted; phases by chance count as is expected. An
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
    sizes = sorted((federation.size(int(c)), int(c)) for c in federation.seen[:10_000])
    client = sizes[len(sizes) // 2][1]
    place = worker.place
    info = ClientInfo(client, federation.size(client), place.model_of(client), place.architectures)
    server = worker.method.init_server(worker.host(0, "init"))
    parts, state = _parts(worker, server, config.rounds, jobs, info)
    scale = statistics.fmean(size for size, _ in sizes) / max(1, federation.size(client))
    spans = [(part.times * scale, part.seconds) for part in parts]
    spans += _judging(worker, server, config, info)
    low, high = (sum(times * span[end] for times, span in spans) / workers for end in (0, 1))
    high *= (BESIDE if workers > 1 else 1.0) * _load(workers)
    kept = min(min(federation.n_seen, config.rounds * jobs) * tr.nbytes(state), parse_bytes(config.client_state_memory))
    held = tr.nbytes(server) * (2 + workers) + jobs * max(part.up for part in parts) + kept
    return {
        "method": spec.label,
        "rounds": config.rounds,
        "cohort": jobs,
        "workers": workers,
        "seconds": round(low, 1),
        "seconds_high": round(high, 1),
        "bytes_down": round(sum(part.times * part.down for part in parts)),
        "bytes_up": round(sum(part.times * part.up for part in parts)),
        "memory": held + _data_bytes(worker),
    }


class _Part(NamedTuple):
    """A phase between clients and server: how often a client goes through it, and what that costs once."""

    times: float
    seconds: tuple[float, float]
    down: int
    up: int


def _parts(worker: Worker, server: Tree, rounds: int, jobs: int, info: ClientInfo) -> tuple[list[_Part], Tree]:
    """Every such phase of a run with ``jobs`` clients a round, and the state that a client is left with. One client
    goes through them once; where others follow, the server hears from everybody what this one has sent."""
    method, program = worker.method, worker.program
    seen = [int(client) for client in worker.federation.seen]
    phases = [i for i, phase in enumerate(program) if phase.over != "neighbours"]
    phases.sort(key=lambda i: {"start": 0, "end": 2}.get(str(program[i].when), 1))
    parts: list[_Part] = []
    state: Tree = None
    going = 1.0
    for i in phases:
        phase, job = program[i], Job(0, info.id, 1, 0, 0, i)
        all_there = phase.when in ("start", "end")
        cohort = sorted(seen if all_there else [info.id, *(c for c in seen if c != info.id)][:jobs])
        message = method.broadcast(phase, server, info)
        call = Call("train", (job, state), message)
        work, after = worker.run(call)  # once to warm up
        down, up = (0 if sent is None else encoded_size(sent) for sent in (message, work.update))
        times = len(seen) if all_there else jobs * going * _rounds(phase, rounds)
        parts.append(_Part(times, _timed(worker, call), down, up))
        state = after
        if i != phases[-1] and phase.over == "cohort" and work.update is not None:
            heard = [_reply(worker, job._replace(client=client), work) for client in cohort]
            server, *_ = worker.run(Call("aggregate", (i, 0, server, heard, cohort)))
            chosen = None if all_there else method.proceed(phase, server)
            going *= 1.0 if chosen is None else len(chosen) / len(cohort)
    return parts, state


def _reply(worker: Worker, job: Job, work: Work) -> Reply:
    """What one client has done, from another."""
    rows = worker.federation.size(job.client)
    return Reply(job, work.update, rows, work.samples, work.steps, 0, 0.0, work.loss)


def _rounds(phase: Phase, rounds: int) -> float:
    """In how many rounds a phase happens, or is to be expected."""
    if isinstance(phase.when, Coin):
        return rounds * phase.when.p
    return float(phase.when.round <= rounds) if isinstance(phase.when, At) else rounds


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
    predictor, ranges = worker.method.global_model(server), row_ranges(worker.federation, worker.place.chunk)
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
