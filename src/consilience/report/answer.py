"""The answer in two sentences, the picks for other aims, and the finding of every section.

Nothing here ever says that methods are equal: a test that finds no difference has only not found one.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from itertools import combinations
from typing import NamedTuple

from consilience.measure.statistics import paired_test
from consilience.report.facts import Entry, Facts, held
from consilience.report.words import NBSP, listed, plural
from consilience.report.words import p_value as plain_p_value


class Pick(NamedTuple):
    """The method to take if something else matters more than the score."""

    aim: str
    entry: Entry
    value: str
    price: str


def p_value(p: float, relation: str = "=") -> str:
    """:func:`consilience.report.words.p_value` for HTML."""
    return escape(plain_p_value(p, relation))


def names(entries: list[Entry]) -> str:
    """Names for a sentence."""
    return listed([escape(e.name) for e in entries])


def question(facts: Facts) -> str:
    """The question that the page answers."""
    clients = f"these {plural(facts.clients, 'client')}" if facts.clients > 1 else "this client"
    if len(facts.ranked) > 1:
        return f"Which federated method should {clients} use?"
    if facts.local is not None:
        return f"Does joining pay for {clients}?"
    return f"How well does {escape(facts.best.name)} do for {clients}?"


def winners(facts: Facts) -> list[Entry]:
    """Methods than which none is significantly better, best first."""
    return [e for e in facts.ranked if facts.comparison.rank[e.label] == 1]


def _who(facts: Facts) -> str:
    return "the global model" if facts.metric == "global" else "the average client"


def _gets(facts: Facts, value: str) -> str:
    return f"has a loss of {value}" if facts.lower else f"gets {value} right"


def first(facts: Facts) -> str:
    """Who wins, by how much, and whether that is real."""
    best, local = facts.best, facts.local
    score = f"{_who(facts)} {_gets(facts, facts.scale.text(best.mean))}"
    alone = facts.ahead(best.mean, local.mean) if local else 0.0
    if local is not None and alone <= 0:
        return _training_alone(facts, local, alone)
    over = f", {facts.scale.gap(alone)} {'less' if facts.lower else 'more'} than alone" if local else ""
    if len(facts.ranked) > 1:
        return _contest(facts, score, over)
    rounds = f" after {plural(facts.rounds, 'round')}"
    if local is None:
        return f"<b>{escape(best.name)}</b>: {score}{rounds}{_seed_note(facts)}."
    real, said = _against(facts, local)
    verdict = "Joining pays" if real else f"{escape(best.name)} is ahead of training alone"
    return f"<b>{verdict}</b>: with {escape(best.name)} {score}{over}{rounds}{said}."


def _training_alone(facts: Facts, local: Entry, alone: float) -> str:
    best = escape(facts.best.name)
    worse = f"is {facts.scale.gap(alone)} worse{_against(facts, local)[1]}" if alone < 0 else "is no better"
    reach = f"the {facts.scale.text(local.mean)} that the average client reaches on its own"
    if len(facts.ranked) > 1:
        return f"<b>Training alone wins</b>: no federated method beats {reach}, and the best, {best}, {worse}."
    return f"<b>Training alone wins</b>: {best} does not beat {reach}, it {worse}."


def _seed_note(facts: Facts) -> str:
    return f", mean of {len(facts.seeds)} seeds" if len(facts.seeds) > 1 else ""


def _against(facts: Facts, local: Entry) -> tuple[bool, str]:
    """Whether the best method differs from training alone, and how to say so."""
    seeds = sorted(facts.best.scores.keys() & local.scores.keys())
    if len(seeds) < 2:
        return False, ", but one seed cannot show whether that is real"
    p = paired_test([facts.best.scores[s] for s in seeds], [local.scores[s] for s in seeds])
    return p < 0.05, f", a real difference ({p_value(p)})" if p < 0.05 else f", which may be chance ({p_value(p)})"


def _contest(facts: Facts, score: str, over: str) -> str:
    compared, best, runner_up, gap = facts.comparison, facts.best, facts.ranked[1], facts.scale.gap
    than = "less" if facts.lower else "more"
    lead = f"{gap(best.mean - runner_up.mean)} {than} than with the next, {escape(runner_up.name)}"
    joined = f"with it {score}{over}{' and' if over else ','} {lead}"
    if not compared.tested:
        return f"<b>{escape(best.name)} is ahead</b>: {joined}, but one seed cannot show whether that is real."
    tied = [e for e in facts.ranked[1:] if not compared.differs(best.label, e.label)]
    worse = [e for e in facts.ranked[1:] if e not in tied]
    if not worse:
        return _undecided(facts)
    top = [best, *tied]
    p = max(compared.p[best.label, e.label] for e in worse)
    real = f"a real difference ({p_value(p, '≤' if len(worse) > 1 else '=')})"
    if not tied:
        return f"<b>{escape(best.name)} wins</b>: {joined}, {real}."
    if len(top) > 3 or not all(compared.differs(a.label, b.label) for a in top for b in worse):
        which = names(worse) if len(worse) <= 3 else f"{len(worse)} methods"
        others = names(tied) if len(tied) <= 3 else f"{len(tied)} others"
        return (
            f"<b>{escape(best.name)} leads</b>: with it {score}{over}, {than} than with {which}, {real}; "
            f"between it and {others} none was found."
        )
    p = max(compared.p[a.label, b.label] for a in top for b in worse)
    smallest = min(compared.p[a.label, b.label] for a, b in combinations(top, 2))
    values = listed([facts.scale.number(e.mean) for e in top])
    unit = f"{NBSP}{facts.scale.unit}" if facts.scale.unit else ""
    margin = gap(facts.ahead(top[-1].mean, worse[0].mean))
    found = f"between the {'two' if len(top) == 2 else 'three'} none was found ({p_value(smallest, '≥')})"
    return (
        f"<b>{names(top)} win</b>: {_who(facts)} {_gets(facts, values + unit)}, at least {margin} {than} than with "
        f"{escape(worse[0].name)}, the next, a real difference ({p_value(p, '≤')}); {found}."
    )


def _undecided(facts: Facts) -> str:
    compared, gap = facts.comparison, facts.scale.gap
    low, high = sorted((facts.best.mean, facts.ranked[-1].mean))
    lie = "all lie" if facts.metric == "global" else "with all of them the average client lies"
    between = f"{lie} between {facts.scale.number(low)} and {facts.scale.text(high)}"
    smallest = min(p for p in compared.p.values() if p == p)
    if smallest < 0.05:
        return f"<b>No method is clearly best</b> of the {len(facts.ranked)}: {between}."
    could = ""
    if compared.detectable:
        seeds = plural(len(facts.seeds), "seed")
        could = f", and {seeds} could only have shown differences above about {gap(compared.detectable)}"
        if not facts.lower and compared.detectable >= 1:
            could = f", and {seeds} are too few to show any"
    return (
        f"<b>No difference was found</b> between the {len(facts.ranked)} methods: {between} "
        f"(smallest {p_value(smallest)}){could}."
    )


def second(facts: Facts) -> str:
    """How many clients lose, and the worst of them; without Local, how the worst-off tenth fares."""
    best = facts.best
    if best.gains:
        losers, total = best.losers, len(best.gains)
        seeds = len({dot.seed for dot in best.gains})
        cases = f"({plural(total // seeds, 'client')} &times; {plural(seeds, 'seed')})" if seeds > 1 else ""
        unit = "cases" if seeds > 1 else "clients"
        if not losers:
            return f"<b>No client loses by joining</b> with {escape(best.name)} {cases}".rstrip() + "."
        worst = min(losers, key=lambda dot: dot.value)
        where = f"client {worst.client}" + (f", seed {worst.seed}" if seeds > 1 else "")
        count = f"{len(losers)} of {total} {unit}"
        loses = f"In {count} a client loses by joining" if seeds > 1 else f"{count} lose by joining"
        return f"<b>{loses}</b> with {escape(best.name)} {cases}".rstrip() + (
            f", at worst {facts.scale.gap(worst.value)} ({where})."
        )
    worst10 = best.last("clients", "worst10")
    if worst10 is None or facts.lower:
        return ""
    text = f"With {escape(best.name)} the worst-off tenth of clients get {facts.scale.text(worst10)} right"
    if len(facts.ranked) == 1:
        text = f"The worst-off tenth of clients get {facts.scale.text(worst10)} right"
    mean = best.last("clients", "mean")
    return text + (f", the average client {facts.scale.text(mean)}." if facts.metric == "global" and mean else ".")


def picks(facts: Facts) -> list[Pick]:
    """What to take if something else matters more; nothing with a single method."""
    if len(facts.ranked) < 2:
        return []
    aims: list[tuple[str, Callable[[Entry], float | None], Callable[[Entry], str]]] = []
    scale = facts.scale
    if not facts.lower:
        aims.append(
            (
                "Worst-off clients",
                lambda e: None if (w := e.last("clients", "worst10")) is None else -w,
                lambda e: f"{scale.text(e.last('clients', 'worst10') or 0.0)} in the worst 10{NBSP}%",
            )
        )
    aims.append(("Traffic", lambda e: e.traffic, lambda e: f"{facts.traffic_unit.text(e.traffic)} per client"))
    key, aim = ("virtual_s", "Time on the devices") if facts.virtual else ("wall_s", "Time on this machine")
    aims.append((aim, lambda e: e.last(key), lambda e: facts.clock(key).text(e.last(key) or 0.0)))
    if facts.local is not None:
        aims.append(
            (
                "Fewest clients that lose",
                lambda e: float(len(e.losers)) if e.gains else None,
                lambda e: f"{len(e.losers)} of {len(e.gains)} lose",
            )
        )
    elif not facts.lower:
        aims.append(
            (
                "Even between clients",
                lambda e: e.last("clients", "std"),
                lambda e: f"{scale.gap(e.last('clients', 'std') or 0.0)} standard deviation",
            )
        )
    top = winners(facts) if facts.comparison.tested else [facts.best]
    found = []
    for aim, measure, text in aims:
        measured = [(value, i) for i, e in enumerate(facts.settled) if (value := measure(e)) is not None]
        if not measured:
            continue
        value, i = min(measured)
        entry = facts.settled[i]
        shared = sum(v == value for v, _ in measured) - 1
        found.append(Pick(aim, entry, text(entry), _price(facts, entry, top, shared)))
    return found


def _price(facts: Facts, entry: Entry, top: list[Entry], shared: int) -> str:
    also = f"; {shared} other{'s' if shared > 1 else ''} the same" if shared else ""
    if entry is facts.best:
        return "The best already" + also
    if entry in top:
        return "No worse was found" + also
    worse = "more loss" if facts.lower else "less accurate"
    return f"but {facts.scale.gap(facts.best.mean - entry.mean)} {worse} than {facts.best.name}{also}"


def leaderboard_finding(facts: Facts) -> str:
    """Who is first, who is last."""
    if len(facts.ranked) == 1:
        return f"{escape(facts.best.name)} over {plural(len(facts.best.scores), 'seed')}, with its references below."
    top, last = winners(facts), facts.ranked[-1]
    gap = facts.scale.gap(facts.best.mean - last.mean)
    if not facts.comparison.tested:
        return f"In this order on one seed; {escape(last.name)} is last, {gap} behind {escape(facts.best.name)}."
    if len(top) == len(facts.ranked):
        return f"All share first place; {escape(last.name)} has the lowest mean, {gap} behind.".replace(
            "lowest", "highest" if facts.lower else "lowest"
        )
    share = "is first" if len(top) == 1 else "share first place"
    return f"{names(top)} {share}; {escape(last.name)} is last, {gap} behind {escape(facts.best.name)}."


def losers(facts: Facts) -> str:
    """One line that warns how many clients do worse than alone, by method; nothing without Local."""
    joined = [e for e in facts.entries if e.gains]
    counts = [f"{escape(e.name)} {len(e.losers)} of {len(e.gains)}" for e in joined if e.losers]
    if not counts:
        return "No client loses by joining, with any method." if joined else ""
    spared = [escape(e.name) for e in joined if not e.losers]
    return f"<b>Warning</b>, losing by joining: {listed(counts)}{f'; none with {listed(spared)}' if spared else ''}."


def clients_finding(facts: Facts) -> str:
    """Which methods cost how many clients accuracy, or how far apart clients are."""
    if facts.local is not None:
        return losers(facts) or "No client was evaluated with and without joining."
    dots = facts.best.accuracies(facts.lower)
    if not dots:
        return "Clients were not evaluated in this run."
    low, high = min(d.value for d in dots), max(d.value for d in dots)
    return f"With {escape(facts.best.name)} clients lie between {facts.scale.number(low)} and {facts.scale.text(high)}."


def federation_finding(facts: Facts) -> str:
    """How many classes and how many samples clients hold."""
    federation = facts.federation
    sizes = [int(n) for n in federation["sizes"]]
    spread = (
        f"from {min(sizes):,} to {max(sizes):,} training samples"
        if min(sizes) < max(sizes)
        else (f"{sizes[0]:,} training samples")
    )
    counts = federation.get("counts")
    if not counts:
        return f"Clients hold {spread}."
    classes, low, high = len(federation["classes"]), min(held(counts)), max(held(counts))
    which = (
        f"all {classes}"
        if low == high == classes
        else f"{low} to {high} of {classes}"
        if low < high
        else (f"{low} of {classes}")
    )
    return f"Clients hold {which} classes and {spread} each."


def cost_finding(facts: Facts) -> str:
    """Who sends least, who is done first."""
    if len(facts.ranked) == 1:
        best = facts.best
        wall = facts.clock("wall_s").text(best.last("wall_s") or 0.0)
        moved = facts.traffic_unit.text(best.traffic)
        return f"{escape(best.name)} moved {moved} per client in {wall} on this machine."
    least, most = (f(facts.settled, key=lambda e: e.traffic) for f in (min, max))
    quick, slow = (f(facts.settled, key=lambda e: e.last("wall_s") or 0.0) for f in (min, max))
    clock, unit = facts.clock("wall_s"), facts.traffic_unit
    same = least.traffic == most.traffic
    sent = (
        f"All send {unit.text(most.traffic)} per client"
        if same
        else f"{escape(least.name)} sends least ({unit.text(least.traffic)} per client), {escape(most.name)} most "
        f"({unit.text(most.traffic)})"
    )
    return (
        f"{sent}; on this machine {escape(quick.name)} is done in {clock.text(quick.last('wall_s') or 0.0)}, "
        f"{escape(slow.name)} in {clock.text(slow.last('wall_s') or 0.0)}."
    )


def curves_finding(facts: Facts) -> str:
    """Who first reaches what every ranked method ends at or beyond."""
    keys = ("global", facts.scale.noun) if facts.metric == "global" else ("clients", "mean")
    last = facts.ranked[-1]
    reached = []
    for entry in facts.ranked:
        rounds = [_reaches(facts, run.history, keys, last.mean) for run in entry.runs]
        known = [r for r in rounds if r is not None]
        if len(known) == len(rounds):
            reached.append((sum(known) / len(known), entry))
    target = facts.scale.text(last.mean)
    if len(facts.ranked) == 1 or not reached:
        return f"{escape(facts.best.name)} ends at {facts.scale.text(facts.best.mean)} after {facts.rounds:,} rounds."
    when, entry = min(reached, key=lambda pair: pair[0])
    what = f"what {escape(last.name)} ends at, {target}," if entry is not last else f"{target}"
    return f"{escape(entry.name)} reaches {what} first, after {plural(round(when), 'round')} of {facts.rounds:,}."


def _reaches(facts: Facts, history: list[dict[str, object]], keys: tuple[str, str], target: float) -> int | None:
    for line in history:
        part = line.get(keys[0])
        value = part.get(keys[1]) if isinstance(part, dict) else None
        if value is not None and facts.ahead(float(value), target) >= 0:
            return int(str(line["round"]))
    return None
