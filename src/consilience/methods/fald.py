"""FA-LD: federated averaging Langevin dynamics, which samples from a posterior (Deng et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Le

from consilience.core.fit import Batch, Grad, Plan
from consilience.core.messages import ClientInfo, Model, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Ensemble, Net, Predictor
from consilience.core.reduce import uniform_weights
from consilience.core.site import Host, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.local_steps import plain_sgd


@record
class Server(NamedTuple):
    """The chain's state, all clients' rows together, and the samples that are kept, oldest first."""

    model: Weights
    rows: int
    samples: tuple[Weights, ...]


@record
class Down(NamedTuple):
    """The chain's state, all clients' rows, and for deployment alone the samples."""

    model: Model
    rows: Stat
    samples: Stat = ()


def averaged(model: Weights, samples: Sequence[Weights]) -> Predictor:
    """The posterior predictive distribution, or the chain's state before there are samples."""
    if not samples:
        return Net(model)
    return Ensemble(tuple(map(Net, samples)), tuple(uniform_weights(len(samples))))


@dataclass(frozen=True)
class FALD(Method):
    """Local steps with noise, so that the global model wanders through the posterior instead of settling.

        target:  exp(-f(x) / tau),  f = sum_i p_i f_i = the sum of all rows' losses (and n weight_decay / 2 ||x||^2),
                 p_i = n_i / n,  f_i = n times client i's mean loss
        y_i <- y_i - h grad f_i(y_i; batch) + sqrt(2 h tau) ( rho z + sqrt((1 - rho^2) / p_i) z_i )
        x   <- sum_i p_i y_i;   h = lr / n, so that lr is the step size on the mean loss as everywhere

    z_i is each client's own standard normal noise; z, the same for all, comes from a seed that they share. Averaged,
    the noise has variance 2 h tau in every coordinate, whatever p and rho are. After ``burn_in`` rounds every
    ``thin``-th x is kept, the last ``keep`` of them; the predictor is the mean of their probabilities, and the
    calibration error of every report is that of this mean.

    tau = 0 before the burn-in ends is FedAvg with the same form, bit for bit; rho = 1 keeps clients together.

    Source: Deng, Zhang, Ma, Song, Zhang, Lin, "On Convergence of Federated Averaging Langevin Dynamics", 2021, from a
    summary. Deviation: with a part of the clients, x is the weighted mean of the cohort, n_i over the rows of the
    cohort; the averaged noise then has n / (rows of the cohort) times that variance. The paper's scheme I draws clients
    by p_i with replacement; its scheme II takes p_i N / |S|, whose sum is not 1.
    """

    name = "fald"
    family = "bayesian"
    source = "Deng et al."
    year = 2021
    confidence = "medium"
    needs = Needs(classification=True, loss=True)
    counts_rows = True

    temperature: Annotated[float, Ge(0)] = option(1.0, "tau; 1 is the posterior, less is colder", Search(1e-3, 1.0))
    shared_noise: Annotated[float, Ge(0), Le(1)] = option(0.0, "rho: the share of noise that all clients have alike")
    burn_in: Annotated[int, Ge(0)] = option(20, "rounds before the first sample")
    thin: Annotated[int, Ge(1)] = option(1, "rounds from one sample to the next")
    keep: Annotated[int, Gt(0)] = option(10, "samples kept at most; the newest")

    def check(self) -> None:
        """Noise belongs to plain steps."""
        plain_sgd(self)

    def init_server(self, host: Host) -> Server:
        """The chain's start."""
        return Server(host.initial(), host.rows, ())

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """x and n."""
        return Down(server.model, server.rows)

    def deploy(self, server: Server, client: ClientInfo) -> Down:
        """The samples, too."""
        return Down(server.model, server.rows, server.samples)

    def plan(self, site: Site, message: Down, state: Tree) -> Plan:
        """Noisy steps."""
        if not self.temperature:
            return Plan()
        share = len(site.train) / message.rows
        size = math.sqrt(2 * self.temperature / (self.rate(site.job.version) * message.rows))  # over lr, as a gradient
        own = size * math.sqrt((1 - self.shared_noise**2) / share)
        noises = [(site.rng("langevin"), own)] if own else []
        if self.shared_noise:
            noises.append((site.shared_rng("langevin", site.job.version), size * self.shared_noise))

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            direction = grad()
            for rng, scale in noises:
                for gradient in direction.values():
                    noise = torch.from_numpy(rng.standard_normal(gradient.shape))
                    gradient.sub_(noise.to(gradient.dtype), alpha=scale)
            return direction, carry

        return Plan(step=step)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """The next x, kept if it is time."""
        model, past, samples = self.combine(server.model, replies), host.version + 1 - self.burn_in, server.samples
        if past > 0 and (past - 1) % self.thin == 0:
            samples = (*samples, model)[-self.keep :]
        return server._replace(model=model, samples=samples)

    def global_model(self, server: Server) -> Predictor:
        """The mean of the samples' probabilities."""
        return averaged(server.model, server.samples)

    def personal_model(self, site: Site, message: Down, state: Tree) -> Predictor:
        """The same."""
        return averaged(message.model, message.samples)
