"""The report of a run or a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from consilience.report import answer
from consilience.report.architectures import architectures, architectures_section
from consilience.report.blob import page_blob
from consilience.report.calibration import calibration_section
from consilience.report.certainty import certainty_section
from consilience.report.clusters import clusters_section, personal
from consilience.report.devices import devices_section
from consilience.report.facts import Facts, gather
from consilience.report.groups import groups_section
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
from consilience.report.targets import target_section
from consilience.report.timeline import timelines
from consilience.report.traffic import lines, traffic_section
from consilience.report.trust import guarded, trust_section
from consilience.report.tuned import read_tuning, tuning_section

SECTIONS: list[tuple[str, str, Callable[[Facts, int], str]]] = [
    ("answer", "Answer", answer_section),
    ("leaderboard", "Leaderboard", leaderboard_section),
    ("certainty", "How sure", certainty_section),
    ("curves", "Learning curves", curves_section),
    ("target", "Cost to reach the target", target_section),
    ("traffic", "What bytes buy", traffic_section),
    ("clients", "Who gains, who loses", clients_section),
    ("clusters", "Personal models and clusters", clusters_section),
    ("architectures", "Architectures", architectures_section),
    ("calibration", "Calibration", calibration_section),
    ("groups", "Fairness between groups", groups_section),
    ("federation", "The federation", federation_section),
    ("devices", "Devices and time", devices_section),
    ("cost", "Cost", cost_section),
    ("trust", "Attack and privacy", trust_section),
    ("tuning", "Tuning", tuning_section),
    ("reproduce", "Reproduce", reproduce_section),
]


def write_report(folder: Path | str) -> Path:
    """Write ``report.html`` into the folder of a run or a comparison; the old one stays until the new one is whole."""
    folder = Path(folder)
    return save(folder / "report.html", render(gather(folder)))


def save(target: Path, page: str) -> Path:
    """Write a page; the old one stays until the new one is whole."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".report-", suffix=".html")
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


def asset(name: str) -> str:
    """The text of a file that pages are made of."""
    return (files("consilience.report") / "assets" / name).read_text("utf-8")


def frame(title: str, about: str, contents: Sequence[tuple[str, str]], sections: str, **more: str) -> str:
    """A whole page. title: in HTML. about: what it is about. contents: anchors and names of its ``sections``.

    more: ``key`` (HTML under the contents), ``blob`` (JSON without ``<``) and ``script``, each empty if not given.
    """
    return Template(asset("page.html")).substitute(
        title=title,
        css=asset("page.css"),
        subject=about,
        contents="".join(
            f'<li><a href="#{anchor}"><span>{i}</span>{name}</a></li>' for i, (anchor, name) in enumerate(contents, 1)
        ),
        sections=sections,
        key=more.get("key", ""),
        blob=more.get("blob", "{}"),
        script=asset("frame.js") + more.get("script", ""),
    )


def render(facts: Facts) -> str:
    """The page as text."""
    alone = len(facts.entries) == 1
    absent = {
        "leaderboard": alone and len(facts.seeds) == 1,
        "certainty": alone,
        "target": facts.compare.get("target") is None,
        "traffic": alone or not lines(facts),
        "tuning": read_tuning(facts.folder) is None,
        "architectures": len(architectures(facts)) < 2,
        "clusters": not personal(facts),
        "devices": not timelines(facts),
        "calibration": not any(e.calibration for e in facts.entries),
        "trust": not guarded(facts),
        "federation": "sizes" not in facts.federation,  # too many clients to draw
    }
    shown = [s for s in SECTIONS if not absent.get(s[0])]
    title = re.sub(r"<[^>]*>", "", answer.first(facts)).partition(":")[0]
    return frame(
        f"{title} · {escape(str(facts.federation.get('name', '')))} · Consilience",
        subject(facts),
        [(anchor, name) for anchor, name, _ in shown],
        "".join(make(facts, i) for i, (_, _, make) in enumerate(shown, 1)),
        key="" if alone else asset("key.html"),
        blob=page_blob(facts),
        script=asset("page.js"),
    )
