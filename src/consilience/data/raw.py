"""Data as it is read, before anybody owns any of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from consilience.core.errors import DataError, nearest
from consilience.core.federation import Task
from consilience.data.preprocess import Table

MAX_SENSITIVE = 20


@dataclass(frozen=True)
class RawData:
    """A data set.

    x: ``(n, *shape)`` float32 inputs, or a table that the clients preprocess together. y: ``(n,)`` int64 labels or
    float32 targets. test_x, test_y: a global test set that the data brings. columns: further values of each
    row, by name, which clients or sensitive attributes may be made of. sensitive: the attributes that are
    sensitive by default. natural: the column that says whose a row is, where the data has owners; client_names:
    their names, in the order of that column's values.
    """

    name: str
    x: NDArray[np.float32] | Table
    y: NDArray[Any]
    task: Task
    test_x: NDArray[np.float32] | Table | None = None
    test_y: NDArray[Any] | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    test_columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    sensitive: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    natural: str = ""
    client_names: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def by_column(self) -> dict[str, NDArray[Any]]:
        """Every named column's values, a table's own included."""
        return {**(self.x.plain() if isinstance(self.x, Table) else {}), **self.columns}

    def sensitive_codes(
        self, names: tuple[str, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, dict[str, list[str]]]:
        """Codes ``(n, s)`` of the attributes ``names``, those of the test set if it has them, and what codes mean."""
        own = self.by_column()
        of_test = {**(self.test_x.plain() if isinstance(self.test_x, Table) else {}), **self.test_columns}
        codes: list[NDArray[np.int64]] = []
        test_codes: list[NDArray[np.int64]] = []
        meaning: dict[str, list[str]] = {}
        for name in names:
            if name not in own:
                what = nearest(name, own) if own else "; the data has no named columns"
                raise DataError(f"{self.name}: no column '{name}' to be sensitive{what}")
            words = np.unique(np.concatenate([own[name], of_test[name]]) if name in of_test else own[name])
            if len(words) > MAX_SENSITIVE:
                raise DataError(
                    f"{self.name}: sensitive column '{name}' has {len(words)} different values, more than "
                    f"{MAX_SENSITIVE}; put them in groups first"
                )
            meaning[name] = [str(word) for word in words.tolist()]
            codes.append(np.searchsorted(words, own[name]).astype(np.int64))
            if name in of_test:
                test_codes.append(np.searchsorted(words, of_test[name]).astype(np.int64))
        whole = len(test_codes) == len(names)
        return np.stack(codes, axis=1), np.stack(test_codes, axis=1) if whole else None, meaning


def inputs(values: ArrayLike, where: str) -> NDArray[np.float32]:
    """Inputs ``(n, *shape)`` as float32, checked to be numbers and finite; bytes (uint8) are scaled to 0..1."""
    x = np.asarray(values)
    if x.ndim < 2 or x.dtype.kind not in "fiub":
        raise DataError(f"{where}: inputs should be an array of numbers (rows, ...), not {x.dtype} of shape {x.shape}")
    out = np.ascontiguousarray(x, dtype=np.float32)
    if x.dtype == np.uint8:
        return np.asarray(out / np.float32(255), dtype=np.float32)
    if not np.isfinite(out).all():
        row, column = np.argwhere(~np.isfinite(out.reshape(len(out), -1)))[0].tolist()
        raise DataError(
            f"{where}: inputs have {out.reshape(len(out), -1)[row, column]} at row {row}, position {column}; "
            "they must be finite numbers"
        )
    return out


def labels(values: ArrayLike, where: str, classes: int | None = None) -> NDArray[np.int64]:
    """Labels ``(n,)`` as int64, checked to be whole numbers from 0 to below ``classes``."""
    y = np.asarray(values)
    if y.ndim != 1 or y.dtype.kind not in "fiub":
        raise DataError(f"{where}: labels should be one whole number per row, not {y.dtype} of shape {y.shape}")
    wrong = ~np.isfinite(y) | (y != np.floor(y)) if y.dtype.kind == "f" else np.zeros(len(y), dtype=np.bool_)
    if not wrong.any():
        y = y.astype(np.int64)
        wrong = (y < 0) | (y >= (classes if classes is not None else np.iinfo(np.int64).max))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        top = "" if classes is None else f" to {classes - 1}"
        raise DataError(f"{where}: label {y[row]} at row {row} should be a whole number from 0{top}")
    return y


def targets(values: ArrayLike, where: str) -> NDArray[np.float32]:
    """Targets of a regression ``(n,)`` or ``(n, k)`` as float32, checked to be finite."""
    y = np.asarray(values)
    if y.ndim not in (1, 2) or y.dtype.kind not in "fiub":
        raise DataError(f"{where}: targets should be an array of numbers, not {y.dtype} of shape {y.shape}")
    finite = np.isfinite(y) if y.ndim == 1 else np.isfinite(y).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(f"{where}: target at row {row} is {y[row]}; it must be a finite number")
    return y.astype(np.float32)
