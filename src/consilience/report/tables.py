"""The tables of a report as files: csv and parquet for all of them, LaTeX for those that go into a paper."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError, DataError
from consilience.report.load import RunFolder, read_runs, read_yaml

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
FORMATS = ("csv", "parquet", "latex")

COSTS_SO_FAR = ("wall_s", "virtual_s", "bytes_up", "bytes_down", "samples", "steps")
"""Columns of a line of history that the long form keeps beside every measure, to be drawn against."""
DIFFERENCE = ("reference", "difference", "difference_ci", "pairs", "p", "p_holm", "p_exact", "p_exact_holm",
              "p_smallest")  # fmt: skip
TARGET = ("target", "reached", "to_target")


def write_tables(folder: Path, form: str, out: Path | None = None) -> list[Path]:
    """Write the tables of a run's, a comparison's or a profile's folder; returns the files.

    form: one of ``FORMATS``. out: where to (``folder/tables``). A table without rows is not written. Raises
    ConfigError for another form and where pyarrow is missing, DataError for a folder without runs; nothing is written
    then.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: one of {', '.join(FORMATS)}")
    if form == "parquet":
        _need_pyarrow()
    found: Mapping[str, Any]
    if form == "latex":
        from consilience.report.latex import latex_tables

        found = latex_tables(boards(folder))
    else:
        found = {name: rows for name, rows in tables(folder).items() if rows}
    if not found:
        raise DataError(f"{folder} has nothing that goes into a {form} table")
    where = out or folder / "tables"
    if where.exists() and not where.is_dir():
        raise ConfigError(f"{where} is a file; --out wants a folder")
    where.mkdir(parents=True, exist_ok=True)
    ending, text = _WRITERS[form]
    files = []
    for name, value in found.items():
        files.append(where / f"{name}.{ending}")
        write_atomically(files[-1], text(value))
    return files


def boards(folder: Path) -> dict[str, list[Row]]:
    """Rows of leaderboards, judged anew from the runs: by federation, or one without a name."""
    from consilience.measure.board import board

    if (folder / "profile.json").exists():
        return {}
    found = {}
    for name, part in _federations(folder).items():
        asked = read_yaml(part / "compare.yaml") if (part / "compare.yaml").is_file() else {}
        found[name] = board(read_runs(part), reference=asked.get("reference"), target=asked.get("target"))
    return found


def tables(folder: Path) -> dict[str, list[Row]]:
    """Every table by name, as rows. With several federations each row begins with its ``federation``."""
    if (folder / "profile.json").exists():
        return _profile(json.loads((folder / "profile.json").read_text("utf-8")))
    found: dict[str, list[Row]] = {}
    parts = _federations(folder)
    for name, rows in boards(folder).items():
        runs = read_runs(parts[name])
        made: dict[str, Callable[[], Iterator[Row]]] = {
            "leaderboard": lambda rows=rows: map(_board_row, rows),  # type: ignore[misc]
            "differences": lambda rows=rows: _differences(rows),  # type: ignore[misc]
            "target": lambda rows=rows: _targets(rows),  # type: ignore[misc]
            "fairness": lambda rows=rows: _fairness(rows),  # type: ignore[misc]
            "robustness": lambda runs=runs: _robustness(runs),  # type: ignore[misc]
            "history": lambda runs=runs: _history(runs),  # type: ignore[misc]
            "clients": lambda runs=runs: _clients(runs),  # type: ignore[misc]
        }
        for table, make in made.items():
            found.setdefault(table, []).extend({"federation": name, **row} if name else row for row in make())
    if (folder / "ranks.json").is_file():
        found["ranks"] = _ranks(json.loads((folder / "ranks.json").read_text("utf-8")))
    return found


def _federations(folder: Path) -> dict[str, Path]:
    """The comparisons in a folder by the name of their federation; the folder itself has none."""
    if (folder / "compare.yaml").is_file() and read_yaml(folder / "compare.yaml").get("federations"):
        inside = sorted(path.parent for path in folder.glob("*/compare.yaml"))
        if not inside:
            raise DataError(f"{folder} has no comparison of a federation yet")
        return {path.name: path for path in inside}
    return {"": folder}


def flat(row: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested keys joined with dots, and an interval ``x_ci`` as ``x_low`` and ``x_high``."""
    found: Row = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif key.endswith("_ci"):
            low, high = value or (None, None)
            found |= {f"{name[:-3]}_low": low, f"{name[:-3]}_high": high}
        else:
            found[name] = value
    return found


def _board_row(row: Mapping[str, Any]) -> Row:
    apart = (*DIFFERENCE, *TARGET, "groups", "robustness", "gain", "best_rounds")
    left = {key: value for key, value in row.items() if key not in apart}
    rounds = row["best_rounds"]
    left["best_round_ci"] = (min(rounds), max(rounds)) if rounds else None  # flat() makes _low and _high of it
    gain = row["gain"] or dict.fromkeys(("mean", "worst", "lose", "of"))
    return {**flat(left), **flat({"gain": gain})}


def _differences(rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        if row["difference"] is not None:
            yield flat({"method": row["method"], **{key: row[key] for key in DIFFERENCE}})


def _targets(rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """A row for every method and cost."""
    for row in rows:
        for cost, of in (row["to_target"] or {}).items():
            about = {"method": row["method"], "target": row["target"], "reached": row["reached"]}
            yield {**about, "seeds": row["seeds"], "cost": cost, **of}


def _fairness(rows: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        for attribute, of in (row["groups"] or {}).items():
            yield {"method": row["method"], "attribute": attribute, **of}


def _robustness(runs: Sequence[RunFolder]) -> Iterator[Row]:
    """A row for every run whose last global model was judged on inputs that were changed."""
    for run in runs:
        if of := run.history[-1].get("robustness"):
            yield {"method": run.label, "seed": run.seed, **of}


def _history(runs: Sequence[RunFolder]) -> Iterator[Row]:
    """The long form: a row for every measure of every judged round, beside what had been spent by then."""
    for run in runs:
        for line in run.history:
            about = {"method": run.label, "seed": run.seed, "round": line["round"]}
            about |= {key: line[key] for key in COSTS_SO_FAR if key in line}
            for measure, value in flat(line).items():
                if measure not in about and isinstance(value, int | float):
                    yield {**about, "measure": measure, "value": float(value)}


def _clients(runs: Sequence[RunFolder]) -> Iterator[Row]:
    for run in runs:
        for line in run.clients:
            yield {
                "method": run.label,
                "seed": run.seed,
                **{key: value for key, value in line.items() if not isinstance(value, Mapping | list)},
            }


def _ranks(ranks: Mapping[str, Any]) -> list[Row]:
    """A row for every method and federation."""
    return [
        {"method": method, "mean_rank": ranks["mean"][method], "federation": part, "rank": of[method]}
        for method in ranks["order"]
        for part, of in ranks["ranks"].items()
    ]


def _profile(found: Mapping[str, Any]) -> dict[str, list[Row]]:
    return {
        "bits": [{"term": term, **flat(of)} for term, of in found["bits"].items()],
        "clients": [
            {key: value for key, value in of.items() if not isinstance(value, Mapping | list)}
            for of in found["clients"]
        ],
    }


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    import pandas as pd

    frame: pd.DataFrame = pd.DataFrame(list(rows))
    # a column without any value has a type all the same: parquet's readers stumble over one of nothing
    for name in frame.columns[frame.isna().all()]:
        frame[name] = frame[name].astype(float)
    return frame


def _csv(rows: Sequence[Row]) -> bytes:
    return _frame(rows).to_csv(index=False, lineterminator="\n").encode()


def _parquet(rows: Sequence[Row]) -> bytes:
    held = io.BytesIO()
    _frame(rows).to_parquet(held, index=False, engine="pyarrow")
    return held.getvalue()


def _need_pyarrow() -> None:
    try:
        importlib.import_module("pyarrow")
    except ImportError:
        raise ConfigError("--format parquet needs pyarrow: pip install 'consilience[parquet]'") from None


_WRITERS: dict[str, tuple[str, Callable[[Any], bytes]]] = {
    "csv": ("csv", _csv),
    "parquet": ("parquet", _parquet),
    "latex": ("tex", str.encode),
}
