"""Partition specifications, as ``--partition`` takes them.

A specification joins parts with ``+``: at most one that assigns rows (``iid``, ``dirichlet:ALPHA``,
``dirichlet:ALPHA:equal``, ``shards:K``, ``natural:COLUMN``), one for quantities (``power:A``, ``sizes:ALPHA``),
any of the features (``rotate:G``, ``brightness:G``, ``noise:S``, ``blur:G``), ``permute:G`` and
``longtail:RATIO``. Or it is the path of a partition file, as every run writes one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from consilience.core.errors import ConfigError, nearest

NAMES = ("digits", "fashion-mnist", "adult", "synthetic", "synthetic-ondemand", "quadratic", "bilinear")
"""Data sets that have a name. Here, because nothing slow is imported here."""

_KIND = {
    "iid": "assignment",
    "dirichlet": "assignment",
    "shards": "assignment",
    "natural": "assignment",
    "power": "quantity",
    "sizes": "quantity",
    "rotate": "feature",
    "brightness": "feature",
    "noise": "feature",
    "blur": "feature",
    "permute": "concept",
    "longtail": "longtail",
}
_USAGE = {
    "iid": "iid",
    "dirichlet": "dirichlet:ALPHA or dirichlet:ALPHA:equal, with ALPHA > 0",
    "shards": "shards:K, with a whole number K >= 1 of classes per client",
    "natural": "natural:COLUMN",
    "power": "power:A, with A >= 0 (sizes fall as rank^-A)",
    "sizes": "sizes:ALPHA, with ALPHA > 0",
    "rotate": "rotate:G, with a whole number G >= 1 of groups",
    "brightness": "brightness:G, with a whole number G >= 1 of groups",
    "noise": "noise:S, with a standard deviation S >= 0",
    "blur": "blur:G, with a whole number G >= 1 of groups",
    "permute": "permute:G, with a whole number G >= 1 of groups",
    "longtail": "longtail:RATIO, with RATIO >= 1 (most common class / rarest class)",
}
_GROUPED = ("rotate", "brightness", "blur", "permute")
NEEDS_LABELS = ("dirichlet", "shards", "permute", "longtail")


@dataclass(frozen=True)
class Part:
    """One part of a specification: its name, its number (0 where it has none), and its word (a column, `equal`)."""

    name: str
    value: float = 0.0
    word: str = ""

    @property
    def count(self) -> int:
        """The number as a count of groups or classes."""
        return int(self.value)


@dataclass(frozen=True)
class Spec:
    """A parsed specification. feature: in the order written. The assignment is iid where none is written."""

    text: str
    assignment: Part = Part("iid")
    quantity: Part | None = None
    feature: tuple[Part, ...] = ()
    concept: Part | None = None
    longtail: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part."""
        rest = (self.quantity, *self.feature, self.concept, self.longtail)
        return (self.assignment, *(part for part in rest if part is not None))

    @property
    def grouped(self) -> tuple[Part, ...]:
        """The parts that divide the clients into groups, in the order in which groups are numbered."""
        return tuple(part for part in self.parts if part.name in _GROUPED)


def is_file(text: str) -> bool:
    """Whether a partition is given as a file rather than as a specification."""
    if text.endswith(".json"):
        return True
    return text.partition(":")[0].partition("+")[0] not in _KIND and Path(text).is_file()


def _part(text: str, spec: str) -> Part:
    name, _, rest = text.partition(":")
    if name not in _KIND:
        raise ConfigError(f"unknown partition '{text}' in '{spec}'{nearest(name, _KIND)}")
    wrong = ConfigError(f"partition '{text}' in '{spec}' should be {_USAGE[name]}")
    if name == "iid":
        if rest or ":" in text:
            raise wrong
        return Part(name)
    if name == "natural":
        if not rest:
            raise wrong
        return Part(name, word=rest)
    number, _, word = rest.partition(":")
    if (word and (name, word) != ("dirichlet", "equal")) or rest.endswith(":"):
        raise wrong
    try:
        value = float(number)
    except ValueError:
        raise wrong from None
    whole = name in (*_GROUPED, "shards")
    least = 1.0 if whole or name == "longtail" else 0.0
    if not math.isfinite(value) or value < least or (whole and value != int(value)):
        raise wrong
    if name in ("dirichlet", "sizes") and value == 0:
        raise wrong
    return Part(name, value, word)


def parse(text: str) -> Spec:
    """The specification ``text``, checked. Raises :class:`ConfigError` that names the part that is wrong.

    >>> parse("dirichlet:0.3+rotate:4").feature[0].count
    4
    """
    pieces = [piece.strip() for piece in text.split("+")]
    if "" in pieces:
        raise ConfigError(
            f"partition '{text}' has an empty part; join parts with one '+', as in dirichlet:0.3+rotate:4"
        )
    if len(pieces) > 1 and any(is_file(piece) for piece in pieces):
        raise ConfigError(f"partition '{text}': a partition file stands alone; its own specification is applied again")
    parts = [_part(piece, text) for piece in pieces]
    seen: dict[str, Part] = {}
    for part in parts:
        key = part.name if _KIND[part.name] == "feature" else _KIND[part.name]
        if key in seen:
            raise ConfigError(
                f"partition '{text}' has both '{seen[key].name}' and '{part.name}'; use one {key} part only"
            )
        seen[key] = part
    spec = Spec(
        text,
        seen.get("assignment", Part("iid")),
        seen.get("quantity"),
        tuple(part for part in parts if _KIND[part.name] == "feature"),
        seen.get("concept"),
        seen.get("longtail"),
    )
    if spec.quantity is not None:
        if spec.assignment.name == "natural":
            raise ConfigError(f"partition '{text}': {spec.quantity.name} cannot resize natural clients; leave it out")
        if spec.assignment.word == "equal":
            raise ConfigError(
                f"partition '{text}': equal sizes and {spec.quantity.name} exclude each other; leave out ':equal'"
            )
    return spec


def with_natural_default(spec: Spec, column: str) -> Spec:
    """``spec`` with ``iid`` read as "keep the clients that the data comes with" (its ``column``)."""
    if spec.assignment.name != "iid":
        return spec
    return parse("+".join([f"natural:{column}", *(p for p in map(str.strip, spec.text.split("+")) if p != "iid")]))
