"""Optimisers that neither torch.optim nor pytorch-optimizer has, and what may stand in front of any."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.model import Params
from consilience.core.tree import Tree


class Around(Protocol):
    """What an optimiser may ask about the batch of its step."""

    def gradient(self, at: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The gradient of the loss at the parameters, or at others."""
        ...

    def curvature(self) -> list[Tensor]:
        """z * (H z) for fresh random signs z, H being the Hessian of the loss at the parameters: the diagonal of H on
        average, and exactly where H is diagonal."""
        ...


class Optimizer(Protocol):
    """Changes parameters in place along a direction that points uphill."""

    def apply(self, directions: Sequence[Tensor], lr: float, around: Around | None = None) -> None:
        """One step."""
        ...

    def memory(self) -> Tree:
        """What it remembers after its steps: nothing of it changes with further ones."""
        ...

    def remember(self, memory: Tree) -> None:
        """Go on from there."""
        ...


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


class OASIS:
    """Steps scaled by the curvature, of a length that it finds by itself; with z random signs, F the loss on the batch:

        D <- beta D + (1 - beta) z * (H(y) z);   S = max(|D|, alpha);   y+ = y - eta d / S
        eta+ = min( sqrt(1 + theta) eta,  ||y - y-||_S / (2 ||grad F(y) - grad F(y-)||_{1/S}) ),   theta+ = eta+ / eta

    d is the direction (of FedAvg: the gradient), y- the parameters before the last step, ||v||_S^2 = sum_i S_i v_i^2;
    both gradients are of the same batch. lr is the first step's eta only, theta begins at infinity, and D as the mean
    of ``probes`` products at the first batch. beta = 0.99, alpha = 0.01. On a diagonal quadratic eta goes to 1/2.

    Source: Jahani, Rusakov, Shi, Richtarik, Mahoney, Takac, "Doubly Adaptive Scaled Algorithm for Machine Learning
    Using Second-Order Information", ICLR 2022. Deviation: 10 probes at the beginning instead of about 100, since local
    optimisers begin anew in each round. A step computes four gradients' worth of rows: the direction, the gradient at
    y-, and a Hessian product that counts as two.
    """

    def __init__(self, parameters: Sequence[Tensor], beta: float = 0.99, alpha: float = 0.01, probes: int = 10) -> None:
        self._parameters = list(parameters)
        self._beta, self._alpha, self._probes = beta, alpha, probes
        self._diagonal: list[Tensor] | None = None
        self._before: list[Tensor] = []
        self._eta, self._theta = 0.0, math.inf

    def apply(self, directions: Sequence[Tensor], lr: float, around: Around | None = None) -> None:
        """One step."""
        assert around is not None, "oasis asks about the batch"
        if self._diagonal is None:
            found = [around.curvature() for _ in range(self._probes)]
            self._diagonal = [torch.stack(column).mean(0) for column in zip(*found, strict=True)]
            scales, self._eta = self._scales(), lr
        else:
            torch._foreach_lerp_(self._diagonal, around.curvature(), 1 - self._beta)
            scales = self._scales()
            new = self._size(scales, around)
            self._theta, self._eta = new / self._eta, new
        self._before = [p.clone() for p in self._parameters]
        torch._foreach_addcdiv_(self._parameters, list(directions), scales, value=-self._eta)

    def _scales(self) -> list[Tensor]:
        assert self._diagonal is not None
        return [d.abs().clamp_(min=self._alpha) for d in self._diagonal]

    def _size(self, scales: Sequence[Tensor], around: Around) -> float:
        moved = torch._foreach_sub(self._parameters, self._before)
        turned = torch._foreach_sub(around.gradient(), around.gradient(self._before))
        far = math.fsum(float((v.square() * s).sum()) for v, s in zip(moved, scales, strict=True))
        steep = math.fsum(float((v.square() / s).sum()) for v, s in zip(turned, scales, strict=True))
        new = math.sqrt(1 + self._theta) * self._eta
        if steep:
            new = min(new, math.sqrt(far / steep) / 2)
        return new if 0 < new < math.inf else self._eta

    def memory(self) -> Tree:
        """Nothing: it asks about batches, which a server has none of."""
        raise NotImplementedError

    def remember(self, memory: Tree) -> None:
        """Nothing."""
        raise NotImplementedError


class Grokfast:
    """A filter in front of any optimiser that strengthens what is slow in the gradients:

        mu <- alpha mu + (1 - alpha) g  (mu = g at first);   the optimiser gets g + lam mu

    Source: Lee, Kang, Kim, Lee, "Grokfast: Accelerated Grokking by Amplifying Slow Gradients", 2024 (its exponential
    filter; alpha = 0.98, lam = 2).
    """

    def __init__(self, inner: Optimizer, alpha: float, lam: float) -> None:
        self._inner, self._alpha, self._lam = inner, alpha, lam
        self._slow: list[Tensor] | None = None

    def apply(self, directions: Sequence[Tensor], lr: float, around: Around | None = None) -> None:
        """One step."""
        given = list(directions)
        if self._slow is None:
            self._slow = [d.clone() for d in given]
        else:
            torch._foreach_lerp_(self._slow, given, 1 - self._alpha)
        self._inner.apply(list(torch._foreach_add(given, self._slow, alpha=self._lam)), lr, around)

    def memory(self) -> Tree:
        """The slow part, and the optimiser's."""
        return {"slow": tr.clone(self._slow), "inner": self._inner.memory()}

    def remember(self, memory: Tree) -> None:
        """Go on from there."""
        self._slow = tr.clone(memory["slow"])
        self._inner.remember(memory["inner"])


class SGG:
    """Steps of any optimiser, scaled by groups of parameters, found anew at the first step and every ``every`` steps:

        m <- 0.9 m + 0.1 g;   in each layer l the entries of m are put into K = 3 groups (k-means)
        D_lc = median over group c of |m_i - mean(m_l)|;   D = median over all D_lc
        S_lc <- clip( 0.99 S_lc + 0.01 D / (D_lc + 1e-8), 0.1, 10 )  (1 at first);   y+ = y + S * (optimiser's step)

    Parameters with fewer than two dimensions (biases, norms) are left alone. Where all of a layer's m are equal, D_lc
    is 0 and S goes to an end of its range.

    Source: Li, Tian, Wang, Jin, Liu, Zhang, Xu, "Taming LLMs by Scaling Learning Rates with Gradient Grouping" (SGG),
    ACL 2025, from a summary of the paper; public code weighs groups by mean |m| instead, which this is not. Deviations:
    k-means in one dimension runs to its end from quantiles instead of on mini-batches; m is kept here, whatever the
    optimiser keeps; groups are found every 10 steps instead of 500, and at the first step too, since local optimisers
    begin anew in each round.
    """

    def __init__(self, inner: Optimizer, parameters: Sequence[Tensor], every: int) -> None:
        self._inner, self._every, self._count = inner, every, 0
        self._parameters = list(parameters)
        self._layers = [i for i, p in enumerate(parameters) if p.dim() > 1]
        self._momentum: list[Tensor] | None = None
        self._groups: list[Tensor] = []
        self._scales = [torch.ones(GROUPS, dtype=torch.float64) for _ in self._layers]

    def apply(self, directions: Sequence[Tensor], lr: float, around: Around | None = None) -> None:
        """One step."""
        layers = [self._parameters[i] for i in self._layers]
        given = [directions[i] for i in self._layers]
        if layers:
            if self._momentum is None:
                self._momentum = [torch.zeros_like(d) for d in given]
            torch._foreach_lerp_(self._momentum, given, 0.1)
            if self._count % self._every == 0:
                self._regroup(self._momentum)
        before = [p.clone() for p in layers]
        self._inner.apply(directions, lr, around)
        for p, old, group, scale in zip(layers, before, self._groups, self._scales, strict=True):
            p.copy_(torch.addcmul(old, p - old, scale.to(p.dtype)[group]))
        self._count += 1

    def _regroup(self, momentum: Sequence[Tensor]) -> None:
        self._groups = [grouped(m) for m in momentum]
        found = deviations(momentum, self._groups)
        for scale, raw in zip(self._scales, scales(found), strict=True):
            scale.copy_(torch.where(raw.isnan(), scale, (0.99 * scale + 0.01 * raw).clamp(0.1, 10.0)))

    def memory(self) -> Tree:
        """Momentum, groups, scales, steps made, and the optimiser's."""
        own = {"momentum": self._momentum, "groups": self._groups, "scales": self._scales, "count": self._count}
        return {**tr.clone(own), "inner": self._inner.memory()}

    def remember(self, memory: Tree) -> None:
        """Go on from there."""
        own = tr.clone({key: value for key, value in memory.items() if key != "inner"})
        self._momentum, self._count = own["momentum"], own["count"]
        self._groups, self._scales = list(own["groups"]), list(own["scales"])
        self._inner.remember(memory["inner"])


GROUPS = 3


def grouped(values: Tensor) -> Tensor:
    """The group of each entry: k-means in one dimension, groups in ascending order, begun at quantiles."""
    ranked = values.detach().flatten().double().sort().values
    n, sums = len(ranked), torch.nn.functional.pad(ranked.cumsum(0), (1, 0))
    centres = ranked[[min(n - 1, int((k + 0.5) * n / GROUPS)) for k in range(GROUPS)]]
    for _ in range(100):
        edges = torch.searchsorted(ranked, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), n)])
        sizes = ends.diff()
        new = torch.where(sizes > 0, sums[ends].diff() / sizes.clamp(min=1), centres)
        if torch.equal(new, centres):
            break
        centres = new
    return torch.bucketize(values.detach().double(), (centres[1:] + centres[:-1]) / 2)


def deviations(momentum: Sequence[Tensor], groups: Sequence[Tensor]) -> list[Tensor]:
    """For each layer D of its groups, ``(GROUPS,)``; NaN for an empty one."""
    found = []
    for m, group in zip(momentum, groups, strict=True):
        away = (m.detach().double() - m.detach().double().mean()).abs()
        found.append(torch.stack([_median(away[group == k]) for k in range(GROUPS)]))
    return found


def scales(found: Sequence[Tensor]) -> list[Tensor]:
    """D / (D_lc + 1e-8), D being the median over layers and groups; NaN for an empty group."""
    everything = torch.cat(list(found))
    middle = _median(everything[~everything.isnan()])
    return [middle / (d + 1e-8) for d in found]


def _median(values: Tensor) -> Tensor:
    """The median, the mean of the middle two of an even number; NaN of none."""
    if not values.numel():
        return torch.tensor(math.nan, dtype=torch.float64)
    ranked, n = values.sort().values, len(values)
    return (ranked[(n - 1) // 2] + ranked[n // 2]) / 2


def worst_near(params: Params, gradient: Params, rho: float, adaptive: bool = False) -> Params | None:
    """Where the loss is worst nearby, to first order: y + rho g / ||g||, or with ``adaptive`` (ASAM) y + rho y^2 g /
    || |y| g ||, the norm over all parameters together. None where the gradient is 0."""
    ascent, measured = gradient, gradient
    if adaptive:
        measured = {name: params[name].abs() * g for name, g in gradient.items()}
        ascent = {name: params[name].square() * g for name, g in gradient.items()}
    norm = tr.norm(measured)
    if not norm:
        return None
    return {name: torch.add(params[name], e, alpha=rho / norm) for name, e in ascent.items()}


OWN: dict[str, Callable[..., Any]] = {"adamomentum": AdaMomentum}
"""Those that are torch optimisers, by name."""
