"""Whole runs of a comparison beside each other: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ClientError, ConsilienceError
from consilience.execute.pooled import DEATHS

if TYPE_CHECKING:
    from consilience.experiment import OnLine, RunSpec

News = tuple[str, str, Any]
"""A run's name, what it is ("line", "error" or "done"), and what belongs to it."""


class Places(Protocol):
    """Where whole runs go."""

    def start(self, spec: RunSpec) -> None:
        """Begin a run, or go on with it."""

    def news(self) -> News | None:
        """What a run has to say; None if for a while none has."""

    def stop(self) -> None:
        """End what still runs."""


def run_beside(todo: Sequence[RunSpec], places: Places, most: int, on_line: OnLine) -> None:
    """Do all these runs, ``most`` at a time. After a failure none begins; it is raised when the others are done."""
    waiting, running = list(todo), set[str]()
    failure: ConsilienceError | None = None
    try:
        while running or (waiting and failure is None):
            while waiting and failure is None and len(running) < most:
                spec = waiting.pop(0)
                places.start(spec)
                running.add(spec.name)
            found = places.news()
            if found is None:
                continue
            label, kind, what = found
            if kind == "line":
                on_line(label, what)
                continue
            running.remove(label)
            if kind == "error":
                failure = failure or _rebuild(label, what)
    finally:
        places.stop()
    if failure is not None:
        raise failure


def _outcome(do: Callable[[], Any]) -> tuple[str, Any]:
    """How a run elsewhere ended: ("done", None), or ("error", what :func:`_rebuild` makes an error of)."""
    try:
        do()
    except ConsilienceError as error:
        return "error", [type(error).__name__, str(error), getattr(error, "trace", "")]
    except BaseException as error:
        import traceback

        return "error", ["", f"{type(error).__name__}: {error}", traceback.format_exc()]
    return "done", None


def _rebuild(label: str, what: Sequence[str]) -> ConsilienceError:
    """The error of a run elsewhere, as one of ours."""
    import consilience.core.errors as errors

    kind, text, trace = what
    if kind == "ClientError":
        return ClientError(f"{label}: {text}", trace)
    cls = getattr(errors, kind, None) or ConsilienceError
    error: ConsilienceError = cls(f"{label}: {text}")
    if not kind:
        error.add_note(trace) if hasattr(error, "add_note") else None
    return error


# --- in processes ----------------------------------------------------------------------------------------------


class InProcesses:
    """A process of its own for each run."""

    def __init__(self, folder: Path, command: str) -> None:
        from consilience.execute.processes import start_context

        self._folder, self._command = folder, command
        self._context = start_context()
        self._news: Any = self._context.Queue()
        self._running: dict[str, Any] = {}

    def start(self, spec: RunSpec) -> None:
        """Begin a run, or go on with it."""
        from consilience.execute.processes import quiet_fork

        args = (spec, self._folder, self._command, self._news)
        process = self._context.Process(target=_child, args=args, daemon=True)
        with quiet_fork():
            process.start()
        self._running[spec.name] = process

    def news(self) -> News | None:
        """What a run has to say, or that its process died without a word."""
        try:
            found: News = self._news.get(timeout=0.2)
        except queue.Empty:
            for label, process in self._running.items():
                if process.exitcode not in (None, 0):
                    del self._running[label]
                    return label, "error", _died(f"its process died (exit code {process.exitcode})")
            return None
        if found[1] != "line":
            self._running.pop(found[0]).join()
        return found

    def stop(self) -> None:
        """Kill what still runs."""
        for process in self._running.values():
            process.kill()
            process.join()


def _died(how: str) -> list[str]:
    return ["ConsilienceError", f"{how}; resume the comparison", ""]


def _child(spec: RunSpec, folder: Path, command: str, news: Any) -> None:
    import signal

    import torch

    from consilience.experiment import one

    torch.set_num_threads(1)  # at once: OpenMP's other threads did not survive the fork, and would be waited for
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def told(line: dict[str, Any]) -> None:
        news.put((spec.name, "line", line))

    news.put((spec.name, *_outcome(lambda: one(spec, folder, command, "serial", told))))


# --- on a Ray cluster ------------------------------------------------------------------------------------------


class OnRay:
    """A task on a CPU of the cluster for each run. Its files come back at every checkpoint and at its end, so a run
    whose node is lost goes on elsewhere from its newest checkpoint here."""

    def __init__(self, folder: Path, command: str) -> None:
        from consilience.execute.ray import library, told

        self._ray, self._told = library(), told()
        self._folder, self._command = folder, command
        task = self._ray.remote(
            num_cpus=1, max_retries=0, num_returns="streaming", max_calls=1, scheduling_strategy="SPREAD"
        )
        self._task = task(_whole_run)
        self._federations: dict[int, Any] = {}
        """In the object store, by seed, which is all that they differ by."""
        self._running: dict[Any, RunSpec] = {}
        self._deaths: dict[str, int] = {}

    def start(self, spec: RunSpec) -> None:
        """Begin a run, or go on with it from the files that are here."""
        from consilience.execute.ray import pack
        from consilience.experiment import make_federation

        seed = spec.config.seed
        if seed not in self._federations:
            self._federations[seed] = self._ray.put(pack(make_federation(spec.config)))
        files = dict(_read(self._folder / spec.name, _names(self._folder / spec.name)))
        stream = self._task.remote(spec, self._command, self._told, self._federations[seed], files)
        self._running[stream] = spec

    def news(self) -> News | None:
        """What a run has to say. Files are written, and lost runs begun again, on the way."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=0.2)
        if not ready:
            return None
        spec = self._running[ready[0]]
        try:
            kind, what = self._ray.get(next(ready[0]))
        except (StopIteration, self._ray.exceptions.RayError) as error:
            return self._lost(ready[0], spec, error)
        if kind == "files":
            write_files(self._folder / spec.name, *what)
            return None
        if kind != "line":
            del self._running[ready[0]]
        return spec.name, kind, what

    def _lost(self, stream: Any, spec: RunSpec, error: Exception) -> News | None:
        del self._running[stream]
        self._deaths[spec.name] = deaths = self._deaths.get(spec.name, 0) + 1
        if deaths < DEATHS:
            self.start(spec)
            return None
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return spec.name, "error", _died(f"its process on Ray died {deaths} times ({why})")

    def stop(self) -> None:
        """Cancel what still runs."""
        for stream in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(stream, force=True)


def _whole_run(
    spec: RunSpec, command: str, given: dict[str, Any], federation: Any, files: dict[str, bytes]
) -> Iterator[tuple[str, Any]]:
    """In a process of Ray's: do a run in a folder of its own, and tell of its lines, its files and its end."""
    import threading

    from consilience.execute.ray import prepare_process, unpack
    from consilience.execute.shared import drop_folder, make_folder
    from consilience.experiment import one

    prepare_process(given)
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    place = make_folder(ram=False)
    folder = place / spec.name
    write_files(folder, files, list(files))
    changes = Changes(folder)

    def told(line: dict[str, Any]) -> None:
        news.put(("line", line))
        if changes.checkpoint():
            news.put(("files", changes.since()))

    def work() -> None:
        end = _outcome(lambda: one(spec, place, command, "serial", told, unpack(federation)))
        if folder.exists():
            news.put(("files", changes.since()))
        news.put(end)

    try:
        threading.Thread(target=work, daemon=True).start()
        while True:
            yield (found := news.get())
            if found[0] in ("done", "error"):
                return
    finally:
        drop_folder(place)


class Changes:
    """What is new among a folder's files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = self._stamps()

    def checkpoint(self) -> bool:
        """Whether a checkpoint was made since files were last asked for."""
        return any(_rank(name) == NOTE and self._known.get(name) != stamp for name, stamp in self._stamps().items())

    def since(self) -> tuple[dict[str, bytes], list[str]]:
        """Files that are new or other than when last asked, and the names of all."""
        stamps = self._stamps()
        new = [name for name, stamp in stamps.items() if self._known.get(name) != stamp]
        self._known = stamps
        return dict(_read(self._folder, new)), list(stamps)

    def _stamps(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name in _names(self._folder):
            with contextlib.suppress(FileNotFoundError):
                about = (self._folder / name).stat()
                found[name] = about.st_mtime_ns, about.st_size
        return found


CONFIG, NOTE, DIGEST = 1, 2, 3
"""Files that say of others that they are whole, in the order in which they have to be written after those."""


def _rank(name: str) -> int:
    path = Path(name)
    if path.parent.name == "checkpoint" and path.suffix == ".json":
        return NOTE
    return {"config.yaml": CONFIG, "digest.txt": DIGEST}.get(name, 0)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _read(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        yield name, (folder / name).read_bytes()


def write_files(folder: Path, files: dict[str, bytes], names: Sequence[str]) -> None:
    """Write files so that, whenever this stops, the folder can be resumed; files not among ``names`` go, last."""
    for name in sorted(files, key=lambda name: (_rank(name), name)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, files[name])
    for name in set(_names(folder)).difference(names):
        (folder / name).unlink()
