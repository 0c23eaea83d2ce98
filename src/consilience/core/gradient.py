"""Gradients of a fit's loss: at its parameters and elsewhere, at the worst point nearby, and times the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError
from consilience.core.model import Instance, Params
from consilience.core.optim import Front
from consilience.core.optimisers import worst_near


class Batch(NamedTuple):
    """Rows of one step: inputs ``(b, *shape)``, targets ``(b, ...)``, and their row numbers ``(b,)``."""

    x: Tensor
    y: Tensor
    rows: Tensor


Models = Any
"""What a loss is given: the module, or a dict of modules when several are trained together."""
Loss = Callable[[Models, Batch], Tensor]
"""``loss(model, batch)`` -> scalar."""
Grad = Callable[..., Params]
"""``grad(params=None, batch=None)`` -> gradient by name, at the current or other parameters; the dropout key
of the step is the same at every call, and buffers move at the first call only. Clipped if the method clips; plain
SGD's weight decay is added after that."""


@dataclass
class Modules:
    """The modules of one fit, seen as one flat set of named parameters."""

    instances: dict[str, Instance]
    single: bool
    names: list[str] = field(default_factory=list)
    leaves: list[nn.Parameter] = field(default_factory=list)

    def choose(self, trainable: Callable[[str], bool] | None) -> None:
        for key, instance in self.instances.items():
            for name, p in instance.parameters.items():
                full = name if self.single else f"{key}/{name}"
                chosen = name not in instance.frozen if trainable is None else trainable(full)
                p.requires_grad_(chosen)
                if chosen:
                    self.names.append(full)
                    self.leaves.append(p)
        if not self.leaves:
            raise ValueError("nothing to train: no parameter was chosen as trainable")

    def flops(self) -> float:
        """FLOP for a row: forward and backward of every model of which anything is trained, forward of others."""
        total = 0.0
        for key, instance in self.instances.items():
            trained = self.single or any(name.startswith(f"{key}/") for name in self.names)
            cost = instance.architecture.flops
            total += cost.training if trained else cost.forward
        return total

    @property
    def modules(self) -> Models:
        return self.instances[""].module if self.single else {key: i.module for key, i in self.instances.items()}

    def live(self) -> Params:
        return {name: p.data for name, p in zip(self.names, self.leaves, strict=True)}

    def buffers(self) -> list[Tensor]:
        return [b for instance in self.instances.values() for b in instance.buffers.values()]

    def point(self, params: Params) -> None:
        for name, p in zip(self.names, self.leaves, strict=True):
            p.data = params[name]

    def read(self) -> Any:
        weights = {key: instance.weights() for key, instance in self.instances.items()}
        return weights[""] if self.single else weights


class Gradient:
    """The ``grad`` that a step is given."""

    def __init__(
        self, models: Modules, loss: Loss, operator: Any, clip: float | None, decay: float, total: bool
    ) -> None:
        self.models, self.loss, self.operator = models, loss, operator
        self.ask: Callable[[Batch], tuple[list[Tensor], float] | None] | None = None
        """Where the gradient can be had in company: at the live parameters of a stacked fit."""
        self.clip, self.decay = clip, decay
        self.sums = [torch.zeros_like(p) for p in models.leaves] if total else None
        self.batch: Batch | None = None
        self.live = models.live()
        self.seed, self.calls, self.value, self.rows = 0, 0, 0.0, 0
        self.keeps, self.first = False, list[Tensor]()
        """Whether a step's first gradient is kept, and it."""

    def begin(self, batch: Batch, seed: int) -> None:
        self.batch, self.seed, self.calls, self.first = batch, seed, 0, []

    def __call__(self, params: Params | None = None, batch: Batch | None = None) -> Params:
        models, batch = self.models, batch or self.batch
        assert batch is not None, "grad is for use within a step"
        elsewhere = params is not None and params is not self.live
        kept = [b.clone() for b in models.buffers()] if self.calls else []
        if elsewhere:
            assert params is not None
            models.point(params)
        try:
            gradients = self._backward(batch, elsewhere)
            if self.sums is not None and not self.calls:
                torch._foreach_add_(self.sums, gradients)
            if self.clip is not None:
                torch._foreach_mul_(gradients, (self.clip / (nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0))
            if self.decay:
                torch._foreach_add_(gradients, [p.data for p in models.leaves], alpha=self.decay)
        finally:
            if elsewhere:
                models.point(self.live)
            for buffer, old in zip(models.buffers(), kept, strict=False):
                buffer.copy_(old)
        if self.keeps and not self.calls and not elsewhere:
            self.first = [g.clone() for g in gradients]
        self.calls += 1
        self.rows += len(batch.x)
        return dict(zip(models.names, gradients, strict=True))

    def _backward(self, batch: Batch, elsewhere: bool) -> list[Tensor]:
        leaves = self.models.leaves
        found = None if self.ask is None or elsewhere else self.ask(batch)
        if found is not None:
            self.value = self.value if self.calls else found[1]
            return found[0]
        torch.default_generator.manual_seed(self.seed)
        if self.operator is not None:
            field_ = self.operator(self.models.modules, batch)
            return [field_[name].detach().clone() for name in self.models.names]
        value = self.loss(self.models.modules, batch)
        parts = torch.autograd.grad(value, leaves, allow_unused=True)
        if not self.calls:
            self.value = float(value.detach())
        return apart([torch.zeros_like(p) if g is None else g for g, p in zip(parts, leaves, strict=True)])

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the loss, weight decay included, times ``vectors``, for the step's batch. It counts as two
        gradients: one in order to have a graph of it, and its own."""
        models, leaves, batch = self.models, self.models.leaves, self.batch
        assert batch is not None, "product is for use within a step"
        if self.operator is not None:
            raise ConfigError(
                "this optimizer asks for the curvature of a loss, and the task has none; use optimizer=sgd"
            )
        kept = [b.clone() for b in models.buffers()]
        try:
            torch.default_generator.manual_seed(self.seed)
            value = self.loss(models.modules, batch)
            gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            bent = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
            parts: Sequence[Tensor | None] = [None] * len(leaves)
            if bent:
                parts = torch.autograd.grad([g for g, _ in bent], leaves, [v for _, v in bent], allow_unused=True)
        finally:
            for buffer, old in zip(models.buffers(), kept, strict=True):
                buffer.copy_(old)
        self.rows += 2 * len(batch.x)
        found = apart([torch.zeros_like(p) if h is None else h for h, p in zip(parts, leaves, strict=True)])
        if self.decay:
            torch._foreach_add_(found, list(vectors), alpha=self.decay)
        return found


class Sharp:
    """``grad`` with the gradient at the worst point nearby in the place of each gradient."""

    def __init__(self, grad: Gradient, front: Front) -> None:
        self._grad, self._rho, self._adaptive = grad, front.numbers[0], front.kind == "asam"

    def __call__(self, params: Params | None = None, batch: Batch | None = None) -> Params:
        here = self._grad(params, batch)
        near = worst_near(self._grad.live if params is None else params, here, self._rho, self._adaptive)
        return here if near is None else self._grad(near, batch)


class Asker:
    """What an optimiser may ask about a step's batch."""

    def __init__(self, grad: Gradient, rng: np.random.Generator) -> None:
        self._grad, self._rng = grad, rng
        grad.keeps = True

    def gradient(self, at: Sequence[Tensor] | None = None) -> list[Tensor]:
        if at is None:
            return self._grad.first or list(self._grad().values())
        return list(self._grad(dict(zip(self._grad.models.names, at, strict=True))).values())

    def curvature(self) -> list[Tensor]:
        leaves = self._grad.models.leaves
        signs = [torch.from_numpy(self._rng.integers(0, 2, p.shape)).to(p.dtype) * 2 - 1 for p in leaves]
        return list(torch._foreach_mul(self._grad.product(signs), signs))


def apart(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients, each in memory of its own, since they are changed in place: autograd may give two parameters
    the same tensor, or an expanded view."""
    seen: set[int] = set()
    for i, g in enumerate(gradients):
        if g.data_ptr() in seen or 0 in g.stride():
            gradients[i] = g = g.clone(memory_format=torch.contiguous_format)
        seen.add(g.data_ptr())
    return gradients
