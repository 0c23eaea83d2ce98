"""The report of a run or a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from consilience.report import answer
from consilience.report.blob import page_blob
from consilience.report.facts import Facts, gather
from consilience.report.leaderboard import leaderboard_section
from consilience.report.sections import (
    answer_section,
    clients_section,
    cost_section,
    curves_section,
    federation_section,
    reproduce_section,
    subject,
)

SECTIONS: list[tuple[str, str, Callable[[Facts, int], str]]] = [
    ("answer", "Answer", answer_section),
    ("leaderboard", "Leaderboard", leaderboard_section),
    ("curves", "Learning curves", curves_section),
    ("clients", "Who gains, who loses", clients_section),
    ("federation", "The federation", federation_section),
    ("cost", "Cost", cost_section),
    ("reproduce", "Reproduce", reproduce_section),
]


def write_report(folder: Path | str) -> Path:
    """Write ``report.html`` into the folder of a run or a comparison; the old one stays until the new one is whole."""
    folder = Path(folder)
    page = render(gather(folder))
    target = folder / "report.html"
    handle, name = tempfile.mkstemp(dir=folder, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's own mode would let nobody else read it
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def render(facts: Facts) -> str:
    """The page as text."""
    assets = files("consilience.report") / "assets"
    alone = len(facts.entries) == 1
    left_out = {"leaderboard"} if alone and len(facts.seeds) == 1 else set[str]()
    if not facts.drawn:
        left_out.add("federation")
    shown = [s for s in SECTIONS if s[0] not in left_out]
    title = re.sub(r"<[^>]*>", "", answer.first(facts)).partition(":")[0]
    return Template((assets / "page.html").read_text("utf-8")).substitute(
        title=f"{title} · {escape(str(facts.federation.get('name', '')))} · Consilience",
        css=(assets / "page.css").read_text("utf-8"),
        subject=subject(facts),
        contents="".join(
            f'<li><a href="#{anchor}"><span>{i}</span>{name}</a></li>' for i, (anchor, name, _) in enumerate(shown, 1)
        ),
        sections="".join(make(facts, i) for i, (_, _, make) in enumerate(shown, 1)),
        key="" if alone else (assets / "key.html").read_text("utf-8"),
        blob=page_blob(facts),
        script=(assets / "page.js").read_text("utf-8"),
    )
