"""FedASMU: learned staleness weights, and a fresh global model mixed in halfway through local training (Liu et al.)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt

from consilience.core import tree as tr
from consilience.core.fit import Batch, Fit, Grad, Plan, shuffled
from consilience.core.messages import ClientInfo, Model, Reply, Stat
from consilience.core.method import Method, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.site import Host, Site
from consilience.core.streams import Streams
from consilience.core.training import Search, option
from consilience.core.tree import record
from consilience.parts.staleness import mix


@record
class Merge(NamedTuple):
    """A device on the server: lambda, sigma, iota, and its last merge (its weight alpha, update t, age t - o + 1)."""

    factor: float
    decay: float
    shift: float
    alpha: float
    update: int
    age: int


@record
class Server(NamedTuple):
    """The global model, its version, and the devices that have sent something."""

    model: Weights
    version: int
    devices: dict[int, Merge]


@record
class Down(NamedTuple):
    """A model and its version, counted from 1."""

    model: Model
    version: Stat


@record
class Up(NamedTuple):
    """A trained model, and how the device's loss changes with the weight of its last one (None: unknown)."""

    model: Model
    slope: Stat


@record
class Own(NamedTuple):
    """A device: gamma, upsilon; halfway through a job its weights, their version and the slope; its last upload."""

    gamma: float
    upsilon: float
    half: Weights | None
    version: int
    slope: float | None
    last: Params | None


@dataclass(frozen=True)
class FedASMU(Method):
    """Asynchronous, with a weight for each device that is learned, and a second download in the middle of a job.

        device, after the share ``request`` of its steps, asks for the global model w^g; if it is newer than w^o:
          w_i <- (1 - beta) w_i + beta w^g,   beta = mu_b phi / (1 + mu_b phi),   at least 0
          phi = gamma_i / sqrt(g) (1 - upsilon_i / sqrt(g - o + 1));   then it goes on with the rest of its steps
        server, at update t with a reply trained from version o:
          xi = lambda_i / ( sqrt(t) (t - o + 1)^sigma_i ) + iota_i,  at least 0;   alpha = mu_a xi / (1 + mu_a xi)
          w^t = (1 - alpha) w^{t-1} + alpha w_i;   left out if t - o + 1 > ``max_age``

    gamma_i and upsilon_i take a gradient step on the device's loss at the mixed model, dF/dbeta =
    <grad F_i, w^g - w_i>, with the gradient of its next local step. lambda_i, sigma_i and iota_i take one on
    dF/dalpha = <grad F_i(w^t), w_i - w^{t-1}>, which the device reports as one number with its next reply.

    If no newer model is there, local training is that of a plain job, bit for bit (with sgd, and no dropout or
    momentum). mu_b = 0 mixes nothing in.

    Source: Liu, Jia, Che, Huo, Ren, Peng, Dai, Dou, "FedASMU: Efficient Asynchronous Federated Learning with Dynamic
    Staleness-aware Model Update", AAAI 2024. Deviations: the time of the request is a fixed share of the job, where
    the paper lets an LSTM and Q-learning choose it; grad F_i(w^t) is taken at the model from which the device's next
    job starts, which costs no extra gradient and one number up instead of a model. Starting values as in a
    third-party port.
    """

    name = "fedasmu"
    family = "asynchronous"
    source = "Liu et al., AAAI"
    year = 2024
    confidence = "medium"
    schedule = "async"
    own_batches = "cuts its batches in two at the download in between"

    request: Annotated[float, Gt(0), Lt(1)] = option(0.5, "share of a job's steps before the fresh model is asked for")
    mu_a: Annotated[float, Gt(0)] = option(1.0, "scale of the server's weight alpha", Search(0.1, 10.0))
    mu_b: Annotated[float, Ge(0)] = option(1.0, "scale of the device's weight beta")
    factor: Annotated[float, Ge(0)] = option(1.0, "first lambda_i")
    decay: Annotated[float, Ge(0)] = option(0.5, "first sigma_i")
    shift: Annotated[float, Ge(0)] = option(0.0, "first iota_i")
    gamma: Annotated[float, Ge(0)] = option(1.0, "first gamma_i")
    upsilon: Annotated[float, Ge(0)] = option(0.5, "first upsilon_i")
    meta_lr: Annotated[float, Ge(0)] = option(0.01, "step size of what is learned about staleness")
    max_age: Annotated[int, Ge(1)] = option(99, "replies with a larger t - o + 1 are left out")
    form: Literal["model"] = option("model", "clients send models")

    def program(self) -> tuple[Phase, ...]:
        """A job in two halves; the second gets a model built when it begins."""
        return (Phase("train"), Phase("rest", over="client"))

    def sends(self, phase: Phase) -> type:
        """See :class:`Up`."""
        return Up

    def init_server(self, host: Host) -> Server:
        """Version 1, no device known."""
        return Server(host.initial(), 1, {})

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """The model and its version."""
        return Down(server.model, server.version)

    # --- the device --------------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Own:
        """Nothing learned yet."""
        return Own(self.gamma, self.upsilon, None, 0, None, None)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """The first half's samples; of the second nothing is promised."""
        return self.one_fit(rows, self._first(self.steps_of(rows, steps))) if phase.name == "train" else 0

    def _first(self, steps: int) -> int:
        return min(steps, max(1, round(self.request * steps)))

    def _half(self, site: Site, weights: Weights, compare: Params | None, skip: int, steps: int) -> Fit:
        """Steps ``skip`` to ``skip + steps`` of a plain job's batches; the carry is <first gradient, compare>."""
        rng = Streams(site.streams.seed, site.id, site.job.number, "train").rng("batches")
        batches = itertools.islice(shuffled(rng, len(site.train), self.batch_size), skip, None)

        def step(params: Params, grad: Grad, batch: Batch, carry: float | None) -> tuple[Params, float | None]:
            gradient = grad()
            if carry is None and compare is not None:
                carry = tr.dot(gradient, {name: compare[name] for name in gradient})
            return gradient, carry

        return site.fit(weights, Plan(step=step, batches=batches, steps=steps, purpose="rest" if skip else "batches"))

    def client_update(self, phase: Phase, site: Site, message: Down, state: Own) -> tuple[Up | None, Own]:
        """The first half from the received model, or the second with a fresh one mixed in."""
        total = self.steps_of(len(site.train), site.job.steps)
        first = self._first(total)
        if phase.name == "train":
            back = None if state.last is None else tr.sub(state.last, message.model.params)
            fit = self._half(site, message.model, back, 0, first)
            return None, state._replace(half=fit.weights, version=message.version, slope=fit.carry)
        weights, toward, beta = self._mixed(message, state)
        fit = self._half(site, weights, toward, first, total - first)
        gamma, upsilon = self._learned(message, state, beta, fit.carry)
        up = Up(fit.weights, state.slope)
        return up, Own(gamma, upsilon, None, 0, None, fit.weights.params)

    def _phi(self, fresh: int, old: int, gamma: float, upsilon: float) -> float:
        return gamma / math.sqrt(fresh) * (1 - upsilon / math.sqrt(fresh - old + 1))

    def _mixed(self, message: Down, state: Own) -> tuple[Weights, Params | None, float]:
        """The weights to go on with, w^g - w_i, and beta."""
        assert state.half is not None
        scaled = self.mu_b * self._phi(message.version, state.version, state.gamma, state.upsilon)
        if message.version <= state.version or scaled <= 0:
            return state.half, None, 0.0
        beta = scaled / (1 + scaled)
        return mix(state.half, message.model, beta), tr.sub(message.model.params, state.half.params), beta

    def _learned(self, message: Down, state: Own, beta: float, slope: float | None) -> tuple[float, float]:
        """gamma_i and upsilon_i after a step; slope = dF/dbeta."""
        if not beta or slope is None or not math.isfinite(slope):
            return state.gamma, state.upsilon
        root, age = math.sqrt(message.version), math.sqrt(message.version - state.version + 1)
        along = self.meta_lr * slope * self.mu_b * (1 - beta) ** 2  # dbeta/dphi = mu_b (1 - beta)^2
        gamma = state.gamma - along * (1 - state.upsilon / age) / root
        upsilon = state.upsilon + along * state.gamma / (root * age)
        return max(0.0, gamma), max(0.0, upsilon)

    # --- the server --------------------------------------------------------------------------------------------

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Merge one model after another, and learn from what devices report."""
        model, devices, update = server.model, dict(server.devices), server.version
        for reply in replies:
            client, age = reply.job.client, reply.staleness + 1
            known = self._taught(devices.get(client), reply.update.slope)
            if age <= self.max_age:
                alpha = self.weight(known, update, age)
                model = mix(model, reply.update.model, alpha)
                known = known._replace(alpha=alpha, update=update, age=age)
            else:
                known = known._replace(update=0)  # what it reports next is not about a merge
            devices[client] = known
        return Server(model, update + 1, dict(sorted(devices.items())))

    def weight(self, known: Merge, update: int, age: int) -> float:
        """alpha, in [0, 1)."""
        xi = max(0.0, known.factor / (math.sqrt(update) * math.pow(age, known.decay)) + known.shift)
        return self.mu_a * xi / (1 + self.mu_a * xi)

    def _taught(self, known: Merge | None, slope: float | None) -> Merge:
        """A device after what it says about its last merge; slope = <grad F_i, w_i - w^t> = (1 - alpha) dF/dalpha."""
        if known is None:
            return Merge(self.factor, self.decay, self.shift, 0.0, 0, 0)
        if slope is None or not known.update or not math.isfinite(slope):
            return known
        part = 1 / (math.sqrt(known.update) * math.pow(known.age, known.decay))  # dalpha/dxi = mu_a (1 - alpha)^2
        along = self.meta_lr * slope / (1 - known.alpha) * self.mu_a * (1 - known.alpha) ** 2
        return known._replace(
            factor=max(0.0, known.factor - along * part),
            decay=max(0.0, known.decay + along * known.factor * math.log(known.age) * part),
            shift=known.shift - along,
        )

    def trained_model(self, site: Site, message: Down, update: Up | None, state: Own) -> Predictor | None:
        """What was uploaded; halfway there, what there is."""
        if update is not None:
            return Net(update.model, site.model)
        return Net(state.half, site.model) if state.half is not None else None
