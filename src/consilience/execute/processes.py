"""One single-threaded worker process per core, over shared memory, living as long as the run.

Calls are queued and handed out longest first. Small trees travel in the pipe, large ones in shared segments;
a broadcast is written once for all. A worker that dies is replaced and its calls are done again: they are pure,
so no bit changes.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import multiprocessing
import os
import shutil
import signal
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from consilience.core.encode import Encoder, decode
from consilience.core.errors import ClientError, WorkerError
from consilience.core.executor import Executor, ready
from consilience.core.reduce import BLOCK
from consilience.core.tree import Tree, clone
from consilience.core.worker import Call, Worker
from consilience.execute.memory import keep_freed_memory
from consilience.execute.shared import Mapped, Segments, drop_folder, make_folder

INLINE = 1 << 14
"""Trees up to this many bytes travel in the pipe."""
AHEAD = 2
"""Calls given to a worker at a time: one to work on, one to go on with."""
EACH = 3
"""Blocks of clients that a worker should get at least, or some would wait for others."""
DEATHS = 3
"""Workers that one call may cost."""


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


def _pack(tree: Tree, segments: Segments) -> tuple[list[Any], bytes]:
    """A reference to the encoded tree, and the bytes that go with it in the pipe."""
    encoder = Encoder(tree)
    if encoder.size <= INLINE:
        inline = bytearray(encoder.size)
        encoder.into(inline)
        return ["", encoder.size], bytes(inline)
    name, memory = segments.take(encoder.size)
    encoder.into(memory)  # type: ignore[arg-type]
    return [name, encoder.size], b""


def _pack_result(result: Tree, segments: Segments) -> tuple[list[Any], bytes]:
    """A result's references and inline bytes. The parts of a tuple are apart, so that the memory of a large one is
    free as soon as nobody looks at that part: a client's new state, say, long before its update."""
    apart = type(result) is tuple
    packed = [_pack(part, segments) for part in (result if apart else [result])]
    return [apart, [at for at, _ in packed]], b"".join(inline for _, inline in packed)


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
    shared: tuple[int, Tree] = (-1, None)
    while True:
        head, body = _receive(pipe)
        ticket, function, args_at, shared_id, shared_at, free = head
        for segment in free:
            segments.give(segment)
        try:
            if shared_id is not None and shared_id != shared[0]:
                shared = (shared_id, decode(mapped.view(*shared_at), copy=False))
            args = decode(mapped.view(*args_at) if args_at[0] else body, copy=False)
            result = worker.run(Call(function, args, shared[1] if shared_id is not None else None))
            at, inline = _pack_result(result, segments)
            answer = [ticket, "done", at], inline
        except ClientError as error:
            answer = [ticket, "client", [str(error), error.trace]], b""
        except Exception as error:
            answer = [ticket, "failed", [f"{type(error).__name__}: {error}", traceback.format_exc()]], b""
        _send(pipe, *answer)


# --- in the parent ---------------------------------------------------------------------------------------------


def _settled(function: str, result: Tree) -> Tree:
    """A result whose new states are copied: they live long, so they leave shared memory at once."""
    if function == "train":
        return result[0], clone(result[1])
    if function == "stack":
        return [_settled("train", one) for one in result]
    if function == "block":
        return result._replace(done=tuple(_settled("train", one) for one in result.done))
    return clone(result) if function == "mix" else result


@dataclass
class _Child:
    """A worker process as the parent sees it."""

    process: Any
    pipe: Connection
    busy: list[int] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    """Names of its segments that nobody here looks at any more."""


@dataclass
class _Out:
    """A call handed out or waiting: what it needs to be done again, and what it occupies."""

    call: Call
    deaths: int = 0
    segment: str = ""


class Processes(Executor):
    """Runs calls on worker processes."""

    def __init__(self, worker: Worker, workers: int) -> None:
        super().__init__(worker)
        self._folder = make_folder()
        self._segments = Segments(self._folder, "p")
        self._mapped = Mapped(self._folder)
        self._out: dict[int, _Out] = {}
        self._queue: list[tuple[float, int]] = []
        self._done: dict[int, Tree] = {}
        self._failed: dict[int, ClientError] = {}
        """Raised when the call is asked for, so that of several the same one is seen whoever comes first."""
        self._shared: dict[int, _Shared] = {}
        self._next, self._made, self._written = 0, 0, 0
        self.pays_from = EACH * BLOCK * workers
        self._context = start_context()
        self._children: list[_Child] = []
        for _ in range(workers):
            self._children.append(self._spawn())

    def begin(self, call: Call) -> int:
        """Queue a call."""
        self._next += 1
        self._out[self._next] = _Out(call)
        heapq.heappush(self._queue, (-call.cost, self._next))
        return self._next

    def finish(self, tickets: Sequence[int]) -> list[Tree]:
        """Wait for these calls; others go on."""
        for ticket in tickets:
            while ticket not in self._done and ticket not in self._failed:
                self._hand_out()
                self._wait()
            if ticket in self._failed:
                raise self._failed[ticket]
        self._hand_out()
        return [self._done.pop(ticket) for ticket in tickets]

    def close(self) -> None:
        """End the workers and free their memory."""
        for child in self._children:
            child.pipe.close()
        for child in self._children:
            child.process.join(timeout=2)
            if child.process.is_alive():
                child.process.kill()
                child.process.join()
        self._children = []
        drop_folder(self._folder)

    def _spawn(self) -> _Child:
        ours, theirs = multiprocessing.Pipe()
        self._made += 1
        forked = self._context.get_start_method() == "fork"
        inherited = [child.pipe for child in self._children] + [ours] if forked else []
        args = (self.worker, theirs, self._folder, f"w{self._made}", inherited)
        process = self._context.Process(target=_serve, args=args, daemon=True)
        with quiet_fork():
            process.start()
        theirs.close()
        return _Child(process, ours)

    def _hand_out(self) -> None:
        """Give waiting calls to workers that have room, the longest first."""
        while self._queue:
            child = min(self._children, key=lambda c: len(c.busy))
            if len(child.busy) >= AHEAD:
                return
            _, ticket = heapq.heappop(self._queue)
            out = self._out[ticket]
            at, inline = _pack(ready(out.call).args, self._segments)
            out.segment = at[0]
            shared_id, shared_at = self._share(out.call.shared)
            free, child.free[:] = list(child.free), []
            child.busy.append(ticket)
            with contextlib.suppress(OSError):  # a worker that has just died is noticed by _wait
                _send(child.pipe, [ticket, out.call.name, at, shared_id, shared_at, free], inline)

    def _share(self, tree: Tree) -> tuple[int | None, list[Any] | None]:
        """Write a tree that several calls have in common once; it stays until its last call is done."""
        if tree is None:
            return None, None
        entry = self._shared.get(id(tree))
        if entry is None or entry.tree is not tree:
            encoder = Encoder(tree)
            name, memory = self._segments.take(encoder.size)
            encoder.into(memory)  # type: ignore[arg-type]
            self._written += 1
            entry = self._shared[id(tree)] = _Shared(tree, self._written, [name, encoder.size])
        entry.users += 1
        return entry.number, entry.at

    def _release(self, out: _Out) -> None:
        """Free what a call occupied."""
        if out.segment:
            self._segments.give(out.segment)
            out.segment = ""
        if out.call.shared is not None:
            entry = self._shared[id(out.call.shared)]
            entry.users -= 1
            if not entry.users:
                self._segments.give(entry.at[0])
                del self._shared[id(out.call.shared)]

    def _wait(self) -> None:
        """Take in what workers have to say."""
        ready = wait([child.pipe for child in self._children])
        for child in [child for child in self._children if child.pipe in ready]:
            try:
                head, body = _receive(child.pipe)
            except (EOFError, OSError):
                self._replace(child)
                continue
            ticket, kind, what = head
            child.busy.remove(ticket)
            out = self._out.pop(ticket)
            self._release(out)
            if kind == "client":
                self._failed[ticket] = ClientError(*what)
                continue
            if kind == "failed":
                raise WorkerError(f"a worker failed in '{out.call.name}': {what[0]}\n{what[1]}")
            self._done[ticket] = _settled(out.call.name, self._unpack(child, what[0], what[1], body))

    def _unpack(self, child: _Child, apart: bool, parts: Sequence[tuple[str, int]], body: bytearray) -> Tree:
        """The result that a worker has packed."""
        found, inline = [], memoryview(body)
        for name, size in parts:
            data: Any = inline[:size] if not name else self._mapped.watched(name, size, child.free)
            inline = inline if name else inline[size:]
            found.append(decode(data, copy=False))
        return tuple(found) if apart else found[0]

    def _replace(self, dead: _Child) -> None:
        """Put a new worker in the place of one that died, and queue its calls again."""
        dead.pipe.close()
        dead.process.join()
        for ticket in dead.busy:
            out = self._out[ticket]
            self._release(out)
            out.deaths += 1
            if out.deaths >= DEATHS:
                raise WorkerError(
                    f"{DEATHS} worker processes died (exit code {dead.process.exitcode}) while doing '{out.call.name}' "
                    "for the same client; is there enough memory? Try fewer --workers or --executor serial"
                )
            heapq.heappush(self._queue, (-out.call.cost, ticket))
        self._children.remove(dead)
        self._children.append(self._spawn())


@dataclass
class _Shared:
    """A tree written once: its number, where it is, and how many calls still need it."""

    tree: Tree
    number: int
    at: list[Any]
    users: int = 0


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
