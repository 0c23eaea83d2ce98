"""Federated preprocessing of tables: what scaling, vocabularies and missing values need, without pooling rows.

Each client sends :func:`client_statistics` of its training rows (counts, sums, squared deviations, counts of
words); :func:`merge` of them equals the statistics of all rows together, and :func:`apply` makes inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MAX_WORDS = 1000


@dataclass(frozen=True)
class Column:
    """A column of a table.

    values: float64 with NaN where missing if ``words`` is None, otherwise int64 indices into ``words`` with -1
    where missing. known: the words are public knowledge (a code book), so every client reports all of them.
    """

    name: str
    values: NDArray[Any]
    words: tuple[str, ...] | None = None
    known: bool = False

    def plain(self) -> NDArray[Any]:
        """The values as numbers, or as words with ``"(missing)"``."""
        if self.words is None:
            return self.values
        words: NDArray[np.str_] = np.array([*self.words, "(missing)"])
        return np.asarray(words[self.values])


@dataclass(frozen=True)
class Table:
    """Named columns of equal length."""

    columns: tuple[Column, ...]

    def __len__(self) -> int:
        return len(self.columns[0].values) if self.columns else 0

    def rows(self, index: Any) -> Table:
        """The rows at ``index``."""
        return Table(tuple(replace(column, values=column.values[index]) for column in self.columns))

    def without(self, name: str) -> Table:
        """The table less one column."""
        return Table(tuple(column for column in self.columns if column.name != name))

    def plain(self) -> dict[str, NDArray[Any]]:
        """Every column's values by name."""
        return {column.name: column.plain() for column in self.columns}


def table_from_frame(frame: pd.DataFrame, where: str) -> Table:
    """A table from a pandas frame: numeric columns are numbers, all others words. ``where`` names it in errors."""
    import pandas as pd

    columns = []
    for name in map(str, frame.columns):
        series = frame[name]
        if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series):
            values = series.to_numpy(dtype=np.float64, na_value=np.nan)
            if np.isinf(values).any():
                row = int(np.flatnonzero(np.isinf(values))[0])
                raise DataError(
                    f"{where}: column '{name}' is infinite at row {row}; use a finite number or leave it empty"
                )
            columns.append(Column(name, values))
            continue
        codes, words = pd.factorize(series.astype("string"), sort=True)
        if len(words) > MAX_WORDS:
            raise DataError(
                f"{where}: column '{name}' has {len(words)} different words, more than {MAX_WORDS}; "
                "drop it or make it numbers"
            )
        columns.append(Column(name, codes.astype(np.int64), tuple(str(word) for word in words)))
    return Table(tuple(columns))


@dataclass(frozen=True)
class Numbers:
    """A numeric column: rows that have a value, their sum, and their squared deviations from their own mean."""

    count: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """The mean, 0 where no row has a value."""
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """The population's standard deviation, 1 where it would be 0, so that a constant column becomes 0."""
        deviation = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return deviation if deviation > 1e-12 * max(1.0, abs(self.mean)) else 1.0


@dataclass(frozen=True)
class Statistics:
    """What a client sends, or several clients' merged: per column, in order, numbers or counts of words."""

    columns: Mapping[str, Numbers | Mapping[str, int]]

    def features(self) -> tuple[str, ...]:
        """Names of the inputs that :func:`apply` makes: a numeric column's own, ``column=word`` for words."""
        names: list[str] = []
        for name, column in self.columns.items():
            names.extend([name] if isinstance(column, Numbers) else [f"{name}={word}" for word in sorted(column)])
        return tuple(names)


def client_statistics(rows: Table) -> Statistics:
    """Counts and sums of one client's rows."""
    columns: dict[str, Numbers | Mapping[str, int]] = {}
    for column in rows.columns:
        if column.words is None:
            present = column.values[~np.isnan(column.values)]
            total = float(present.sum())
            squares = float(np.square(present - total / len(present)).sum()) if len(present) else 0.0
            columns[column.name] = Numbers(len(present), total, squares)
        else:
            counts = np.bincount(column.values + 1, minlength=len(column.words) + 1)[1:].tolist()
            columns[column.name] = {w: n for w, n in zip(column.words, counts, strict=True) if n or column.known}
    return Statistics(columns)


def merge(statistics: Iterable[Statistics]) -> Statistics:
    """The statistics of all rows together. Merging merged statistics works too."""
    parts = list(statistics)
    if not parts:
        raise DataError("there are no statistics to merge; at least one client must send its own")
    merged: dict[str, Numbers | Mapping[str, int]] = {}
    for name in parts[0].columns:
        numbers: list[Numbers] = []
        words: dict[str, int] = {}
        for client, part in enumerate(parts):
            column = part.columns.get(name)
            if column is None or part.columns.keys() != parts[0].columns.keys():
                raise DataError(
                    f"statistics of client {client} have columns {', '.join(part.columns)}; "
                    f"client 0 has {', '.join(parts[0].columns)}"
                )
            if isinstance(column, Numbers) != isinstance(parts[0].columns[name], Numbers):
                raise DataError(f"column '{name}' holds numbers at one client and words at another (client {client})")
            if isinstance(column, Numbers):
                numbers.append(column)
            else:
                for word, count in column.items():
                    words[word] = words.get(word, 0) + count
        if numbers:
            count, total = sum(n.count for n in numbers), sum(n.total for n in numbers)
            mean = total / count if count else 0.0
            # deviations from a client's own mean, moved to the common one: no cancellation of large squares
            squares = sum(n.squares + n.count * (n.mean - mean) ** 2 for n in numbers)
            merged[name] = Numbers(count, total, squares)
        else:
            merged[name] = words
    return Statistics(merged)


def apply(rows: Table, merged: Statistics) -> NDArray[np.float32]:
    """Inputs ``(n, features)``: numbers to mean 0 and deviation 1, words one-hot.

    Missing numbers become the mean, missing words the most common word (the first in the alphabet on ties), and
    a word that no client reported becomes all zeros.
    """
    blocks: list[NDArray[np.float32]] = []
    for column in rows.columns:
        known = merged.columns.get(column.name)
        if known is None or isinstance(known, Numbers) != (column.words is None):
            raise DataError(
                f"column '{column.name}' is not what the statistics were made of ({', '.join(merged.columns)})"
            )
        if isinstance(known, Numbers):
            filled = np.where(np.isnan(column.values), known.mean, column.values)
            blocks.append(((filled - known.mean) / known.std).astype(np.float32)[:, None])
            continue
        words = sorted(known)
        place = {word: index for index, word in enumerate(words)}
        mode = min(range(len(words)), key=lambda index: (-known[words[index]], index), default=len(words))
        # one row of the identity per word; the row after the last is all zeros; code -1 finds the mode at the end
        index = np.array([*(place.get(word, len(words)) for word in column.words or ()), mode])
        blocks.append(np.eye(len(words) + 1, len(words), dtype=np.float32)[index[column.values]])
    return np.concatenate(blocks, axis=1) if blocks else np.empty((len(rows), 0), dtype=np.float32)
