"""Write those parts of the documentation that are made from the code: ``python docs/generate.py``.

Text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is replaced, and every method gets a page. Tests
compare :func:`files` with what is there, so that the pages cannot go stale.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from consilience import methods
from consilience.cards import cards
from consilience.config import TRAINING, Config
from consilience.core.method import Method
from consilience.data import spec

DOCS = Path(__file__).parent


def files() -> dict[Path, str]:
    """What every generated file should hold."""
    found = {DOCS / "methods" / f"{card['name']}.md": method_page(card) for card in cards()}
    parts = {"options": options(), "training": training(), "methods": method_table(), "usage": usage()}
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text("utf-8")
        found[path] = re.sub(
            r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
            lambda m: m[1] + parts[m[2]] + m[3],
            text,
            flags=re.DOTALL,
        )
    return found


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def value(default: Any) -> str:
    """A default as it would be typed."""
    if default is None or default == []:
        return "none"
    return f"`{','.join(map(str, default)) if isinstance(default, tuple) else default}`"


def options() -> str:
    """The options of :class:`Config`."""
    rows = [
        (f"`--{name.replace('_', '-')}`", value(field.default), str(field.description))
        for name, field in Config.model_fields.items()
    ]
    return table(("option", "default", "meaning"), rows)


def training() -> str:
    """The options of :class:`Training`."""
    rows = [
        (
            f"`--{name.replace('_', '-')}`",
            value(field.default),
            field.metadata["help"],
            str(field.metadata["search"] or ""),
        )
        for name, field in TRAINING.items()
    ]
    return table(("option", "default", "meaning", "searched by `--tune`"), rows)


def usage() -> str:
    """How each part of a partition is written, and the names of data sets."""
    parts = table(("part", "kind", "usage"), [(f"`{n}`", spec._KIND[n], spec._USAGE[n]) for n in spec._KIND])
    return f"Data sets: {', '.join(f'`{name}`' for name in spec.NAMES)}.\n\n{parts}"


def method_table() -> str:
    """All methods."""
    rows = [
        (f"[{c['name']}](methods/{c['name']}.md)", c["family"], c["summary"], f"{c['source']} {c['year']}")
        for c in cards()
    ]
    return table(("method", "family", "what it does", "source"), rows)


def method_page(card: dict[str, Any]) -> str:
    """A method's page: how to run it, its options, its equations and its code."""
    cls = methods.get(card["name"])
    base = Method.options()
    mine = [k for k in card["options"] if k not in base or card["options"][k]["default"] != base[k].default]
    options = card["options"]
    rows = [(f"`{k}`", value(options[k]["default"]), options[k]["help"], options[k]["search"] or "") for k in mine]
    text = ""
    if "__doc__ =" in inspect.getsource(cls):  # mkdocstrings reads only docstrings that stand in the source
        text = card["text"] + "\n\n"
        if "\n    Source:" in text:  # put together from indented parts, which the card leaves indented
            text = re.sub(r"^ {1,4}", "", text, flags=re.MULTILINE)
    own = table(("option", "default", "meaning", "searched by `--tune`"), rows) if rows else "None of its own.\n"
    needs = ", ".join(card["needs"]).replace("_", " ") or "nothing"
    return (
        f"# {card['name']}\n\n"
        f"{card['family'].capitalize()}. Source: {card['source']} {card['year']}. Needs: {needs}. "
        f"Schedule: `{cls().default_schedule()}`.\n\n"
        f"```sh\nconsilience run {card['name']} --partition dirichlet:0.3\n```\n\n"
        "## Options\n\n"
        f"{own}\n"
        "Options that every method has are in [Configuration](../configuration.md#training).\n\n"
        "## Equations and code\n\n"
        f"{text}::: {cls.__module__}.{cls.__name__}\n"
    )


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
