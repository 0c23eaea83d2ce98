"""Workers on a Ray cluster: one single-threaded actor for each CPU that Ray offers.

What is placed: data, models and method once, in the object store, from which each node copies them once and its actors
map them (arrays are read where they lie); a broadcast once, likewise. Arguments and results travel with their calls.
Whole blocks of the canonical reduction are added up on the actors where a method allows it, so that updates stay there.

Client states belong to the driver (:class:`consilience.core.states.States`) and travel with each call: down as an
argument, up with the result. So a lost actor or node costs nothing but time: its calls, which are pure, are done again
elsewhere with the same bits. States that stayed on the actors would save the way down only, S of the 2 S + U bytes that
a job moves (S: its state, U: its update, which a cohort summed in blocks does not send), since all the same they would
have to come up or be computed anew from every broadcast since. docs/cluster.md has the numbers.

Nothing of Ray's is imported before it is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import queue
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from consilience.core.encode import ALIGNMENT, Encoder, decode, memory
from consilience.core.errors import ConfigError, WorkerError
from consilience.core.tree import Tree
from consilience.core.worker import Call, Worker
from consilience.execute.memory import keep_freed_memory
from consilience.execute.pooled import DEATHS, Desk, Hand, Pooled, Shared, attempt

PATIENCE = 300.0
"""Seconds to wait for the first CPU of a cluster."""
KNOCK = 5.0
"""Seconds that a cluster has to answer its door."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # prints none of its lines: the loss of a node would be pages of them
    "RAY_worker_niceness": "0",  # client work is the work, not what is done when nobody else wants the CPU
}
"""What Ray is told before it is imported, unless the user has said something else."""
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"
"""What lets a Ray of our own listen on this machine only."""
FAILPOINT = "CONSILIENCE_FAILPOINT"


def library() -> Any:
    """The module ``ray``. Raises ConfigError if it is not installed."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        import ray
    except ImportError:
        raise ConfigError("--executor ray needs ray: pip install 'consilience[ray]'") from None
    return ray


@contextlib.contextmanager
def connected(address: str | None, workers: int | None = None) -> Iterator[None]:
    """Inside, Ray is there: the one that this process already uses, the cluster at ``address``, or one that lives as
    long as this (of ``workers`` CPUs, if that is more than there are). Raises ConfigError."""
    if address is None and "ray" not in sys.modules:
        os.environ.setdefault(*LOOPBACK)
    ray = library()
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        cpus = max(workers or 1, _cores())
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        _knock(address)
        try:
            ray.init(address=address, **quiet)
        except Exception as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"--address {address}: no Ray cluster that takes us ({text[:200]})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Refuse an address at which nothing listens; Ray itself would try for long, and say much."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise ConfigError(f"--address {address}: HOST:PORT of a Ray cluster's head, or auto for one on this machine")
    try:
        socket.create_connection((host, int(port)), KNOCK).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--address {address}: nothing answers there ({why}); is it the head's HOST:PORT?") from None


def _cores() -> int:
    from consilience.execute.processes import cores

    return cores()


def cpus() -> int:
    """CPUs that the cluster has, whoever uses them. Only inside :func:`connected`."""
    return int(library().cluster_resources().get("CPU", 0))


# --- what is placed --------------------------------------------------------------------------------------------


def pack(thing: Any) -> tuple[bytes, list[Any]]:
    """A thing as bytes and the arrays of its tensors, which Ray leaves where they are when the thing is read."""
    import numpy as np

    library()
    base: Any = importlib.import_module("ray.cloudpickle").CloudPickler

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is Tensor and _plain(obj):
                return _tensor, (obj.numpy(),)
            return super().reducer_override(obj)

    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler: Any = Pickler(file, protocol=5, buffer_callback=buffers.append)
    pickler.dump(thing)
    return file.getvalue(), [np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers]


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is an array and nothing else."""
    kind = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype is not torch.bfloat16
    return kind and tensor.is_contiguous() and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())


def _tensor(array: Any) -> Tensor:
    """The tensor of an array. It begins where torch's own would, since last bits may depend on that."""
    found = torch.from_numpy(array)
    return found.clone() if found.data_ptr() % ALIGNMENT else found


def unpack(packed: tuple[bytes, Sequence[Any]]) -> Any:
    """What :func:`pack` packed; its arrays are read-only and shared with whoever else reads them here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        return pickle.loads(packed[0], buffers=packed[1])


def _array(encoder: Encoder) -> Any:
    """An encoded tree as Ray takes it without a copy."""
    import numpy as np

    data = memory(encoder.size)
    encoder.into(data)
    return np.asarray(data)


# --- in the actor ----------------------------------------------------------------------------------------------


class Actor:
    """A worker on the cluster. What it does comes back as a list of its kind and what belongs to it."""

    def load(self, packed: Any, given: dict[str, Any]) -> tuple[str, Any]:
        """Read everything that client work needs. given: of the driver, what this process has to be like."""
        return attempt(partial(self._load, packed, given))

    def _load(self, packed: Any, given: dict[str, Any]) -> dict[str, str]:
        prepare_process(given)
        self._desk = Desk(unpack(packed))
        return versions()

    def do(self, function: str, args: Any, number: int | None, shared: Any) -> list[Any]:
        """The answer to a call: kind, and for what is done whether it is a tuple and its parts."""

        def run() -> list[Any]:
            apart, encoders = self._desk.answer(function, args, number, shared)
            return [apart, *map(_array, encoders)]

        kind, what = attempt(run)
        return [kind, *what]


def prepare_process(given: dict[str, Any]) -> None:
    """Make a process of Ray's one of ours: one thread, and the driver's places to import from, where there are."""
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
    sys.path.extend(place for place in given["path"] if place not in sys.path)
    if given["failpoint"]:
        os.environ[FAILPOINT] = given["failpoint"]


def told() -> dict[str, Any]:
    """What a process of Ray's is told of this one."""
    return {"path": [place or os.getcwd() for place in sys.path], "failpoint": os.environ.get(FAILPOINT, "")}


def versions() -> dict[str, str]:
    """What the bits of a process depend on."""
    from consilience import __version__

    capability = torch.backends.cpu.get_cpu_capability()
    return {"consilience": __version__, "torch": str(torch.__version__), "CPU capability": capability}


# --- in the driver ---------------------------------------------------------------------------------------------


@dataclass
class Moved:
    """What a run has moved: objects put by the driver, calls, and results, with their bytes."""

    placed: int = 0
    placed_bytes: int = 0
    calls: int = 0
    call_bytes: int = 0
    result_bytes: int = 0

    def since(self, before: Moved) -> Moved:
        """The difference from an earlier moment."""
        return Moved(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


@dataclass(eq=False)
class _Hand(Hand):
    """An actor as the driver sees it."""

    actor: Any


class Ray(Pooled[_Hand]):
    """Runs calls on actors of the Ray that this process is connected to. workers: at most so many (None: a worker for
    each CPU). An actor works from the moment that Ray gives it a CPU; until then the others go on."""

    def __init__(self, worker: Worker, workers: int | None = None) -> None:
        self._ray = library()
        count = workers or cpus()
        if count < 1:
            raise ConfigError("--executor ray: this Ray cluster has no CPUs")
        super().__init__(worker, count)
        self.moved = Moved()
        self._news: queue.SimpleQueue[tuple[_Hand, int, Any]] = queue.SimpleQueue()
        self._failures, self._count = 0, count
        self._told = told()
        thing = pack(worker)
        self.moved.placed += 1
        self.moved.placed_bytes += len(thing[0]) + sum(array.nbytes for array in thing[1])
        self._packed = self._ray.put(thing)
        remote = self._ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")
        self._made = remote(Actor)
        self._coming: set[_Hand] = set()
        for _ in range(count):
            self._spawn()

    def close(self) -> None:
        """Let the actors go."""
        for hand in (*self._hands, *self._coming):
            self._kill(hand)
        self._hands, self._coming = [], set()
        self._packed = None

    def _spawn(self) -> None:
        hand = _Hand(self._made.remote())
        self._coming.add(hand)
        self._expect(hand, 0, hand.actor.load.remote(self._packed, self._told))

    def _kill(self, hand: _Hand) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(hand.actor)

    def _expect(self, hand: _Hand, ticket: int, ref: Any) -> None:
        """Let news of an answer come in when it is there. Ticket 0: that the actor is ready."""
        news = self._news
        ref.future().add_done_callback(lambda future: news.put((hand, ticket, future)))

    def _give(self, hand: _Hand, ticket: int, call: Call, shared: Shared | None) -> None:
        args = _array(Encoder(call.args))
        self.moved.calls += 1
        self.moved.call_bytes += args.nbytes
        where = (None, None) if shared is None else (shared.number, shared.at)
        self._expect(hand, ticket, hand.actor.do.remote(call.name, args, *where))

    def _place(self, tree: Tree) -> Any:
        data = _array(Encoder(tree))
        self.moved.placed += 1
        self.moved.placed_bytes += data.nbytes
        return self._ray.put(data)

    def _free(self, at: Any) -> None:
        """Ray frees what nobody refers to."""

    def _wait(self) -> None:
        try:
            hand, ticket, future = self._news.get(timeout=PATIENCE)
        except queue.Empty:
            if self._hands:
                return  # they work, and a long call is no fault
            raise WorkerError(f"Ray has had no CPU for us in {PATIENCE:.0f} s; is the cluster in use?") from None
        if hand not in (self._coming if ticket == 0 else self._hands):
            return  # of an actor that is lost already
        try:
            answer = future.result()
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerError(f"a worker failed on Ray: {error}") from None
        except self._ray.exceptions.RayError as error:
            self._gone(hand, error)
            return
        if ticket == 0:
            self._welcome(hand, *answer)
            return
        kind, *what = answer
        call = self._came(hand, ticket)
        self._note(ticket, call, kind, self._read(*what) if kind == "done" else what)

    def _read(self, apart: bool, *arrays: Any) -> Tree:
        """A result, copied out of the object store, which has room for it then."""
        self.moved.result_bytes += sum(array.nbytes for array in arrays)
        found = [decode(array) for array in arrays]
        return tuple(found) if apart else found[0]

    def _welcome(self, hand: _Hand, kind: str, what: Any) -> None:
        """An actor is ready, or says why it cannot be."""
        if kind != "done":
            raise WorkerError(f"a worker cannot start on Ray: {what[0]}\n{what[1]}")
        mine = versions()
        for key, value in what.items():
            if value != mine[key]:
                text = f"a node of the Ray cluster has {key} {value}, this machine {mine[key]}"
                if key != "CPU capability":
                    raise ConfigError(f"{text}; install the same on both")
                warnings.warn(f"{text}: last bits may differ", RuntimeWarning, stacklevel=2)
        self._failures = 0
        self._coming.remove(hand)
        self._hands.append(hand)

    def _gone(self, hand: _Hand, error: Exception) -> None:
        """Put a new actor in the place of one that is lost, or cannot be reached."""
        self._kill(hand)
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if hand in self._coming:
            self._coming.remove(hand)
            self._failures += 1
            if self._failures >= DEATHS * self._count:
                raise WorkerError(f"workers on Ray die before they are ready ({why})")
        else:
            self._lose(hand, why)
        self._spawn()
