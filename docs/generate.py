"""Write those parts of the documentation that are made from the code: ``python docs/generate.py``.

Text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is replaced, and every method gets a page. Tests
compare :func:`files` with what is there, so that the pages cannot go stale.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from consilience import methods
from consilience.cards import cards
from consilience.config import TRAINING, Config
from consilience.core.method import Method
from consilience.data import spec

DOCS = Path(__file__).parent
MEASURED = DOCS.parent / "benchmarks" / "results"
WORKLOADS = {"w1": "W1", "w2": "W2", "w3": "W3"}
OPPONENTS = {
    "floor": "floor", "channels-last": "floor, channels-last", "pfl": "pfl-research", "fedlab": "FedLab",
    "blazefl": "BlazeFL", "flower": "Flower",
}  # fmt: skip


def files() -> dict[Path, str]:
    """What every generated file should hold."""
    found = {DOCS / "methods" / f"{card['name']}.md": method_page(card) for card in cards()}
    parts = {
        "options": options(),
        "training": training(),
        "methods": method_table(),
        "usage": usage(),
        "speed": speed(),
        "compiled": compiled(),
        "architectures": measured("architectures"),
        "compression": measured("compression"),
        "personalisation": measured("personalisation"),
        "tracking": measured("tracking"),
        "decentralised": measured("decentralised"),
        "minimax": measured("minimax"),
        "privacy": measured("privacy"),
        "attacks": measured("attacks"),
        "cluster": cluster(),
        "reproduction": reproduction(),
    }
    found[DOCS / "growth.svg"] = growth()
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text("utf-8")
        found[path] = re.sub(
            r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
            lambda m: m[1] + parts[m[2]] + m[3],
            text,
            flags=re.DOTALL,
        )
    return found


def measured(name: str) -> str:
    """The tables of ``benchmarks/NAME.py``."""
    spec_ = importlib.util.spec_from_file_location(name, MEASURED.parent / f"{name}.py")
    assert spec_ is not None
    assert spec_.loader is not None
    module = importlib.util.module_from_spec(spec_)
    sys.modules[name] = module  # where its dataclasses look for themselves
    sys.path.insert(0, str(MEASURED.parent))  # as for a script
    try:
        spec_.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return f"{module.tables(module.KEPT.stored()).strip()}\n"


def reproduction() -> str:
    """The results of ``benchmarks/reproduction``."""
    sys.path.insert(0, str(DOCS.parent))
    try:
        found: str = importlib.import_module("benchmarks.reproduction.table").table()
    finally:
        sys.path.remove(str(DOCS.parent))
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


def speed() -> str:
    """What benchmarks/speed.py measured: rounds against the floor and other frameworks, then our own ratios."""
    found = json.loads((MEASURED / "speed.json").read_text())
    head = (
        "workload",
        "against",
        "its s a round",
        "ours",
        "ours / its",
        "its start, s",
        "ours",
        "its memory, GB",
        "ours",
    )
    rows = []
    for key, opponent in ((f"{w}-{o}", o) for w in WORKLOADS for o in OPPONENTS):
        if key in found:
            one, mine = found[key], "consilience"
            seconds, start, memory = (one[k] for k in ("seconds_a_round", "start_s", "peak_mb"))
            cells = [f"{seconds[opponent]:.3f}", f"{seconds[mine]:.3f}", f"**{one['ratio']:.2f}**"]
            cells += [f"{start[opponent]:.1f}", f"{start[mine]:.1f}"]
            cells += [f"{memory[side] / 1000:.2f}" for side in (opponent, mine)]
            rows.append((WORKLOADS[one["workload"]], OPPONENTS[opponent], *cells))
    others = []
    for method, sizes in json.loads((MEASURED / "population.json").read_text())["methods"].items():
        many, few = (sizes[n]["seconds_for_10000_rows"] for n in ("1000000", "1000"))
        what = f"{method}: 1,000,000 registered clients, against 1,000"
        others.append((what, "seconds for 10,000 rows", f"{many:.3g}", f"{few:.3g}", f"**{many / few:.2f}**"))
    if "compare" in found:
        (a, x), (b, y) = found["compare"]["seconds"].items()
        others.append((f"runs {a}, against {b}", "seconds", f"{x:.3g}", f"{y:.3g}", f"**{x / y:.2f}**"))
    extra = "\n" + table(("what", "measured", "first", "second", "ratio"), others)
    return table(head, rows) + extra


def compiled() -> str:
    """What benchmarks/compiled.py measured."""
    found = json.loads((MEASURED / "compiled.json").read_text())
    rows = []
    for model, ways in found.items():
        if isinstance(ways, dict):
            for way, one in ways.items():
                off = [f"**{d:.2f}**" if d > 1e-3 else f"{d:.0e}" for d in one["differences"].values()]
                rows.append((model, f"`{way}`", *off, f"{one['plain_ms']:.2f}", f"{one['compiled_ms']:.2f}"))
    return table(("model", "compiled by", "batch of 32", "then 24", "ms a step without", "with"), rows)


def cluster() -> str:
    """What benchmarks/cluster.py fitted, and what it says of larger clusters."""
    found = json.loads((MEASURED / "cluster.json").read_text())
    fit, runs = found["fit"], found["measured"]
    text = (
        f"Fitted to {len(runs)} runs: {1e3 * fit['round_s']:.2g} ms a round, {1e3 * fit['call_s']:.2g} ms a call and "
        f"{1e9 * fit['byte_s']:.2g} s for each GB moved. Runs differ from that by {fit['median_error']:.0%} "
        f"(median), at most {fit['largest_error']:.0%}.\n\n"
    )
    head = (
        "model",
        "method",
        "workers",
        "clients",
        "objects",
        "placed",
        "with calls",
        "with replies",
        "driver's seconds",
    )
    rows = [
        (
            row["model"], row["method"], f"{row['workers']:,}", f"{row['workers'] * row['each']:,}",
            f"{row['objects']:,.0f}",
            *(_bytes(row[key]) for key in ("placed_bytes", "call_bytes", "result_bytes")),
            f"**{row['driver_s']:.2g}**" if row["driver_s"] < 100 else f"**{row['driver_s']:,.0f}**",
        )
        for row in found["predicted"]
    ]  # fmt: skip
    return text + table(head, rows)


def _bytes(count: float) -> str:
    """Bytes in their unit."""
    if not count:
        return "0"
    size, unit = next(
        (s, u) for s, u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= s or u == "kB"
    )
    return f"{count / size:.3g} {unit}"


PANELS = {
    "participants": "participants a round",
    "registered clients": "registered clients, 100 a round",
    "parameters": "parameters of the model",
    "workers": "worker processes",
}
WIDTH, HEIGHT, LEFT, TOP = 380, 210, 52, 44


def growth() -> str:
    """What benchmarks/growth.py measured, as a picture: four panels of seconds a round, on logarithmic axes."""
    found = json.loads((MEASURED / "growth.json").read_text())
    panels = "".join(
        f'<g transform="translate({i % 2 * (WIDTH + 40)},{i // 2 * (HEIGHT + 60)})">{_panel(title, found[key])}</g>'
        for i, (key, title) in enumerate(PANELS.items())
    )
    style = (
        ".a{fill:#1b1f24}.b{fill:#57606a}.g{stroke:#d0d7de}.l{stroke:#0969da;fill:none;stroke-width:2}.p{fill:#0969da}"
        "@media(prefers-color-scheme:dark){.a{fill:#e6edf3}.b{fill:#9198a1}.g{stroke:#3d444d}"
        ".l{stroke:#58a6ff}.p{fill:#58a6ff}}"
    )
    width, height = 2 * WIDTH + 40, 2 * HEIGHT + 60
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img"><title>Seconds a round against participants, '
        f"registered clients, parameters and workers</title><style>{style}</style>{panels}</svg>\n"
    )


def _panel(title: str, points: list[list[float]]) -> str:
    """One panel: seconds a round (y) over a number (x), each point with its value."""
    xs, ys = zip(*points, strict=True)
    low, high = math.floor(math.log10(min(ys)) * 2) / 2, math.ceil(math.log10(max(ys)) * 2) / 2
    low, high = (low - 0.5, high) if high - low < 1 else (low, high)
    first, last = math.log(xs[0]), math.log(xs[-1])
    right, bottom = WIDTH - 30, HEIGHT - 26

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (math.log(x) - first) / (last - first) * (right - LEFT - 20) + 10
        return round(across, 1), round(bottom - (math.log10(y) - low) / (high - low) * (bottom - TOP), 1)

    text = f'<text class="a" x="0" y="16" font-weight="600">seconds a round over {title}</text>'
    for k in range(math.ceil(low), math.floor(high) + 1):
        y = at(xs[0], 10.0**k)[1]
        text += f'<path class="g" d="M{LEFT} {y}H{right}"/>'
        text += f'<text class="b" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{10.0**k:g} s</text>'
    places = [at(x, y) for x, y in points]
    text += f'<path class="l" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>'
    for (x, y), (n, seconds) in zip(places, points, strict=True):
        text += f'<circle class="p" cx="{x}" cy="{y}" r="3.5"/>'
        text += f'<text class="a" x="{x}" y="{y - 9}" text-anchor="middle">{seconds:.2g}</text>'
        text += f'<text class="b" x="{x}" y="{bottom + 18}" text-anchor="middle">{_short(n)}</text>'
    return text


def _short(n: float) -> str:
    """A number in few letters."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:g}"


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
