"""FedRC: components that differ in what inputs mean, and not in which labels they see (Guo et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Phase
from consilience.core.model import Weights
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.tree import record
from consilience.methods.fedem import FedEM
from consilience.parts import components


@record
class Server(NamedTuple):
    """The components; by client the label masses ``(components, classes)`` that it sent last; each component's share of
    labels, from all of them."""

    models: Stat
    masses: dict[int, Tensor]
    labels: Tensor


@record
class Down(NamedTuple):
    """The components, and each one's share of labels ``(components, classes)``."""

    models: Stat
    labels: Stat


@record
class Up(NamedTuple):
    """Trained components, and how many rows of each label each is responsible for, ``(components, classes)``."""

    models: Stat
    masses: Stat


@dataclass(frozen=True)
class FedRC(FedEM):
    """FedEM in which a component is not rewarded for labels being rare or common in it.

        q_jm = softmax_m( log pi_im - loss(h_m(x_j), y_j) - log C_m,y_j )         pi_i, theta_m as in ``fedem``
        t_i,m,y = sum_{j: y_j = y} q_jm;      C_m,y = max(sum_i t_i,m,y, 1e-8), scaled to sum 1 over y; uniform at first

    The objective is log sum_m pi_m exp(-loss) / C_m,y, so clients are told apart by p(y | x): concept shift, and not by
    label or feature shift. Masses are those that each client sent last. Round 1 is ``fedem`` bit for bit, as is any
    C equal for all m; one component is FedAvg. Counts of labels leave the client.

    Source: Guo, Tang, Lin, "FedRC: Tackling Diverse Distribution Shifts Challenge in Federated Learning by Robust
    Clustering", ICML 2024. Deviations: no adaptive number of components, no smoothing of q, no noise on t; a client
    without a part joins as in ``fedem``, with C.
    """

    name = "fedrc"
    family = "clusters"
    source = "Guo et al., ICML"
    year = 2024

    def sends(self, phase: Phase) -> type:
        """See :class:`Up`."""
        return Up

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """As many models, and masses that are none below 0."""
        own = place.architectures[model]
        shape = Shape(own.dtype, (self.components, own.outputs), low=0)
        return {"models": components.fitting(place, model, self.components), "masses": shape}

    def init_server(self, host: Host) -> Server:
        """Components that differ; no masses."""
        own = host.architecture()
        labels = torch.full((self.components, own.outputs), 1 / own.outputs, dtype=own.dtype)
        return Server(components.draw(host, self.components), {}, labels)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """Components, and shares of labels."""
        return Down(server.models, server.labels)

    def scores(self, site: Site, message: Down) -> Tensor:
        """- loss - log C, up to log C of the first component, so that a C equal for all adds exactly nothing."""
        share = message.labels.log()
        found: Tensor = super().scores(site, message) - (share - share[0]).T[site.train.y]
        return found

    def packed(self, site: Site, models: tuple[Weights, ...], q: Tensor) -> Up:
        """Components, and masses."""
        return Up(models, q.T @ F.one_hot(site.train.y, site.task.outputs).to(q.dtype))

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """The mean of each component, and the sum of all masses."""
        heard = {reply.job.client: reply.update.masses for reply in replies}
        masses = dict(sorted({**server.masses, **heard}.items()))
        total = weighted_sum(list(masses.values()), [1.0] * len(masses)).clamp_min(1e-8)
        mean: Server = super().aggregate(phase, host, server, replies, cohort)
        return mean._replace(masses=masses, labels=total / total.sum(1, keepdim=True))
