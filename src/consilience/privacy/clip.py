"""Clipping: no client's update is longer than a bound, whatever it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from consilience.core.errors import ConfigError, nearest

Kind = Literal["flat", "layers", "dim", "normalise", "adaptive"]
MARGIN = 1e-9
"""What a clipped vector stays below its bound, relative: more than rounding in float64 sums can add."""


class Clip(NamedTuple):
    """How updates are clipped, to norm C.

    flat: delta min(1, C / ||delta||). layers, dim: each of H tensors to C_h, with C_h = C / sqrt(H), or C sqrt(d_h / d)
    for d_h of d numbers, so that sum_h C_h^2 = C^2. normalise: where ||delta|| > C, every tensor is scaled to norm
    C / sqrt(H), small ones up. adaptive: flat, with C following the quantile of norms.

    layers, dim and normalise are made for large transformers (Pelikan, Azam, et al., 2023, "Enabling Differentially
    Private Federated Learning for Speech Recognition"; normalise is what the code does, the others the text);
    adaptive: Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS
    2021: C <- C exp(-0.2 (b - quantile)), where b is the noised share of clients at most C long.
    """

    kind: Kind = "flat"
    norm: float = 1.0
    quantile: float = 0.5

    def __str__(self) -> str:
        if self.kind == "adaptive":
            return f"adaptive:{self.quantile:g}:{self.norm:g}"
        return f"{self.norm:g}" if self.kind == "flat" else f"{self.kind}:{self.norm:g}"


def parse(text: str) -> Clip:
    """From ``C``, ``layers:C``, ``dim:C``, ``normalise:C`` or ``adaptive:QUANTILE[:FIRST]``. Raises ConfigError."""
    kind, *numbers = text.split(":")
    if not numbers:
        kind, numbers = "flat", [text]
    wrong = ConfigError(f"--dp-clip '{text}': C, layers:C, dim:C, normalise:C or adaptive:QUANTILE[:FIRST]")
    if kind not in get_args(Kind):
        raise ConfigError(f"{wrong}{nearest(kind, get_args(Kind))}")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        raise wrong from None
    if len(values) > (2 if kind == "adaptive" else 1) or not all(value > 0 for value in values):
        raise wrong
    if kind != "adaptive":
        return Clip(kind, values[0])  # type: ignore[arg-type]
    first = values[1] if len(values) == 2 else 0.1
    if values[0] >= 1 or math.isinf(first):
        raise ConfigError(f"--dp-clip '{text}': the quantile is between 0 and 1, the first norm finite")
    return Clip("adaptive", first, values[0])


def norm_of(vector: Sequence[Tensor]) -> tuple[float, float]:
    """The Euclidean norm of all tensors together, as (largest magnitude, norm in units of it): their product is the
    norm, but may overflow. A vector with a number that is not finite is (inf, 1)."""
    most = [float(part.abs().max()) for part in vector if part.numel()]
    if not all(map(math.isfinite, most)):  # before max(), which may pass over a nan
        return math.inf, 1.0
    largest = max(most, default=0.0)
    if largest == 0:
        return 0.0, 1.0
    return largest, math.sqrt(sum(float((part.double() / largest).square().sum()) for part in vector))


def clipped(vector: Sequence[Tensor], clip: Clip, norm: float | None = None) -> tuple[list[Tensor], bool]:
    """The vector at most ``norm`` long (the clip's own by default), in float64, and whether it was already. With an
    infinite norm it is left as it is. What holds a number that is not finite becomes 0."""
    bound = clip.norm if norm is None else norm
    if math.isinf(bound):
        return list(vector), True
    largest, length = norm_of(vector)
    within = largest * length <= bound * (1 - MARGIN)
    if clip.kind in ("flat", "adaptive") or (clip.kind == "normalise" and within):
        return _to(vector, bound, largest, length), within
    budgets = _budgets(vector, clip.kind, bound)
    up = clip.kind == "normalise"
    return [_to([part], b, *norm_of([part]), up)[0] for part, b in zip(vector, budgets, strict=True)], within


def _budgets(vector: Sequence[Tensor], kind: Any, bound: float) -> list[float]:
    if kind == "dim":
        total = max(1, sum(part.numel() for part in vector))
        return [bound * math.sqrt(part.numel() / total) for part in vector]
    return [bound / math.sqrt(len(vector))] * len(vector)


def _to(vector: Sequence[Tensor], bound: float, largest: float, length: float, up: bool = False) -> list[Tensor]:
    """A vector at most (``up``: exactly) so long."""
    bound *= 1 - MARGIN
    if largest == 0 or math.isinf(largest):
        return [torch.zeros_like(part, dtype=torch.float64) for part in vector]
    if largest * length <= bound and not up:
        return [part.double() for part in vector]
    return [part.double() / largest * (bound / length) for part in vector]
