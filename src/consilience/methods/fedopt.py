"""Server optimisers on the pseudo-gradient: FedAvgM, FedAdagrad, FedAdam, FedYogi (Reddi et al., 2021), and any other
by name."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn

from consilience.core import optim
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Reply
from consilience.core.method import Method, Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.site import Host
from consilience.core.streams import torch_fork
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record


def _needs_delta(method: Method) -> None:
    if method.form != "delta":
        raise ConfigError(f"{method.name}: a server optimiser works on differences; use form=delta")


@record
class Momentum(NamedTuple):
    """Server state of FedAvgM: model and velocity."""

    model: Weights
    velocity: Params


@dataclass(frozen=True)
class FedAvgM(Method):
    """Server momentum.

        Delta = sum_i p_i (y_i - x);   v <- beta v + Delta;   x <- x + eta_g v;   v_0 = 0

    server_momentum = 0 and server_lr = 1 is FedAvg in delta form bit for bit. Buffers take plain averages.

    Source: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", 2019; FedAvgM of Reddi et al., ICLR 2021. Deviations: none.
    """

    name = "fedavgm"
    family = "server optimiser"
    source = "Hsu et al."
    year = 2019
    takes_rules = True
    sums = Method.means

    server_lr: Annotated[float, Gt(0)] = option(1.0, "server step size eta_g", Search(0.1, 10.0))
    server_momentum: Annotated[float, Ge(0), Lt(1)] = option(0.9, "beta", Search(0.0, 0.99, log=False))
    form: Literal["model", "delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """The form must be delta."""
        _needs_delta(self)

    def init_server(self, host: Host) -> Momentum:
        """The initial model and no velocity."""
        model = host.initial()
        return Momentum(model, tr.zeros_like(model.params))

    def aggregate(
        self, phase: Phase, host: Host, server: Momentum, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Momentum:
        """One server step."""
        shares = self.shares(replies)
        velocity = self.mean_delta(replies, shares)
        if self.server_momentum:
            velocity = tr.axpy(self.server_momentum, server.velocity, velocity)
        params = tr.axpy(self.server_lr, velocity, server.model.params)
        model = keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model)
        return Momentum(model, velocity)


@record
class Moments(NamedTuple):
    """Server state of the adaptive optimisers: model, first and second moment."""

    model: Weights
    first: Params
    second: Params


@dataclass(frozen=True)
class _Adaptive(Method):
    """Adaptive server optimisers.

        Delta = sum_i p_i (y_i - x);   m <- beta_1 m + (1 - beta_1) Delta
        v <- (as above);               x <- x + eta_g m / (sqrt(v) + tau)
        m_{-1} = 0,  v_{-1} = tau^2 in every coordinate

    There is no bias correction, and tau is added outside the root: this is not torch.optim.Adam. Buffers take
    plain averages.
    """

    family = "server optimiser"
    source = "Reddi et al., ICLR"
    year = 2021
    takes_rules = True
    sums = Method.means

    server_lr: Annotated[float, Gt(0)] = option(0.03, "server step size eta_g", Search(1e-3, 1.0))
    beta_1: Annotated[float, Ge(0), Lt(1)] = option(0.9, "decay of the first moment")
    tau: Annotated[float, Gt(0)] = option(1e-3, "degree of adaptivity", Search(1e-5, 1e-1))
    form: Literal["model", "delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """The form must be delta."""
        _needs_delta(self)

    @abstractmethod
    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The next second moment, from Delta squared."""

    def init_server(self, host: Host) -> Moments:
        """m = 0, v = tau^2."""
        model = host.initial()
        second = {name: torch.full_like(p, self.tau**2) for name, p in model.params.items()}
        return Moments(model, tr.zeros_like(model.params), second)

    def aggregate(
        self, phase: Phase, host: Host, server: Moments, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Moments:
        """One server step."""
        shares = self.shares(replies)
        delta = self.mean_delta(replies, shares)
        first = {k: self.beta_1 * server.first[k] + (1 - self.beta_1) * d for k, d in delta.items()}
        second = {k: self.second(server.second[k], d.square()) for k, d in delta.items()}
        params = {
            k: x + self.server_lr * first[k] / (second[k].sqrt() + self.tau) for k, x in server.model.params.items()
        }
        model = keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model)
        return Moments(model, first, second)


def _explained(rule: str) -> str:
    """The docstring of an adaptive method: its own rule, what all share, and where it comes from."""
    shared = inspect.cleandoc(_Adaptive.__doc__ or "").partition("\n\n")[2]
    return "\n\n".join((f"Adaptive server optimiser with  {rule}", shared, inspect.cleandoc(_SOURCE)))


_SOURCE = """
    Source: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", ICLR
    2021, algorithm 2. Deviations: none; the paper tunes eta_g and tau on a grid, so treat the defaults as a start.
    """


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    __doc__ = _explained("v <- v + Delta^2.")
    name = "fedadagrad"

    server_lr: Annotated[float, Gt(0)] = option(0.1, "server step size eta_g", Search(1e-3, 1.0))
    beta_1: Annotated[float, Ge(0), Lt(1)] = option(0.0, "decay of the first moment (0 in the paper)")

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """v + Delta^2."""
        return v + square


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    __doc__ = _explained("v <- beta_2 v + (1 - beta_2) Delta^2.")
    name = "fedadam"

    beta_2: Annotated[float, Ge(0), Lt(1)] = option(0.99, "decay of the second moment")

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """beta_2 v + (1 - beta_2) Delta^2."""
        return self.beta_2 * v + (1 - self.beta_2) * square


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    __doc__ = _explained("v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2).")
    name = "fedyogi"

    beta_2: Annotated[float, Ge(0), Lt(1)] = option(0.99, "decay of the second moment")

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """v - (1 - beta_2) Delta^2 sign(v - Delta^2)."""
        return v - (1 - self.beta_2) * square * torch.sign(v - square)


@record
class Optimised(NamedTuple):
    """Server state of FedOpt: model, and what its optimiser remembers."""

    model: Weights
    memory: Tree


@dataclass(frozen=True)
class FedOpt(Method):
    """Any optimiser on the server, by its name in torch.optim or pytorch-optimizer (or adamomentum), with ``grokfast+``
    or ``sgg+`` in front if wanted.

        Delta = sum_i p_i (y_i - x);   x <- one step of the optimiser from x along the gradient -Delta, of size eta_g

    Its other constants are the library's own. What it remembers is part of the server's state. sgd with server_lr = 1
    is FedAvg in delta form bit for bit, and with server_momentum FedAvgM but for the last bits; adam, adagrad and yogi
    are *not* FedAdam, FedAdagrad and FedYogi, which have no bias correction and another constant tau. Optimisers that
    ask about batches of rows (sam+, oasis, adahessian) cannot be used by a server, nor those whose memory cannot be
    written down. Buffers take plain averages.

    Source: the general form (algorithm 1) of Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive
    Federated Optimization", ICLR 2021. Deviations: none of that form; what an optimiser does is what its library does.
    """

    name = "fedopt"
    family = "server optimiser"
    source = "Reddi et al., ICLR"
    year = 2021
    takes_rules = True
    sums = Method.means

    server_optimizer: str = option("adam", "of torch.optim or pytorch-optimizer; grokfast+NAME, sgg+NAME")
    server_lr: Annotated[float, Gt(0)] = option(0.01, "server step size eta_g", Search(1e-4, 1.0))
    server_momentum: Annotated[float, Ge(0), Lt(1)] = option(0.0, "of optimisers that have an option momentum")
    form: Literal["model", "delta"] = option("delta", "clients send differences")

    def check(self) -> None:
        """The form must be delta, and the optimiser one for servers."""
        _needs_delta(self)
        optim.check_server(self.server_optimizer, self.server_momentum)

    def init_server(self, host: Host) -> Optimised:
        """The initial model and no memory."""
        return Optimised(host.initial(), None)

    def aggregate(
        self, phase: Phase, host: Host, server: Optimised, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Optimised:
        """One server step."""
        shares = self.shares(replies)
        delta = self.mean_delta(replies, shares)
        params = {name: nn.Parameter(x.clone()) for name, x in server.model.params.items()}
        made = optim.make(self.server_optimizer, list(params.values()), self.server_lr, self.server_momentum, 0.0)
        if server.memory is not None:
            made.remember(server.memory)
        with torch_fork(host.streams.torch_seed("server-optimizer")):  # some draw
            made.apply([-delta[name] for name in params], self.server_lr)
        stepped = {name: p.detach() for name, p in params.items()}
        model = keep_buffers(Weights(stepped, self.mean_buffers(replies, shares)), server.model)
        return Optimised(model, made.memory())
