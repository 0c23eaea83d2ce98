"""What a run will cost, before it runs: one client's work is measured, and multiplied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from consilience import experiment
from consilience.config import Settings
from consilience.core import tree as tr
from consilience.core.encode import encoded_size
from consilience.core.events import cohort_size
from consilience.core.messages import ClientInfo, Job
from consilience.core.worker import Call, Worker, test_ranges
from consilience.execute.processes import cores
from consilience.simulate import single_thread

if TYPE_CHECKING:
    from rich.table import Table


def plan(settings: Settings, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per method: seconds, bytes up and down and peak memory of one run, with how sure they can be.

    Bytes are exact for methods whose messages do not change in size. Seconds scale one measured client of median
    size; memory is data plus models, without what Python and torch take.
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
    cohort = cohort_size(config.participation, len(federation.seen))
    server = worker.method.init_server(worker.host(0, "init"))
    sizes = sorted((federation.size(int(c)), int(c)) for c in federation.seen[:10_000])
    client = sizes[len(sizes) // 2][1]
    phase = next(i for i, p in enumerate(worker.program) if p.over == "cohort" and p.when == "round")
    info = ClientInfo(client, federation.size(client), worker.place.model_of(client))
    message = worker.method.broadcast(worker.program[phase], server, info)
    call = Call("train", (Job(0, client, 1, 0, 0, phase), None), message)
    worker.run(call)  # once to warm up
    began = time.perf_counter()
    work, state = worker.run(call)
    train = time.perf_counter() - began
    mean = statistics.fmean(size for size, _ in sizes) / max(1, federation.size(client))
    judged = _judging(worker, server)
    lines = -(-config.rounds // config.eval_every)
    seconds = (config.rounds * cohort * train * mean + lines * judged) / workers
    down = 0 if message is None else encoded_size(message)
    up = 0 if work.update is None else encoded_size(work.update)
    held = tr.nbytes(server) * (2 + workers) + cohort * up + len(federation.seen) * tr.nbytes(state)
    return {
        "method": spec.label,
        "rounds": config.rounds,
        "cohort": cohort,
        "workers": workers,
        "seconds": round(seconds, 1),
        "bytes_down": config.rounds * cohort * down,
        "bytes_up": config.rounds * cohort * up,
        "memory": held + _data_bytes(worker),
    }


def _judging(worker: Worker, server: Any) -> float:
    """Seconds of one evaluation of the global model, from its first chunk."""
    predictor = worker.method.global_model(server)
    ranges = test_ranges(worker.federation, worker.place.chunk)
    if predictor is None or not ranges:
        return 0.0
    began = time.perf_counter()
    worker.run(Call("chunk", ranges[0], predictor))
    return (time.perf_counter() - began) * len(ranges)


def _data_bytes(worker: Worker) -> int:
    federation = worker.federation
    rows = getattr(federation, "rows", None)
    return sum(tr.nbytes((split.x, split.y)) for split in (rows, federation.test) if split is not None)


def plan_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    from rich import box
    from rich.table import Table

    title = (
        f"One run of {rows[0]['rounds']} rounds with {rows[0]['cohort']} clients each, on {rows[0]['workers']} workers"
    )
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("Method", "Time", "Down", "Up", "Memory"):
        table.add_column(head, justify="left" if head == "Method" else "right")
    for row in rows:
        amounts = (_amount(row[key]) for key in ("bytes_down", "bytes_up", "memory"))
        table.add_row(row["method"], _duration(row["seconds"]), *amounts)
    return table


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _amount(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n < 1e9 else f"{n / 1e9:.2f} GB"
