"""One single-threaded worker process per core, over shared memory, living as long as the run.

Small trees travel in the pipe, large ones in shared segments; a broadcast is written once for all.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from consilience.core.encode import Encoder, decode
from consilience.core.tree import Tree
from consilience.core.worker import Call, Worker
from consilience.execute.memory import keep_freed_memory
from consilience.execute.pooled import Desk, Hand, Pooled, Shared, attempt
from consilience.execute.shared import Mapped, Segments, drop_folder, make_folder

INLINE = 1 << 14
"""Trees up to this many bytes travel in the pipe."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fork_is_safe() -> bool:
    """Whether a forked child can train: not where the parent's autograd has already run, nor without fork."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return False
    with quiet_fork():
        pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            torch.zeros(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]
            code = 0
        os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


@contextlib.contextmanager
def quiet_fork() -> Any:
    """Newer Pythons warn of forking beside threads; the probe above has tried that it works here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _pack(encoder: Encoder, segments: Segments) -> tuple[list[Any], bytes]:
    """A reference to an encoded tree, and the bytes that go with it in the pipe."""
    if encoder.size <= INLINE:
        inline = bytearray(encoder.size)
        encoder.into(inline)
        return ["", encoder.size], bytes(inline)
    return _write(encoder, segments), b""


def _write(encoder: Encoder, segments: Segments) -> list[Any]:
    """A reference to a tree, written into a segment."""
    name, memory = segments.take(encoder.size)
    encoder.into(memory)  # type: ignore[arg-type]
    return [name, encoder.size]


def _send(pipe: Connection, head: list[Any], body: bytes) -> None:
    pipe.send_bytes(json.dumps(head).encode() + b"\n" + body)


def _receive(pipe: Connection) -> tuple[list[Any], bytearray]:
    head, _, body = pipe.recv_bytes().partition(b"\n")
    return json.loads(head), bytearray(body)


# --- in the worker process -------------------------------------------------------------------------------------


def _serve(worker: Worker, pipe: Connection, folder: Path, name: str, inherited: Sequence[Connection]) -> None:
    """Answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in inherited:  # a pipe held open by a sibling would never report that the parent is gone
        other.close()
    torch.set_num_threads(1)
    keep_freed_memory()
    mapped, segments = Mapped(folder), Segments(folder, name)
    try:
        _answer(worker, pipe, mapped, segments)
    except (EOFError, OSError):  # the parent has closed the pipe, or is gone
        if os.getppid() == 1:
            shutil.rmtree(folder, ignore_errors=True)


def _answer(worker: Worker, pipe: Connection, mapped: Mapped, segments: Segments) -> None:
    """Answer calls for ever. Raises EOFError or OSError when nobody listens any more."""
    desk = Desk(worker)

    def answer(head: list[Any], body: bytearray) -> tuple[list[Any], bytes]:
        _, function, args_at, number, shared_at, free = head
        for segment in free:
            segments.give(segment)
        shared = None if shared_at is None else mapped.view(*shared_at)
        apart, encoders = desk.answer(function, mapped.view(*args_at) if args_at[0] else body, number, shared)
        packed = [_pack(encoder, segments) for encoder in encoders]
        return [apart, [at for at, _ in packed]], b"".join(inline for _, inline in packed)

    while True:
        head, body = _receive(pipe)
        kind, what = attempt(partial(answer, head, body))
        what, inline = what if kind == "done" else (what, b"")
        _send(pipe, [head[0], kind, what], inline)


# --- in the parent ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Child(Hand):
    """A worker process as the parent sees it."""

    process: Any
    pipe: Connection
    free: list[str] = field(default_factory=list)
    """Names of its segments that nobody here looks at any more."""


class Processes(Pooled[_Child]):
    """Runs calls on worker processes."""

    def __init__(self, worker: Worker, workers: int) -> None:
        super().__init__(worker, workers)
        self._folder = make_folder()
        self._segments = Segments(self._folder, "p")
        self._mapped = Mapped(self._folder)
        self._made = 0
        self._context = start_context()
        for _ in range(workers):
            self._hands.append(self._spawn())

    def close(self) -> None:
        """End the workers and free their memory."""
        for child in self._hands:
            child.pipe.close()
        for child in self._hands:
            child.process.join(timeout=2)
            if child.process.is_alive():
                child.process.kill()
                child.process.join()
        self._hands = []
        drop_folder(self._folder)

    def _spawn(self) -> _Child:
        ours, theirs = multiprocessing.Pipe()
        self._made += 1
        forked = self._context.get_start_method() == "fork"
        inherited = [child.pipe for child in self._hands] + [ours] if forked else []
        args = (self.worker, theirs, self._folder, f"w{self._made}", inherited)
        process = self._context.Process(target=_serve, args=args, daemon=True)
        with quiet_fork():
            process.start()
        theirs.close()
        return _Child(process, ours)

    def _give(self, hand: _Child, ticket: int, call: Call, shared: Shared | None) -> list[Any] | None:
        at, inline = _pack(Encoder(call.args), self._segments)
        where = (None, None) if shared is None else (shared.number, shared.at)
        free, hand.free[:] = list(hand.free), []
        with contextlib.suppress(OSError):  # a worker that has just died is noticed by _wait
            _send(hand.pipe, [ticket, call.name, at, *where, free], inline)
        return at if at[0] else None

    def _place(self, tree: Tree) -> list[Any]:
        return _write(Encoder(tree), self._segments)

    def _free(self, at: Any) -> None:
        self._segments.give(at[0])

    def _wait(self) -> None:
        ready = wait([child.pipe for child in self._hands])
        for child in [child for child in self._hands if child.pipe in ready]:
            try:
                head, body = _receive(child.pipe)
            except (EOFError, OSError):
                self._replace(child)
                continue
            ticket, kind, what = head
            call = self._came(child, ticket)
            self._note(ticket, call, kind, self._unpack(child, what[0], what[1], body) if kind == "done" else what)

    def _unpack(self, child: _Child, apart: bool, places: Sequence[tuple[str, int]], body: bytearray) -> Tree:
        """The result that a worker has packed."""
        found, inline = [], memoryview(body)
        for name, size in places:
            data: Any = inline[:size] if not name else self._mapped.watched(name, size, child.free)
            inline = inline if name else inline[size:]
            found.append(decode(data, copy=False))
        return tuple(found) if apart else found[0]

    def _replace(self, dead: _Child) -> None:
        """Put a new worker in the place of one that died."""
        dead.pipe.close()
        dead.process.join()
        self._lose(dead, f"exit code {dead.process.exitcode}")
        self._hands.append(self._spawn())


def start_context() -> Any:
    """How to start a process: a fork where that is safe, else from a clean process with the slow imports done."""
    if fork_is_safe():
        return multiprocessing.get_context("fork")
    import torch.multiprocessing as torch_mp

    methods = multiprocessing.get_all_start_methods()
    context = torch_mp.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["consilience.execute.processes"])
    return context
