"""FedGMM: components that differ in what inputs mean, and Gaussians in which inputs there are (Wu et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Phase, keep_buffers
from consilience.core.predict import Binder, Net, Predictor, Scorer
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.methods.fedem import FedEM
from consilience.parts import components, density
from consilience.parts.density import Density


@record
class Server(NamedTuple):
    """The components, the Gaussians, and the mean over clients of Pi ``(Gaussians, components)``."""

    models: Stat
    density: Density
    pi: Tensor


@record
class Down(NamedTuple):
    """Components and Gaussians."""

    models: Stat
    density: Stat


@record
class Up(NamedTuple):
    """Trained components, Pi_i, and by Gaussian the mean and the covariance of the client's rows."""

    models: Stat
    pi: Stat
    means: Stat
    covariances: Stat


@record
class Gated(NamedTuple):
    """Components mixed for each input by the Gaussians that it may come from. Scores are log-probabilities."""

    members: tuple[Net, ...]
    density: Density
    pi: Tensor

    def scorer(self, at: Binder) -> Scorer:
        """log sum_m p(m | x) softmax(member_m(x))."""
        scorers = [member.scorer(at) for member in self.members]

        def score(x: Tensor) -> Tensor:
            near = density.log_normal(self.density, density.embed(self.density, x))
            joint = near[:, :, None] + self.pi.double().log()
            gate = joint.flatten(1).softmax(1).view_as(joint).sum(1)
            logs = torch.stack([f(x).log_softmax(-1) for f in scorers], 1)
            return (gate.to(logs.dtype).log()[:, :, None] + logs).logsumexp(1)

        return score


@dataclass(frozen=True)
class FedGMM(FedEM):
    """FedEM of p(x, y): a client's rows are a mixture of pairs of a Gaussian over inputs and a component.

        E:  r_jam = softmax_am( log Pi_i,am + log N(z_j; mu_a, Sigma_a) - loss(h_m(x_j), y_j) )
        M:  Pi_i,am = mean_j r_jam;     theta_im: local steps from theta_m on sum_j (sum_a r_jam) loss(h_m(x_j), y_j)
            mu_ia, Sigma_ia: mean and covariance of the client's z_j, weighted by sum_m r_jam
        n_ia = n_i sum_m Pi_i,am;       n_im = n_i sum_a Pi_i,am
        mu_a <- sum_i n_ia mu_ia / sum_i n_ia;          theta_m <- sum_i n_im theta_im / sum_i n_im
        Sigma_a <- sum_i n_ia ( Sigma_ia + (mu_ia - mu_a)(mu_ia - mu_a)^T ) / sum_i n_ia + ridge I
        client i deploys  sum_m p_i(m | x) softmax(h_m(x)),   p_i(m | x) ~ sum_a Pi_i,am N(z; mu_a, Sigma_a)

    z: the ``dim`` principal components of everybody's inputs, scaled to variance 1, found before round 1 from the mean
    and the second moments that clients send once (d and d^2 numbers for inputs of d). The Gaussians begin at clients'
    means. ``log_density`` gives log p_i(x) (up to a constant): the lower, the newer an input or a client is. A client
    that never took part joins by ``join_steps`` of EM on Pi_i. Its cluster is its largest Pi_i,am.

    With one Gaussian nothing is asked before round 1, and with share = clients it is ``fedem`` bit for bit; with one
    component beside, FedAvg. ``between=False`` leaves out the scatter of clients' means, as the authors' code does;
    with it, Gaussians and weights after a round from a common Pi are those of EM on the pooled rows.

    Source: Wu, Zhang, Yu, Cheng, Chen, Niu, Marsic, "Personalized Federated Learning under Mixture of Distributions",
    ICML 2023, algorithm 1, and its official code. Deviations: z is linear (the paper: also autoencoders); the
    covariance with the scatter between clients; log Pi in prediction, where the code adds Pi; means begin at clients'
    means by k-means++; the mean is over the cohort.
    """

    name = "fedgmm"
    family = "clusters"
    source = "Wu et al., ICML"
    year = 2023

    densities: Annotated[int, Ge(1)] = option(3, "how many Gaussians", Search(1, 6))
    dim: Annotated[int, Ge(1)] = option(32, "principal components of the inputs that Gaussians see")
    ridge: Annotated[float, Gt(0)] = option(1e-3, "added to variances (inputs' components have variance 1)")
    between: bool = option(True, "whether covariances hold the scatter of clients' means")
    share: Literal["rows", "clients"] = option(
        "rows", "weights in the mean of a component: rows that it is responsible for (rows), or `weights` (clients)"
    )

    def program(self) -> tuple[Phase, ...]:
        """Moments of inputs once, where Gaussians are to be told apart; then rounds."""
        train = Phase("train")
        return (train,) if self.densities == 1 else (Phase("moments", when="start"), train)

    def sends(self, phase: Phase) -> type:
        """Moments or components, as the phase is."""
        return density.Moments if phase.name == "moments" else Up

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """As many models, weights and Gaussians."""
        own = place.architectures[model]
        size = math.prod(own.input_shape)
        a, k = self.densities, min(self.dim, size)
        return {
            "mean": Shape(own.dtype, (size,)),
            "second": Shape(own.dtype, (size, size)),
            "models": components.fitting(place, model, self.components),
            "pi": Shape(own.dtype, (a, self.components), low=0, high=1 + 1e-4),
            "means": Shape(own.dtype, (a, k)),
            "covariances": Shape(own.dtype, (a, k, k)),
        }

    @property
    def cells(self) -> int:
        """Pairs of a Gaussian and a component."""
        return self.densities * self.components

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """Components that differ, and Gaussians that do not yet."""
        own = host.architecture()
        size = math.prod(own.input_shape)
        blank = density.blank(self.densities, min(self.dim, size), size, own.dtype)
        pi = torch.full((self.densities, self.components), 1 / self.cells, dtype=own.dtype)
        return Server(components.draw(host, self.components), blank, pi)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down | None:
        """Nothing before round 1; then all of it but Pi."""
        return None if phase.name == "moments" else Down(server.models, server.density)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """The first Gaussians, or the M step over all clients."""
        rows = torch.tensor([reply.samples for reply in replies], dtype=torch.float64)
        found = [reply.update for reply in replies]
        if phase.name == "moments":
            shares = (rows / rows.sum()).tolist()
            return server._replace(density=density.begun(found, shares, server.density, host.rng("gaussians")))
        dtype = server.pi.dtype
        counts = rows[:, None, None] * torch.stack([up.pi.double() for up in found])
        means, covariances = density.pooled(
            server.density, counts.sum(2), torch.stack([up.means.double() for up in found]),
            torch.stack([up.covariances.double() for up in found]), self.ridge, self.between,
        )  # fmt: skip
        return Server(
            self._models(server, replies, counts.sum(1)),
            server.density._replace(means=means.to(dtype), covariances=covariances.to(dtype)),
            (counts.sum(0) / rows.sum()).to(dtype),
        )

    def _models(self, server: Server, replies: Sequence[Reply], counts: Tensor) -> tuple[Tree, ...]:
        """The mean of each component. counts: rows ``(clients, components)`` that it is responsible for."""
        new = []
        for m, old in enumerate(server.models):
            total = float(counts[:, m].sum())
            if self.share == "clients":
                shares = self.shares(replies)
            elif total > 0:
                shares = (counts[:, m] / total).tolist()
            else:
                new.append(old)
                continue
            mean = weighted_sum([reply.update.models[m] for reply in replies], shares)
            new.append(keep_buffers(mean, old))
        return tuple(new)

    def global_model(self, server: Server) -> Predictor | None:
        """Components by the mean Pi."""
        return self._mixed(server.models, server.density, server.pi, "")

    # --- the client's half -------------------------------------------------------------------------------------

    def scores(self, site: Site, message: Down) -> Tensor:
        """log N(z; mu_a) - loss of component m ``(rows, Gaussians x components)``, up to a constant of the row which
        makes that of a single Gaussian exactly 0."""
        losses = components.losses(site, message.models)
        near = density.log_normal(message.density, density.embed(message.density, site.cast(site.train).x))
        near = near.log_softmax(1).to(losses.dtype)
        return (near[:, :, None] - losses[:, None, :]).flatten(1)

    def client_update(self, phase: Phase, site: Site, message: Down, state: Tensor | None) -> tuple[Tree, Tree]:
        """Moments; or E, then M."""
        x = site.cast(site.train).x
        if phase.name == "moments":
            return density.moments(x), state
        dtype = site.architecture().dtype
        prior = torch.full((self.cells,), 1 / self.cells, dtype=dtype) if state is None else state
        q, pi = components.estimate(self.scores(site, message), prior, 1)
        r = q.view(len(q), self.densities, self.components)
        if self.components == 1:
            trained = [site.fit(message.models[0]).weights]
        else:
            share = r.sum(1)
            trained = [site.fit(old, sample_weight=share[:, m]).weights for m, old in enumerate(message.models)]
        means, covariances = density.fitted(density.embed(message.density, x), r.sum(2).double())
        pairs = pi.view(self.densities, self.components)
        return Up(tuple(trained), pairs, means.to(dtype), covariances.to(dtype)), pi

    def _mixed(self, models: Sequence[Tree], found: Density, pi: Tensor, model: str) -> Predictor:
        if self.densities == 1:
            return components.mixture(models, pi.flatten().tolist(), model)
        return Gated(tuple(Net(one, model) for one in models), found, pi.view(self.densities, self.components))

    def personal_model(self, site: Site, message: Down, state: Tensor | None) -> Predictor:
        """Components by the own Pi."""
        return self._mixed(message.models, message.density, self.joined(site, message, state), site.model)

    def trained_model(self, site: Site, message: Down, update: Up, state: Tensor) -> Predictor:
        """The trained components by the new Pi, with the received Gaussians."""
        return self._mixed(update.models, message.density, state, site.model)

    def log_density(self, server: Server, x: Tensor, pi: Tensor | None = None) -> Tensor:
        """log sum_a pi_a N(z; mu_a, Sigma_a) of inputs ``(n, *shape)``: float64 ``(n,)``. pi: a client's state, or
        everybody's. The lower, the less was such an input seen in training."""
        share = (server.pi if pi is None else pi.view(self.densities, self.components)).double().sum(1)
        return (share.log() + density.log_normal(server.density, density.embed(server.density, x))).logsumexp(1)
