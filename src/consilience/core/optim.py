"""Optimisers by name: plain SGD written out, everything else from torch.optim or pytorch-optimizer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError, nearest


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


@functools.cache
def factory(name: str) -> Callable[..., Any]:
    """The optimiser class called ``name`` in any case. Raises ConfigError with the nearest name."""
    of_torch = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name in of_torch:
        return of_torch[name]
    try:
        import pytorch_optimizer
    except ImportError:
        raise ConfigError(
            f"optimizer '{name}' is not in torch.optim{nearest(name, of_torch)} "
            "(pip install pytorch-optimizer for some hundred more)"
        ) from None
    known = {key.lower(): key for key in pytorch_optimizer.get_supported_optimizers()}
    if name not in known:
        raise ConfigError(f"unknown optimizer '{name}'{nearest(name, [*of_torch, *known])}")
    found: Callable[..., Any] = pytorch_optimizer.load_optimizer(known[name])
    return found


def check(name: str, momentum: float, weight_decay: float) -> dict[str, float]:
    """The options that an optimiser takes beside lr. Raises ConfigError if it is not known or lacks one of them."""
    given = {key: v for key, v in (("momentum", momentum), ("weight_decay", weight_decay)) if v}
    if name == "sgd":
        return given
    accepted = inspect.signature(factory(name)).parameters
    for key in given:
        if key not in accepted:
            raise ConfigError(f"optimizer '{name}' has no {key}")
    return given


def make(name: str, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """An optimiser over ``parameters``. Plain SGD takes no weight decay here: it is part of the gradient."""
    if name == "sgd":
        return SGD([p.data for p in parameters], momentum)
    return Library(factory(name), parameters, {"lr": lr, **check(name, momentum, weight_decay)})
