"""Models with somebody who maximises: the players of a game, and an adversary in front of any model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from consilience.core.model import Factory, SplitModel


class Players(nn.Module):
    """``players``: the unknowns ``u`` and ``v`` of a game whose rows are ``(k, k + 2)``, drawn from N(0, 1); its output
    for each row is both of them, ``(n, 2 k)``. Raises ValueError for other inputs."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        if len(input_shape) != 2 or input_shape[1] != input_shape[0] + 2 or outputs != 2 * input_shape[0]:
            raise ValueError("players are for the rows of a game of two, (k, k + 2), as of --data bilinear")
        self.u, self.v = (nn.Parameter(torch.randn(input_shape[0])) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, k, k + 2)`` -> ``(n, 2 k)``."""
        return torch.cat([self.u, self.v]).expand(len(x), -1)


class _Climb(torch.autograd.Function):
    """The identity whose gradient is turned round, less a penalty: what descends behind it climbs g - rho x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rho: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.rho = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.rho * x - g, None


class Shifted(nn.Module):
    """Features of inputs that an adversary has moved, all by the same ``shift``; in evaluation they are as they are."""

    def __init__(self, inner: nn.Module, input_shape: tuple[int, ...], rho: float) -> None:
        super().__init__()
        self.inner, self.rho = inner, rho
        self.shift = nn.Parameter(torch.zeros(input_shape))

    def forward(self, x: Tensor) -> Tensor:
        """Of the inner module."""
        if self.training:
            x = x + _Climb.apply(self.shift, self.rho)  # type: ignore[no-untyped-call]
        out: Tensor = self.inner(x)
        return out


class Opposed(SplitModel):
    """``NAME+adversary:RHO``: a model and an adversary who moves all inputs by one delta (a universal perturbation):

        min_w max_delta  mean loss(w; x + delta) - (rho / 2) |delta|^2

    delta is a parameter whose gradient is turned round, so that every method's descent is the descent-ascent of this
    problem; with model ``linear`` and squared loss it is robust regression. delta starts at 0. What is deployed is w,
    on inputs as they are. A first layer with a bias over whole inputs (``logistic``, ``mlp``) can take back any common
    shift, so that in the end its delta is 0; ``linear`` and convolutions cannot.

    Raises ValueError for a model that is not split.
    """

    def __init__(self, factory: Factory, rho: float, input_shape: tuple[int, ...], outputs: int) -> None:
        model = factory(input_shape, outputs)
        if not isinstance(model, SplitModel):
            raise ValueError("an adversary stands in front of a split model (features and head)")
        super().__init__(Shifted(model.features, input_shape, rho), model.head, model.width)
