"""How the report writes names, numbers and units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MINUS, NONE, NBSP = "\u2212", "\u2013", "\u00a0"

NAMES = {
    "local": "Local",
    "centralised": "Centralised",
    "fedavgm": "FedAvgM",
    "fedsam": "FedSAM",
    "fedbn": "FedBN",
    "fedsa": "FedSA",
    "fedmd": "FedMD",
    "feddf": "FedDF",
    "fedgh": "FedGH",
    "fedkd": "FedKD",
    "fedtgp": "FedTGP",
    "lgfedavg": "LG-FedAvg",
    "fml": "FML",
    "knfu": "KnFu",
    "mhd": "MHD",
    "heterofl": "HeteroFL",
    "fedem": "FedEM",
    "fedgmm": "FedGMM",
    "fedrc": "FedRC",
    "fedasmu": "FedASMU",
    "feddisco": "FedDisco",
    "scaffold": "SCAFFOLD",
    "moon": "MOON",
    "ifca": "IFCA",
    "cfl": "CFL",
    "ahc": "AHC",
    "scool": "SCooL",
    "ditto": "Ditto",
    "dpsgd": "D-PSGD",
    "dadao": "DADAO",
    "finalmerge": "Final merging",
    "vargossip": "Variance-corrected gossip",
    "localgda": "Local GDA",
    "masha1": "MASHA1",
    "masha2": "MASHA2",
    "tracking": "Gradient tracking",
    "dproxsgt": "DProxSGT",
    "fedau": "FedAU",
    "fedasync": "FedAsync",
    "fedbuff": "FedBuff",
    "fedfix": "FedFix",
    "fedcompass": "FedCompass",
    "apfl": "APFL",
    "pfedme": "pFedMe",
    "perfedavg": "Per-FedAvg",
    "spectral": "Spectral co-distillation",
    "fedavg-m": "FedAvg-M",
    "fedavg-m-vr": "FedAvg-M-VR",
    "scaffold-m": "SCAFFOLD-M",
    "scaffold-m-vr": "SCAFFOLD-M-VR",
    "fedswa": "FedSWA",
    "fedmoswa": "FedMoSWA",
    "fedlex": "FedLEx",
    "fald": "FA-LD",
    "fedld": "FedLD",
    "ggeur": "GGEUR",
    "fedcog": "FedCOG",
    "fedetf": "FedETF",
    "ccvr": "CCVR",
    "fedloge": "FedLoGe",
    "curriculum": "Curriculum",
    "ida": "IDA",
    "fedce": "FedCE",
    "inco": "InCo",
    "flexifed": "FlexiFed",
    "fedadp": "FedADP",
    "fedd2s": "FedD2S",
    "cellm": "CELLM",
    "sgc": "SGC",
    "co2": "CO2",
    "onebyte": "One byte",
    "pfedgate": "pFedGate",
    "frl": "FRL",
    "fal": "FAL",
}
"""Spellings that the rule of :func:`display` does not give."""


def display(label: str, method: str) -> str:
    """A method's label as its authors spell the name: ``fedprox:mu=1`` becomes ``FedProx mu=1``."""
    rest = label[len(method) :] if label.startswith(method) else ""
    base = method if label.startswith(method) else label
    name = NAMES.get(base) or (f"Fed{base[3:4].upper()}{base[4:]}" if base.startswith("fed") else base)
    return name + (" " + rest.lstrip(":").replace(",", " ") if rest.startswith(":") else rest)


def fixed(value: float, digits: int = 1) -> str:
    """A number with a real minus sign, thousands separated, and no "-0.0"."""
    text = f"{abs(value):,.{digits}f}"
    negative = value < 0 and any(c in "123456789" for c in text)
    return (MINUS if negative else "") + text


def signed(value: float, digits: int = 1) -> str:
    """A difference, with its sign."""
    text = fixed(value, digits)
    return text if text.startswith(MINUS) or not any(c in "123456789" for c in text) else "+" + text


def p_value(p: float, relation: str = "=") -> str:
    """``p = 0.03``, ``p < 0.001``."""
    text = "p < 0.001" if p < 0.001 else f"p {relation} {p:.3f}" if p < 0.01 else f"p {relation} {p:.2f}"
    return text.replace(" ", NBSP)


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``, ``2 classes``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


class Unit(NamedTuple):
    """A unit for a whole column: ``value / factor`` with ``digits`` decimals."""

    name: str
    factor: float
    digits: int

    def number(self, value: float | None) -> str:
        """The value in this unit, without its name."""
        return NONE if value is None or math.isnan(value) else fixed(value / self.factor, self.digits)

    def text(self, value: float) -> str:
        """The value with the unit's name."""
        return f"{self.number(value)}{NBSP}{self.name}".rstrip(NBSP)


def _unit(values: Iterable[float | None], steps: Sequence[tuple[float, str, float]]) -> Unit:
    largest = max((v for v in values if v is not None), default=0.0)
    factor, name = next(((f, n) for least, n, f in reversed(steps) if largest >= least), (steps[0][2], steps[0][1]))
    whole = name in ("bytes", "") or largest / factor >= 100
    return Unit(name, factor, 0 if whole else 1 if largest / factor >= 3 else 2)


def byte_unit(values: Iterable[float | None]) -> Unit:
    """bytes, kB, MB or GB, after the largest value of a column."""
    return _unit(values, [(0, "bytes", 1), (1e3, "kB", 1e3), (1e6, "MB", 1e6), (1e9, "GB", 1e9)])


def flop_unit(values: Iterable[float | None]) -> Unit:
    """MFLOP, GFLOP or TFLOP, after the largest value of a column."""
    return _unit(values, [(0, "MFLOP", 1e6), (1e9, "GFLOP", 1e9), (1e12, "TFLOP", 1e12)])


def time_unit(values: Iterable[float | None]) -> Unit:
    """s, min or h, after the largest value of a column."""
    return _unit(values, [(0, "s", 1), (180, "min", 60), (3 * 3600, "h", 3600)])


def count_unit(values: Iterable[float | None]) -> Unit:
    """Plain, thousands or millions, after the largest value of a column."""
    return _unit(values, [(0, "", 1), (1e5, "thousand", 1e3), (1e6, "million", 1e6)])


def rounds_of(first: int, last: int) -> str:
    """``round 20``, or ``rounds 20 to 40`` where seeds differ."""
    return f"round {first:,}" if first == last else f"rounds {first:,} to {last:,}"


@dataclass(frozen=True)
class Scale:
    """How scores are written: accuracies in percent and points, losses as they are."""

    lower: bool

    @property
    def factor(self) -> float:
        return 1.0 if self.lower else 100.0

    @property
    def digits(self) -> int:
        return 3 if self.lower else 1

    @property
    def noun(self) -> str:
        return "loss" if self.lower else "accuracy"

    @property
    def unit(self) -> str:
        return "" if self.lower else "%"

    @property
    def points(self) -> str:
        return "" if self.lower else "points"

    def number(self, value: float | None) -> str:
        """``85.9``."""
        return NONE if value is None else fixed(value * self.factor, self.digits)

    def text(self, value: float) -> str:
        """``85.9 %``."""
        return f"{self.number(value)}{NBSP}{self.unit}".rstrip(NBSP)

    def beside(self, mean: float, low: float, high: float) -> str:
        """What stands beside a mean for its interval: ``± 1.2``, or both ends where they are not equally far, as where
        the interval was cut at 100 %."""
        up, down = self.number(high - mean), self.number(mean - low)
        return f"± {up}" if up == down else f"{self.number(low)}…{self.number(high)}"

    def gap(self, value: float) -> str:
        """``1.2 points``, of a difference's size."""
        return f"{self.number(abs(value))}{NBSP}{self.points}".rstrip(NBSP)

    def signed(self, value: float | None) -> str:
        """``+1.2``."""
        return NONE if value is None else signed(value * self.factor, self.digits)
