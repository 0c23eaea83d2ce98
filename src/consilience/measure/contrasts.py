"""Paired differences from one chosen method: how large, how sure, and how sure these seeds could be at best."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from consilience.measure.statistics import holm, mean_interval, paired_test

ENUMERATED = 16
"""Up to so many pairs all sign flips are tried; beyond, ``DRAWN`` of them."""
DRAWN = 99_999


@dataclass(frozen=True)
class Difference:
    """A method less the reference, over the seeds that both have.

    mean: in the units of the scores, above 0 where the method's score is higher. interval: 95 %, None below two
    pairs. p, p_holm: paired t-test, before and after Holm's correction over all methods that were held against
    the reference. p_exact, p_exact_holm: the same by the sign-flip test. p_smallest: the smallest value that
    p_exact_holm can take with so many pairs and methods. nan: not tested.
    """

    method: str
    reference: str
    pairs: int
    mean: float
    interval: tuple[float, float] | None
    p: float
    p_holm: float
    p_exact: float
    p_exact_holm: float
    p_smallest: float


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p of Fisher's sign-flip test on the mean of paired differences (1935); nan without two pairs.

    Exact, and free of any assumption but that a difference has either sign with equal chance. Its smallest value is
    :func:`smallest_p`. Above ``ENUMERATED`` pairs the flips are drawn from a fixed stream: same values, same p.
    """
    n = len(differences)
    if n < 2:
        return math.nan
    numpy = importlib.import_module("numpy")
    d = numpy.asarray(differences, dtype=float)
    if n <= ENUMERATED:
        codes = numpy.arange(2**n)[:, None] >> numpy.arange(n) & 1
        sums = numpy.abs((1 - 2 * codes) @ d)
        extra = 0
    else:
        flips = numpy.random.default_rng(0).integers(0, 2, (DRAWN, n), dtype=numpy.int8)
        sums, extra = numpy.abs((1 - 2 * flips) @ d), 1
    slack = 1e-9 * float(numpy.abs(d).sum())  # sums in another order differ in their last bits
    hits = int((sums >= abs(float(d.sum())) - slack).sum())
    return (hits + extra) / (len(sums) + extra)


def smallest_p(pairs: int, tests: int = 1) -> float:
    """The smallest p that a sign-flip test of so many pairs can give, after Holm's correction over ``tests``."""
    if pairs < 2:
        return math.nan
    least = 2.0 ** (1 - pairs) if pairs <= ENUMERATED else 1 / (DRAWN + 1)
    return min(1.0, tests * least)


def differences(scores: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Difference]:
    """Every other method against ``reference``, by method. ``scores[method][seed]``; methods are paired by seed."""
    base = scores.get(reference, {})
    found: list[tuple[str, list[float], float, float]] = []
    for method, own in scores.items():
        if method == reference:
            continue
        seeds = sorted(own.keys() & base.keys())
        gaps = [own[s] - base[s] for s in seeds]
        found.append(
            (method, gaps, paired_test([own[s] for s in seeds], [base[s] for s in seeds]), sign_flip_test(gaps))
        )
    tests = sum(not math.isnan(p) for _, _, p, _ in found)
    corrected, exact = holm([p for _, _, p, _ in found]), holm([q for *_, q in found])
    return {
        method: Difference(
            method,
            reference,
            len(gaps),
            fmean(gaps) if gaps else math.nan,
            mean_interval(gaps),
            p,
            corrected[i],
            q,
            exact[i],
            smallest_p(len(gaps), tests),
        )
        for i, (method, gaps, p, q) in enumerate(found)
    }
