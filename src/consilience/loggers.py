"""A run's history passed on to TensorBoard, MLflow or Weights & Biases, each an extra of its own.

All write into the run's folder, and nothing leaves the machine, unless the tools' own environment variables say
otherwise (``MLFLOW_TRACKING_URI``, ``WANDB_MODE``). A logger sees numbers after they were written, so no result, and
no digest, depends on it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.report.tables import flat

OnLine = Callable[[Mapping[str, Any]], None]
NEEDS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
"""What each logger imports."""
NOTE = "loggers.json"
"""The file by which a resumed run finds its own record again."""


class Logger(Protocol):
    """Where numbers go."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one judged round."""

    def close(self, failed: bool) -> None:
        """The run ended, or failed."""


def check(names: Sequence[str]) -> None:
    """Raise ConfigError if what a logger needs is not installed."""
    for name in names:
        for module in NEEDS[name]:
            if not _installed(module):
                lacks = "" if module == name else f" ({module} is missing)"
                raise ConfigError(f"--log {name}{lacks}: pip install 'consilience[{name}]'")


def _installed(module: str) -> bool:
    try:
        found = importlib.util.find_spec(module)
    except ValueError:  # it was taken out of sys.modules
        return False
    return found is not None and found.origin is not None  # a folder of that name is no package


@contextlib.contextmanager
def logging_to(names: Sequence[str], folder: Path, about: Mapping[str, Any]) -> Iterator[OnLine]:
    """Gives a function to be called with each line of a run's history: the ``on_line`` of a run.

    names: of the loggers. folder: the run's. about: its name under ``label`` and ``seed``, and its configuration.
    Loggers open at the first line, so that a refused run leaves nothing. Raises ConfigError if one is not installed,
    ConsilienceError if one cannot be opened.
    """
    check(names)
    opened: list[Logger] = []
    with contextlib.ExitStack() as stack:

        def pass_on(line: Mapping[str, Any]) -> None:
            step = int(line["round"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # theirs, about themselves
                if not opened:
                    for name in names:
                        opened.append(_open(name, folder, about, step))
                        stack.push(_closing(opened[-1]))
                for logger in opened:
                    logger.numbers(step, numbers(line))

        yield pass_on


def _open(name: str, folder: Path, about: Mapping[str, Any], step: int) -> Logger:
    try:
        return _MAKERS[name](folder, about, step)
    except Exception as error:
        raise ConsilienceError(f"--log {name}: {' '.join(str(error).split())}") from error


def _closing(logger: Logger) -> Callable[..., None]:
    def close(kind: Any, error: Any, trace: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.close(kind is not None)

    return close


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of history, with dotted names, but the round."""
    return {
        key: float(value)
        for key, value in flat(line).items()
        if key != "round" and isinstance(value, int | float) and math.isfinite(value)
    }


def _id(folder: Path, name: str, make: Callable[[], str]) -> tuple[str, bool]:
    """A logger's name for this run, and whether it is new."""
    path = folder / NOTE
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if name in known:
        return str(known[name]), False
    known[name] = make()
    write_atomically(path, json.dumps(known))
    return known[name], True


def _title(about: Mapping[str, Any]) -> str:
    return f"{about.get('label', 'run')}-seed{about.get('seed', 0)}"


class TensorBoard:
    """Event files in the folder ``tensorboard``."""

    def __init__(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an interrupted run wrote after its checkpoint is hidden: it comes again
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar each; the first part of a name is its group."""
        for key, value in values.items():
            self._writer.add_scalar(key.replace(".", "/", 1), value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class MLflow:
    """A run in ``mlflow.db`` (sqlite), or on the server that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        with _quiet():
            from mlflow.tracking import MlflowClient

            home = folder.absolute()
            where = os.environ.get("MLFLOW_TRACKING_URI")
            self._client = MlflowClient(tracking_uri=where or f"sqlite:///{(home / 'mlflow.db').as_posix()}")

            def begin() -> str:
                known = self._client.get_experiment_by_name("consilience")
                at = None if where else (home / "mlartifacts").as_uri()
                number = known.experiment_id if known else self._client.create_experiment("consilience", at)
                return str(self._client.create_run(number, run_name=_title(about)).info.run_id)

            self._run, new = _id(folder, "mlflow", begin)
        self._last = -1
        if new:
            for key, value in flat(about).items():
                self._client.log_param(self._run, key, str(value)[:500])
        else:
            self._client.set_terminated(self._run, "RUNNING")
            self._last = max((m.step for m in self._client.get_metric_history(self._run, "samples")), default=-1)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """One metric each; rounds that an interrupted run told already are not told again."""
        from mlflow.entities import Metric

        if step > self._last:
            now = int(1000 * time.time())
            self._client.log_batch(self._run, metrics=[Metric(key, value, now, step) for key, value in values.items()])

    def close(self, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    """An offline run under ``wandb``, for ``wandb sync``; or what ``WANDB_MODE`` says."""

    def __init__(self, folder: Path, about: Mapping[str, Any], step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        own, _ = _id(folder, "wandb", lambda: uuid.uuid4().hex[:8])
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        )
        self._run: Any = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            id=own,
            name=_title(about),
            config=dict(about),
            project=os.environ.get("WANDB_PROJECT", "consilience"),
            resume=None if mode == "offline" else "allow",
            settings=settings,
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """All in one row of the run's history."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Write what is left, and end the service beside."""
        self._run.finish(exit_code=int(failed))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only warnings of a library while it sets itself up."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


_MAKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}
