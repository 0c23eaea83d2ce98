"""Optimisers by name: plain SGD written out, those of :mod:`consilience.core.optimisers`, and everything else from
torch.optim or pytorch-optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError, nearest
from consilience.core.optimisers import OWN, Grokfast


class Optimizer(Protocol):
    """Changes parameters in place along a direction that points uphill."""

    def apply(self, directions: Sequence[Tensor], lr: float) -> None:
        """One step."""
        ...


class SGD:
    """y <- y - lr d, or with momentum  v <- momentum v + d,  y <- y - lr v  (v = d at the first step)."""

    def __init__(self, parameters: Sequence[Tensor], momentum: float) -> None:
        self._parameters = list(parameters)
        self._momentum = momentum
        self._velocity: list[Tensor] | None = None

    def apply(self, directions: Sequence[Tensor], lr: float) -> None:
        """One step; bit for bit torch.optim.SGD's."""
        steps = list(directions)
        if self._momentum:
            if self._velocity is None:
                self._velocity = [d.clone() for d in steps]
            else:
                torch._foreach_mul_(self._velocity, self._momentum)
                torch._foreach_add_(self._velocity, steps)
            steps = self._velocity
        torch._foreach_add_(self._parameters, steps, alpha=-lr)


class Library:
    """An optimiser of torch.optim or pytorch-optimizer, fed with directions as gradients."""

    def __init__(
        self, factory: Callable[..., Any], parameters: Sequence[nn.Parameter], options: dict[str, Any]
    ) -> None:
        self._parameters = list(parameters)
        self._inner = factory(self._parameters, **options)

    def apply(self, directions: Sequence[Tensor], lr: float) -> None:
        """One step of the library's optimiser."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        for p, d in zip(self._parameters, directions, strict=True):
            p.grad = d
        self._inner.step()
        for p in self._parameters:
            p.grad = None


SHARPNESS = ("sam", "asam", "gsam", "wsam", "looksam", "friendlysam", "bsam")
"""Names of pytorch-optimizer that are no optimisers of their own."""


@functools.cache
def factory(name: str) -> Callable[..., Any]:
    """The optimiser class called ``name``. Raises ConfigError with the nearest name."""
    if name in SHARPNESS:
        raise ConfigError(f"optimizer '{name}' needs two gradients a step: use the method fedsam")
    of_torch = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name in of_torch or name in OWN:
        return of_torch.get(name) or OWN[name]
    try:
        import pytorch_optimizer
    except ImportError:
        raise ConfigError(
            f"optimizer '{name}' is not in torch.optim{nearest(name, [*of_torch, *OWN])} "
            "(pip install pytorch-optimizer for some hundred more)"
        ) from None
    known = {key.lower(): key for key in pytorch_optimizer.get_supported_optimizers()}
    if name not in known:
        raise ConfigError(f"unknown optimizer '{name}'{nearest(name, [*of_torch, *OWN, *known])}")
    found: Callable[..., Any] = pytorch_optimizer.load_optimizer(known[name])
    return found


@functools.cache
def _steps(name: str) -> str:
    """Why an optimiser cannot be used here, found by letting it make a step along a gradient; nothing if it can."""
    parameter = nn.Parameter(torch.ones(2, 2))
    try:
        Library(factory(name), [parameter], {"lr": 0.1}).apply([torch.ones(2, 2)], 0.1)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def split(name: str) -> tuple[str, bool]:
    """An optimiser's own name, and whether ``grokfast+`` stands in front of it."""
    own = name.removeprefix("grokfast+")
    return own, own != name


def check(name: str, momentum: float, weight_decay: float) -> dict[str, float]:
    """The options that an optimiser takes beside lr. Raises ConfigError if it is not known, lacks one of them, or needs
    more than a gradient."""
    given = {key: v for key, v in (("momentum", momentum), ("weight_decay", weight_decay)) if v}
    own, _ = split(name)
    if own == "sgd":
        return given
    accepted = inspect.signature(factory(own)).parameters
    for key in given:
        if key not in accepted:
            raise ConfigError(f"optimizer '{own}' has no {key}")
    why = _steps(own)
    if why:
        raise ConfigError(f"optimizer '{own}' cannot step along a gradient alone: {why}")
    return given


def make(name: str, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """An optimiser over ``parameters``. Plain SGD takes no weight decay here: it is part of the gradient."""
    own, filtered = split(name)
    made: Optimizer
    if own == "sgd":
        made = SGD([p.data for p in parameters], momentum)
    else:
        made = Library(factory(own), parameters, {"lr": lr, **check(own, momentum, weight_decay)})
    return Grokfast(made) if filtered else made
