"""A profile in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from consilience.report import profile_words as words
from consilience.report.words import NONE

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BAR = 20


def _table(title: str, heads: Sequence[tuple[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.min_width = len(title)  # a title is folded to the width of its table
    for head, justify in heads:
        table.add_column(head, justify=justify, no_wrap=head != "What it says")
    return table


def bar(share: float) -> str:
    """A share, 0 to 1, as blocks."""
    eighths = round(max(0.0, min(share, 1.0)) * _BAR * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")


def show(profile: words.Profile) -> list[RenderableType]:
    """What is printed, part by part; other facts about a federation are parts of their own."""
    return [
        _answer(profile),
        _bits(profile),
        _between(profile),
        *_devices(profile),
        *_nearest(profile),
        _limits(profile),
    ]


def _plain(text: str) -> str:
    return re.sub(r"<[^>]+>", "", text).replace("\u00a0", " ")


def _answer(profile: words.Profile) -> RenderableType:
    from rich.text import Text

    return Text(f"{_plain(words.first(profile))}\n{_plain(words.second(profile))}\n")


def _bits(profile: words.Profile) -> Table:
    title = f"Heterogeneity in bits: {profile['name']}, {profile['partition']}"
    right: Any = "right"
    table = _table(
        title, [("", "left"), ("", "left"), ("Bits", right), ("95 % CI", right), ("Most", right), ("", "left")]
    )
    for name, (title, formula) in words.NAMES.items():
        row = profile["bits"][name]
        exact = name == "quantity_skew"
        table.add_row(
            title,
            formula,
            f"{row['value']:.2f}",
            NONE if exact else f"{row['low']:.2f}…{row['high']:.2f}",
            f"{row['max']:.2f}",
            bar(row["value"] / row["max"] if row["max"] else 0.0),
        )
    return table


def _between(profile: words.Profile) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    table = _table(
        "Distances between clients", [("", "left"), *((head, "right") for head in ("Mean", "Largest", "By chance"))]
    )
    for row in words.distances(profile):
        table.add_row(*row)
    clusters = profile["clusters"]
    groups = "No groups of clients stand out."
    if clusters["count"] > 1:
        listed = "; ".join(
            ", ".join(map(str, group[:12])) + ("…" if len(group) > 12 else "") for group in clusters["members"]
        )
        groups = f"{clusters['count']} groups of clients (silhouette {clusters['silhouette']:.2f}): {listed}"
    return Group(table, Text(f"{groups}\n{words.coverage(profile)}\n"))


def _nearest(profile: words.Profile) -> list[RenderableType]:
    from rich.text import Text

    rows, advice = profile["nearest"], profile["suggestions"]
    if not rows:
        return []
    names = sorted(rows[0]["accuracy"], key=lambda name: [s["method"] for s in advice].index(name) if advice else name)
    table = _table(
        "Nearest federations of the benchmark, client mean accuracy %",
        [("", "left"), ("Distance", "right"), *((name, "right") for name in names)],
    )
    for row in rows:
        table.add_row(row["id"], f"{row['distance']:.2f}", *(f"{100 * row['accuracy'][name]:.1f}" for name in names))
    made = profile["benchmark"]
    said = "A reason to try, no proof." if advice else "None is near enough to suggest a method."
    return [table, Text(f"From {made['file']}, made by `{made['command']}`. {said}\n")]


def _devices(profile: words.Profile) -> list[RenderableType]:
    rows = profile["fleet"]
    if not rows:
        return []
    heads: list[tuple[str, Any]] = [("", "left"), ("Unit", "left")]
    table = _table("Devices", [*heads, *((title, "right") for title in words.QUANTILES.values())])
    for row in rows:
        table.add_row(row["name"], row["unit"], *(words.amount(row[key]) for key in words.QUANTILES))
    return [table]


def _limits(profile: words.Profile) -> RenderableType:
    from rich.text import Text

    said = [f"{words.identity(row)}." for row in profile["identities"] if row["holds"]]  # limits tell the others
    return Text("Limits\n" + "\n".join(f"- {text}" for text in [*said, *profile["limits"]]))
