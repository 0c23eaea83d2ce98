"""FedImpro: the upper part of the network also trains on Gaussian features, common to all (Tang et al., 2024)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn

from consilience.core.errors import NeedsError
from consilience.core.fit import Batch, Models, Plan
from consilience.core.messages import ClientInfo, Model, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, SplitModel
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import uniform_weights, weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record


@record
class Server(NamedTuple):
    """The global model; mean and standard deviation of each number at the cut by class, both ``(classes, width)``."""

    model: Model
    means: Stat
    deviations: Stat


@record
class Up(NamedTuple):
    """The same at a client, and its rows of each class ``(classes,)``."""

    model: Model
    means: Stat
    deviations: Stat
    counts: Stat


@dataclass(frozen=True)
class FedImpro(Method):
    """FedAvg whose clients train the upper part of the network on features drawn from common Gaussians as well.

        h = low(x), flattened;   fake labels 0 .. C-1 over and over, as many whole turns as fill a batch;
        h' ~ N(mu_c, sigma_c^2) of these, without a gradient below the cut;   scores = high([h, h'])
        loss = CE(real) + w_t CE(fake),   w_t = weight min(1, t / ramp), t rounds made before
        after each batch, for its classes, a = min(1, rows of c in the batch / rows of c here):
            mu_c <- (1 - a) mu_c + a mean(h),   sigma_c <- min(s_max, (1 - a) sigma_c + a std(h))   (of >= 2 rows)
        server: x as FedAvg; mu, sigma: equal means over the cohort, or "pooled" with w_i the clients' shares of c:
            mu = sum w_i mu_i,  sigma^2 = sum w_i sigma_i^2 + sum w_i (mu_i - mu)^2    (classes of nobody keep theirs)

    At first mu is uniform on [0, 1) and sigma s_max. ``cut``: how many of the last layers of the model's features
    belong to the upper part beside the head; with 0 it is the head alone.

    weight = 0 is FedAvg bit for bit, as is the first round.

    Source: Tang, Zhang, Shi, Tian, Liu, Han, Chu, "FedImpro: Measuring and Improving Client Update in Federated
    Learning", ICLR 2024, and its official code, with the weights that its commands use ("gradual2half": real rows keep
    the weight 1). Deviations: the code's t / ramp goes on growing above 1; its other weights, "gradual" (1 - w_t for
    real rows) and "gradualhalfhalf", are not offered; the step a (the code divides the length of a feature by a
    constant); no turn of fake labels more where a batch is whole turns; noise is off unless asked for (the code's
    default is 0.001); no detached cut and no contrast of real and fake features, which its commands leave off. The
    paper cuts a ResNet in the middle.
    """

    name = "fedimpro"
    family = "skewed data"
    source = "Tang et al., ICLR"
    year = 2024
    confidence = "medium"
    needs = Needs(split_model=True, classification=True, loss=True)
    unstacked = "the loss draws features"

    weight: Annotated[float, Ge(0)] = option(1.0, "weight of drawn features in the end", Search(0.1, 2.0))
    ramp: Annotated[int, Ge(1)] = option(20, "rounds until they have it (500 of 1000 in the paper)")
    cut: Annotated[int, Ge(0)] = option(0, "layers below the head that belong to the upper part")
    s_max: Annotated[float, Ge(0)] = option(0.1, "largest standard deviation of drawn features", Search(0.01, 1.0))
    noise: Annotated[float, Ge(0)] = option(0.0, "standard deviation of noise on the statistics that clients send")
    statistics: Literal["uniform", "pooled"] = option("uniform", "how statistics combine")
    weights: Literal["samples", "uniform"] = option("samples", "a client's weight in the mean model")
    form: Literal["model"] = option("model", "clients send models")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Statistics of what passes the cut."""
        own = place.architectures[model]
        width = math.prod(at_cut(own, self.cut))
        return {
            "means": Shape(own.dtype, (own.outputs, width)),
            "deviations": Shape(own.dtype, (own.outputs, width), low=0),
            "counts": Shape(torch.int64, (own.outputs,), low=0),
        }

    def sends(self, phase: Phase) -> type:
        """See :class:`Up`."""
        return Up

    def init_server(self, host: Host) -> Server:
        """The initial model, uniform means."""
        own = host.architecture()
        means = torch.from_numpy(host.rng("means").random((own.outputs, math.prod(at_cut(own, self.cut)))))
        return Server(host.initial(), means.to(own.dtype), torch.full_like(means, self.s_max).to(own.dtype))

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """All of it."""
        return server

    def client_update(self, phase: Phase, site: Site, message: Server, state: Tree) -> tuple[Tree, Tree]:
        """Train, and follow the statistics on the way."""
        counts = torch.bincount(site.train.y, minlength=site.task.outputs)
        found = Running(message.means.clone(), message.deviations.clone(), counts, self.s_max)
        fit = site.fit(message.model, self._plan(site, found))
        means, deviations = found.means, found.deviations
        if self.noise:
            rng = site.rng("statistics")
            drawn = [torch.from_numpy(rng.standard_normal(means.shape)).to(means.dtype) for _ in range(2)]
            means, deviations = means + self.noise * drawn[0], (deviations + self.noise * drawn[1]).clamp_min(0)
        return Up(fit.weights, means, deviations, counts), state

    def _plan(self, site: Site, found: Running) -> Plan:
        weight = self.weight * min(1.0, site.job.version / self.ramp)
        shape, rng, classes = at_cut(site.architecture(), self.cut), site.rng("features"), site.task.outputs

        def loss(model: Models, batch: Batch) -> Tensor:
            low, high = parts(model, self.cut)
            h = low(batch.x)
            if not weight:
                value = site.task.loss(high(h), batch.y)
            else:
                y = torch.arange(classes).repeat(math.ceil(len(batch.y) / classes))
                eps = torch.from_numpy(rng.standard_normal((len(y), found.means.shape[1]))).to(h.dtype)
                fake = found.means[y] + found.deviations[y] * eps
                real, drawn = high(torch.cat([h, fake.reshape(len(y), *shape)])).split_with_sizes([len(h), len(y)])
                value = site.task.loss(real, batch.y) + weight * site.task.loss(drawn, y)
            found.follow(h.detach().flatten(1), batch.y)
            return value

        return Plan(loss=loss)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Mean model, combined statistics."""
        updates = [reply.update for reply in replies]
        if self.statistics == "pooled":
            means, deviations = pooled(server, updates)
        else:
            equal = uniform_weights(len(updates))
            means = weighted_sum([u.means for u in updates], equal)
            deviations = weighted_sum([u.deviations for u in updates], equal)
        return Server(self.combine(server.model, replies), means, deviations)

    def trained_model(self, site: Site, message: Tree, update: Up, state: Tree) -> Predictor:
        """The trained model."""
        return Net(update.model, site.model)


@dataclass
class Running:
    """Statistics that follow what passes the cut. means, deviations: changed in place. counts: rows of each class."""

    means: Tensor
    deviations: Tensor
    counts: Tensor
    s_max: float

    def follow(self, h: Tensor, y: Tensor) -> None:
        """h: ``(b, width)``, y: ``(b,)``."""
        for c in torch.bincount(y).nonzero().flatten().tolist():
            own = h[y == c]
            a = min(1.0, len(own) / int(self.counts[c]))
            self.means[c] = (1 - a) * self.means[c] + a * own.mean(0)
            if len(own) > 1:
                self.deviations[c] = ((1 - a) * self.deviations[c] + a * own.std(0)).clamp_max(self.s_max)


def pooled(server: Server, updates: Sequence[Up]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(classes, width)`` of the mixture of the clients' Gaussians by class."""
    total = torch.stack([u.counts for u in updates]).sum(0)
    shares = [(u.counts / total.clamp_min(1)).double()[:, None] for u in updates]
    ones = [1.0] * len(updates)
    means = weighted_sum([w * u.means.double() for w, u in zip(shares, updates, strict=True)], ones)
    spread = [
        w * (u.deviations.double().square() + (u.means.double() - means).square())
        for w, u in zip(shares, updates, strict=True)
    ]
    deviations, known = weighted_sum(spread, ones).sqrt(), (total > 0)[:, None]
    dtype = server.means.dtype
    kept = torch.where(known, means.to(dtype), server.means)
    return kept, torch.where(known, deviations.to(dtype), server.deviations)


Half = Callable[[Tensor], Tensor]


def parts(model: nn.Module, cut: int) -> tuple[Half, Half]:
    """(what is below the cut, what is above). Raises NeedsError if the model's features are no sequence of more than
    ``cut`` layers."""
    assert isinstance(model, SplitModel)
    if not cut:
        return model.features, model.head
    layers = model.features
    if not isinstance(layers, nn.Sequential) or len(layers) <= cut:
        raise NeedsError(f"fedimpro: cut={cut} needs a model whose features are an nn.Sequential of more layers")
    return layers[:-cut], nn.Sequential(*layers.children(), model.head)[len(layers) - cut :]


@functools.cache
def at_cut(model: Architecture, cut: int) -> tuple[int, ...]:
    """Shape of what passes the cut, for one row."""
    module = model.build().eval()
    with torch.no_grad():
        return tuple(parts(module, cut)[0](torch.zeros(1, *model.input_shape, dtype=model.dtype)).shape[1:])
