"""The pieces of HTML that sections share: marks, tables, empty states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from consilience.report.facts import SLOTS, Entry

SHAPES = (
    '<circle cx="7" cy="7" r="5" {0}/>',
    '<rect x="2.5" y="2.5" width="9" height="9" {0}/>',
    '<path d="M7 1.25L12.75 11.6H1.25z" {0}/>',
    '<path d="M7 .7L13.3 7L7 13.3L.7 7z" {0}/>',
    '<path d="M7 12.75L12.75 2.4H1.25z" {0}/>',
    '<path d="M5.1 1.5h3.8v3.6h3.6v3.8h-3.6v3.6h-3.8v-3.6h-3.6v-3.8h3.6z" {0}/>',
    '<path d="M12.75 7L9.9 12L4.1 12L1.25 7L4.1 2L9.9 2z" {0}/>',
    '<path transform="rotate(45 7 7)" d="M5.2 1.5h3.6v3.7h3.7v3.6h-3.7v3.7h-3.6v-3.7h-3.7v-3.6h3.7z" {0}/>',
)
OPEN = {
    "local": '<circle cx="7" cy="7" r="4.4" {0}/>',
    "centralised": '<rect x="2.8" y="2.8" width="8.4" height="8.4" {0}/>',
}


def colour(entry: Entry) -> str:
    """The CSS colour of a method; past the eighth, the one of references."""
    return f"var(--m{entry.slot + 1})" if 0 <= entry.slot < SLOTS else "var(--ref)"


def mark(entry: Entry, css: str = "sw") -> str:
    """A method's mark: its shape in its hue, so that neither has to be told apart alone."""
    if entry.reference and entry.slot < 0:
        shape = OPEN[entry.reference].format('fill="var(--bg)" stroke="var(--ref)" stroke-width="1.8"')
    else:
        shape = SHAPES[entry.slot % SLOTS].format(f'fill="{colour(entry)}"')
    return f'<svg class="{css}" width="14" height="14" aria-hidden="true">{shape}</svg>'


def named(entry: Entry) -> str:
    """The mark and the name, which may go on in another line after a sign."""
    return mark(entry) + re.sub(r"([=:,+])", r"\1<wbr>", escape(entry.name))


class Cell(NamedTuple):
    """A cell of a table: its HTML, the value it is sorted by, and a class."""

    html: str
    value: float | str | None = None
    css: str = ""

    def td(self) -> str:
        """The cell as HTML."""
        css = f' class="{self.css}"' if self.css else ""
        value = "" if self.value is None else f' data-v="{escape(str(self.value))}"'
        return f"<td{css}{value}>{self.html}</td>"


class Column(NamedTuple):
    """A column's head: its title, a small line under it, and where sorting starts."""

    title: str
    small: str = ""
    up: bool = False
    css: str = ""


def table(
    caption: str, label: str, columns: Sequence[Column], rows: Sequence[tuple[str, Sequence[Cell]]], css: str = "ct"
) -> str:
    """A sortable table that scrolls inside, its first column (already HTML) staying in sight."""
    head = "".join(
        f'<th scope="col"{_css(("l stick " if i == 0 else "") + c.css)}>'
        f'<button type="button"{" data-dir=asc" if c.up else ""}>{escape(c.title)}</button>'
        f"{f'<small>{escape(c.small)}</small>' if c.small else ''}</th>"
        for i, c in enumerate(columns)
    )
    body = "".join(
        f'<tr><th scope="row" class="stick">{first}</th>{"".join(cell.td() for cell in cells)}</tr>'
        for first, cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table class="{css} sortable">'
        f'<caption class="sr">{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _css(names: str) -> str:
    return f' class="{names.strip()}"' if names.strip() else ""


def details(summary: str, inner: str) -> str:
    """Something to open."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def radios(name: str, legend: str, options: Sequence[tuple[str, str]]) -> str:
    """A switch made of native radio buttons, the first one chosen; nothing to switch, nothing shown."""
    if len(options) < 2:
        return ""
    inputs = "".join(
        f'<label><input type="radio" name="{name}" value="{escape(value)}"{"" if i else " checked"}>'
        f"<span>{escape(text)}</span></label>"
        for i, (value, text) in enumerate(options)
    )
    return (
        f'<fieldset class="seg" data-state="{name}"><legend>{legend}</legend>'
        f'<div class="opts">{inputs}</div></fieldset>'
    )


def empty(text: str) -> str:
    """What a section shows when it has nothing: what is missing and what to add."""
    return f'<p class="empty">{text}</p>'


def note(text: str) -> str:
    """The small print under a figure."""
    return f'<p class="note">{text}</p>'


def section(anchor: str, number: int, title: str, finding: str, inner: str) -> str:
    """A numbered section: title, finding, content."""
    return (
        f'<section id="{anchor}" aria-labelledby="h-{anchor}"><h2 id="h-{anchor}"><span class="no">{number}</span>'
        f'{escape(title)}</h2><p class="find">{finding}</p>{inner}</section>\n'
    )
