"""The worst inputs nearby: projected gradient ascent on a loss, within a box around each input."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.errors import ConfigError


class Bounds(NamedTuple):
    """The valid range of inputs; infinite where there is none."""

    low: float = -float("inf")
    high: float = float("inf")


def parse_bounds(text: str) -> Bounds:
    """``none``, or ``LOW:HIGH``. Raises ConfigError."""
    if text == "none":
        return Bounds()
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not low < high:
        raise ConfigError(f"bounds '{text}': none, or LOW:HIGH, the valid range of inputs, as 0:1")
    return Bounds(low, high)


def worst(
    losses: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, *, eps: float, size: float, steps: int, bounds: Bounds
) -> Tensor:
    """Inputs ``(n, ...)`` after ``steps`` steps up the loss, from ``x + start``:

        u <- P( u + size sign(grad_u losses(u)) ),   P: to |u - x| <= eps and to the bounds

    losses: the loss of each row. Parameters get no gradient. An input outside its bounds stays within eps of itself.
    Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018 (largest norm).
    """
    low = (x - eps).clamp(min=bounds.low).minimum(x)
    high = (x + eps).clamp(max=bounds.high).maximum(x)
    found = torch.clamp(x + start, low, high)
    for _ in range(steps):
        found.requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(losses(found).sum(), found)
        found = torch.clamp(found.detach() + size * slope.sign(), low, high)
    return found.detach()
