"""Optimisers that neither torch.optim nor pytorch-optimizer has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class AdaMomentum(torch.optim.Optimizer):
    """Adam whose second moment is that of the first moment instead of the gradient:

        m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) m^2 + eps
        y <- y - lr m' / sqrt(v'),   m' = m / (1 - b1^t),   v' = v / (1 - b2^t)

    eps is inside the accumulator. The first step is about lr / (1 - b1), so lr is to be a tenth of Adam's. Weight decay
    is added to the gradient.

    Source: Wang et al., "Momentum Provides a Better Second Moment" (AdaMomentum), from a summary.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the gradients that the parameters hold."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
                state["step"] += 1
                g = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                first = state["first"].lerp_(g, 1 - b1)
                second = state["second"].mul_(b2).addcmul_(first, first, value=1 - b2).add_(group["eps"])
                t = state["step"]
                p.addcdiv_(first, (second / (1 - b2**t)).sqrt_(), value=-group["lr"] / (1 - b1**t))


class Grokfast:
    """A filter in front of any optimiser that strengthens what is slow in the gradients:

        mu <- alpha mu + (1 - alpha) g  (mu = g at first);   the optimiser gets g + lam mu

    alpha = 0.98, lam = 2. Source: Lee, Kang, Kim, Lee, "Grokfast: Accelerated Grokking by Amplifying Slow Gradients",
    2024 (its exponential filter).
    """

    def __init__(self, inner: Any, alpha: float = 0.98, lam: float = 2.0) -> None:
        self._inner, self._alpha, self._lam = inner, alpha, lam
        self._slow: list[Tensor] | None = None

    def apply(self, directions: Sequence[Tensor], lr: float) -> None:
        """One step."""
        given = list(directions)
        if self._slow is None:
            self._slow = [d.clone() for d in given]
        else:
            torch._foreach_lerp_(self._slow, given, 1 - self._alpha)
        self._inner.apply(list(torch._foreach_add(given, self._slow, alpha=self._lam)), lr)


OWN: dict[str, Callable[..., Any]] = {"adamomentum": AdaMomentum}
"""By name."""
