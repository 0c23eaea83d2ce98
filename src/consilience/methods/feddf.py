"""FedDF: the server distils the ensemble of all clients into the mean model of each architecture (Lin et al., 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt
from torch import Tensor

from consilience.core.fit import Batch, Models
from consilience.core.messages import Broadcast, ClientInfo, Reply
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import uniform_weights, weighted_sum
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.distillation import kl_to


@record
class Students(NamedTuple):
    """A model of each architecture, by name; the server's first."""

    models: dict[str, Weights]


@dataclass(frozen=True)
class FedDF(Method):
    """FedAvg within each architecture, and then every mean learns from the ensemble of all clients on public rows.

        x_g <- sum_{k in g} p_k x_k for each architecture g (p sums to 1 within g)
        target(u) = softmax( mean_k scores_k(u) / T ) over all clients of the round;  then on batches of public rows
        x_g <- Adam step on T^2 KL( target(u) || softmax(scores_g(u) / T) ),  step size from server_lr to 0 by a cosine

    The server's own model (``--model``) is a student too, even if no client has its architecture. With server_steps = 0
    it is FedAvg within each architecture, bit for bit.

    Source: Lin, Kong, Stich, Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS
    2020, algorithms 1 and 3. Deviations: a fixed number of steps, since the server has no labels to stop early or to
    drop bad teachers by; students of architectures without a reply in a round learn all the same.
    """

    name = "feddf"
    family = "different architectures"
    source = "Lin et al., NeurIPS"
    year = 2020
    needs = Needs(architectures="any", public_data=True, classification=True)
    trains_on_server = True

    server_steps: Annotated[int, Ge(0)] = option(100, "the server's steps on public rows in a round")
    server_lr: Annotated[float, Gt(0)] = option(1e-3, "the server's first step size", Search(1e-4, 1e-2))
    server_batch: Annotated[int, Ge(1)] = option(128, "public rows in one of the server's steps")
    temperature: Annotated[float, Gt(0)] = option(1.0, "T")
    form: Literal["model"] = option("model", "clients send models")

    def init_server(self, host: Host) -> Students:
        """The initial model of each architecture."""
        return Students({name: host.initial(name) for name in host.place.architectures})

    def broadcast(self, phase: Phase, server: Students, client: ClientInfo) -> Broadcast:
        """The model of the client's architecture."""
        return Broadcast(server.models[client.model])

    def aggregate(
        self, phase: Phase, host: Host, server: Students, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Students:
        """Average, then distil."""
        own = [host.place.model_of(reply.job.client) for reply in replies]
        models = dict(server.models)
        for name in models:
            group = [reply for reply, its in zip(replies, own, strict=True) if its == name]
            if group:
                models[name] = self.combine(models[name], group)
        if not self.server_steps:
            return Students(models)
        x = host.public.x
        teachers = [host.scores(Net(r.update.model, name), x) for r, name in zip(replies, own, strict=True)]
        mean = weighted_sum(teachers, uniform_weights(len(teachers)))
        target = (mean / self.temperature).softmax(1)

        def loss(model: Models, batch: Batch) -> Tensor:
            return kl_to(model(batch.x), target[batch.rows], self.temperature)

        def rate(step: int) -> float:
            return self.server_lr * (1 + math.cos(math.pi * step / self.server_steps)) / 2

        for name, start in models.items():
            fit = host.fit(
                start, loss=loss, data=host.public, steps=self.server_steps, batch_size=self.server_batch, lr=rate,
                optimizer="adam", momentum=0.0, model=name, purpose=f"distil-{name}",
            )  # fmt: skip
            models[name] = fit.weights
        return Students(models)

    def global_model(self, server: Students) -> Predictor | None:
        """The server's student."""
        return Net(next(iter(server.models.values())))

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Tree) -> Predictor:
        """The client's model."""
        return Net(update.model, site.model)
