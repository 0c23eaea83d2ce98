"""Federations in memory, and federations whose clients are made when asked for."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from consilience.core.errors import ConfigError, DataError
from consilience.core.federation import ClientData, Federation, Split, Task, TaskKind
from consilience.data import raw as raw_data
from consilience.data.partition import Partition, make_partition, read_partition, write_on_demand, write_partition
from consilience.data.preprocess import Statistics, Table, apply, client_statistics, merge
from consilience.data.raw import RawData
from consilience.data.spec import is_file, parse, with_natural_default
from consilience.data.transform import shift


@dataclass(kw_only=True, eq=False)
class ArrayFederation(Federation):
    """All clients' rows in one tensor, client by client and train | valid | test, so that data are views.

    rows: the clients' rows. partition: who has which, and where each part starts. statistics: those by which a
    table was made into inputs.
    """

    rows: Split
    partition: Partition
    statistics: Statistics | None = None

    def data(self, client: int) -> ClientData:
        a, b, c, d = self.partition.bounds[client].tolist()
        return ClientData(self.rows.rows(slice(a, b)), self.rows.rows(slice(b, c)), self.rows.rows(slice(c, d)))

    def size(self, client: int) -> int:
        return int(self.partition.bounds[client, 1] - self.partition.bounds[client, 0])

    def fingerprint(self) -> str:
        """The base's, and who has which rows and labels."""
        h = hashlib.sha256(super().fingerprint().encode())
        h.update(self.partition.order.tobytes())
        h.update(self.partition.bounds.tobytes())
        h.update(self.rows.y.numpy().tobytes())
        return h.hexdigest()


@dataclass(kw_only=True, eq=False)
class OnDemandFederation(Federation):
    """Clients made from their ids when asked for, so that memory does not grow with their number.

    make: a client's data from its id, always the same (it must be picklable for worker processes). sizes: a
    client's number of training rows. keep: how many clients are remembered.
    """

    make: Callable[[int], ClientData]
    sizes: Callable[[int], int]
    keep: int = 16
    _kept: OrderedDict[int, ClientData] = field(default_factory=OrderedDict, repr=False)

    def data(self, client: int) -> ClientData:
        if not 0 <= client < self.n_clients:
            raise DataError(f"client {client} does not exist; there are clients 0 to {self.n_clients - 1}")
        if client in self._kept:
            self._kept.move_to_end(client)
            return self._kept[client]
        made = self.make(client)
        self._kept[client] = made
        if len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        return made

    def size(self, client: int) -> int:
        return self.sizes(client)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


def save_partition(path: str | Path, federation: Federation) -> None:
    """Write the file from which ``partition=path`` makes the same federation of the same data again."""
    if isinstance(federation, ArrayFederation):
        write_partition(path, federation.partition, data=federation.name)
    else:
        write_on_demand(
            path,
            data=federation.name,
            clients=federation.n_clients,
            seed=int(federation.about.get("seed", 0)),
            unseen=sorted(federation.unseen),
        )


def build(
    raw: RawData,
    *,
    clients: int = 10,
    partition: str = "iid",
    split: Sequence[float] = (0.8, 0.1, 0.1),
    test_fraction: float | None = None,
    public: int = 0,
    unseen: float = 0,
    min_size: int | None = None,
    sensitive: Sequence[str] = (),
    seed: int = 0,
) -> ArrayFederation:
    """A federation of ``raw``, as :func:`~consilience.data.partition.make_partition` divides it.

    test_fraction: of the rows, held out as the global test set where the data brings none (default 0.2). Data
    that comes with owners keeps them when the partition is ``iid``. sensitive: columns to report by, the data
    set's own if empty. A column that makes the clients is no input.
    """
    if raw.test_y is not None and test_fraction:
        raise ConfigError(f"{raw.name} brings its own test set; leave out test_fraction")
    if test_fraction is None:
        test_fraction = 0.2 if raw.test_y is None else 0.0
    if is_file(partition):
        plan = read_partition(partition, raw.y)
    else:
        spec = parse(partition)
        plan = make_partition(
            with_natural_default(spec, raw.natural) if raw.natural else spec,
            raw.y,
            clients=clients,
            seed=seed,
            split=split,
            test_fraction=test_fraction,
            public=public,
            unseen=unseen,
            min_size=min_size,
            natural=raw.by_column(),
        )
    column = plan.spec.assignment.word if plan.spec.assignment.name == "natural" else ""
    if column and column == raw.natural and raw.client_names and len(raw.client_names) == plan.clients:
        plan = replace(plan, names=raw.client_names)

    x, test_x, statistics = _encode(raw, plan, column)
    features = raw.features if statistics is None else statistics.features()
    names = tuple(sensitive) or raw.sensitive
    codes, test_codes, meaning = raw.sensitive_codes(names) if names else (None, None, {})

    def pick(ids: NDArray[np.int64]) -> Split:
        return Split(_tensor(x[ids]), _tensor(raw.y[ids]), None if codes is None else _tensor(codes[ids]))

    rows = pick(plan.order)
    shift(rows.x, rows.y, plan, raw.task.outputs)
    test = None if plan.test is None else pick(plan.test)
    if test_x is not None and raw.test_y is not None:
        test = Split(_tensor(test_x), _tensor(raw.test_y), None if test_codes is None else _tensor(test_codes))
    about: dict[str, Any] = {"data": raw.name, "partition": plan.spec.text, "seed": plan.seed, **raw.about}
    if features:
        about["features"] = list(features)
    if meaning:
        about["sensitive"] = meaning
    return ArrayFederation(
        name=raw.name,
        task=replace(raw.task, sensitive=names),
        n_clients=plan.clients,
        input_shape=tuple(x.shape[1:]),
        test=test,
        public=_tensor(x[plan.public]) if len(plan.public) else None,
        unseen=frozenset(plan.unseen),
        groups=plan.groups,
        names=plan.names,
        about=about,
        rows=rows,
        partition=plan,
        statistics=statistics,
    )


def _encode(
    raw: RawData, plan: Partition, column: str
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, Statistics | None]:
    """Inputs of the pool and of the test set; a table's are made with the training clients' merged statistics."""
    if not isinstance(raw.x, Table):
        assert not isinstance(raw.test_x, Table)
        return raw.x, raw.test_x, None
    table = raw.x.without(column)
    if not table.columns:
        raise DataError(f"{raw.name} has no column left to be an input")
    seen = sorted(set(range(plan.clients)) - set(plan.unseen))
    merged = merge(client_statistics(table.rows(plan.client(client)[0])) for client in seen)
    test = apply(raw.test_x.without(column), merged) if isinstance(raw.test_x, Table) else None
    return apply(table, merged), test, merged


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def from_arrays(
    x: ArrayLike | Tensor | Table,
    y: ArrayLike | Tensor,
    *,
    clients: int = 10,
    partition: str = "iid",
    split: Sequence[float] = (0.8, 0.1, 0.1),
    test: tuple[ArrayLike | Tensor | Table, ArrayLike | Tensor] | None = None,
    test_fraction: float | None = None,
    public: int = 0,
    unseen: float = 0,
    min_size: int | None = None,
    seed: int = 0,
    sensitive: Mapping[str, ArrayLike] | None = None,
    columns: Mapping[str, ArrayLike] | None = None,
    task: TaskKind = "classification",
    classes: Sequence[str] | None = None,
    name: str = "arrays",
) -> ArrayFederation:
    """A federation of arrays.

    x: ``(n, *shape)`` numbers (bytes are scaled to 0..1) or a table. y: ``(n,)`` labels 0 .. C - 1, or targets.
    test: a global test set; otherwise ``test_fraction`` of the rows becomes it. sensitive: attributes by name,
    ``(n,)`` values each. columns: what ``natural:COLUMN`` may name. classes: the labels' names.
    For the rest see :func:`build`. Raises DataError or ConfigError with what is wrong and where.
    """
    raw = raw_from_arrays(
        x, y, test=test, columns={**(columns or {}), **(sensitive or {})}, task=task, classes=classes, name=name
    )
    return build(
        replace(raw, sensitive=tuple(sensitive or ())),
        clients=clients,
        partition=partition,
        split=split,
        test_fraction=test_fraction,
        public=public,
        unseen=unseen,
        min_size=min_size,
        seed=seed,
    )


def raw_from_arrays(
    x: ArrayLike | Tensor | Table,
    y: ArrayLike | Tensor,
    *,
    test: tuple[ArrayLike | Tensor | Table, ArrayLike | Tensor] | None = None,
    columns: Mapping[str, ArrayLike] | None = None,
    task: TaskKind = "classification",
    classes: Sequence[str] | None = None,
    name: str = "arrays",
) -> RawData:
    """Arrays, checked, as a data set nobody owns yet."""
    if task not in ("classification", "regression"):
        raise ConfigError(f"task '{task}' should be classification or regression")
    own_x, own_y = _checked(x, y, task, classes, name)
    test_x, test_y = (None, None) if test is None else _checked(*test, task, classes, f"{name} (test)")
    if task == "classification":
        present = [int(labels.max()) for labels in (own_y, test_y) if labels is not None]
        outputs = len(classes) if classes is not None else max(present) + 1
        names = tuple(classes) if classes is not None else tuple(map(str, range(outputs)))
    else:
        outputs, names = (1 if own_y.ndim == 1 else int(own_y.shape[1])), ()
    if test_x is not None and _row_kind(own_x) != _row_kind(test_x):
        raise DataError(f"{name}: inputs are {_row_kind(own_x)} in training and {_row_kind(test_x)} in test")
    arrays = {key: np.asarray(values) for key, values in (columns or {}).items()}
    for key, values in arrays.items():
        if values.shape != (len(own_y),):
            raise DataError(f"{name}: column '{key}' has shape {values.shape}; it should be ({len(own_y)},)")
    return RawData(name, own_x, own_y, Task(task, outputs, names), test_x, test_y, columns=arrays)


def _checked(
    x: ArrayLike | Tensor | Table, y: ArrayLike | Tensor, task: TaskKind, classes: Sequence[str] | None, name: str
) -> tuple[NDArray[np.float32] | Table, NDArray[Any]]:
    own_x = x if isinstance(x, Table) else raw_data.inputs(_numpy(x), name)
    if task == "classification":
        own_y: NDArray[Any] = raw_data.labels(_numpy(y), name, None if classes is None else len(classes))
    else:
        own_y = raw_data.targets(_numpy(y), name)
    if len(own_x) != len(own_y):
        raise DataError(f"{name}: {len(own_x)} rows of inputs but {len(own_y)} of labels or targets")
    if not len(own_x):
        raise DataError(f"{name}: there are no rows")
    return own_x, own_y


def _row_kind(x: NDArray[np.float32] | Table) -> tuple[int | str, ...]:
    """What one row is: its shape, or its columns' names."""
    return tuple(column.name for column in x.columns) if isinstance(x, Table) else tuple(x.shape[1:])


def _numpy(values: ArrayLike | Tensor) -> ArrayLike:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def from_torch(dataset: Any, *, test: Any = None, name: str = "torch", **options: Any) -> ArrayFederation:
    """A federation of a map-style torch dataset of ``(input, label)`` pairs; ``options`` as in :func:`from_arrays`.

    Images that are not tensors yet (PIL) become ``(channels, height, width)``. test: a dataset too.
    """
    x, y = _torch_arrays(dataset, name)
    held = None if test is None else _torch_arrays(test, f"{name} (test)")
    return from_arrays(x, y, test=held, name=name, **options)


def _torch_arrays(dataset: Any, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if isinstance(dataset, torch.utils.data.TensorDataset) and len(dataset.tensors) == 2:
        return dataset.tensors[0].numpy(), dataset.tensors[1].numpy()
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"{name}: {type(dataset).__name__} has no length and items; use a map-style dataset")
    if not len(dataset):
        raise DataError(f"{name}: there are no rows")
    items = [dataset[index] for index in range(len(dataset))]
    if any(not isinstance(item, (tuple, list)) or len(item) != 2 for item in items):
        raise DataError(f"{name}: items should be pairs (input, label)")
    return _stack([item[0] for item in items], name), np.array([np.asarray(item[1]) for item in items])


def _stack(values: Sequence[Any], where: str) -> NDArray[Any]:
    """Rows as one array; images with channels last, as PIL gives them, get channels first."""
    arrays = [np.asarray(value) for value in values]
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise DataError(f"{where}: input {row} has shape {array.shape}, input 0 has {arrays[0].shape}")
    x = np.stack(arrays)
    if x.dtype == np.uint8 and not isinstance(values[0], Tensor):
        if x.ndim == 3:
            return x[:, None]
        if x.ndim == 4 and x.shape[-1] in (1, 3, 4):
            return np.moveaxis(x, -1, 1)
    return x


def from_huggingface(
    dataset: Any,
    *,
    label: str = "label",
    input: str | None = None,
    natural: Sequence[str] = (),
    name: str = "huggingface",
    **options: Any,
) -> ArrayFederation:
    """A federation of a Hugging Face dataset, or of anything with ``column_names`` and columns by name.

    A dict of splits gives its ``train``, with ``test`` as the global test set. input: the column of images or
    vectors; without it, a single other column that holds arrays is the input, otherwise all other columns are a
    table. natural: columns for ``natural:COLUMN``, which are no inputs. ``options`` as in :func:`from_arrays`.
    """
    train, held = dataset, None
    if isinstance(dataset, Mapping):
        if "train" not in dataset:
            raise DataError(f"{name}: no split 'train' among {', '.join(map(str, dataset))}")
        train, held = dataset["train"], dataset.get("test")
    if not hasattr(train, "column_names"):
        raise DataError(f"{name}: {type(train).__name__} has no column_names; load it with datasets.load_dataset")
    for column in (label, *natural, *((input,) if input else ())):
        if column not in train.column_names:
            raise DataError(f"{name}: no column '{column}' among {', '.join(train.column_names)}")
    feature = getattr(train, "features", {}).get(label)
    classes = getattr(feature, "names", None)
    y, test_y = _values(train, label), None if held is None else _values(held, label)
    if not all(isinstance(value, (int, float, np.number)) for value in y):
        classes = sorted({str(value) for value in y})
        place = {word: index for index, word in enumerate(classes)}
        y = [place[str(value)] for value in y]
        test_y = None if test_y is None else [place.get(str(value), -1) for value in test_y]
    x = _hugging_inputs(train, label, input, natural, name)
    test = None if held is None or test_y is None else (_hugging_inputs(held, label, input, natural, name), test_y)
    columns = {column: np.asarray(_values(train, column)) for column in natural}
    return from_arrays(x, y, test=test, columns=columns, classes=classes, name=name, **options)


def _values(dataset: Any, column: str) -> list[Any]:
    return list(dataset[column])


def _hugging_inputs(
    dataset: Any, label: str, input: str | None, natural: Sequence[str], name: str
) -> NDArray[Any] | Table:
    others = [column for column in dataset.column_names if column != label and column not in natural]
    if not others:
        raise DataError(f"{name}: no column besides '{label}' to be an input")
    if input is None and len(others) == 1 and np.ndim(dataset[0][others[0]]) > 0:
        input = others[0]
    if input is not None:
        return _stack(_values(dataset, input), name)
    import pandas as pd

    from consilience.data.preprocess import table_from_frame

    return table_from_frame(pd.DataFrame({column: _values(dataset, column) for column in others}), name)


def from_file(
    path: str | Path, *, target: str | None = None, task: TaskKind | None = None, **options: Any
) -> ArrayFederation:
    """A federation of one csv, parquet or npz file; see :func:`~consilience.data.read.read_file` and :func:`build`."""
    from consilience.data.read import read_file

    return build(read_file(path, target=target, task=task), **options)


def from_client_files(
    paths: str | Path | Sequence[str | Path], *, target: str | None = None, task: TaskKind | None = None, **options: Any
) -> ArrayFederation:
    """A federation of one file per client (a folder of them, or their paths), each client keeping its own rows."""
    from consilience.data.read import read_client_files

    return build(read_client_files(paths, target=target, task=task), **options)
