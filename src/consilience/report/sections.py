"""The other sections of the report; every one stands alone and says so when it has nothing to show."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from consilience.report import answer
from consilience.report.blob import (
    HEAT,
    Point,
    axes,
    client_order,
    curve,
    judged_on_validation,
    measures,
    partitions,
    strip_blob,
    strips,
)
from consilience.report.evenness import evenness_table
from consilience.report.facts import Dot, Entry, Facts, held, unfinished
from consilience.report.markup import Cell, Column, details, empty, mark, named, note, radios, section, table
from consilience.report.trust import conditions
from consilience.report.words import NBSP, NONE, flop_unit, plural, rounds_of

ROWS = 200
"""A table of clients shows so many rows."""


def answer_section(facts: Facts, number: int) -> str:
    """Section "Answer"; it has no title, since the answer is the page's."""
    second = answer.second(facts)
    text = answer.first(facts) + (f' <span class="s2">{second}</span>' if second else "")
    chosen = "".join(
        f"<div><dt>{escape(p.aim)}</dt><dd><b>{named(p.entry)}</b><span class=v>{escape(p.value)}</span><br>"
        f"{escape(p.price)}</dd></div>"
        for p in answer.picks(facts)
    )
    box = f'<div class="picks"><h2>If something else matters more</h2><dl>{chosen}</dl></div>' if chosen else ""
    waiting = "".join(note(escape(text)) for text in unfinished(facts))
    return (
        f'<section id="answer" aria-labelledby="answer-h"><p class="question">{answer.question(facts)}</p>'
        f'<h1 class="answer" id="answer-h">{text}</h1>{box}{waiting}</section>\n'
    )


def curves_section(facts: Facts, number: int) -> str:
    """Section "Learning curves"."""
    shown = measures(facts)
    if not shown:
        inner = empty("Neither a global model nor clients were evaluated. Lower --eval-clients-every to see curves.")
        return section("curves", number, "Learning curves", answer.curves_finding(facts), inner)
    bands = '<label class="check"><input type="checkbox" id="bands" checked>95 % bands</label>'
    across = [(a.key, a.short) for a in axes(facts)]
    of, rounds = "loss" if facts.lower else "accuracy", [("last", "Last round"), ("best", "Best on validation")]
    inner = (
        '<noscript><p class="empty">The charts need JavaScript. Every table works without it.</p></noscript>'
        f'<div class="bar">{radios("x", "Horizontal axis", across)}{bands if len(facts.seeds) > 1 else ""}'
        f"{radios('pick', 'Model of', rounds) if judged_on_validation(facts) else ''}"
        f'<i class="br"></i>{radios("y", f"Vertical axis: {of} of", [(m.key, m.short) for m in shown])}</div>'
        '<div class="inlinekey"><span class="lab" id="k2">Methods shown</span>'
        '<div class="keys" role="group" aria-labelledby="k2" data-keys></div></div>'
        '<figure><figcaption><b id="cv-t"></b><span id="cv-s"></span></figcaption><div class="plot" id="cv"></div>'
        '<div class="range"><label class="sr" for="cvr">Read values at</label>'
        '<input type="range" id="cvr" min="0" max="100" value="100" step="1"><output id="cvo" for="cvr"></output></div>'
        f"</figure>{details('These values as a table', _curves_table(facts))}"
    )
    return section("curves", number, "Learning curves", answer.curves_finding(facts), inner)


def _curves_table(facts: Facts) -> str:
    marks = sorted({max(1, round(facts.rounds * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
    body = ""
    picks = (False, True) if judged_on_validation(facts) else (False,)
    for measure, best in [(measure, best) for measure in measures(facts) for best in picks]:
        rows = ""
        for entry in facts.entries:
            points = curve(entry, measure.keys, best=best)
            if not points:
                continue
            cells = ""
            for goal in marks:
                # the last evaluation at or before that round
                point = next((p for p in reversed(points) if p.round <= goal), None)
                cells += f"<td>{NONE if point is None else _point(facts, point, best)}</td>"
            rows += f'<tr><th scope="row" class="stick">{named(entry)}</th>{cells}</tr>'
        told = measure.title + (", of the round best on validation data so far" if best else "")
        title = f'<th scope="rowgroup" class="stick sub" colspan="{len(marks) + 1}">{escape(told)}</th>'
        body += f"<tbody><tr>{title}</tr>{rows}</tbody>"
    head = "".join(f'<th scope="col">Round {goal:,}</th>' for goal in marks)
    return (
        '<div class="scroll" role="region" aria-label="Values of the learning curves" tabindex="0"><table class="ct">'
        f'<caption class="sr">Learning curves at {len(marks)} rounds, mean over seeds and 95 % interval.'
        f'</caption><thead><tr><th scope="col" class="l stick">Method</th>{head}</tr></thead>{body}</table></div>'
    )


def _point(facts: Facts, point: Point, best: bool) -> str:
    """A point of a curve with its interval. best: and the rounds of the seeds that it is of."""
    beside = facts.scale.beside(point.mean, *point.interval(share=not facts.lower))
    told = facts.scale.number(point.mean) + (f' <span class="ci">{beside}</span>' if point.half else "")
    return told + (f'<br><span class="ci">{rounds_of(*point.shown)}</span>' if best else "")


def clients_section(facts: Facts, number: int) -> str:
    """Section "Who gains, who loses"."""
    blob, rounds = strip_blob(facts), [("last", "Last round"), ("best", "Best on validation")]
    title = "Who gains, who loses"
    if not blob["dots"]:
        inner = empty("No client was evaluated. Lower --eval-clients-every to see every client.")
        return section("clients", number, title, answer.clients_finding(facts), inner)
    one = f"One mark per client{' and seed (a seed changes the partition)' if len(facts.seeds) > 1 else ''}"
    if facts.local is not None:
        caption = (
            f"<b>{'Loss saved' if facts.lower else 'Accuracy gained'} by joining, per client</b>{one}: "
            f"{facts.scale.points or 'difference'} over training alone (Local). "
            '<span aria-hidden="true">▼</span> marks a client that loses.'
        )
        intro = ""
    else:
        caption = f"<b>{facts.scale.noun.capitalize()} per client</b>{one}, after its last evaluation."
        intro = ""
        if not any(e.reference == "local" for e in facts.entries):
            intro = empty(
                "Local was not among the methods, so gains cannot be computed. The chart shows "
                f"{facts.scale.noun} per client instead. Compare with <code>local</code> to see who gains."
            )
    switch, tables = "", _clients_table(facts)
    if blob["best"]:
        switch = radios("who", "Models of", rounds)
        tables += _clients_table(facts, best=True)
    inner = (
        f"{intro}{f'<div class=bar>{switch}</div>' if switch else ''}<figure><figcaption>{caption}</figcaption>"
        f'<div class="plot" id="strip"></div></figure>{evenness_table(facts)}{tables}'
    )
    return section("clients", number, title, answer.clients_finding(facts), inner)


def _clients_table(facts: Facts, *, best: bool = False) -> str:
    local, scale = facts.local, facts.scale
    entries = [e for e in facts.entries if e is not local]
    by: dict[str, dict[tuple[int, int], Dot]] = {
        k: {(d.seed, d.client): d for d in of} for k, of in strips(facts, best=best).items()
    }
    lead = by.get(facts.best.label, {})
    keys = sorted({key for of in by.values() for key in of})
    keys.sort(key=lambda key: lead[key].value * (-1 if facts.lower and local is None else 1) if key in lead else 0.0)
    alone = {(d.seed, d.client): d.value for d in local.accuracies(facts.lower, best=best)} if local is not None else {}
    sizes = {run.seed: run.federation.get("sizes") or () for run in facts.runs}
    columns = [Column("Client", up=True)]
    if len(facts.seeds) > 1:
        columns.append(Column("Seed", up=True))
    columns.append(Column("Samples"))
    if local is not None:
        columns.append(Column("Local", scale.unit))
    columns += [Column(e.name, "points" if local and scale.points else scale.unit, up=True) for e in entries]
    rows = []
    for seed, client in keys[:ROWS]:
        size = int(sizes[seed][client]) if client < len(sizes[seed]) else None
        cells = [Cell(str(seed))] if len(facts.seeds) > 1 else []
        cells.append(Cell(NONE, "") if size is None else Cell(f"{size:,}", size))
        if local is not None:
            cells.append(Cell(scale.number(alone.get((seed, client)))))
        for e in entries:
            dot = by[e.label].get((seed, client))
            if dot is None:
                cells.append(Cell(NONE, ""))
            elif local is None:
                cells.append(Cell(scale.number(dot.value), dot.value))
            else:
                cells.append(Cell(scale.signed(dot.value), dot.value, "neg" if dot.value < 0 else ""))
        rows.append((str(client), cells))
    at = ", at the round best on validation data" if best else ""
    what = f"{'Gain over Local' if local else scale.noun.capitalize()} of every client and method{at}."
    all_of = f"All {len(keys)}{at}" if len(keys) <= ROWS else f"The {ROWS} lowest of {len(keys)}{at}"
    all_of += ", as a table" if best else " as a table"
    return details(all_of, table(f"{what} Columns can be sorted.", what, columns, rows))


def federation_section(facts: Facts, number: int) -> str:
    """Section "The federation"."""
    found = partitions(facts)
    _, first = found[0]
    switch = radios("fs", "Partition of seed", [(str(i), str(seed)) for i, (seed, _) in enumerate(found[:10])])
    heat = bool(first.get("counts"))
    ramp = "".join(f'<i style="background:var(--r{i})"></i>' for i in range(7))
    legend = (
        f'<div class="legend"><span>0{NBSP}% <i class="ramp" aria-hidden="true">{ramp}</i> '
        f'<span id="fed-max">100{NBSP}%</span></span></div>'
    )
    grouped = "by group" if first.get("groups") else "by the class it holds most of"
    each = -(-len(first["sizes"]) // HEAT)
    rows = "One row per client" if each == 1 else f"Every row is the average of {each} clients"
    caption = (
        f"<b>Who holds what, and how much</b>{rows}, ordered {grouped}. Shade: share of the client&rsquo;s "
        "training samples in the class."
        if heat
        else f"<b>Who holds how much</b>{rows}: training samples."
    )
    inner = (
        f"{f'<div class=bar>{switch}</div>' if switch else ''}<figure><figcaption>{caption}</figcaption>"
        f'{legend if heat else ""}<div class="plot" id="fed"></div></figure>{_federation_table(first)}'
    )
    if len(found) > 1:
        inner += note(f"Every seed draws its own partition; the table is that of seed {found[0][0]}.")
    return section("federation", number, "The federation", answer.federation_finding(facts), inner)


def _federation_table(federation: Mapping[str, Any]) -> str:
    counts = federation.get("counts")
    classes = [str(c) for c in federation.get("classes") or ()] if counts else []
    unseen = {int(i) for i in federation.get("unseen") or ()}
    columns = [Column("Client", up=True), Column("Samples"), *([Column("Classes")] if classes else [])]
    columns += [Column(c) for c in classes]
    kept = held(counts) if counts else []
    rows = []
    for i in client_order(federation)[:ROWS]:
        cells = [Cell(f"{int(federation['sizes'][i]):,}", int(federation["sizes"][i]))]
        if counts:
            cells += [Cell(str(kept[i])), *(Cell(f"{n:,}", n) for n in counts[i])]
        rows.append((f"{i}{' (unseen)' if i in unseen else ''}", cells))
    total = len(federation["sizes"])
    summary = "These values as a table" if total <= ROWS else f"The first {ROWS} of {total} clients as a table"
    return details(summary, table("Training samples of every client.", "Samples of every client", columns, rows))


def cost_section(facts: Facts, number: int) -> str:
    """Section "What it cost"."""
    traffic, samples, wall = facts.traffic_unit, facts.sample_unit, facts.clock("wall_s")
    work = flop_unit(e.last("flops") for e in facts.entries)
    columns = [
        Column("Method"),
        Column("Down", f"{traffic.name} per client", True),
        Column("Up", f"{traffic.name} per client", True),
        Column("Both", f"{traffic.name} per client", True),
        Column("Samples", samples.name, True),
        Column("Steps", "", True),
        Column("Work", work.name, True),
        Column("Wall time", wall.name, True),
    ]
    clock = facts.clock("virtual_s")
    if facts.virtual:
        columns.append(Column("Virtual time", clock.name, True))

    def values(e: Entry) -> list[float | None]:
        down, up = (e.last("bytes_down") or 0.0) / e.clients, (e.last("bytes_up") or 0.0) / e.clients
        found = [down, up, e.traffic, e.last("samples"), e.last("steps"), e.last("flops"), e.last("wall_s")]
        return found + ([e.last("virtual_s")] if facts.virtual else [])

    units = [traffic, traffic, traffic, samples, None, work, wall, clock]
    ranked = [values(e) for e in facts.settled]
    # a column in which all are equal has no least
    least = [
        min(known) if len(set(known := [v for v in column if v is not None])) > 1 else None
        for column in zip(*ranked, strict=True)
    ]
    compared = any(value is not None for value in least)
    rows = []
    for e in facts.entries:
        cells = []
        for i, value in enumerate(values(e)):
            unit = units[i]
            absent = value is None or (i < 3 and value == 0)
            text = NONE if value is None or absent else unit.number(value) if unit else f"{value:,.0f}"
            best = e in facts.settled and not absent and value == least[i]
            cells.append(Cell(text, "" if absent else value, "best" if best else ""))
        rows.append((named(e), cells))
    text = (
        ("Bold: least in the column. " if compared else "")
        + "Whole run, mean of seeds. Bytes are those of the encoded messages, per client the average over "
        f"{plural(facts.clients, 'client')}. Wall time is this machine&rsquo;s"
        + ("; virtual time is simulated on the clients&rsquo; devices and links." if facts.virtual else ".")
    )
    caption = "Cost of every method over the whole run."
    inner = table(caption, "Cost table", columns, rows, "co") + note(text)
    return section("cost", number, "What it cost", answer.cost_finding(facts), inner)


def reproduce_section(facts: Facts, number: int) -> str:
    """Section "Reproduce"."""
    whole = facts.compare.get("command")
    told = [whole] if whole else [run.config.get("command") for run in facts.runs]
    commands = [_folded(str(command)) for command in dict.fromkeys(told) if command]
    title = "Command" if len(commands) == 1 else "Commands"
    command = (
        f'<div class="codehead"><h3>{title}</h3><button class="b" type="button" data-copy="cmd">Copy</button></div>'
        f'<pre id="cmd" tabindex="0" role="region" aria-label="{title}">{escape(chr(10).join(commands))}</pre>'
        if commands
        else empty("The command was not recorded: the run was started from Python. Its configuration is below.")
    )
    config = escape(_configuration(facts))
    inner = (
        f'{command}<div class="cols2 gap"><div><div class="codehead"><h3>Configuration</h3>'
        '<button class="b" type="button" data-copy="cfg">Copy</button></div>'
        f'<pre id="cfg" tabindex="0" role="region" aria-label="Configuration">{config}</pre></div>'
        f"<div><h3>Digests</h3>{_digests(facts)}<h3>Versions</h3>{_versions(facts)}</div></div>"
    )
    repeats = "These commands repeat" if len(commands) > 1 else "One command repeats"
    finding = (
        f"{repeats if commands else 'The configuration repeats'} every number above; equal digests mean equal bits."
    )
    return section("reproduce", number, "Reproduce", finding, inner)


def _folded(command: str, width: int = 76) -> str:
    """A command over several lines, broken before a word."""
    try:
        words = [shlex.quote(word) for word in shlex.split(command)]
    except ValueError:  # a lone quote: show it as it is
        return command
    lines, line = [], ""
    for word in words:
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])


APART = ("label", "method", "options", "seed", "versions", "command", "out", "fingerprint", "identity")


def _configuration(facts: Facts) -> str:
    import yaml

    configs = [run.config for run in facts.runs]
    shared = {
        key: value
        for key, value in configs[0].items()
        if key not in APART and all(key in c and c[key] == value for c in configs)
    }
    value: dict[str, Any] = {**shared, "seeds": facts.seeds}
    value["methods"] = {
        e.label: {**(e.runs[0].config.get("options") or {}), **_own(e.runs[0].config, shared)} for e in facts.entries
    }
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=60)).rstrip()


def _own(config: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in APART and key not in shared}


def _digests(facts: Facts) -> str:
    runs = [(e, run) for e in facts.entries for run in e.runs if run.finished]
    if not runs:
        return empty("No run is finished yet, so there are no digests.")
    rows = "".join(
        f'<tr><th scope="row">{mark(e)}{escape(e.name)}</th><td>{run.seed}</td>'
        + "".join(
            f'<td class="l hex" title="{escape(run.digests.get(part, ""))}">{escape(run.digests.get(part, NONE)[:10])}'
            f"{'…' if len(run.digests.get(part, '')) > 10 else ''}</td>"
            for part in ("server", "clients", "history")
        )
        + "</tr>"
        for e, run in runs
    )
    head = "".join(
        f'<th scope="col"{css}>{title}</th>'
        for title, css in [("Method", ' class="l"'), ("Seed", "")]
        + [(t, ' class="l"') for t in ("Server", "Clients", "History")]
    )
    shown = (
        '<div class="scroll" role="region" aria-label="Digests" tabindex="0"><table class="ct">'
        f'<caption class="sr">SHA-256 of every run.</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    return shown if len(runs) <= 12 else details(f"Digests of {len(runs)} runs", shown)


def _versions(facts: Facts) -> str:
    found: dict[str, list[str]] = {}
    for run in facts.runs:
        for key, value in (run.config.get("versions") or {}).items():
            values = found.setdefault(str(key), [])
            if str(value) not in values:
                values.append(str(value))
    if not found:
        return empty("The versions were not recorded.")
    rows = "".join(
        f'<tr><th scope="row">{escape(key.replace("_", " "))}</th><td class="l">{escape(", ".join(values))}</td></tr>'
        for key, values in found.items()
    )
    return (
        f'<table class="ct wrap"><caption class="sr">Versions of the software.</caption><tbody>{rows}</tbody></table>'
    )


def subject(facts: Facts) -> str:
    """What the page is about, for its head."""
    name = escape(str(facts.federation.get("name", "a federation")))
    count = len(facts.ranked)
    what = f"Comparison of {plural(count, 'method')}" if count > 1 else escape(facts.best.name)
    if facts.references:
        what += f" and {plural(len(facts.references), 'reference')}"
    unseen = len(facts.federation.get("unseen") or ())
    parts = [plural(facts.clients, "client"), *map(escape, conditions(facts.runs))]
    parts += [f"{unseen} more unseen"] if unseen else []
    parts += [plural(len(facts.seeds), "seed"), plural(facts.rounds, "round")]
    return f"{what} on <b>{name}</b>: {', '.join(parts)}"
