"""A profile as one HTML file that needs nothing else; all of it is drawn without script."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from consilience.report import profile_words as words
from consilience.report.blob import HEAT, client_order
from consilience.report.html import frame, save
from consilience.report.markup import Cell, Column, details, empty, note, section, table
from consilience.report.sections import ROWS
from consilience.report.words import NBSP, display, plural

Section = tuple[str, str, Callable[[words.Profile, int], str]]
COLUMNS = 60
"""The heat map shows so many classes, the largest."""
NAMED = 40
"""Clients are named on the map up to so many, where the groups do not name them."""
LETTERS = "ABCDEFGHIJ"


def sections(profile: words.Profile) -> list[Section]:
    """The page's sections in order: anchor, name, and what makes it. What else is known of a federation joins here."""
    devices = [("devices", "Devices", _devices)] if profile["fleet"] else []
    return [
        ("answer", "Answer", _answer),
        ("bits", "Kinds of heterogeneity", _bits),
        ("classes", "Who holds what", _classes),
        ("map", "Which clients are alike", _map),
        *devices,
        ("nearest", "What worked elsewhere", _nearest),
        ("limits", "Limits", _limits),
        ("reproduce", "Reproduce", _reproduce),
    ]


def write_profile(folder: Path) -> Path:
    """Write ``report.html`` into a folder that holds ``profile.json``."""
    profile: dict[str, Any] = json.loads((folder / "profile.json").read_text("utf-8"))
    return save(folder / "report.html", render(profile))


def render(profile: words.Profile) -> str:
    """The page as text."""
    shown = sections(profile)
    of = profile["federation"]
    title = re.sub(r"<[^>]*>", "", words.first(profile)).partition(":")[0]
    name = escape(f"{profile['name']}, {profile['partition']}" if profile["partition"] else str(profile["name"]))
    return frame(
        f"{escape(title)} · {name} · Consilience",
        f"Profile of <b>{name}</b>: {plural(of['clients'], 'client')}, {plural(of['rows'], 'training row')}",
        [(anchor, title) for anchor, title, _ in shown],
        "".join(make(profile, i) for i, (_, _, make) in enumerate(shown, 1)),
        blob=json.dumps(profile, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _answer(profile: words.Profile, number: int) -> str:
    question = f"How do these {plural(len(profile['clients']), 'client')} differ?"
    return (
        f'<section id="answer" aria-labelledby="answer-h"><p class="question">{question}</p><h1 class="answer" '
        f'id="answer-h">{words.first(profile)} <span class="s2">{words.second(profile)}</span></h1></section>\n'
    )


def _bits(profile: words.Profile, number: int) -> str:
    rows = "".join(_row(profile, name) for name in words.NAMES)
    body = [
        (
            f"{title} <span class=ci>{escape(formula)}</span>",
            [
                Cell(f"{profile['bits'][name][key]:.3f}", profile["bits"][name][key])
                for key in ("value", "low", "high", "max")
            ],
        )
        for name, (title, formula) in words.NAMES.items()
    ]
    columns = [Column("Kind", css="l"), Column("Bits"), Column("Low", "95 %"), Column("High", "95 %"), Column("Most")]
    inner = (
        "<figure><figcaption><b>Heterogeneity in bits</b>Bar: estimate. Whisker: 95&nbsp;% interval. Track: the most "
        "it could be here. Dotted line: what half of the rows give.</figcaption>"
        f'<div class="bits">{rows}</div></figure>'
        + details("These values as a table", table("Bits of every kind.", "Bits of every kind", columns, body))
        + note(
            "C is the client of a training row, Y its label, X its input. Chance is subtracted, so that an i.i.d. "
            "federation reads 0. Label and feature skew add up to the total, and so do input skew and concept shift: "
            "they are two ways to divide the same bits."
        )
        + "".join(note(escape(f"{words.identity(row)}.")) for row in profile["identities"])
    )
    total = profile["bits"]["total"]
    finding = f"Input and label together tell {total['value']:.2f} of the {total['max']:.2f} bits that name the client."
    return section("bits", number, "Kinds of heterogeneity", finding, inner)


def _row(profile: words.Profile, name: str) -> str:
    title, formula = words.NAMES[name]
    row = profile["bits"][name]

    def at(value: float) -> float:
        return round(100 * min(value / row["max"], 1.0), 2) if row["max"] > 0 else 0.0

    exact = row["low"] == row["high"]
    whisker = (
        "" if exact else f'<u style="left:{at(row["low"])}%;width:{round(at(row["high"]) - at(row["low"]), 2)}%"></u>'
    )
    half = f'<s style="left:{at(row["half"])}%"></s>' if row.get("half", 0) > 0 else ""
    label = f"{title} {row['value']:.2f} bits, interval {row['low']:.2f} to {row['high']:.2f}, at most {row['max']:.2f}"
    return (
        f'<div><div class="row"><b>{title}<i>{escape(formula)}</i></b><span>{words.of_most(row)}</span></div>'
        f'<div class="track" role="img" aria-label="{label}"><i style="width:{at(row["value"])}%"></i>'
        f"{half}{whisker}</div>"
        f"<p>{escape(words.meaning(profile, name))}</p></div>"
    )


def _ordered(profile: words.Profile) -> list[int]:
    """Clients by cluster, then by the class they hold most of, as places in the profile's list."""
    clients = profile["clients"]
    groups = [client["cluster"] for client in clients] if profile["clusters"]["count"] > 1 else None
    return client_order({"counts": profile["counts"], "groups": groups, "sizes": [c["rows"] for c in clients]})


def _classes(profile: words.Profile, number: int) -> str:
    order, counts, clients = _ordered(profile), profile["counts"], profile["clients"]
    totals = [sum(row[k] for row in counts) for k in range(len(profile["classes"]))]
    shown = sorted(sorted(range(len(totals)), key=lambda k: (-totals[k], k))[:COLUMNS])
    each = -(-len(order) // HEAT)
    rows = [order[i : i + each] for i in range(0, len(order), each)]
    shares = [
        [sum(counts[i][k] for i in row) / max(1, sum(clients[i]["rows"] for i in row)) for k in shown] for row in rows
    ]
    top = max((share for row in shares for share in row), default=1.0) or 1.0
    ramp = "".join(f'<i style="background:var(--r{i})"></i>' for i in range(7))
    per = "One row per client" if each == 1 else f"Every row is the average of {each} clients"
    by = "by group" if profile["clusters"]["count"] > 1 else "by the class it holds most of"
    some = "" if len(shown) == len(totals) else f" The {len(shown)} largest of {len(totals)} classes are shown."
    kind = profile["federation"]["labels"]
    inner = (
        f"<figure><figcaption><b>Clients by {kind}</b>{per}, ordered {by}. Shade: share of the client&rsquo;s training "
        f"rows in the class; at the right how many rows.{some}</figcaption>"
        f'<div class="legend"><span>0{NBSP}% <i class="ramp" aria-hidden="true">{ramp}</i> '
        f"{100 * top:.0f}{NBSP}%</span></div>"
        f"{_heat(profile, rows, shares, shown, top)}</figure>{_clients_table(profile, order)}"
    )
    return section("classes", number, "Who holds what", escape(words.coverage(profile)), inner)


def _heat(
    profile: words.Profile,
    rows: Sequence[Sequence[int]],
    shares: Sequence[Sequence[float]],
    shown: Sequence[int],
    top: float,
) -> str:
    clients, classes = profile["clients"], profile["classes"]
    sizes = [sum(clients[i]["rows"] for i in row) / len(row) for row in rows]
    height = 20 if len(rows) <= 24 else 13 if len(rows) <= 60 else 9
    turned = len(shown) > 12 or max(len(classes[k]) for k in shown) * len(shown) > 110
    cells = ["<b></b>", *(f"<b{' class=t' if turned else ''}>{escape(classes[k])}</b>" for k in shown), "<b></b>"]
    for row, share, size in zip(rows, shares, sizes, strict=True):
        name = clients[row[0]]["name"] if len(row) == 1 else ""
        cells.append(f"<span>{escape(str(name)) if height > 12 else ''}</span>")
        for k, part in zip(shown, share, strict=True):
            shade = max(1, min(6, round(part / top * 6))) if part > 0 else 0
            told = f"{escape(str(name))} {escape(classes[k])}: {100 * part:.0f} %"
            cells.append(f'<i style="background:var(--r{shade})" title="{told}"></i>')
        wide = 70 * size / max(sizes)
        cells.append(f'<u style="--w:{wide:.0f}%">{f"{size:,.0f}" if height > 12 else ""}</u>')
    label = f"Heat map of {plural(len(clients), 'client')} by {plural(len(shown), 'class')}; a table is below."
    grid = f"grid-template-columns:auto repeat({len(shown)},minmax(2px,1fr)) minmax(70px,18%)"
    grid += f";grid-auto-rows:minmax({height}px,auto)"
    return f'<div class="heat" role="img" aria-label="{label}" style="{grid}">{"".join(cells)}</div>'


def _clients_table(profile: words.Profile, order: Sequence[int]) -> str:
    clusters = profile["clusters"]["count"] > 1
    classes = profile["classes"][:COLUMNS]
    columns = [
        Column("Client", up=True),
        *([Column("Group", up=True)] if clusters else []),
        Column("Rows"),
        Column("Classes"),
    ]
    columns += [
        Column("Label entropy", "bits"),
        Column("Labels to all", "JS, bits"),
        *(Column(name) for name in classes),
    ]
    rows = []
    for i in order[:ROWS]:
        client = profile["clients"][i]
        cells = [Cell(LETTERS[client["cluster"]], client["cluster"])] if clusters else []
        cells += [Cell(f"{client['rows']:,}", client["rows"]), Cell(str(client["classes"]), client["classes"])]
        cells += [Cell(f"{client[key]:.2f}", client[key]) for key in ("label_entropy", "label_js_to_pooled")]
        cells += [Cell(f"{count:,}", count) for count in profile["counts"][i][:COLUMNS]]
        rows.append((escape(str(client["name"])), cells))
    total = len(profile["clients"])
    summary = "These values as a table" if total <= ROWS else f"The first {ROWS} of {total} clients as a table"
    return details(summary, table("Training rows of every client.", "Rows of every client", columns, rows))


def _map(profile: words.Profile, number: int) -> str:
    clients, clusters = profile["clients"], profile["clusters"]
    title = "Which clients are alike"
    if len(clients) < 2:
        return section("map", number, title, "One client has nobody to be like.", empty("A map needs two clients."))
    reach = max(max(abs(v) for v in client["position"]) for client in clients)
    scale = 44 / max(reach, 0.1)  # noise alone does not fill the picture
    marks = ""
    for client in clients:
        x, y = (50 + scale * v for v in client["position"])
        at = f"left:{x:.1f}%;top:{100 - y:.1f}%"
        name = escape(str(client["name"]))
        told = f"client {name}, {client['rows']:,} rows, {client['classes']} classes"
        if clusters["count"] > 1:
            marks += f'<span style="{at}" title="{told}">{LETTERS[client["cluster"]]}</span>'
        else:
            marks += f'<span class="dot" style="{at}" title="{told}"></span>'
            if len(clients) <= NAMED:
                marks += f'<em style="{at}">{name}</em>'
    letters = ", each with its letter" if clusters["count"] > 1 else ""
    caption = (
        f"<b>Clients in two dimensions{letters}</b>Near: their rows could be each other&rsquo;s, judged by label and "
        "input together. The axes have no meaning of their own."
    )
    label = f"Map of {plural(len(clients), 'client')} in {plural(clusters['count'], 'group')}."
    rows = [(escape(name), [Cell(value) for value in values]) for name, *values in words.distances(profile)]
    columns = [Column("Distance", css="l"), Column("Mean"), Column("Largest"), Column("By chance", "mean")]
    inner = (
        f'<div class="cols2"><figure><figcaption>{caption}</figcaption>'
        f'<div class="map" role="img" aria-label="{label}">{marks}</div></figure>'
        f"<div>{_groups(profile)}<h3>Distances between clients</h3>"
        + table("Distances between clients.", "Distances between clients", columns, rows)
        + note("By chance: the mean if all rows were dealt again at random, to the same client sizes.")
        + "</div></div>"
    )
    return section("map", number, title, _map_finding(profile), inner)


def _map_finding(profile: words.Profile) -> str:
    clusters = profile["clusters"]
    if clusters["count"] > 1:
        return f"{clusters['count']} groups of clients stand out (mean silhouette {clusters['silhouette']:.2f})."
    if clusters["largest"] < 0.05:
        return "All clients are alike."
    return "No groups stand out: clients differ, but not in a few kinds."


def _groups(profile: words.Profile) -> str:
    if profile["clusters"]["count"] < 2:
        return ""
    names = {client["client"]: str(client["name"]) for client in profile["clients"]}
    rows = "".join(
        f"<li><b>{LETTERS[i]}</b>, {plural(len(group), 'client')}: {escape(', '.join(names[c] for c in group[:40]))}"
        f"{' and others' if len(group) > 40 else ''}</li>"
        for i, group in enumerate(profile["clusters"]["members"])
    )
    return f'<h3>Groups</h3><ul class="plain">{rows}</ul>'


def _nearest(profile: words.Profile, number: int) -> str:
    rows, advice = profile["nearest"], profile["suggestions"]
    title = "What worked elsewhere"
    if not rows:
        return section(
            "nearest", number, title, "There is no benchmark to look at.", empty("The benchmark has no rows.")
        )
    names = [row["method"] for row in advice] or sorted(rows[0]["accuracy"])
    columns = [
        Column("Federation", css="l"),
        Column("Distance", up=True),
        Column("Clients"),
        Column("Rounds"),
        Column("Seeds"),
    ]
    columns += [Column(display(name, name), "%") for name in names]
    body = []
    for row in rows:
        best = max(row["accuracy"].values())
        cells = [Cell(f"{row['distance']:.2f}", row["distance"])]
        cells += [Cell(str(row[key]), row[key]) for key in ("clients", "rounds", "seeds")]
        for name in names:
            value, between = row["accuracy"][name], row["interval"][name]
            half = f' <span class="ci">± {50 * (between[1] - between[0]):.1f}</span>' if between else ""
            cells.append(Cell(f"{100 * value:.1f}{half}", value, "best" if value == best else ""))
        body.append((escape(f"{row['data']}, {row['partition']}"), cells))
    made = profile["benchmark"]
    inner = table("Nearest federations of the benchmark.", "Nearest federations", columns, body) + note(
        "Accuracy is the mean over clients, each on its own test rows, at the last round; bold: the best. Distance is "
        "between profiles, in shares of each skew&rsquo;s maximum. All methods had the same options, none was tuned. "
        f"Rows are from <code>{escape(made['file'])}</code>, made by <code>{escape(made['command'])}</code>."
    )
    finding = "None is near enough to suggest a method."
    if advice:
        best = display(advice[0]["method"], advice[0]["method"])
        finding = f"{best} did best on the nearest: a reason to try it, no proof."
    return section("nearest", number, title, finding, inner)


def _devices(profile: words.Profile, number: int) -> str:
    rows = profile["fleet"]
    columns = [Column("", up=True), *(Column(title) for title in words.QUANTILES.values())]
    cells = [
        (f"{escape(row['name'])} <small>{escape(row['unit'])}</small>", [
            Cell(words.amount(row[key]), row[key]) for key in words.QUANTILES
        ])
        for row in rows
    ]  # fmt: skip
    passes = next(row for row in rows if row["name"] == "pass over own rows")
    most, least = passes["most"], passes["least"]
    finding = "All need the same time for a pass over their rows."
    if least and most > 1.05 * least:
        times = words.amount(most / least)
        finding = f"A pass over its own rows takes the slowest client {times} times as long as the fastest."
    return section("devices", number, "Devices", finding, table("Devices", "Devices", columns, cells))


def _limits(profile: words.Profile, number: int) -> str:
    said = "".join(f"<li>{escape(text)}</li>" for text in profile["limits"])
    return section("limits", number, "Limits", "What these numbers cannot show.", f'<ul class="plain">{said}</ul>')


def _reproduce(profile: words.Profile, number: int) -> str:
    command = profile.get("command")
    inner = (
        '<div class="codehead"><h3>Command</h3><button class="b" type="button" data-copy="cmd">Copy</button></div>'
        f'<pre id="cmd" tabindex="0" role="region" aria-label="Command">{escape(str(command))}</pre>'
        if command
        else empty("The command was not recorded: the profile was made from Python.")
    )
    made = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in (profile.get("versions") or {}).items())
    return section(
        "reproduce", number, "Reproduce", "The same command gives the same numbers.", inner + note(escape(made))
    )
