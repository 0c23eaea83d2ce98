"""pFedGate: each client learns which blocks of the common model it uses, and how much (Chen et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.fit import Batch, Grad, Models, Plan, Step, n_steps
from consilience.core.messages import Buffers, ClientInfo, DeltaUpdate, Device, ModelUpdate, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Architecture, Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected, Shape, Wrong, misfit
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.blocks import Blocks, blocks
from consilience.parts.local_steps import plain_sgd


@record
class Server(NamedTuple):
    """The common model; by client, the blocks ``(blocks,)`` that it wants next; and the share of the model that the
    clients of the last round sent, on average."""

    model: Weights
    wishes: dict[int, Tensor]
    sent: float


@record
class Part(NamedTuple):
    """Some blocks of a model: ``(blocks,)`` which, and their numbers one after another."""

    chosen: Tensor
    values: Tensor


@record
class Down(NamedTuple):
    """What the client asked for, or all blocks where it never has; and the share that it may use."""

    part: Stat
    buffers: Buffers
    budget: Stat
    asked: Stat


@record
class Up(NamedTuple):
    """The blocks trained (or their differences), and those wanted next."""

    part: Stat
    buffers: Buffers
    wish: Stat


class Gate(nn.Module):
    """``sigmoid(BatchNorm(Linear(x / |x|)))``: a score in (0, 1) of each block for each row, where x is normalised to
    mean 0 and variance 1."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.score = nn.Linear(math.prod(input_shape), outputs)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, blocks)``."""
        rows = x.flatten(1)
        out: Tensor = self.norm(self.score(F.layer_norm(rows, rows.shape[1:]))).sigmoid()
        return out


@dataclass(frozen=True)
class PFedGate(Method):
    """A client's small gate gives each block of the common model a score; the client uses, trains and sends the blocks
    with the best scores that fit its budget, each multiplied by its score.

        g(x) = clip( sigmoid( BN( A norm(x) + a ) ), s_min, 1 ), mean over rows    (A, a, BN: phi_k, the client's own)
        M_k = knapsack of the blocks by g over all its rows: at most the share s_k of the model
        (theta_k, phi_k) <- SGD on F_k( theta * g * M_k ; batch ),  g over the batch, step sizes eta and eta_g
        theta <- theta + sum_k p_k M_k (theta_k - theta)

    A block is one of ``pieces`` runs of a parameter; the first of each is always used, linear layers and others are
    packed apart, s_min = min(max(1 / pieces, 0.1), s_k). M_k stays for a round: it is chosen at the end of the last one
    and told to the server, so that only its blocks travel, both ways; before the first they all come down. Outside M_k
    the client has zeros. s_k = ``budget``, or less where devices are simulated and ``transfer_seconds`` is given: so
    much that the transfers of a round last no longer on the client's link. FLOP are those of the whole model, since
    blocks of zeros are multiplied too. A client deploys theta * g * M_k with g over its own rows; one that never took
    part learns phi alone first, for ``join_epochs`` passes. Every round reports ``sent``, the share of the model that
    its clients sent. With gate_lr = 0 there are no gates, all scores are 1, and with budget = 1 it is FedAvg bit for
    bit.

    Source: Chen, Yao, Gao, Ding, Li, "Efficient Personalized Federated Learning via Sparse Model-Adaptation", ICML
    2023, and its official code. Deviations: there M is chosen anew for each batch, in training and in tests, so that
    all blocks may travel; scores are not rounded in the knapsack, whose budget includes the first blocks; the input is
    normalised plainly (SwitchNorm there); gradients are clipped only if ``clip`` says so, both together.
    """

    name = "pfedgate"
    family = "personal models"
    source = "Chen et al., ICML"
    year = 2023
    needs = Needs(loss=True)
    unstacked = "two networks are trained at once"

    budget: Annotated[float, Gt(0), Le(1)] = option(0.5, "share of the model that a client uses", Search(0.1, 1, False))
    transfer_seconds: Annotated[float, Gt(0)] | None = option(
        None, "virtual seconds that a client's transfers may take in a round, where devices are simulated"
    )
    pieces: Annotated[int, Ge(1)] = option(5, "blocks of a parameter")
    gate_lr: Annotated[float, Ge(0)] = option(0.1, "step size of gates", Search(0.01, 1.0))
    join_epochs: Annotated[int, Ge(0)] = option(5, "passes of a client that never took part for its gate")

    def check(self) -> None:
        """Two step sizes, and blocks that must not move, are for SGD."""
        plain_sgd(self, momentum=True)
        if self.buffers == "local":
            raise ConfigError("pfedgate: buffers=local is not possible; leave it out")
        super().check()

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The gate."""
        model = next(iter(models.values()))
        count = len(blocks(model, self.pieces).sizes)
        return {"gate": Architecture("gate", Gate, model.input_shape, count, model.dtype)}

    def _blocks(self, place: Place) -> Blocks:
        return blocks(place.architectures[place.server_model], self.pieces)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """As many numbers as the blocks hold."""
        made, dtype = self._blocks(place), place.architectures[model].dtype
        which = Shape(torch.bool, (len(made.sizes),))

        def fits(found: Any) -> Wrong | None:
            if not isinstance(found, Part):
                return "", f"is {type(found).__name__}, not some blocks of a model"
            wrong = misfit(found.chosen, which, {})
            if wrong is not None:
                return "chosen", wrong[1]
            wrong = misfit(found.values, Shape(dtype, (made.count(found.chosen),)), {})
            return None if wrong is None else ("values", wrong[1])

        return {"part": fits, "wish": which}

    def sends(self, phase: Phase) -> type:
        """Blocks."""
        return Up

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """The initial model."""
        return Server(host.initial(), {}, 1.0)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """The blocks that the client wants."""
        made = blocks(client.architectures[client.model], self.pieces)
        wish = server.wishes.get(client.id)
        chosen = torch.ones_like(made.first) if wish is None else wish
        share = self.share(client.device, tr.nbytes(server.model.params))
        return Down(Part(chosen, made.take(server.model.params, chosen)), server.model.buffers, share, wish is not None)

    def share(self, device: Device | None, size: int) -> float:
        """s_k of a client with this device, for a model of ``size`` bytes."""
        if device is None or self.transfer_seconds is None:
            return self.budget
        whole = size / device.down + size / device.up
        return min(self.budget, max(0.0, self.transfer_seconds - 2 * device.latency) / whole)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """The mean, to which a client adds nothing where it has no block."""
        made, wishes = self._blocks(host.place), dict(server.wishes)
        old = server.model.params if self.form == "model" else tr.zeros_like(server.model.params)
        whole, sent = [], 0
        for reply in replies:
            part, buffers, wish = reply.update
            params = made.put(part.values, part.chosen, old)
            update = ModelUpdate(Weights(params, buffers)) if self.form == "model" else DeltaUpdate(params, buffers)
            whole.append(reply._replace(update=update))
            wishes[reply.job.client] = wish
            sent += len(part.values)
        total = len(replies) * int(made.sizes.sum())
        return Server(self.combine(server.model, whole), dict(sorted(wishes.items())), sent / total)

    def report(self, server: Server) -> Mapping[str, float]:
        """The share of the model that was sent."""
        return {"sent": server.sent}

    def global_model(self, server: Server) -> Predictor | None:
        """There is one only without gates and budget."""
        return Net(server.model) if not self.gate_lr and self.budget == 1 and not self.transfer_seconds else None

    # --- the client's half -------------------------------------------------------------------------------------

    def client_update(self, phase: Phase, site: Site, message: Down, state: Weights | None) -> tuple[Tree, Tree]:
        """Train the blocks and the gate; choose those of the next round."""
        made = self._blocks(site.place)
        start = self._received(site, message)
        gate = site.initial("gate") if state is None else state
        chosen = self._chosen(site, message, gate)
        mask = made.spread(chosen.to(site.architecture().dtype))
        start = start._replace(params={name: p * mask[name] for name, p in start.params.items()})
        trained, gate = self._trained(site, start, gate, chosen, message.budget, Plan())
        params = trained.params if self.form == "model" else tr.sub(trained.params, start.params)
        wish = made.choose(self.scores(site, gate, message.budget), message.budget)
        return Up(Part(chosen, made.take(params, chosen)), trained.buffers, wish), gate

    def _received(self, site: Site, message: Down) -> Weights:
        zeros = tr.zeros_like(site.architecture().spec.params)
        params = self._blocks(site.place).put(message.part.values, message.part.chosen, zeros)
        return Weights(params, message.buffers)

    def _chosen(self, site: Site, message: Down, gate: Weights) -> Tensor:
        if message.asked:
            return message.part.chosen  # type: ignore[no-any-return]
        return self._blocks(site.place).choose(self.scores(site, gate, message.budget), message.budget)

    def _least(self, budget: float) -> float:
        return min(max(1 / self.pieces, 0.1), budget)

    def scores(self, site: Site, gate: Weights, budget: float) -> Tensor:
        """g over all training rows ``(blocks,)``; ones without gates or rows."""
        dtype = site.architecture().dtype
        if not self.gate_lr or not len(site.train):
            return torch.ones(len(self._blocks(site.place).sizes), dtype=dtype)
        total = sum(site.map(lambda g, rows: g(rows.x).double().sum(0), gate, name="gate"))
        assert isinstance(total, Tensor)
        return (total / len(site.train)).to(dtype).clamp(min=self._least(budget))

    def _trained(
        self, site: Site, start: Weights, gate: Weights, chosen: Tensor, budget: float, plan: Plan
    ) -> tuple[Weights, Weights]:
        """The model and the gate after training with ``plan``, to which the gates are added."""
        made, dtype = self._blocks(site.place), site.architecture().dtype
        if not self.gate_lr:
            if not chosen.all():
                plan.step = _masked(made.spread(chosen.to(dtype)))
            return site.fit(start, plan).weights, gate
        mask, least = chosen.to(dtype), self._least(budget)

        def loss(models: Models, batch: Batch) -> Tensor:
            scores = models["gate"](batch.x).mean(0).clamp(min=least)
            scale = made.spread(scores * mask)
            params = {name: p * scale[name] for name, p in models["model"].named_parameters()}
            return site.task.loss(functional_call(models["model"], params, (batch.x,)), batch.y)

        ratio = self.gate_lr / self.lr

        def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
            return {n: g * ratio if n.startswith("gate/") else g for n, g in grad().items()}, carry

        plan.loss, plan.step = loss, step
        plan.model = {"model": "", "gate": "gate"}
        weights = site.fit({"model": start, "gate": gate}, plan).weights
        return weights["model"], weights["gate"]

    # --- what would be deployed --------------------------------------------------------------------------------

    def _gated(self, site: Site, model: Weights, gate: Weights, chosen: Tensor, budget: float) -> Net:
        scale = self._blocks(site.place).spread(self.scores(site, gate, budget) * chosen)
        return Net(Weights({name: p * scale[name] for name, p in model.params.items()}, model.buffers), site.model)

    def personal_model(self, site: Site, message: Down, state: Weights | None) -> Predictor:
        """The gated model; a client without a gate learns one."""
        start = self._received(site, message)
        gate = site.initial("gate") if state is None else state
        if state is None and self.gate_lr and self.join_epochs and len(site.train):
            steps = n_steps(len(site.train), self.batch_size, self.join_epochs, None)
            plan = Plan(steps=steps, trainable=lambda name: name.startswith("gate/"), purpose="join")
            gate = self._trained(site, start, gate, self._chosen(site, message, gate), message.budget, plan)[1]
        return self._gated(site, start, gate, self._chosen(site, message, gate), message.budget)

    def trained_model(self, site: Site, message: Down, update: Up, state: Weights) -> Predictor:
        """The blocks as trained, with the gate as it is now."""
        made, part = self._blocks(site.place), update.part
        start = self._received(site, message).params
        params = made.put(part.values, part.chosen, tr.zeros_like(start))
        if self.form == "delta":
            params = tr.add(start, params)
        return self._gated(site, Weights(params, update.buffers), state, part.chosen, message.budget)


def _masked(mask: Params) -> Step:
    """A step that leaves what the mask leaves out where it is."""

    def step(params: Params, grad: Grad, batch: Batch, carry: Tree) -> tuple[Params, Tree]:
        return {n: g * mask[n] for n, g in grad().items()}, carry

    return step
