"""Proximal operators of simple regularisers r: prox_t(v) = argmin_x r(x) + ||x - v||^2 / (2 t), number by number.

    l1:LAM     r(x) = LAM ||x||_1              sign(v) max(|v| - t LAM, 0)
    l2:LAM     r(x) = LAM / 2 ||x||_2^2        v / (1 + t LAM)
    box:A:B    r(x) = 0 in [A, B], else infinite   min(max(v, A), B)

Source: Parikh and Boyd, "Proximal Algorithms", Foundations and Trends in Optimization, 2014, sections 6.1.1, 6.2.1 and
6.5.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from consilience.core.errors import ConfigError, nearest
from consilience.core.model import Params

KINDS = {"none": 0, "l1": 1, "l2": 1, "box": 2}
"""Names, and how many numbers follow them."""
USAGE = "none, l1:LAM, l2:LAM (LAM from 0 on) or box:A:B (A at most B)"


@dataclass(frozen=True)
class Regularizer:
    """r: its name, and its numbers."""

    kind: str
    numbers: tuple[float, ...] = ()

    def prox(self, params: Params, t: float) -> Params:
        """prox_t of all parameters; they themselves where r = 0."""
        if self.kind == "none":
            return params
        if self.kind == "box":
            low, high = self.numbers
            return {name: p.clamp(low, high) for name, p in params.items()}
        (lam,) = self.numbers
        if self.kind == "l2":
            return {name: p / (1 + t * lam) for name, p in params.items()}
        return {name: torch.sign(p) * (p.abs() - t * lam).clamp_min(0) for name, p in params.items()}


def parse(text: str, where: str) -> Regularizer:
    """A regulariser by name. Raises ConfigError."""
    kind, *rest = text.split(":")
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown regularizer '{kind}'{nearest(kind, KINDS)}; write {USAGE}")
    try:
        numbers = tuple(float(part) for part in rest)
    except ValueError:
        numbers = (math.nan,)
    good = len(numbers) == KINDS[kind] and not any(map(math.isnan, numbers))
    if good and kind == "box":
        good = numbers[0] <= numbers[1]
    elif good:
        good = all(0 <= number < math.inf for number in numbers)
    if not good:
        raise ConfigError(f"{where} {text}: write {USAGE}")
    return Regularizer(kind, numbers)
