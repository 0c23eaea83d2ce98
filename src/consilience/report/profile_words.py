"""What a profile says in words: the kind of heterogeneity, and what each number means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from consilience.report.words import NBSP, listed, plural

Profile = Mapping[str, Any]

NAMES = {
    "label_skew": ("Label skew", "I(C; Y)"),
    "feature_skew": ("Feature skew", "I(C; X | Y)"),
    "input_skew": ("Input skew", "I(C; X)"),
    "concept_shift": ("Concept shift", "I(C; Y | X)"),
    "total": ("Total", "I(C; X, Y)"),
    "quantity_skew": ("Quantity skew", "log2 n - H(C)"),
}
"""How each term is called and written; C is the client, Y the label, X the input."""
LEAST = 0.05
"""Less than so many bits is not worth a sentence."""


class Kind(NamedTuple):
    """A kind of heterogeneity: its name, the term that holds it, and how much of it there is, in bits."""

    name: str
    term: str
    bits: float


def kinds(profile: Profile) -> list[Kind]:
    """The kinds of heterogeneity that stand out, largest first.

    Feature skew and concept shift are two views of the same bits, and label skew moves concept shift too where classes
    overlap. The bits of feature skew are called concept shift as far as concept shift is more than what label skew
    alone gives, and left open where that does not settle it.
    """
    value = {name: row["value"] for name, row in profile["bits"].items()}
    skew, shift = value["feature_skew"], value["concept_shift"]
    alone = profile["bits"]["concept_shift"].get("by_label_skew", 0.0)
    least, most = min(max(shift - alone, 0.0), skew), min(shift, skew)
    if least < skew / 2 <= most:
        divided = [Kind("Feature skew or concept shift", "feature_skew", skew)]
    else:
        divided = [Kind("Feature skew", "feature_skew", skew - least), Kind("Concept shift", "concept_shift", least)]
    found = [
        Kind("Label skew", "label_skew", value["label_skew"]),
        *divided,
        Kind("Quantity skew", "quantity_skew", value["quantity_skew"]),
    ]
    return sorted((kind for kind in found if kind.bits >= LEAST), key=lambda kind: -kind.bits)


def of_most(row: Mapping[str, float]) -> str:
    """``0.81 of 2.90 bits, 28 %``."""
    share = f", {100 * row['value'] / row['max']:.0f}{NBSP}%" if row["max"] > 0 else ""
    return f"{row['value']:.2f} of {row['max']:.2f} bits{share}"


def meaning(profile: Profile, term: str) -> str:
    """One sentence about a term of this profile."""
    row = profile["bits"][term]
    much = row["value"] >= LEAST
    if term == "label_skew":
        tells = f"knowing the client gives {row['value']:.2f} of the {row['max']:.2f} bits that could tell the class"
        return f"Clients hold different classes: {tells}." if much else "All clients hold the classes in like shares."
    if term == "feature_skew":
        shares = {kind.name: kind.bits for kind in kinds(profile)}
        if "Feature skew or concept shift" in shares:
            return "Inputs of the same label differ: they look different, or the label means another thing."
        if much and shares.get("Concept shift", 0.0) > row["value"] / 2:
            return "Inputs of the same label differ between clients, because the label means something else."
        return "The same class looks different from client to client." if much else "A class looks alike everywhere."
    if term == "input_skew":
        return "Inputs alone tell something about the client." if much else "Inputs alone do not tell the client."
    if term == "concept_shift":
        if much and row.get("by_label_skew", 0.0) > row["value"] / 2:
            return "Classes overlap, so that label skew moves labels even where inputs are alike."
        return "The same input is labelled differently by different clients." if much else "Inputs mean the same label."
    if term == "total":
        return "All that input and label together tell about the client."
    sizes = [client["rows"] for client in profile["clients"]]
    same = min(sizes) == max(sizes)
    return f"{sizes[0]:,} training rows each." if same else f"From {min(sizes):,} to {max(sizes):,} training rows."


def first(profile: Profile) -> str:
    """The answer's first sentence, its verdict between ``<b>`` and ``</b>``."""
    clients = plural(len(profile["clients"]), "client")
    found, bits = kinds(profile), profile["bits"]
    if not found:
        most = max(bits[name]["high"] for name in bits)
        return f"<b>No heterogeneity was found</b> between {clients}: every kind reads at most {most:.2f} bits."
    lead = found[0]
    amount = of_most({**bits[lead.term], "value": lead.bits})
    rest = [f"{kind.name.lower()} ({kind.bits:.2f} bits)" for kind in found[1:]]
    more = f"; then {listed(rest)}" if rest else ""
    return f"<b>{lead.name}</b> sets these {clients} apart most: {amount}{more}."


def second(profile: Profile) -> str:
    """The answer's second sentence: groups of clients, or what was tried first elsewhere."""
    clusters, advice = profile["clusters"], profile["suggestions"]
    groups = ""
    if clusters["count"] > 1:
        sizes = sorted((len(group) for group in clusters["members"]), reverse=True)
        groups = f"They fall into {clusters['count']} groups ({listed([str(n) for n in sizes])} clients). "
    if not advice:
        return groups + "No federation of the benchmark is like it."
    count = len(advice[0]["rows"])
    near = "benchmark federation" if count == 1 else f"{count} benchmark federations"
    behind = f", {100 * advice[0]['behind']:.1f} points behind the best on average" if advice[0]["behind"] > 0 else ""
    return f"{groups}On the nearest {near}, <b>{advice[0]['method']}</b> did best{behind}."


def coverage(profile: Profile) -> str:
    """Who holds which classes, in a sentence."""
    low, middle, high = profile["coverage"]["classes_per_client"]
    total = len(profile["classes"])
    span = f"all {total} classes" if low == high == total else f"{low} to {high} of {total} classes (median {middle:g})"
    if low == high != total:
        span = f"{low} of {total} classes"
    said = [f"Clients hold {span}."]
    for key, text in (("held_by_one", "held by one client only"), ("missing", "held by nobody")):
        names = profile["coverage"][key]
        if names:
            shown = listed(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            said.append(f"{plural(len(names), 'class')} {'is' if len(names) == 1 else 'are'} {text}: {shown}.")
    return " ".join(said)


def distances(profile: Profile) -> list[tuple[str, str, str, str]]:
    """Rows of (distance, mean, largest, by chance)."""
    titles = {
        "label_js": "Labels: Jensen-Shannon, bits",
        "sliced_wasserstein": "Inputs: sliced Wasserstein, s.d.",
    }
    return [
        (titles[name], f"{row['mean']:.3f}", f"{row['largest']:.3f}", f"{row['by_chance']:.3f}")
        for name, row in profile["distances"].items()
    ]


def identity(row: Mapping[str, Any]) -> str:
    """Whether a pair of terms adds up to the total, without the full stop."""
    parts = row["sum"].replace("_", " ").replace("+", "and").capitalize()
    off = f"{abs(row['gap']):.3f} bits, interval ±{row['interval']:.3f}"
    return f"{parts} add up to the total ({off})" if row["holds"] else f"{parts} miss the total ({off})"


QUANTILES = {"least": "Least", "quarter": "25 %", "median": "Median", "three_quarters": "75 %", "most": "Most"}
"""Headings of a fleet's numbers."""


def amount(value: float) -> str:
    """A number in three figures."""
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
