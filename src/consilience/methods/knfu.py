"""KnFu: each client learns the scores of those whose data are like its own (Seyedmohammadi et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from consilience.core.fit import Batch, Models
from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.distillation import kl_to
from consilience.parts.public import rows_of_round


@record
class Knowledge(NamedTuple):
    """knowledge: probabilities ``(rows, classes)`` of the round's public rows. law: ``(classes,)``, how often the
    client meets each class."""

    knowledge: Stat
    law: Stat


@record
class Fused(NamedTuple):
    """Probabilities of the round's public rows as each client is to learn them."""

    of: dict[int, Stat]


@dataclass(frozen=True)
class KnFu(Method):
    """Clients train, score public rows, and learn a mean of all scores in which similar clients count more.

        train on the own rows;  K_i = softmax(f_i(X) / T) on the public rows X;  p_i = mean of softmax(f_i(x)), own rows
        w_ij = exp(-beta KL(p_i || p_j)) / sum_l exp(-beta KL(p_i || p_l));     F_i = sum_j w_ij K_j
        learn: T^2 KL(F_i || softmax(f_i(X) / T)) on the public rows

    beta = 0 fuses all equally. With learn_epochs = 0 the models are those of ``local``, bit for bit.

    Source: Seyedmohammadi, Atapour, Abouei, Mohammadi, "KnFu: Effective Knowledge Fusion", 2024. The steps and beta =
    10 are the paper's; its equations were not at hand, and p_i, the direction of the divergence and a client's own
    share in its fusion are a reconstruction.
    """

    name = "knfu"
    family = "different architectures"
    source = "Seyedmohammadi et al."
    year = 2024
    confidence = "low"
    needs = Needs(architectures="any", public_data=True, classification=True)
    unstacked = "the loss looks at the scores of others"

    beta: Annotated[float, Ge(0)] = option(10.0, "how sharply unlike clients are left out", Search(0.1, 100.0))
    temperature: Annotated[float, Gt(0)] = option(1.0, "T")
    public_rows: Annotated[int, Ge(1)] = option(500, "public rows scored in a round")
    learn_epochs: Annotated[int, Ge(0)] = option(1, "passes over the round's public rows")

    def program(self) -> tuple[Phase, ...]:
        """Training and scores, then learning."""
        return (Phase("train"), Phase("learn"))

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """Probabilities of the round's rows, and of classes."""
        own, count = place.architectures[model], 0 if place.public is None else len(place.public)
        return {
            "knowledge": Shape(own.dtype, (min(self.public_rows, count), own.outputs), low=0, high=1.01),
            "law": Shape(own.dtype, (own.outputs,), low=0, high=1.01),
        }

    def init_server(self, host: Host) -> Fused:
        """Nothing yet."""
        return Fused({})

    def broadcast(self, phase: Phase, server: Fused, client: ClientInfo) -> Tree:
        """What this client is to learn."""
        return server.of[client.id] if phase.name == "learn" else None

    def deploy(self, server: Tree, client: ClientInfo) -> Tree:
        """Nothing."""
        return None

    def init_client(self, site: Site) -> Tree:
        """The common initial model of its architecture."""
        return site.initial()

    def sends(self, phase: Phase) -> type:
        """Scores of the model just trained."""
        return Knowledge if phase.name == "train" else NoneType

    def client_update(self, phase: Phase, site: Site, message: Tensor, state: Weights) -> tuple[Tree, Tree]:
        """Train and score, or learn."""
        public = rows_of_round(site, self.public_rows, site.job.version)
        if phase.name == "train":
            weights = site.fit(state).weights
            net = Net(weights, site.model)
            law = site.scores(net, site.train.x).softmax(1).mean(0)
            return Knowledge((site.scores(net, public.x) / self.temperature).softmax(1), law), weights
        if not self.learn_epochs:
            return None, state

        def loss(model: Models, batch: Batch) -> Tensor:
            return kl_to(model(batch.x), message[batch.rows], self.temperature)

        return None, site.fit(state, loss=loss, data=public, epochs=self.learn_epochs, purpose="learn").weights

    def aggregate(
        self, phase: Phase, host: Host, server: Fused, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Fused:
        """A fusion for each client; forgotten once it is learned."""
        if phase.name != "train":
            return Fused({})
        known = [reply.update.knowledge for reply in replies]
        shares = fusion(torch.stack([reply.update.law for reply in replies]), self.beta)
        return Fused({
            reply.job.client: weighted_sum(known, row.tolist()) for reply, row in zip(replies, shares, strict=True)
        })  # fmt: skip

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None

    def personal_model(self, site: Site, message: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)


def fusion(laws: Tensor, beta: float) -> Tensor:
    """w_ij, ``(clients, clients)`` float64 with rows that sum to 1, from laws ``(clients, classes)``."""
    p = laws.double().clamp_min(1e-12)
    divergence = (p[:, None, :] * (p[:, None, :].log() - p[None, :, :].log())).sum(2)
    return (-beta * divergence).softmax(1)
