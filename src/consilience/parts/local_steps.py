"""What methods share that look at local steps as such: how long a client's path is, and how steps get smaller on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from consilience.core.errors import ConfigError
from consilience.core.messages import Reply
from consilience.core.method import Method


def plain_sgd(method: Method, momentum: bool = False) -> None:
    """Refuse local optimisers other than SGD; momentum: whether it may have some. Raises ConfigError."""
    if method.optimizer != "sgd" or (method.momentum and not momentum):
        allowed = "SGD" if momentum else "SGD without momentum"
        raise ConfigError(f"{method.name}: the local optimiser is {allowed}; use optimizer=sgd and momentum=0")


def lengths(method: Method, replies: Sequence[Reply]) -> list[float]:
    """K_i eta_i of each reply: its steps times the step size that they had."""
    return [reply.steps * method.rate(reply.job.version) for reply in replies]


def relative(
    shares: Sequence[float], lengths: Sequence[float], wanted: Sequence[float] | None = None
) -> tuple[list[float], float]:
    """w_i = p_i L / l_i, and L = sum_j p_j t_j / sum_j p_j; t are ``wanted``, or the lengths themselves.

    With these weights clients that went further count no more than others. Where all lengths are equal (and t with
    them) w is p bit for bit.
    """
    unit = max(lengths)
    mean = math.fsum(p * (t / unit) for p, t in zip(shares, wanted or lengths, strict=True)) / math.fsum(shares)
    return [p * (mean / (length / unit)) for p, length in zip(shares, lengths, strict=True)], mean * unit


def falling(lr: float, end: float, steps: int) -> Callable[[int], float]:
    """Step sizes lr ((1 - k/K) + (k/K) end) for k = 0 .. K - 1: from lr towards ``end`` times lr."""
    return lambda k: lr * ((1 - k / steps) + (k / steps) * end)
