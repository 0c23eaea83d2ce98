"""FedGen: a generator of features, learned from the clients' heads, guides local training (Zhu et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from consilience.core.errors import NeedsError
from consilience.core.federation import Split
from consilience.core.fit import Batch, Loss, Models
from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.distillation import kl
from consilience.parts.generators import inputs, latent
from consilience.parts.split import alone, head_network, head_of, with_head


@record
class Server(NamedTuple):
    """What is shared (a model, or the parameters of a head), the generator (None where it is not sent), and the classes
    that it knows, ``(m,)`` (none before the first round)."""

    shared: Weights | Params
    generator: Weights | None
    classes: Stat


@record
class Up(NamedTuple):
    """What is shared, trained; and how many rows of each class were seen in training, ``(classes,)``."""

    shared: Stat
    counts: Stat


@dataclass(frozen=True)
class FedGen(Method):
    """The server learns to generate features that the clients' heads recognise; clients train on these as well.

        client: L = CE(w(x), y) + (G/B) alpha_t CE(h(g(y', e')), y') + beta_t KL( softmax h(g(y, e)) || softmax w(x) )
                y' uniform over the classes that the generator knows, G of them; y the labels of the batch of B rows;
                e uniform noise; alpha_t = max(1e-4, alpha 0.98^t), beta_t likewise; none in the first round
        server, before it averages: generator_steps Adam steps, with w_k,y the share of client k in the rows of class y,
                L_g = sum_k mean_b w_k,y CE(h_k(g(y, e)), y) + diversity exp( mean_ij - |e_i - e_j|^2 |z_i - z_j| )

    share "model" averages whole models, "head" only heads, and clients keep their bodies, which may then differ in
    architecture. With alpha = beta = 0 it is FedAvg (or, sharing heads, ``lgfedavg``), bit for bit; the first round
    always is.

    Source: Zhu, Hong, Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML 2021,
    algorithm 1, and its official code for what the paper leaves open (uniform noise, how alpha and beta fade, the
    generator before averaging). Deviations: Adam of the generator begins anew each round, at a step size that decays by
    0.98 a round, and without weight decay.
    """

    name = "fedgen"
    family = "different architectures"
    source = "Zhu et al., ICML"
    year = 2021
    needs = Needs(architectures="any", same_features=True, split_model=True, classification=True)
    trains_on_server = True
    unstacked = "the loss asks a generator"

    alpha: Annotated[float, Ge(0)] = option(10.0, "first weight of generated features", Search(0.1, 10.0))
    beta: Annotated[float, Ge(0)] = option(10.0, "first weight of the generator's scores", Search(0.1, 10.0))
    fading: Annotated[float, Gt(0), Le(1)] = option(0.98, "factor on both after each round")
    share: Literal["model", "head"] = option("model", "what is averaged")
    noise: Annotated[int, Ge(1)] = option(32, "numbers of noise")
    generator_steps: Annotated[int, Ge(0)] = option(50, "the generator's steps in a round")
    generator_lr: Annotated[float, Gt(0)] = option(3e-4, "the generator's step size")
    generator_batch: Annotated[int, Ge(2)] = option(32, "generated rows in one step")
    diversity: Annotated[float, Ge(0)] = option(1.0, "weight of diversity in the generator's loss")
    form: Literal["model"] = option("model", "clients send models")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The generator, and a head alone. Raises NeedsError if whole models of different architecture were shared."""
        if self.share == "model" and len(models) > 1:
            raise NeedsError("fedgen needs one architecture for all clients, or share=head, which keeps bodies apart")
        server = next(iter(models.values()))
        return {"generator": latent(server, self.noise), "head": head_network(server)}

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A model or a head like the client's, and counts."""
        own = place.architectures[model]
        shared: Expected = own.spec if self.share == "model" else head_of(own.spec)
        return {"shared": shared, "counts": Shape(torch.int64, (own.outputs,), low=0)}

    def sends(self, phase: Phase) -> type:
        """See :class:`Up`."""
        return Up

    def init_server(self, host: Host) -> Server:
        """The initial model or its head, and a generator that knows no class."""
        model = host.initial()
        shared = model if self.share == "model" else head_of(model)
        return Server(shared, host.initial("generator"), torch.zeros(0, dtype=torch.int64))

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """What is shared, and the generator once it knows a class."""
        return server if len(server.classes) and (self.alpha or self.beta) else server._replace(generator=None)

    def init_client(self, site: Site) -> Tree:
        """Its model where it keeps the body."""
        return site.initial() if self.share == "head" else None

    def client_update(self, phase: Phase, site: Site, message: Server, state: Weights | None) -> tuple[Tree, Tree]:
        """Train with the generator's help."""
        start = self._whole(message, state)
        counts = torch.zeros(site.task.outputs, dtype=torch.int64)
        loss = self._loss(site, message, counts)
        weights = site.fit(start, loss=loss).weights
        if self.share == "model":
            return Up(weights, counts), state
        return Up(head_of(weights), counts), weights

    def _whole(self, message: Server, state: Weights | None) -> Weights:
        shared = message.shared
        if isinstance(shared, Weights):
            return shared
        assert state is not None
        return with_head(state, shared)

    def _loss(self, site: Site, message: Server, counts: Tensor) -> Loss:
        fade = self.fading**site.job.version
        alpha, beta = (max(1e-4, weight * fade) if weight else 0.0 for weight in (self.alpha, self.beta))
        generator = None if message.generator is None else site.bind(message.generator, "generator")
        rng, dtype, classes = site.rng("generator"), site.architecture().dtype, site.task.outputs

        def made(y: Tensor) -> Tensor:
            assert generator is not None
            with torch.no_grad():
                features: Tensor = generator(inputs(rng, y, self.noise, classes, dtype)[0])
            return features

        def loss(model: Models, batch: Batch) -> Tensor:
            counts.add_(torch.bincount(batch.y, minlength=classes))
            scores = model(batch.x)
            value = site.task.loss(scores, batch.y)
            if generator is None:
                return value
            if alpha:
                drawn = rng.integers(len(message.classes), size=self.generator_batch)
                y = message.classes[torch.from_numpy(drawn)]
                value = value + self.generator_batch / len(batch.y) * alpha * F.cross_entropy(model.head(made(y)), y)
            if beta:
                with torch.no_grad():
                    guide = model.head(made(batch.y))
                value = value + beta * kl(scores, guide)
            return value

        return loss

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Train the generator on the heads that came, then average."""
        counts = torch.stack([reply.update.counts for reply in replies])
        classes = (counts.max(0).values > 0).nonzero().flatten()
        generator = self._taught(host, server.generator, replies, counts, classes)
        mean = weighted_sum([reply.update.shared for reply in replies], self.shares(replies))
        return Server(mean, generator, classes)

    def _taught(
        self, host: Host, generator: Weights | None, replies: Sequence[Reply], counts: Tensor, classes: Tensor
    ) -> Weights | None:
        if not self.generator_steps or not (self.alpha or self.beta):
            return generator
        heads = [host.bind(alone(_head(reply.update.shared)), "head") for reply in replies]
        total = counts.sum(0).clamp_min(1)
        dtype, rng = host.architecture().dtype, host.rng("generator")
        shares = (counts / total).to(dtype)

        def loss(network: Models, batch: Batch) -> Tensor:
            y = classes[torch.from_numpy(rng.integers(len(classes), size=self.generator_batch))]
            x, eps = inputs(rng, y, self.noise, host.task.outputs, dtype)
            z = network(x)
            known = torch.zeros((), dtype=dtype)
            for head, share in zip(heads, shares, strict=True):
                known = known + (share[y] * F.cross_entropy(head(z), y, reduction="none")).mean()
            return known + self.diversity * likeness(eps, z) if self.diversity else known

        rows = Split(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, dtype=torch.int64))  # the loss makes its own
        fit = host.fit(
            generator, loss=loss, data=rows, model="generator", steps=self.generator_steps, optimizer="adam",
            momentum=0.0, weight_decay=0.0,
            lr=self.generator_lr * 0.98**host.version, purpose="generator",
        )  # fmt: skip
        taught: Weights = fit.weights
        return taught

    def global_model(self, server: Server) -> Predictor | None:
        """The mean model, if models are shared."""
        return Net(server.shared) if isinstance(server.shared, Weights) else None

    def personal_model(self, site: Site, message: Server, state: Weights | None) -> Predictor:
        """The mean model, or the own body with the mean head."""
        return Net(self._whole(message, state), site.model)

    def trained_model(self, site: Site, message: Server, update: Up, state: Weights | None) -> Predictor:
        """The trained model."""
        return Net(update.shared if state is None else state, site.model)


def _head(shared: Weights | Params) -> Params:
    return head_of(shared) if isinstance(shared, Weights) else shared


def likeness(eps: Tensor, z: Tensor) -> Tensor:
    """exp( mean over pairs of - mean squared difference of noise x mean absolute difference of features ): small where
    different noise gives different features."""
    noise = (eps[:, None, :] - eps[None, :, :]).square().mean(2)
    features = (z[:, None, :] - z[None, :, :]).abs().mean(2)
    return torch.exp(-(noise * features).mean())
