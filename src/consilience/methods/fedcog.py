"""FedCOG: clients generate rows of the classes that they lack, and learn what the global model says of them (Ye et al.,
2024)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.core.federation import Split
from consilience.core.fit import Batch, Models, Plan, shuffled
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Weights
from consilience.core.site import Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.distillation import kl


class Rows(nn.Module):
    """Inputs that are trained: parameters ``(count, *input_shape)``."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, count: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, *input_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows


class Made(NamedTuple):
    """Generated inputs ``(images, *shape)``, and the global model's scores of them ``(images, classes)``."""

    x: Tensor
    scores: Tensor


@dataclass(frozen=True)
class FedCOG(Method):
    """FedAvg whose clients complete their data by inputs on which the global model is sure and their own is not.

        q_c ~ max_c' n_c' - n_c;   labels of M inputs by q (largest remainders);   inputs u start as normal noise
        u <- Adam, G steps on  CE(x(u), labels) + disagree (1 - JS(softmax y_prev(u), softmax x(u)));   best u kept
        each local step: r CE(y; real batch) + (1 - r) T^2 KL( softmax(x(u) / T) || softmax(y(u) / T) ) on a batch of u
        r = n / (n + sum_c (max n - n_c))

    x: the received model, y_prev: the client's last local one (x if it has none), both frozen in evaluation mode. JS:
    Jensen-Shannon divergence with probabilities held in [0.01, 0.99], cut to [0, 1]. Client state: y_prev.

    Up to round ``start``, and for clients with equally many rows of all classes, it is FedAvg bit for bit.

    Source: Ye, Du, Ni, Chen, Wang, "Fake It Till Make It: Federated Learning with Consensus-Oriented Generation", 2023
    (arXiv 2312.05966), and its official code. Deviations: no augmentation of generated inputs, no BatchNorm statistics
    in their loss, no generator network; Adam's usual betas instead of (0.5, 0.9); labels sum to M (the code drops
    remainders); the best inputs are kept (the code's are overwritten by later steps).
    """

    name = "fedcog"
    family = "skewed data"
    source = "Ye et al."
    year = 2023
    takes_rules = True
    sums = Method.means
    needs = Needs(classification=True, loss=True)
    unstacked = "the loss looks at generated inputs, which are each client's own"

    start: Annotated[int, Ge(0)] = option(10, "rounds of FedAvg before inputs are generated")
    images: Annotated[int, Ge(1)] = option(256, "M: inputs that a client generates in a round")
    generate_steps: Annotated[int, Ge(1)] = option(100, "G: steps on these inputs (500 in the paper)")
    generate_lr: Annotated[float, Gt(0)] = option(0.01, "step size of these", Search(1e-3, 0.1))
    disagree: Annotated[float, Ge(0)] = option(0.1, "weight of disagreement with the own last model", Search(0.01, 1.0))
    temperature: Annotated[float, Gt(0)] = option(1.0, "T")

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The inputs that are trained."""
        model = next(iter(models.values()))
        factory = functools.partial(Rows, count=self.images)
        return {"inputs": Architecture("inputs", factory, model.input_shape, model.outputs, model.dtype)}

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Weights | None) -> tuple[Tree, Tree]:
        """Generate, train, remember the result."""
        fit = self.train(site, message, state)
        return self.pack(message.model, fit.weights), fit.weights

    def sends(self, phase: Phase) -> type:
        """Models or differences, as FedAvg."""
        return self.packs

    def plan(self, site: Site, message: Tree, state: Weights | None) -> Plan:
        """Cross-entropy and what the global model says of generated inputs."""
        counts = torch.bincount(site.train.y, minlength=site.task.outputs)
        lacking = counts.max() - counts
        if site.job.version < self.start or not lacking.any():
            return Plan()
        made = self.generated(site, message.model, state, apportioned(lacking.numpy(), self.images))
        real = len(site.train) / float(len(site.train) + lacking.sum())
        picks = shuffled(site.rng("generated-batches"), self.images, self.batch_size)

        def loss(model: Models, batch: Batch) -> Tensor:
            index = next(picks)
            taught = kl(model(made.x[index]), made.scores[index], self.temperature)
            return real * site.task.loss(model(batch.x), batch.y) + (1 - real) * taught

        return Plan(loss=loss)

    def generated(self, site: Site, model: Weights, previous: Weights | None, labels: Tensor) -> Made:
        """Inputs of these labels ``(images,)``: those of the lowest loss over the steps."""
        received = site.bind(model)
        own = received if previous is None else site.bind(previous)
        noise = site.rng("inputs").standard_normal((self.images, *site.architecture().input_shape))
        start = Weights({"rows": torch.from_numpy(noise).to(site.architecture().dtype)}, {})
        best: list[Any] = [np.inf, None]

        def loss(rows: Models, batch: Batch) -> Tensor:
            scores = received(rows.rows)
            value = F.cross_entropy(scores, labels)
            if self.disagree:
                value = value + self.disagree * (1 - divergence(own(rows.rows), scores))
            if float(value.detach()) < best[0]:
                best[:] = float(value.detach()), Made(rows.rows.detach().clone(), scores.detach())
            return value

        rows = Split(start.params["rows"][:1], labels[:1])  # the loss looks at none of these
        site.fit(
            start, loss=loss, data=rows, model="inputs", steps=self.generate_steps, optimizer="adam",
            lr=self.generate_lr, purpose="generate",
        )  # fmt: skip
        found: Made = best[1]
        return found


def apportioned(shares: np.ndarray, total: int) -> Tensor:
    """``total`` labels, ascending, in proportion to ``shares`` by largest remainders; ties to the lower class."""
    exact = shares * (total / shares.sum())
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: total - whole.sum()]] += 1
    return torch.from_numpy(np.repeat(np.arange(len(shares)), whole))


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of softmax(a) and softmax(b) in nats, mean over rows ``(n, classes)``, with all
    probabilities held in [0.01, 0.99] and the result in [0, 1]."""
    p, q = (scores.softmax(1).clamp(0.01, 0.99) for scores in (a, b))
    middle = ((p + q) / 2).clamp(0.01, 0.99).log()
    both = F.kl_div(middle, p, reduction="batchmean") + F.kl_div(middle, q, reduction="batchmean")
    return (both / 2).clamp(0, 1)
