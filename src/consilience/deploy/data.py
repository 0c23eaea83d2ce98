"""A site's own data: from a file or from its owner's function, and what the server is told of them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.core.errors import ConfigError, ConsilienceError, DataError
from consilience.core.federation import ClientData, Federation, Split, Task, TaskKind
from consilience.core.streams import SERVER, philox
from consilience.data.preprocess import Numbers, Statistics, Table, apply, client_statistics, merge
from consilience.data.raw import RawData
from consilience.data.read import from_frame, read_arrays, read_frame

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Own:
    """A site's rows as they were read: by part, not yet made into inputs where they are a table. classes: the labels'
    names here, by number."""

    x: Mapping[str, Any]
    y: Mapping[str, NDArray[Any]]
    task: Task
    sensitive: Mapping[str, Mapping[str, NDArray[np.str_]]]

    def facts(self) -> dict[str, Any]:
        """What the server must know before it begins: numbers of rows, the task, the inputs, their statistics."""
        train = self.x["train"]
        table = isinstance(train, Table)
        return {
            "rows": [len(self.y[part]) for part in PARTS],
            "kind": self.task.kind,
            "outputs": self.task.outputs,
            "classes": list(self.task.classes),
            "input_shape": None if table else list(train.shape[1:]),
            "statistics": _plain(client_statistics(train)) if table else None,
            "groups": {
                name: sorted({word for part in parts.values() for word in part.tolist()})
                for name, parts in self.sensitive.items()
            },
        }

    def rows(self, about: Mapping[str, Any]) -> ClientData:
        """Inputs, labels and groups numbered as all sites together have them. about: see :func:`together`."""
        statistics = None if about["statistics"] is None else _statistics(about["statistics"])
        parts = []
        for part in PARTS:
            x = self.x[part] if statistics is None else apply(self.x[part], statistics)
            y = self.y[part]
            if self.task.kind == "classification":
                place = np.array([about["classes"].index(name) for name in self.task.classes], dtype=np.int64)
                y = place[y]
            codes = [np.searchsorted(about["groups"][name], of[part]) for name, of in self.sensitive.items()]
            sensitive = torch.from_numpy(np.stack(codes, 1).astype(np.int64)) if codes else None
            parts.append(Split(_tensor(x), _tensor(y), sensitive))
        return ClientData(*parts)


class Facts(BaseModel):
    """What a site may tell before the beginning, as :meth:`Own.facts` makes it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rows: list[Annotated[int, Field(ge=0)]] = Field(min_length=3, max_length=3)
    kind: Literal["classification", "regression"]
    outputs: int = Field(ge=1)
    classes: list[str]
    input_shape: list[Annotated[int, Field(ge=1)]] | None
    statistics: list[tuple[str, list[float | int] | dict[str, int]]] | None
    groups: dict[str, list[str]]


def checked(facts: Any, name: str) -> dict[str, Any]:
    """What a site has told, if it is of the right form. Raises DataError."""
    try:
        Facts.model_validate_json(json.dumps(facts))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"site {name} tells of its data what cannot be: {where}: {first['msg'].lower()}") from None
    if not facts["rows"][0]:
        raise DataError(f"site {name} has no rows to train on")
    return dict(facts)


def together(
    facts: Sequence[Mapping[str, Any]], names: Sequence[str], also: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """What holds for all sites: the sum of what each has told. also: of the server's own rows, which count for classes
    and groups alone. Raises DataError where they do not fit together."""
    first = facts[0]
    for name, fact in zip(names, facts, strict=True):
        for key, word in (("kind", "a task of"), ("input_shape", "inputs of shape")):
            if fact[key] != first[key]:
                raise DataError(f"site {name} has {word} {fact[key]}, site {names[0]} of {first[key]}")
        if fact["kind"] == "regression" and fact["outputs"] != first["outputs"]:
            raise DataError(f"site {name} has {fact['outputs']} targets, site {names[0]} {first['outputs']}")
        if fact["groups"].keys() != first["groups"].keys():
            raise DataError(f"site {name} has other sensitive columns than site {names[0]}")
    statistics = None
    shape = first["input_shape"]
    if first["statistics"] is not None:
        merged = merge(_statistics(fact["statistics"]) for fact in facts)
        statistics, shape = _plain(merged), [len(merged.features())]
    words = {name for fact in (*facts, *also) for name in fact["classes"]}
    numbers = all(name.lstrip("-").isdigit() for name in words)
    classes = sorted(words, key=int) if numbers else sorted(words)
    return {
        "kind": first["kind"],
        "outputs": len(classes) if first["kind"] == "classification" else first["outputs"],
        "classes": classes,
        "input_shape": shape,
        "statistics": statistics,
        "features": [] if first["statistics"] is None else list(merged.features()),
        "groups": {
            name: sorted({word for fact in (*facts, *also) for word in fact["groups"].get(name, ())})
            for name in first["groups"]
        },
        "rows": sum(fact["rows"][0] for fact in facts),
    }


def task_of(about: Mapping[str, Any]) -> Task:
    """The task of all sites."""
    return Task(about["kind"], about["outputs"], tuple(about["classes"]), tuple(about["groups"]))


def load(
    source: str, folder: Path, *, client: int, split: Sequence[float], seed: int, target: str | None = None,
    task: TaskKind | None = None, sensitive: Sequence[str] = (),
) -> Own:  # fmt: skip
    """A site's rows. source: a csv, parquet or npz file (in ``folder`` if its path is relative), or
    ``package.module:function``, whose function gives a pandas frame, ``(x, y)``, or a dict of arrays as an npz file
    would hold. Where valid and test rows are not given (``x_valid``, ``y_valid``, ``x_test``, ``y_test``), they are
    drawn as ``split`` says. Raises ConfigError or DataError."""
    module, colon, name = source.partition(":")
    if colon and not (folder / source).exists():
        found = _called(module, name, folder, source)
    elif source.lower().endswith(".npz"):
        found = read_arrays(folder / source)
    else:
        found = read_frame(folder / source)
    if hasattr(found, "columns") and hasattr(found, "iloc"):
        found = from_frame(found, source, source, target, task, tuple(sensitive), least=1)
    if isinstance(found, (tuple, list)) and len(found) == 2:
        found = {"x": found[0], "y": found[1]}
    if isinstance(found, Mapping):
        return _from_arrays({k: np.asarray(v) for k, v in found.items()}, source, task, sensitive, split, seed, client)
    if not isinstance(found, RawData):
        raise DataError(f"{source} gave {type(found).__name__}; it should give a frame, (x, y), or a dict of arrays")
    groups = {name: np.asarray(found.by_column()[name]).astype(str) for name in sensitive if name in found.by_column()}
    _all_there(groups, sensitive, source)
    return _drawn(found.x, found.y, found.task, groups, split, seed, client)


def _called(module: str, name: str, folder: Path, source: str) -> Any:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"data '{source}': {error}") from None
    try:
        return function()
    except ConsilienceError:
        raise
    except Exception as error:
        raise DataError(f"data '{source}' failed: {type(error).__name__}: {error}") from error


def _from_arrays(
    arrays: dict[str, NDArray[Any]], source: str, task: TaskKind | None, sensitive: Sequence[str],
    split: Sequence[float], seed: int, client: int,
) -> Own:  # fmt: skip
    for key in ("x", "y"):
        if key not in arrays:
            raise DataError(f"{source} has no array '{key}'; it has {', '.join(arrays) or 'none'}")
    suffix = {"train": "", "valid": "_valid", "test": "_test"}
    xs, ys = ({part: arrays.get(f"{key}{s}") for part, s in suffix.items()} for key in ("x", "y"))
    for part in PARTS:
        if (xs[part] is None) != (ys[part] is None) or (xs[part] is not None and len(xs[part]) != len(ys[part])):  # type: ignore[arg-type]
            raise DataError(f"{source}: x{suffix[part]} and y{suffix[part]} should have a row each for every case")
    made, labels = _labels(ys, arrays.get("classes"), source, task)
    groups = {name: arrays[name].astype(str) for name in sensitive if name in arrays}
    _all_there(groups, sensitive, source)
    if xs["valid"] is None and xs["test"] is None:
        return _drawn(_inputs(xs["train"], source), labels["train"], made, groups, split, seed, client)
    empty = np.zeros((0, *arrays["x"].shape[1:]), np.float32)
    inputs = {part: empty if x is None else _inputs(x, source) for part, x in xs.items()}
    blank = labels["train"][:0]
    by_part = {
        name: {part: arrays.get(f"{name}{s}", np.array([])).astype(str) for part, s in suffix.items()}
        for name in groups
    }
    return Own(inputs, {part: labels.get(part, blank) for part in PARTS}, made, by_part)


def _labels(
    ys: Mapping[str, NDArray[Any] | None], classes: NDArray[Any] | None, source: str, task: TaskKind | None
) -> tuple[Task, dict[str, NDArray[Any]]]:
    """The task, and labels or targets by part."""
    from consilience.data.read import encode_target

    there = {part: y for part, y in ys.items() if y is not None}
    if classes is not None:
        names = tuple(str(name) for name in classes.tolist())
        return Task("classification", len(names), names), {k: v.astype(np.int64) for k, v in there.items()}
    whole = np.concatenate(list(there.values()))
    words = whole.dtype.kind not in "fiub"
    y, made = encode_target(whole.astype(str).astype(object) if words else whole, source, task, least=1)
    ends = np.cumsum([len(v) for v in there.values()])[:-1]
    return made, dict(zip(there, np.split(y, ends), strict=True))


def _inputs(x: Any, source: str) -> NDArray[np.float32]:
    from consilience.data.raw import inputs

    return inputs(x, source)


def _all_there(groups: Mapping[str, Any], sensitive: Sequence[str], source: str) -> None:
    for name in sensitive:
        if name not in groups:
            raise DataError(f"{source}: no column '{name}' to be sensitive")


def _drawn(
    x: Any, y: NDArray[Any], task: Task, groups: Mapping[str, NDArray[Any]], split: Sequence[float], seed: int,
    client: int,
) -> Own:  # fmt: skip
    """Rows dealt to train, valid and test at random, in shares; the server's are all for testing."""
    n = len(y)
    if client == SERVER:
        index = {"train": np.arange(0), "valid": np.arange(0), "test": np.arange(n)}
    else:
        order = philox(seed, "deploy-split", client).permutation(n)
        first, second = round(split[0] * n), round((split[0] + split[1]) * n)
        index = dict(zip(PARTS, np.split(order, [max(1, first), max(1, second)]), strict=True))
    take = (lambda rows: x.rows(rows)) if isinstance(x, Table) else (lambda rows: x[rows])
    return Own(
        {part: take(rows) for part, rows in index.items()},
        {part: y[rows] for part, rows in index.items()},
        task,
        {name: {part: values[rows] for part, rows in index.items()} for name, values in groups.items()},
    )


def _plain(statistics: Statistics) -> list[list[Any]]:
    """Statistics as JSON has them, exactly."""
    return [
        [name, [c.count, c.total, c.squares] if isinstance(c, Numbers) else dict(c)]
        for name, c in statistics.columns.items()
    ]


def _statistics(plain: Sequence[Sequence[Any]]) -> Statistics:
    try:
        return Statistics({str(n): Numbers(*c) if isinstance(c, list) else dict(c) for n, c in plain})
    except (TypeError, ValueError) as error:
        raise DataError(f"damaged statistics: {error}") from None


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclass(kw_only=True, eq=False)
class Known(Federation):
    """What the server knows of its sites: how many rows each has, and none of them."""

    counts: Sequence[Sequence[int]]

    def data(self, client: int) -> ClientData:
        """Rows without content: their numbers are right."""
        return ClientData(*[Split(torch.empty(n, 0), torch.empty(n)) for n in self.counts[client]])

    def size(self, client: int) -> int:
        return self.counts[client][0]


@dataclass(kw_only=True, eq=False)
class Alone(Federation):
    """What a site knows of the federation: its own rows, and how many others there are."""

    client: int
    own: ClientData

    def data(self, client: int) -> ClientData:
        if client != self.client:
            raise DataError(f"the rows of client {client} are not here")
        return self.own

    def size(self, client: int) -> int:
        return len(self.own.train) if client == self.client else 0
