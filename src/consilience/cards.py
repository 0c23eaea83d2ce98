"""Method cards: what each method is, says and needs, for people and for programs."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from consilience import methods
from consilience.core.method import Method

if TYPE_CHECKING:
    from rich.console import Console


_MIXED = {"same": "same_architecture", "widths": "nested_widths", "family": "one_family"}
"""What is needed of architectures, in a word; nothing where any may be mixed."""


def cards() -> list[dict[str, Any]]:
    """All methods' cards."""
    return [card(name) for name in methods.NAMES]


def card(name: str) -> dict[str, Any]:
    """A method's card: name, family, summary, source, year, needs, schedule, options, confidence, text."""
    cls = methods.get(name)
    text = inspect.cleandoc(cls.__doc__ or "")
    needs = [key for key, value in dataclasses.asdict(cls.needs).items() if value is True]
    mixed = _MIXED.get(cls.needs.architectures)
    return {
        "name": name,
        "family": cls.family,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "source": cls.source,
        "year": cls.year,
        "needs": needs if mixed is None else [mixed, *needs],
        "schedule": cls.schedule,
        "options": {key: _option(cls, key) for key in cls.options()},
        "unstacked": cls.unstacked,
        "confidence": cls.confidence,
        "text": text,
    }


def _option(cls: type[Method], key: str) -> dict[str, Any]:
    field = cls.options()[key]
    search = field.metadata.get("search")
    return {
        "default": field.default,
        "help": field.metadata.get("help", ""),
        "search": None if search is None else str(search),
    }


def show_cards(console: Console) -> None:
    """A table of all methods."""
    from rich import box
    from rich.table import Table

    table = Table("Method", "Family", "What it does", "Source", box=box.SIMPLE_HEAD, pad_edge=False)
    for c in cards():
        table.add_row(c["name"], c["family"], c["summary"], f"{c['source']} {c['year']}")
    console.print(table)


def show_card(console: Console, name: str) -> None:
    """One method's card in full."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    c = card(name)
    console.print(Text(f"{c['name']}   {c['family']}, {c['source']} {c['year']}", style="bold"))
    console.print(Text(c["text"]), soft_wrap=True)
    console.print()
    console.print(Text(f"needs: {', '.join(c['needs']).replace('_', ' ') or 'nothing'}"))
    console.print(Text(f"schedule: {c['schedule']}; confidence in this implementation: {c['confidence']}"))
    if c["unstacked"]:
        console.print(Text(f"executor stacked: no faster, since {c['unstacked']}"), soft_wrap=True)
    table = Table("Option", "Default", "Meaning", box=box.SIMPLE_HEAD, pad_edge=False)
    own = [key for key in c["options"] if key not in Method.options()]
    for key in [*own, *(key for key in c["options"] if key not in own)]:
        table.add_row(key, str(c["options"][key]["default"]), c["options"][key]["help"])
    console.print(table)
