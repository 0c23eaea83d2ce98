"""The only training loop: local steps of any optimiser on any tree of models, as a suspendable generator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from consilience.core import optim
from consilience.core.federation import Split
from consilience.core.model import Instance, Params, Weights
from consilience.core.tree import Tree

if TYPE_CHECKING:
    from consilience.core.site import Site


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
Step = Callable[[Params, Grad, Batch, Tree], tuple[Params, Tree]]
"""``step(params, grad, batch, carry)`` -> (direction, carry). The direction points uphill, as a gradient does."""

Together = Callable[[Any], Any]
"""Asks for a gradient (:class:`~consilience.core.stack.Wanted`) that is computed together with those of others."""


@dataclass
class Fit:
    """What training did. weights: trained, shaped as given. flops: computed, counting a model of which anything was
    trained as a whole. carry: as the last step left it. grad_sum: sum of the
    raw gradients of the loss over the steps (if asked for): before clipping and without weight decay. lr_sum: sum
    of the step sizes. loss: mean over the steps."""

    weights: Any
    carry: Tree
    grad_sum: Params
    lr_sum: float
    steps: int
    samples: int
    loss: float
    flops: float = 0.0


@dataclass
class Plan:
    """How to train; what is None follows the method's own fields.

    loss, step: see above. carry: the first state handed to ``step``. trainable: which parameters, by name.
    data: rows to train on. model: architecture name (or a dict of them, like the weights). batches: batches of
    row numbers instead of shuffled epochs. sample_weight: ``(n,)``, multiplies each row's loss. lr: a number,
    or a function of the step number. momentum, weight_decay: for an optimizer of the fit's own, which may have none.
    sum_gradients: whether grad_sum is wanted. purpose: of the batch stream.
    """

    loss: Loss | None = None
    step: Step | None = None
    carry: Tree = None
    trainable: Callable[[str], bool] | None = None
    data: Split | None = None
    model: Any = ""
    batches: Iterable[Tensor] | None = None
    sample_weight: Tensor | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    lr: float | Callable[[int], float] | None = None
    optimizer: str | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    sum_gradients: bool = False
    purpose: str = "batches"


def n_steps(n: int, batch_size: int, epochs: int, steps: int | None) -> int:
    """Local steps for ``n`` rows: ``steps`` if given, else whole epochs with a partial last batch."""
    return steps if steps is not None else epochs * math.ceil(n / batch_size)


def fit_samples(n: int, batch_size: int, steps: int) -> int:
    """Rows in the first ``steps`` batches of :func:`shuffled` epochs over ``n`` rows."""
    if not n:
        return 0
    epochs, rest = divmod(steps, math.ceil(n / batch_size))
    return epochs * n + min(rest * batch_size, n)


def shuffled(rng: np.random.Generator, n: int, batch_size: int) -> Iterator[Tensor]:
    """Row numbers of batches, epoch after epoch without end; the last batch of an epoch may be smaller."""
    while True:
        yield from torch.split(torch.from_numpy(rng.permutation(n)), batch_size)


PICKED = 1 << 20
"""Bytes of rows that are picked at a time: one large pick costs less than one for each batch."""


def picked(data: Split, batches: Iterator[Tensor], total: int | None, batch_size: int) -> Iterator[Batch]:
    """At most ``total`` batches, several picked at a time, where each of them begins at a multiple of 64 bytes, as
    if it were picked alone: the last bits of a matrix product may depend on that."""
    size = data.x[0].numel() * data.x.element_size() * batch_size
    ahead = max(1, PICKED // size) if size and size % 64 == 0 else 1
    limited = itertools.islice(batches, total)
    several: list[Tensor] = []
    for index in limited:
        several.append(index)
        if len(several) >= ahead or len(index) < batch_size:
            yield from _pick(data, several)
            several = []
    if several:
        yield from _pick(data, several)


def _pick(data: Split, several: list[Tensor]) -> Iterator[Batch]:
    rows, sizes = torch.cat(several), [len(index) for index in several]
    parts = (data.x.index_select(0, rows), data.y.index_select(0, rows), rows)
    return map(Batch, *(part.split_with_sizes(sizes) for part in parts))


@dataclass
class _Models:
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


class _Gradient:
    """The ``grad`` that a step is given."""

    def __init__(
        self, models: _Models, loss: Loss, operator: Any, clip: float | None, decay: float, total: bool
    ) -> None:
        self.models, self.loss, self.operator = models, loss, operator
        self.ask: Callable[[Batch], tuple[list[Tensor], float] | None] | None = None
        """Where the gradient can be had in company: at the live parameters of a stacked fit."""
        self.clip, self.decay = clip, decay
        self.sums = [torch.zeros_like(p) for p in models.leaves] if total else None
        self.batch: Batch | None = None
        self.live = models.live()
        self.seed, self.calls, self.value, self.rows = 0, 0, 0.0, 0

    def begin(self, batch: Batch, seed: int) -> None:
        self.batch, self.seed, self.calls = batch, seed, 0

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


def apart(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients, each in memory of its own, since they are changed in place: autograd may give two parameters
    the same tensor, or an expanded view."""
    seen: set[int] = set()
    for i, g in enumerate(gradients):
        if g.data_ptr() in seen or 0 in g.stride():
            gradients[i] = g = g.clone(memory_format=torch.contiguous_format)
        seen.add(g.data_ptr())
    return gradients


def training(site: Site, weights: Any, plan: Plan) -> Generator[float, None, Fit]:
    """Train; yields the loss after every step and returns a Fit. :meth:`Site.fit` runs it to its end; an
    executor may suspend it between steps instead."""
    method = site.method
    data = site.cast(plan.data if plan.data is not None else site.train)
    if not len(data):
        raise ValueError("no rows to train on")
    models = _fill(site, weights, plan)
    models.choose(plan.trainable)
    operator = site.task.operator if plan.loss is None else None
    name = plan.optimizer or method.optimizer
    decay = method.weight_decay if plan.weight_decay is None else plan.weight_decay
    momentum = method.momentum if plan.momentum is None else plan.momentum
    loss = plan.loss or _task_loss(site, plan.sample_weight)
    added = decay if optim.split(name)[0] == "sgd" else 0.0  # other optimisers take it themselves
    grad = _Gradient(models, loss, operator, method.clip, added, plan.sum_gradients)
    if site.together is not None and plan.loss is None and operator is None and models.single:
        grad.ask = _company(site, models, plan.sample_weight)
    rate = plan.lr if plan.lr is not None else method.rate(site.job.version)
    rates = rate if callable(rate) else lambda _: rate
    optimizer = optim.make(name, models.leaves, rates(0), momentum, decay)
    batch_size = plan.batch_size or method.batch_size
    total = _length(site, plan, len(data), batch_size)
    batches: Iterator[Batch]
    if plan.batches is not None:  # they may depend on what training has found so far, so none is taken ahead
        batches = (next(_pick(data, [index])) for index in itertools.islice(plan.batches, total))
    else:
        batches = picked(data, shuffled(site.rng(plan.purpose), len(data), batch_size), total, batch_size)
    key = site.streams.torch_seed("dropout", plan.purpose)
    step = plan.step or _plain
    result = Fit(None, plan.carry, {}, 0.0, 0, 0, 0.0)
    for number, batch in enumerate(batches):
        grad.begin(batch, (key + number) % 2**63)
        direction, result.carry = step(grad.live, grad, batch, result.carry)
        lr = rates(number)
        optimizer.apply([direction[n] for n in models.names], lr)
        result.lr_sum += lr
        result.steps += 1
        result.samples = grad.rows
        result.loss += grad.value
        yield grad.value
    result.flops = result.samples * models.flops()
    result.loss = result.loss / result.steps if result.steps else math.nan
    result.grad_sum = dict(zip(models.names, grad.sums, strict=True)) if grad.sums is not None else {}
    result.weights = models.read()
    return result


def _company(
    site: Site, models: _Models, weights: Tensor | None
) -> Callable[[Batch], tuple[list[Tensor], float] | None]:
    """How a client of a stack asks for the gradient of the task's loss."""
    from consilience.core.stack import Wanted

    ask, instance = site.together, models.instances[""]
    assert ask is not None

    def wait(batch: Batch) -> tuple[list[Tensor], float] | None:
        rows = None if weights is None else weights[batch.rows]
        answer: tuple[list[Tensor], float] | None = ask(Wanted(site.task, instance, models.names, batch, rows))
        return answer

    return wait


def _plain(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
    """The default step: the gradient."""
    return grad(), carry


def _fill(site: Site, weights: Any, plan: Plan) -> _Models:
    single = isinstance(weights, Weights)
    given: Mapping[str, Weights] = {"": weights} if single else weights
    named = {"": plan.model} if single else (plan.model or dict.fromkeys(given, ""))
    models = _Models({key: site.borrow(named[key]) for key in given}, single)
    for key, value in given.items():
        models.instances[key].fill(value, train=True)
    return models


def _task_loss(site: Site, sample_weight: Tensor | None) -> Loss:
    task = site.task
    if sample_weight is None:
        return lambda model, batch: task.loss(model(batch.x), batch.y)
    return lambda model, batch: (task.losses(model(batch.x), batch.y) * sample_weight[batch.rows]).mean()


def _length(site: Site, plan: Plan, n: int, batch_size: int) -> int | None:
    if plan.batches is not None:
        return plan.steps
    steps = plan.steps if plan.steps is not None else site.job.steps
    if steps is None and plan.epochs is None:
        steps = site.method.local_steps
    return n_steps(n, batch_size, plan.epochs or site.method.local_epochs, steps)
