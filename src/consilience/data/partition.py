"""Partitions: how the rows of a data set become the clients of a federation, and the file that says so."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.core.errors import ConfigError, DataError, nearest
from consilience.core.streams import philox
from consilience.data import assign
from consilience.data.assign import Floats, Ints
from consilience.data.spec import NEEDS_LABELS, Part, Spec, parse

FORMAT = 1


@dataclass(frozen=True)
class Partition:
    """Who has which rows.

    rows: rows of the pool that was divided. order: row ids, client by client, train | valid | test. bounds:
    ``(clients, 4)``, where a client's three parts start in ``order`` and its last one ends. test: rows held out
    as the global test set (None when the data brings its own). public: unlabelled rows for everybody. unseen:
    clients that never train. groups: each client's group, if the specification makes groups. labels: SHA-256 of
    the pool's labels, which tells one data set from another.
    """

    spec: Spec
    seed: int
    rows: int
    order: Ints
    bounds: Ints
    test: Ints | None = None
    public: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    unseen: tuple[int, ...] = ()
    groups: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    labels: str = ""

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.bounds)

    def client(self, client: int) -> tuple[Ints, Ints, Ints]:
        """Row ids of a client's train, validation and test rows."""
        a, b, c, d = self.bounds[client].tolist()
        return self.order[a:b], self.order[b:c], self.order[c:d]

    def group_of(self, part: Part) -> Ints:
        """Each client's group for one grouped part (groups of several parts are numbered together)."""
        groups = np.array(self.groups, dtype=np.int64)
        for other in self.spec.grouped:
            if other is part:
                return np.asarray(groups % part.count, dtype=np.int64)
            groups = groups // other.count
        raise ValueError(f"{part.name} makes no groups")


def fractions(split: Sequence[float]) -> tuple[float, float, float]:
    """``split`` as train, validation and test fractions, checked."""
    if len(split) != 3 or any(not 0 <= f <= 1 for f in split) or abs(sum(split) - 1) > 1e-6 or split[0] <= 0:
        raise ConfigError(
            f"split {','.join(f'{f:g}' for f in split)} should be three fractions for train, validation and test "
            "that sum to 1, train above 0, as in 0.8,0.1,0.1"
        )
    return float(split[0]), float(split[1]), float(split[2])


def choose_unseen(unseen: float, clients: int, seed: int) -> tuple[int, ...]:
    """Which clients never train: a fraction if ``unseen`` is a float, a count if it is an int."""
    count = unseen if isinstance(unseen, int) else int(unseen * clients + 0.5)
    if (isinstance(unseen, float) and not 0 <= unseen < 1) or count < 0:
        raise ConfigError(f"unseen {unseen} should be a fraction from 0 to below 1, or a count of clients")
    if count >= clients:
        raise ConfigError(f"unseen {unseen} leaves none of {clients} clients to train; use at most {clients - 1}")
    chosen = philox(seed, "partition", "unseen").permutation(clients)[:count]
    return tuple(sorted(chosen.tolist()))


def label_digest(y: NDArray[Any]) -> str:
    """SHA-256 of labels or targets, by which a partition file knows its data set."""
    whole = np.issubdtype(y.dtype, np.integer)
    return hashlib.sha256(np.ascontiguousarray(y, dtype="<i8" if whole else "<f4").tobytes()).hexdigest()


def make_partition(
    spec: Spec | str,
    y: NDArray[Any],
    *,
    clients: int,
    seed: int = 0,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    test_fraction: float = 0.0,
    public: int = 0,
    unseen: float = 0,
    min_size: int | None = None,
    natural: Mapping[str, ArrayLike] | None = None,
) -> Partition:
    """Divide rows with labels (integers) or targets (floats) ``y`` among ``clients``.

    In this order: the global test set is held out (``test_fraction``, stratified by label, or by client for a
    natural partition), public rows are drawn, a long tail drops rows, the rest is dealt (every row to exactly one
    client), and each client's rows are split. A natural partition has as many clients as its column has values,
    whatever ``clients`` says, and moves no rows; others give each client at least ``min_size`` rows (default 10,
    or half the mean size if that is less) by donations from the largest.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    _, valid, test = fractions(split)
    labelled = bool(np.issubdtype(y.dtype, np.integer))
    if not labelled:
        for part in spec.parts:
            if part.name in NEEDS_LABELS:
                raise ConfigError(
                    f"partition '{spec.text}': {part.name} needs class labels and this is a regression task; "
                    "use iid, power:A, sizes:ALPHA, noise:S or natural:COLUMN"
                )
    if clients < 1:
        raise ConfigError(f"clients {clients} should be at least 1")
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"test_fraction {test_fraction} should be from 0 to below 1")
    codes = y.astype(np.int64) if labelled else np.zeros(len(y), dtype=np.int64)
    owner_of: Ints | None = None
    names: tuple[str, ...] = ()
    if spec.assignment.name == "natural":
        owner_of, names = _natural(spec, natural or {}, len(y))
        clients = len(names)
    stays = np.zeros(len(y), dtype=np.bool_)
    if owner_of is not None:  # a row of every natural client, so that none loses all of its own to what follows
        shuffled = np.lexsort((philox(seed, "partition", "stays").random(len(y)), owner_of))
        stays[shuffled[np.searchsorted(owner_of[shuffled], np.arange(clients))]] = True
    rows = np.arange(len(y))
    held: Ints | None = None
    if test_fraction:
        strata = codes if owner_of is None else np.unique(owner_of * (codes.max() + 1) + codes, return_inverse=True)[1]
        marked = assign.hold_out(strata, test_fraction, philox(seed, "partition", "test")) & ~stays
        held, rows = rows[marked], rows[~marked]
    free = rows[~stays[rows]]
    if public < 0 or public > len(free) - (owner_of is None):
        raise ConfigError(f"public {public} should be from 0 to below the {len(rows)} training rows")
    drawn = np.sort(philox(seed, "partition", "public").permutation(free)[:public])
    rows = np.setdiff1d(rows, drawn, assume_unique=True)
    if spec.longtail is not None:
        keep = assign.long_tail(codes[rows], spec.longtail.value, philox(seed, "partition", "longtail"))
        rows = rows[keep | stays[rows]]
    owner = _deal(spec, codes[rows], clients, seed, min_size) if owner_of is None else owner_of[rows]
    order, bounds = assign.split_rows(owner, codes[rows], clients, valid, test, philox(seed, "partition", "split"))
    return Partition(
        spec=spec,
        seed=seed,
        rows=len(y),
        order=rows[order],
        bounds=bounds,
        test=held,
        public=drawn,
        unseen=choose_unseen(unseen, clients, seed),
        groups=_groups(spec, clients, seed),
        names=names,
        labels=label_digest(y),
    )


def _natural(spec: Spec, natural: Mapping[str, ArrayLike], rows: int) -> tuple[Ints, tuple[str, ...]]:
    column = spec.assignment.word
    if column not in natural:
        what = nearest(column, natural) if natural else "; the data has no columns, use iid or dirichlet:ALPHA"
        raise ConfigError(f"partition '{spec.text}': no column '{column}'{what}")
    values, codes = np.unique(np.asarray(natural[column]), return_inverse=True)
    if len(codes) != rows:
        raise DataError(f"column '{column}' has {len(codes)} values for {rows} rows")
    return codes.astype(np.int64), tuple(str(value) for value in values.tolist())


def _deal(spec: Spec, y: Ints, clients: int, seed: int, min_size: int | None) -> Ints:
    """The owner of each row of the pool, at least ``min_size`` rows each."""
    part, rows = spec.assignment, len(y)
    if rows < clients:
        raise DataError(f"{clients} clients but only {rows} training rows; use at most {rows} clients")
    if min_size is None:
        min_size = min(10, max(1, rows // (2 * clients)))
    elif min_size < 1:
        raise ConfigError(f"min_size {min_size} should be at least 1")
    if rows < clients * min_size:
        raise DataError(
            f"{rows} training rows cannot give each of {clients} clients {min_size}; "
            f"use at most {rows // min_size} clients or a min_size of at most {rows // clients}"
        )
    weights = _weights(spec, clients, seed)
    rng = philox(seed, "partition", part.name)
    if part.name == "shards":
        owner = assign.shards(y, clients, part.count, weights, rng)
    elif part.name == "dirichlet" and part.word != "equal" and spec.quantity is None:
        owner = assign.label_dirichlet(y, clients, part.value, rng)
    else:
        sizes, _ = assign.raise_to(assign.apportion(rows, weights), min_size)
        if part.name == "iid":
            owner = assign.by_sizes(rows, sizes, rng)
        else:
            owner = assign.sized_dirichlet(y, sizes, part.value, rng)
    return assign.donate(owner, clients, min_size, philox(seed, "partition", "donate"))


def _weights(spec: Spec, clients: int, seed: int) -> Floats:
    """Each client's share of the rows, by the specification's quantity part."""
    if spec.quantity is None:
        return np.ones(clients)
    rng = philox(seed, "partition", spec.quantity.name)
    if spec.quantity.name == "sizes":
        return np.asarray(assign.dirichlet(rng, spec.quantity.value, (1, clients))[0])
    return np.asarray((rng.permutation(clients) + 1.0) ** -spec.quantity.value, dtype=np.float64)


def _groups(spec: Spec, clients: int, seed: int) -> tuple[int, ...] | None:
    """Each client's group: even in every grouped part and even across parts, mixed radix over the parts."""
    if not spec.grouped:
        return None
    for part in spec.grouped:
        if part.count > clients:
            raise ConfigError(
                f"partition '{spec.text}': {part.name}:{part.count} has more groups than {clients} clients"
            )
    place = philox(seed, "partition", "groups").permutation(clients)
    return tuple((place % math.prod(part.count for part in spec.grouped)).tolist())


def write_partition(path: str | Path, partition: Partition, *, data: str = "") -> None:
    """Write ``partition`` as JSON: row ids by client, global test and public rows, groups, specification, seed."""
    clients = []
    for client in range(partition.clients):
        parts = dict(zip(("train", "valid", "test"), map(np.ndarray.tolist, partition.client(client)), strict=True))
        name = {"name": partition.names[client]} if partition.names else {}
        clients.append({**name, **parts})
    record = {
        "format": FORMAT,
        "data": data,
        "spec": partition.spec.text,
        "seed": partition.seed,
        "rows": partition.rows,
        "labels_sha256": partition.labels,
        "test": None if partition.test is None else partition.test.tolist(),
        "public": partition.public.tolist(),
        "unseen": list(partition.unseen),
        "groups": None if partition.groups is None else list(partition.groups),
        "clients": clients,
    }
    lines = [f'"{key}": {json.dumps(value)}' for key, value in record.items() if key != "clients"]
    body = ",\n".join(json.dumps(client) for client in clients)
    Path(path).write_text("{\n" + ",\n".join(lines) + ',\n"clients": [\n' + body + "\n]}\n", encoding="utf-8")


def read_partition(path: str | Path, y: NDArray[Any]) -> Partition:
    """The partition that a file holds, checked against the labels or targets ``y`` of the data it is used on.

    A file needs only ``clients``, a list of objects with ``train`` and, optionally, ``valid`` and ``test`` row
    ids; see :func:`write_partition` for the rest.
    """
    path = Path(path)
    record = _record(path)
    if not isinstance(record.get("clients"), list) or not record["clients"]:
        raise DataError(f"partition file {path} should hold an object with a non-empty list 'clients'")
    rows = record.get("rows", len(y))
    if rows != len(y):
        raise DataError(f"partition file {path} is for {rows} rows, the data has {len(y)}: it is of another data set")
    digest = label_digest(y)
    if record.get("labels_sha256") not in (None, "", digest):
        raise DataError(f"partition file {path} is of another data set: as many rows, other labels")
    clients = record["clients"]
    lists: list[Ints] = []
    for number, client in enumerate(clients):
        if not isinstance(client, dict) or not client.get("train"):
            raise DataError(f"partition file {path}: client {number} has no 'train' rows")
        lists.extend(
            _ids(path, f"client {number} {part}", client.get(part, ()), rows) for part in ("train", "valid", "test")
        )
    test = None if record.get("test") is None else _ids(path, "test", record["test"], rows)
    public = _ids(path, "public", record.get("public", ()), rows)
    everything = np.concatenate([*lists, public, *(() if test is None else (test,))])
    twice = np.flatnonzero(np.bincount(everything, minlength=rows) > 1)
    if len(twice):
        raise DataError(f"partition file {path} gives row {twice[0]} more than once; every row has one owner")
    spec = parse(record.get("spec", "iid"))
    groups, unseen = record.get("groups"), record.get("unseen", [])
    top = math.prod(part.count for part in spec.grouped)
    if bool(spec.grouped) != (groups is not None):
        raise DataError(f"partition file {path}: 'groups' does not fit its specification '{spec.text}'")
    if groups is not None and (len(groups) != len(clients) or any(g not in range(top) for g in groups)):
        raise DataError(f"partition file {path}: 'groups' should give each of {len(clients)} clients 0 to {top - 1}")
    if any(client not in range(len(clients)) for client in unseen) or len(set(unseen)) == len(clients):
        raise DataError(f"partition file {path}: 'unseen' should list some of the clients 0 to {len(clients) - 1}")
    sizes = np.array([len(ids) for ids in lists], dtype=np.int64).reshape(-1, 3)
    ends = np.cumsum(sizes).reshape(-1, 3)
    named = all("name" in client for client in clients)
    return Partition(
        spec=spec,
        seed=int(record.get("seed", 0)),
        rows=rows,
        order=np.concatenate(lists),
        bounds=np.concatenate([ends[:, :1] - sizes[:, :1], ends], axis=1),
        test=test,
        public=public,
        unseen=tuple(sorted(set(unseen))),
        groups=None if groups is None else tuple(groups),
        names=tuple(str(client["name"]) for client in clients) if named else (),
        labels=digest,
    )


def write_on_demand(path: str | Path, *, data: str, clients: int, seed: int, unseen: Sequence[int]) -> None:
    """The partition file of a federation whose clients are made from their ids: what makes them again."""
    record = {"format": FORMAT, "data": data, "spec": "iid", "seed": seed, "on_demand": clients, "unseen": list(unseen)}
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")


def read_on_demand(path: str | Path, data: str) -> tuple[int, int, frozenset[int]]:
    """Clients, seed and unseen clients of a file by :func:`write_on_demand`, checked to be of ``data``."""
    record = _record(Path(path))
    if record.get("data") != data or not isinstance(record.get("on_demand"), int):
        raise DataError(f"partition file {path} is of another data set ({record.get('data') or 'unknown'}), not {data}")
    return record["on_demand"], int(record["seed"]), frozenset(record["unseen"])


def _record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"partition file {path} does not exist")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"partition file {path} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"partition file {path} should hold a JSON object")
    if record.get("format", FORMAT) != FORMAT:
        raise DataError(f"partition file {path} has format {record['format']}; this version reads format {FORMAT}")
    return record


def _ids(path: Path, where: str, values: Any, rows: int) -> Ints:
    """Row ids from a file, checked to be whole numbers below ``rows``."""
    ids = np.asarray(values if len(values) else np.empty(0, dtype=np.int64))
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"partition file {path}: {where} should be a list of row numbers")
    if len(ids) and (ids.min() < 0 or ids.max() >= rows):
        wrong = int(ids[(ids < 0) | (ids >= rows)][0])
        raise DataError(f"partition file {path}: {where} has row {wrong}, the data has rows 0 to {rows - 1}")
    return ids.astype(np.int64)
