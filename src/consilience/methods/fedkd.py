"""FedKD: adaptive mutual distillation with a small model that travels compressed (Wu et al., 2022)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from consilience.core import tree as tr
from consilience.core.fit import Batch, Models
from consilience.core.messages import Buffers, ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase, keep_buffers
from consilience.core.model import Architecture, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Wrong
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts.distillation import kl
from consilience.parts.lowrank import misfit, pack, unpack


@record
class Server(NamedTuple):
    """The mentee, and what of it is sent: packed parameters, and whether they are its difference from the initial
    one."""

    model: Weights
    packed: Stat


@record
class Down(NamedTuple):
    """The mentee's difference from its common initial value, packed, or (energy 1) its parameters."""

    packed: Stat
    buffers: Buffers


@record
class Up(NamedTuple):
    """What training changed in the mentee, packed."""

    packed: Stat
    buffers: Buffers


@record
class Node(NamedTuple):
    """A client's mentor, and the map from the mentee's features to the mentor's."""

    mentor: Weights
    map: Weights


class Map(nn.Module):
    """A linear map of features."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.map = nn.Linear(input_shape[0], outputs, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.map(z)
        return out


@dataclass(frozen=True)
class FedKD(Method):
    """A client's mentor and a small mentee teach each other, less where both still err; the mentee travels as SVD.

        c_m = CE(o, y), c_g = CE(q, y)          o, z: scores and features of the mentor;  q, s: of the mentee
        L = c_m + c_g + transfer ( KL(softmax q || softmax o) + KL(softmax o || softmax q) + MSE(z, W s) ) / (c_m + c_g)
        mentor, mentee and the private map W step at once; denominator and teachers take no gradient
        up: SVD of the mentee's change;   g <- g~ + sum_k p_k change_k;   down: SVD of g - g_0, so that clients go on
        from g~ = g_0 + that, where g_0 is the initial mentee that all can draw

    Each matrix is sent by the smallest rank that holds a share T(t) of its squared singular values, which rises from
    energy_start to energy_end over energy_rounds rounds; a matrix that this would not make smaller goes as it is. The
    mentee is ``--model``, the mentors are ``--models``. With transfer = 0 and both energies 1 the mentee is FedAvg's
    with uniform weights in delta form, and mentors are those of ``local``, bit for bit.

    Source: Wu, Wu, Lyu, Huang, Xie, "Communication-efficient federated learning via knowledge distillation", Nature
    Communications 2022, equations 1 to 6. Deviations: the down link is relative to g_0, so that a client that was away
    needs no history; ranks are at least 1 and suffice (the HtFLlib version zeroes a matrix that needs its full rank).
    """

    name = "fedkd"
    family = "different architectures"
    source = "Wu et al., Nature Communications"
    year = 2022
    confidence = "medium"
    needs = Needs(architectures="any", split_model=True, classification=True)
    unstacked = "two networks learn from each other"

    transfer: Annotated[float, Ge(0)] = option(1.0, "weight of what the two models teach each other", Search(0.1, 10.0))
    energy_start: Annotated[float, Gt(0), Le(1)] = option(0.95, "share of squared singular values kept at first")
    energy_end: Annotated[float, Gt(0), Le(1)] = option(0.98, "share kept in the end")
    energy_rounds: Annotated[int, Ge(1)] = option(50, "rounds over which that share rises")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight")
    form: Literal["delta"] = option("delta", "clients send differences")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def energy(self, version: int) -> float:
        """T after ``version`` rounds."""
        part = min(1.0, version / self.energy_rounds)
        return self.energy_start + part * (self.energy_end - self.energy_start)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """A map from the mentee's features to those of each mentor."""
        mentee, *_ = models.values()
        widths = sorted({model.width or 0 for model in models.values()})
        names = [f"map:{width}" for width in widths]
        made = [Architecture(n, Map, (mentee.width or 0,), w, mentee.dtype) for n, w in zip(names, widths, strict=True)]
        return dict(zip(names, made, strict=True))

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A change of the mentee."""
        spec = place.architectures[place.server_model].spec
        fits: Expected = functools.partial(_fits, like=spec.params)
        return {"packed": fits, "buffers": {} if self.buffers == "local" else spec.buffers}

    def sends(self, phase: Phase) -> type:
        """See :class:`Up`."""
        return Up

    def init_server(self, host: Host) -> Server:
        """The initial mentee."""
        return self._packed(host.initial(), host.initial(), 0)

    def _packed(self, model: Weights, initial: Weights, version: int) -> Server:
        energy = self.energy(version)
        params = model.params if energy >= 1 else tr.sub(model.params, initial.params)
        return Server(model, pack(params, energy))

    def _unpacked(self, packed: Stat, initial: Weights, version: int) -> tr.Tree:
        """The mentee's parameters as clients have them."""
        params = unpack(packed, initial.params)
        return params if self.energy(version) >= 1 else tr.add(initial.params, params)

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Down:
        """The mentee, packed."""
        return Down(server.packed, server.model.buffers)

    def init_client(self, site: Site) -> Node:
        """The common initial model of its architecture, and an initial map."""
        return Node(site.initial(), site.initial(f"map:{site.architecture().width}"))

    def client_update(self, phase: Phase, site: Site, message: Down, state: Node) -> tuple[Up, Node]:
        """Train mentor, mentee and map, send the mentee's change."""
        small = site.place.server_model
        start = Weights(self._unpacked(message.packed, site.initial(small), site.job.version), message.buffers)

        def loss(models: Models, batch: Batch) -> Tensor:
            mentor, mentee = models["mentor"], models["mentee"]
            z, s = mentor.features(batch.x), mentee.features(batch.x)
            o, q = mentor.head(z), mentee.head(s)
            labels = site.task.loss(o, batch.y) + site.task.loss(q, batch.y)
            if not self.transfer:
                return labels
            shared = kl(o, q) + kl(q, o) + F.mse_loss(models["map"](s), z)
            return labels + self.transfer * shared / labels.detach()

        given = {"mentor": state.mentor, "mentee": start, "map": state.map}
        named = {"mentor": site.model, "mentee": small, "map": f"map:{site.architecture().width}"}
        trained = site.fit(given, model=named, loss=loss).weights
        change = tr.sub(trained["mentee"].params, start.params)
        up = Up(pack(change, self.energy(site.job.version)), trained["mentee"].buffers)
        return up, Node(trained["mentor"], trained["map"])

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """Move the mentee by the mean change."""
        initial, shares = host.initial(), self.shares(replies)
        changes = [unpack(reply.update.packed, initial.params) for reply in replies]
        held = self._unpacked(server.packed, initial, host.version)
        params = tr.add(held, weighted_sum(changes, shares))
        model = keep_buffers(Weights(params, self.mean_buffers(replies, shares)), server.model)
        return self._packed(model, initial, host.version + 1)

    def personal_model(self, site: Site, message: Tree, state: Node) -> Predictor:
        """The mentor."""
        return Net(state.mentor, site.model)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Node) -> Predictor:
        """The mentor."""
        return Net(state.mentor, site.model)


def _fits(packed: Tree, like: dict[str, Tensor]) -> Wrong | None:
    return misfit(packed, like)
