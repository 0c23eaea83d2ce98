"""What has left a site, line by line, and who was turned away; its owner reads it with ``deploy ledger``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.tree import Tree
from consilience.folder import read_lines

FILE = "ledger.jsonl"


def fields_of(tree: Tree) -> dict[str, int]:
    """The fields of a message with the bytes of the tensors in each; 0 for numbers and words."""
    if isinstance(tree, dict):
        return {str(key): tr.nbytes(value) for key, value in tree.items()}
    if tr.is_record(tree):
        return {name: tr.nbytes(getattr(tree, name)) for name in tree._fields}
    return {"value": tr.nbytes(tree)}


def note(folder: Path, line: dict[str, Any]) -> None:
    """Append a line and see it on disk, before what it tells of leaves. A line that was cut off before was of nothing
    that left."""
    path = folder / FILE
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps({"time": round(time.time(), 3), **line}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[dict[str, Any]]:
    """All lines. Raises ConfigError."""
    path = folder / FILE
    if not path.exists():
        raise ConfigError(f"{path}: nothing has left this site (no ledger there)")
    return read_lines(path)


def show(folder: Path) -> Any:
    """The ledger as a table, with totals in its caption."""
    from rich.table import Table

    from consilience.deploy import budget, policy

    lines = read(folder)
    table = Table(
        title=f"What has left {folder.resolve().name}", box=None, title_justify="left", caption_justify="left"
    )
    for column in ("Time", "Run", "Round", "Message", "Fields"):
        table.add_column(column, justify="right" if column == "Round" else "left")
    table.add_column("Bytes", justify="right")
    for line in lines:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["time"]))
        if "refused" in line:
            table.add_row(clock, line.get("run", "-"), "-", "refused", line["refused"], "0")
            continue
        told = ", ".join(name if not size else f"{name} ({size:,} B)" for name, size in line["fields"].items())
        table.add_row(clock, line["run"], str(line["round"]), line["message"], told, f"{line['bytes']:,}")
    sent = [line for line in lines if "bytes" in line]
    table.caption = f"{len(sent)} messages, {sum(line['bytes'] for line in sent):,} bytes"
    costs = budget.costs(lines)
    if costs:
        delta = policy.read(folder / "policy.yaml").delta
        table.caption += f"; a row has spent epsilon {budget.spent(costs, delta):.3g} at delta {delta:g}"
    return table
