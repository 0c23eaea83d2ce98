"""Reading a user's own files: csv, parquet and npz."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilience.core.errors import ConfigError, DataError, nearest
from consilience.core.federation import Task, TaskKind
from consilience.data import raw as raw_data
from consilience.data.preprocess import table_from_frame
from consilience.data.raw import RawData

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet", ".npz")
TARGETS = ("label", "target", "y", "class")
MAX_CLASSES = 100
OWNER = "client"


def read_file(
    path: str | Path, *, target: str | None = None, task: TaskKind | None = None, sensitive: Sequence[str] = ()
) -> RawData:
    """The data of one file.

    csv, parquet: a table; ``?`` and empty fields are missing. target: the column to predict, by default the one
    called label, target, y or class, else the last. task: by default classification if the target is words or at
    most 100 different whole numbers, else regression. npz: arrays ``x`` and ``y``, optionally ``x_test`` and
    ``y_test``; other arrays of the same length are columns.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _read_npz(path, target, task, tuple(sensitive))
    return from_frame(read_frame(path), str(path), path.name, target, task, tuple(sensitive))


def read_client_files(
    paths: str | Path | Sequence[str | Path],
    *,
    target: str | None = None,
    task: TaskKind | None = None,
    sensitive: Sequence[str] = (),
) -> RawData:
    """One file per client: a folder's csv, parquet or npz files by name, or paths in order.

    Clients are called as their files. Every file needs the same columns, of the same kind.
    """
    if isinstance(paths, (str, Path)):
        folder = Path(paths)
        if not folder.is_dir():
            raise DataError(f"folder {folder} does not exist")
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        name = folder.resolve().name
        if not files:
            raise DataError(f"folder {folder} has no {', '.join(SUFFIXES)} files, one for each client")
    else:
        files, name = [Path(path) for path in paths], "client files"
        if not files:
            raise DataError("no client files were given")
    if len({file.suffix.lower() == ".npz" for file in files}) > 1:
        raise DataError(f"client files of {name} mix npz with csv or parquet; use one kind")
    if files[0].suffix.lower() == ".npz":
        raw = _joined_npz(files, name, target, task, tuple(sensitive))
        sizes = raw.columns[OWNER]
    else:
        frames = [read_frame(file) for file in files]
        _same_columns(files, frames)
        import pandas as pd

        joined = pd.concat(frames, ignore_index=True)
        raw = from_frame(joined, name, name, target, task, tuple(sensitive))
        sizes = np.repeat(np.arange(len(files)), [len(frame) for frame in frames])
    columns = {**raw.columns, OWNER: sizes}
    return replace(raw, columns=columns, natural=OWNER, client_names=tuple(file.stem for file in files))


def read_frame(path: Path) -> pd.DataFrame:
    """A csv or parquet file as a frame with at least one row."""
    import pandas as pd

    if not path.is_file():
        raise DataError(f"file {path} does not exist")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"file {path} should be one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".csv":
            frame = pd.read_csv(path, skipinitialspace=True, na_values="?")
        else:
            frame = pd.read_parquet(path)
    except ImportError:
        raise DataError(f"reading {path} needs pyarrow: pip install 'consilience[parquet]'") from None
    except (ValueError, OSError) as error:  # pandas' parser errors and pyarrow's ArrowInvalid are ValueErrors
        raise DataError(f"file {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not len(frame):
        raise DataError(f"file {path} has no rows")
    frame.columns = frame.columns.map(str)
    return frame


def _same_columns(files: Sequence[Path], frames: Sequence[pd.DataFrame]) -> None:
    import pandas as pd

    def numeric(series: pd.Series[Any]) -> bool:
        return bool(pd.api.types.is_numeric_dtype(series))

    first = frames[0]
    for file, frame in zip(files, frames, strict=True):
        missing = [column for column in first.columns if column not in frame.columns]
        extra = [column for column in frame.columns if column not in first.columns]
        if missing or extra:
            what = f"no column '{missing[0]}'" if missing else f"a column '{extra[0]}' too many"
            raise DataError(f"file {file} has {what}; {files[0]} has {', '.join(first.columns)}")
        for column in first.columns:
            both = frame[column].notna().any() and first[column].notna().any()
            if both and numeric(frame[column]) != numeric(first[column]):
                kinds = ["numbers" if numeric(f[column]) else "words" for f in (frame, first)]
                raise DataError(f"file {file}: column '{column}' holds {kinds[0]}, in {files[0]} it holds {kinds[1]}")


def from_frame(
    frame: pd.DataFrame,
    where: str,
    name: str,
    target: str | None,
    task: TaskKind | None,
    sensitive: tuple[str, ...],
    least: int = 2,
) -> RawData:
    """The data in a frame. least: different labels that there must be."""
    import pandas as pd

    if target is None:
        target = next((column for column in TARGETS if column in frame.columns), str(frame.columns[-1]))
    elif target not in frame.columns:
        raise DataError(f"{where}: no target column '{target}'{nearest(target, frame.columns)}")
    series = frame[target]
    if series.isna().any():
        row = int(np.flatnonzero(series.isna())[0])
        raise DataError(f"{where}: target '{target}' is missing at row {row}; every row needs one")
    if len(frame.columns) < 2:
        raise DataError(f"{where}: no column besides the target '{target}'")
    number = pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series)
    y, made = encode_target(
        series.to_numpy() if number else series.astype(str).to_numpy(dtype=object), where, task, least
    )
    return RawData(
        name,
        table_from_frame(frame.drop(columns=[target]), where),
        y,
        made,
        sensitive=sensitive,
        about={"target": target},
    )


def labels(values: NDArray[Any], classes: Sequence[str]) -> NDArray[np.int64]:
    """The numbers of labels ``(n,)`` among ``classes``, written as :func:`encode_target` wrote them: -1 for one that
    is no class, and -2 for one that is missing."""
    import pandas as pd

    missing = np.asarray(pd.isna(values), dtype=bool)
    if values.dtype.kind == "f":  # whole numbers beside missing ones
        whole = np.where(missing, 0, values)
        values = whole.astype(np.int64) if bool((whole == np.floor(whole)).all()) else values
    number = {name: code for code, name in enumerate(classes)}
    return np.asarray(
        [-2 if lost else number.get(str(value), -1) for value, lost in zip(values.tolist(), missing, strict=True)],
        dtype=np.int64,
    )


def encode_target(values: NDArray[Any], where: str, task: TaskKind | None, least: int = 2) -> tuple[NDArray[Any], Task]:
    """Labels or targets, and their task; see :func:`read_file` for the default ``task``. least: different labels that
    there must be."""
    if task not in (None, "classification", "regression"):
        raise ConfigError(f"task '{task}' should be classification or regression")
    words = values.dtype.kind not in "fiub"
    if words and task == "regression":
        raise DataError(f"{where}: the target holds words, a regression needs numbers")
    if not words and values.ndim == 1 and task is None:
        whole = bool(np.isfinite(values).all() and (values == np.floor(values)).all())
        task = "classification" if whole and len(np.unique(values)) <= MAX_CLASSES else "regression"
    if task == "regression" or (not words and values.ndim > 1):
        y = raw_data.targets(values, where)
        return y, Task("regression", 1 if y.ndim == 1 else y.shape[1])
    if values.dtype.kind == "f":
        row = np.flatnonzero(~np.isfinite(values) | (values != np.floor(values)))
        if len(row):
            raise DataError(f"{where}: label {values[row[0]]} at row {row[0]} should be a whole number or a word")
        values = values.astype(np.int64)
    known, codes = np.unique(values.astype(str) if words else values, return_inverse=True)
    if len(known) < least:
        raise DataError(f"{where}: every label is {known[0]}; a classification needs at least two classes")
    return codes.astype(np.int64), Task("classification", len(known), tuple(str(word) for word in known.tolist()))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise DataError(f"file {path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"file {path} cannot be read: {str(error).splitlines()[0]}") from None


def _pair(arrays: dict[str, NDArray[Any]], path: Path | str, target: str) -> tuple[NDArray[np.float32], NDArray[Any]]:
    for key in ("x", target):
        if key not in arrays:
            raise DataError(f"file {path} has no array '{key}'; it has {', '.join(arrays) or 'none'}")
    x, y = raw_data.inputs(arrays.pop("x"), str(path)), arrays.pop(target)
    if len(x) != len(y):
        raise DataError(f"file {path}: x has {len(x)} rows and {target} has {len(y)}")
    if not len(x):
        raise DataError(f"file {path} has no rows")
    return x, y


def _read_npz(path: Path, target: str | None, task: TaskKind | None, sensitive: tuple[str, ...]) -> RawData:
    arrays = read_arrays(path)
    x, y = _pair(arrays, path, target or "y")
    test_x = test_y = None
    if "x_test" in arrays or "y_test" in arrays:
        held = {key.removesuffix("_test"): arrays.pop(key) for key in ("x_test", "y_test") if key in arrays}
        test_x, test_y = _pair(held, f"{path} (test)", "y")
        if test_x.shape[1:] != x.shape[1:]:
            raise DataError(f"file {path}: x has rows of shape {x.shape[1:]}, x_test of {test_x.shape[1:]}")
    together = y if test_y is None else np.concatenate([y, test_y])
    codes, made = encode_target(together, str(path), task)
    columns = {key: values for key, values in arrays.items() if values.shape == (len(x),)}
    return RawData(
        path.name,
        x,
        codes[: len(x)],
        made,
        test_x,
        None if test_y is None else codes[len(x) :],
        columns=columns,
        sensitive=sensitive,
    )


def _joined_npz(
    files: Sequence[Path], name: str, target: str | None, task: TaskKind | None, sensitive: tuple[str, ...]
) -> RawData:
    xs: list[NDArray[np.float32]] = []
    ys: list[NDArray[Any]] = []
    rest: list[dict[str, NDArray[Any]]] = []
    for file in files:
        arrays = read_arrays(file)
        x, y = _pair(arrays, file, target or "y")
        if xs and x.shape[1:] != xs[0].shape[1:]:
            raise DataError(f"file {file} has rows of shape {x.shape[1:]}, {files[0]} of {xs[0].shape[1:]}")
        xs.append(x)
        ys.append(y)
        rest.append({key: values for key, values in arrays.items() if values.shape == (len(x),)})
    columns = {key: np.concatenate([r[key] for r in rest]) for key in rest[0] if all(key in r for r in rest)}
    columns[OWNER] = np.repeat(np.arange(len(files)), [len(y) for y in ys])
    y, made = encode_target(np.concatenate(ys), name, task)
    return RawData(name, np.concatenate(xs), y, made, columns=columns, sensitive=sensitive)
