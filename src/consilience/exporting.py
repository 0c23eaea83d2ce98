"""From a finished run to something that is used: predictions, and files that any program can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience import experiment
from consilience.core import checkpoint
from consilience.core.encode import encode
from consilience.core.errors import CheckpointError, ConfigError, DataError
from consilience.core.evaluate import mean_model, newcomer
from consilience.core.federation import Federation
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Place
from consilience.core.snapshot import Snapshot
from consilience.core.worker import Worker
from consilience.folder import digest_text, read_lines, read_snapshot


@dataclass(frozen=True)
class Finished:
    """A run read back from its folder."""

    folder: Path
    spec: experiment.RunSpec
    worker: Worker
    snapshot: Snapshot

    @property
    def federation(self) -> Federation:
        """The federation it ran on, made again."""
        return self.worker.federation

    def predictor(self, client: int | None) -> Predictor:
        """The global model, or a client's own. Raises ConfigError where there is none."""
        method, server = self.worker.method, self.snapshot.server
        if client is None:
            found = method.global_model(server)
            if found is None:
                raise ConfigError(f"{method.name} has no global model; name a client (--client ID)")
            return found
        if not 0 <= client < self.federation.n_clients:
            raise ConfigError(f"--client {client}: clients are 0 to {self.federation.n_clients - 1}")
        unseen, states = client in self.federation.unseen, self.snapshot.states
        if unseen and self.worker.place.topology is not None:
            found = newcomer(method.global_model(server), mean_model(method, states)[0])
        else:
            found = self.worker.deployed(server, client, states.get(client))
        if found is None:
            who = f"client {client}, which takes no part" if unseen else f"client {client}"
            raise ConfigError(f"{method.name} has no model for {who}")
        return found

    def scores(self, predictor: Predictor, x: Tensor) -> Tensor:
        """Scores of a predictor, on one thread as in the run."""
        from consilience.simulate import single_thread

        with single_thread():
            return self.worker.host(self.snapshot.version, "predict").scores(predictor, x)


def read_run(folder: Path) -> Finished:
    """A run with its newest whole checkpoint. Raises ConfigError or CheckpointError."""
    experiment.simulated(folder)
    spec, _ = experiment.read_spec(folder)
    worker = experiment.check(spec, experiment.make_federation(spec.config))
    snapshot, _ = read_snapshot(folder)
    return Finished(folder, spec, worker, snapshot)


def digest(folder: Path) -> str:
    """A run's three digests, computed anew from its checkpoint and history. Raises CheckpointError."""
    from consilience import methods
    from consilience.parts.compose import composed

    spec, _ = experiment.read_spec(folder)
    composed(methods.make(spec.method, spec.options))  # registers the records of its state
    snapshot, notes = read_snapshot(folder)
    if snapshot.version < spec.config.rounds:
        raise CheckpointError(f"{folder}: only {snapshot.version} of {spec.config.rounds} rounds are done; resume it")
    text = (folder / "history.jsonl").read_bytes()[: notes["history_bytes"]]
    if len(text) < notes["history_bytes"]:
        raise CheckpointError(f"{folder}: history.jsonl is shorter than when the run ended")
    return digest_text(snapshot, read_lines(folder / "history.jsonl"))


@dataclass(frozen=True)
class Right:
    """The share of right predictions among the rows that have a label, and how many those are."""

    accuracy: float
    rows: int


def predict(folder: Path, data: str, client: int | None = None) -> tuple[list[str], list[list[Any]], Right | None]:
    """Predictions for ``data``: column names, rows, and how many are right if the data has labels.

    data: a data set by name (its test set if it has one), or a csv, parquet or npz file with the inputs the run
    had. Its label is in the column in which the run's was, or in one called as a target may be; columns that were
    no inputs are ignored. A label that is no class of the run counts as wrong.
    """
    run = read_run(folder)
    x, y = _inputs(run, data)
    if tuple(x.shape[1:]) != tuple(run.federation.input_shape):
        raise DataError(f"{data}: inputs of shape {tuple(x.shape[1:])}, the model takes {run.federation.input_shape}")
    scores = run.scores(run.predictor(client), x)
    task = run.federation.task
    if task.kind != "classification":
        names = [f"output_{i}" for i in range(scores.shape[1])]
        return names, scores.tolist(), None
    classes = list(task.classes) or [str(c) for c in range(task.outputs)]
    found = scores.argmax(1)
    probability = scores.double().softmax(1)
    rows = [[classes[int(c)], *p] for c, p in zip(found, probability.tolist(), strict=True)]
    return ["predicted", *(f"p_{name}" for name in classes)], rows, _right(found, y)


def _right(found: Tensor, y: Tensor | None) -> Right | None:
    known = None if y is None else y > -2
    if y is None or known is None or not known.any():
        return None
    return Right(float((found == y)[known].double().mean()), int(known.sum()))


def _inputs(run: Finished, data: str) -> tuple[Tensor, Tensor | None]:
    """Inputs as the run's models take them, and labels ``(n,)`` if there are any, as :func:`labels` numbers them."""
    from consilience.data.datasets import load
    from consilience.data.preprocess import Table, apply, table_from_frame
    from consilience.data.raw import inputs as raw_inputs
    from consilience.data.read import SUFFIXES, labels, read_arrays, read_frame
    from consilience.data.spec import NAMES

    federation = run.federation
    statistics = getattr(federation, "statistics", None)
    path = Path(data)
    x: Any
    y: Any
    if data.partition(":")[0] in NAMES:
        raw = load(data)
        x, y = (raw.x, raw.y) if raw.test_x is None or raw.test_y is None else (raw.test_x, raw.test_y)
    elif path.suffix.lower() == ".npz":
        arrays = read_arrays(path)
        if "x" not in arrays:
            raise DataError(f"{path} has no array 'x'; it has {', '.join(arrays) or 'none'}")
        x, y = raw_inputs(arrays["x"], str(path)), arrays.get("y")
        if y is not None and federation.task.classes:
            y = labels(y, federation.task.classes)
    elif path.suffix.lower() in SUFFIXES:
        if statistics is None:
            raise DataError(f"{path}: this run's inputs were arrays, not a table; give an npz file with an array x")
        frame = read_frame(path)
        missing = [name for name in statistics.columns if name not in frame.columns]
        if missing:
            raise DataError(f"{path} has no column '{missing[0]}', which the model needs")
        x, y = table_from_frame(frame[list(statistics.columns)], str(path)), None
        target = _target(run, list(frame.columns))
        if target is not None:
            y = labels(frame[target].to_numpy(), federation.task.classes)
    else:
        raise DataError(f"{data}: neither a data set ({', '.join(NAMES)}) nor a {', '.join(SUFFIXES)} file")
    if isinstance(x, Table):
        if statistics is None:
            raise DataError(f"{data} is a table, but this run's inputs were arrays")
        x = apply(Table(tuple(c for c in x.columns if c.name in statistics.columns)), statistics)
    known = y is not None and y.dtype.kind in "iu"
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.asarray(y, np.int64)) if known else None


def _target(run: Finished, columns: Sequence[str]) -> str | None:
    """The column of a table that holds the labels of a run's task, if one does."""
    from consilience.data.read import TARGETS

    if run.federation.task.kind != "classification":
        return None
    statistics: Any = getattr(run.federation, "statistics", None)
    names = [run.federation.about.get("target"), *TARGETS]
    return next((name for name in names if name in columns and name not in statistics.columns), None)


def export(folder: Path, out: Path, client: int | None = None) -> list[Path]:
    """Write a model's weights as safetensors, under the names that ``load_state_dict`` takes, and config.json
    beside it; returns both paths. Raises ConfigError if what would be deployed is not one network."""
    run = read_run(folder)
    predictor = run.predictor(client)
    if not isinstance(predictor, Net):
        raise ConfigError(f"{run.spec.method} deploys a {type(predictor).__name__}, which is not one network to export")
    about = {
        "input_shape": list(run.federation.input_shape),
        "features": run.federation.about.get("features", []),
        "method": run.spec.label,
        "rounds": run.snapshot.version,
        "client": client,
        "data": run.spec.config.data,
    }
    return write_model(predictor, out, run.worker.place, about)


def write_model(predictor: Predictor, out: Path, place: Place, about: Mapping[str, Any]) -> list[Path]:
    """Write a network's weights as model.safetensors, or another predictor as the tree that it is
    (predictor.safetensors, for ``consilience.core.encode.decode``), and config.json, with what ``about`` says of where
    it comes from; returns both paths."""
    from safetensors.torch import save

    file, data, model = "predictor.safetensors", b"", place.server_model
    if isinstance(predictor, Net):
        tensors = {k: v.contiguous() for k, v in {**predictor.weights.params, **predictor.weights.buffers}.items()}
        file, data, model = "model.safetensors", save(tensors), predictor.model or model
    else:
        data = bytes(encode(predictor))
    about = {
        "model": model,
        "file": file,
        "outputs": place.task.outputs,
        "task": place.task.kind,
        "classes": list(place.task.classes),
        **about,
    }
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(out / file, data)
    checkpoint.write_atomically(out / "config.json", json.dumps(about, indent=1))
    return [out / file, out / "config.json"]


def read_weights(path: Path, architecture: Architecture) -> Weights:
    """Weights from a safetensors file with plain names (as :func:`export` writes). Raises ConfigError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--init {path}: not a readable safetensors file ({error})") from None
    own = architecture.initial(0)
    wanted = {**own.params, **own.buffers}
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
        odd = sorted(found.keys() ^ wanted.keys()) or [k for k in wanted if found[k].shape != wanted[k].shape]
        raise ConfigError(f"--init {path}: not weights of model '{architecture.name}' here ('{odd[0]}' does not fit)")
    cast = {k: found[k].to(v.dtype) for k, v in wanted.items()}
    return Weights({k: cast[k] for k in own.params}, {k: cast[k] for k in own.buffers})
