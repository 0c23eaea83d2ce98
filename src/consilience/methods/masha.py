"""MASHA: variational inequalities and minimax problems with compressed messages in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Gt, Le

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import Broadcast, Buffers, ClientInfo, Delta, Reply, Stat
from consilience.core.method import Coin, Method, Phase, keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.streams import Streams
from consilience.core.training import Search, option
from consilience.core.tree import Tree, record
from consilience.parts import feedback
from consilience.parts.compressed import Squeezed
from consilience.parts.directions import along, means
from consilience.parts.feedback import Memory, Scheme, shapes_of


@record
class Server(NamedTuple):
    """z, w and F(w) (0 before it is known); what clients have not heard yet: r as it is sent, and whether F(w) is
    new; what the server's compressor remembers."""

    model: Weights
    anchor: Params
    full: Params
    step: Squeezed | Params | None = None
    fresh: bool = False
    memory: Memory = Memory()


@record
class Client(NamedTuple):
    """z at the start of the last step, w and F(w)."""

    model: Weights
    anchor: Params
    full: Params


@record
class Down(NamedTuple):
    """r of the last step, and F(w) if it is new."""

    step: Stat
    full: Stat


@record
class Whole(NamedTuple):
    """F_m(w), uncompressed."""

    full: Stat
    buffers: Buffers


@record
class Change(NamedTuple):
    """eta (F_m(z_half) - F_m(w)), which ``compress`` is for."""

    delta: Delta
    buffers: Buffers


@dataclass(frozen=True)
class Masha1(Method):
    """Extragradient with variance reduction against what compression loses: sought is z with sum_m F_m(z) = 0.

    F_m is the operator of the task or, where there is a loss, its gradient, with the sign turned for players that
    maximise. With a common coin b that is 1 with probability ``refresh`` = 1 - tau:

        z_half <- tau z + (1 - tau) w - eta F(w)
        client m sends Q( eta (F_m(z_half) - F_m(w)) );   r <- Q( their mean ), sent to all;   z <- z_half - r
        if b:  w <- z,  clients send F_m(w) whole, and the server F(w), their mean

    Q: ``compress`` up and ``compress_down`` down, both unbiased (randk, qsgd, or identity); they commute with eta.
    F_m(w) is over all rows, F_m(z_half) - F_m(w) over those of the round's batches, the same for both. A round is one
    step: ``local_steps`` and ``local_epochs`` say of how many batches (all rows in the paper). Every client takes part
    in every round. ``refresh`` of about what compressors keep makes both kinds of message cost alike.

    With identity and refresh = 1 it is the extragradient method, z <- z - eta F(z - eta F(z)), to rounding.

    Source: Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov, "Distributed Methods with Compressed Communication for
    Solving Variational Inequalities, with Theoretical Guarantees", NeurIPS 2022, algorithm 1. Deviation: a refresh is
    counted to the round that begins with it. The algorithm was put down from its description, not from code.
    """

    name = "masha1"
    family = "minimax"
    source = "Beznosikov et al., NeurIPS"
    year = 2022
    takes_momentum = False
    confidence = "medium"
    compresses = "down"
    feeds: ClassVar[str] = ""
    """The rule of error feedback that compressors have."""

    refresh: Annotated[float, Gt(0), Le(1)] = option(0.1, "probability 1 - tau of a new w", Search(0.01, 1.0))
    compress: str = option("randk:0.1", "what clients send: randk:F, qsgd:BITS or identity")
    compress_down: str = option("randk:0.1", "what the server sends: randk:F, qsgd:BITS or identity")
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight in the mean (uniform in the paper)")
    form: Literal["delta"] = option("delta", "clients send differences")

    wanted: ClassVar[str] = "compressors are unbiased and feed nothing back here; use randk:F, qsgd:BITS or identity"

    def check(self) -> None:
        """Both compressors are of the kind that the theory asks for."""
        down = self.compress_down if self.compress_down == "identity" else self.feeds + self.compress_down
        for name, text in (("compress", self.compress), ("compress_down", down)):
            scheme = feedback.parse(text, f"{self.name} {name}")
            if scheme is not None and not self.fits(scheme):
                raise ConfigError(f"{self.name} {name}={getattr(self, name)}: {self.wanted}")

    def fits(self, scheme: Scheme) -> bool:
        """Whether this way to compress is one for this method."""
        return scheme.rule == "plain" and scheme.compressor.unbiased

    @property
    def everybody(self) -> bool:
        """Nobody may miss a step of z."""
        return True

    def program(self) -> tuple[Phase, ...]:
        """F(w) at first and after heads; steps."""
        return (Phase("begin", when="start"), Phase("refresh", when=Coin(self.refresh)), Phase("step"))

    def sends(self, phase: Phase) -> type:
        """F_m(w), or a difference."""
        return Change if phase.name == "step" else Whole

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A whole operator has the shapes of the parameters."""
        return {"full": place.architectures[model].spec.params}

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Server:
        """w = z, the common initial model."""
        start = host.initial()
        return Server(start, start.params, tr.zeros_like(start.params))

    def broadcast(self, phase: Phase, server: Server, client: ClientInfo) -> Tree:
        """What clients have not heard yet."""
        return Down(server.step, server.full if server.fresh and phase.name == "step" else None)

    def deploy(self, server: Server, client: ClientInfo) -> Tree:
        """z."""
        return Broadcast(server.model)

    def aggregate(
        self, phase: Phase, host: Host, server: Server, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Server:
        """F(w); or a step of z."""
        shares, old = self.shares(replies), server.model
        buffers = keep_buffers(Weights(old.params, self.mean_buffers(replies, shares)), old).buffers
        if phase.name != "step":
            full = weighted_sum([reply.update.full for reply in replies], shares)
            return server._replace(
                model=Weights(old.params, buffers), anchor=old.params, full=full, step=None, fresh=True
            )
        mean, down = self.mean_delta(replies, shares), self._back()
        sent, memory = mean, server.memory
        step: Squeezed | Params = mean
        if down is not None:
            coded, sent, memory = down.send(mean, memory, *(_stream(host.place, host.version) for _ in range(2)))
            step = Squeezed(coded, shapes_of(mean))
        half = self._half(old.params, server.anchor, server.full, host.version)
        return server._replace(model=Weights(along(half, 1.0, sent), buffers), step=step, fresh=False, memory=memory)

    def _back(self) -> Scheme | None:
        """How the server compresses."""
        return feedback.parse(self.feeds + self.compress_down if self.compress_down != "identity" else "identity")

    def _half(self, z: Params, w: Params, full: Params, version: int) -> Params:
        """z_half."""
        middle = tr.axpy(self.refresh, tr.sub(w, z), z)
        return along(middle, self.rate(version), full)

    # --- the client's half -------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Client:
        """As the server begins."""
        start = site.initial()
        return Client(start, start.params, tr.zeros_like(start.params))

    def client_update(self, phase: Phase, site: Site, message: Down, state: Client) -> tuple[Tree, Client]:
        """F_m at a new w; or what changes from w to z_half."""
        version = site.job.version
        z = self._heard(site, message, state)
        if phase.name != "step":
            found = means(site, z, whole=True)
            buffers = found.fit.weights.buffers
            whole = Whole(self._filled(z.params, found.at[0]), buffers)
            return whole, state._replace(model=Weights(z.params, buffers), anchor=z.params)
        full = state.full if message.full is None else message.full
        half = self._half(z.params, state.anchor, full, version)
        found = means(site, Weights(half, z.buffers), (state.anchor,))
        change = self._filled(half, tr.scale(tr.sub(*found.at), self.rate(version)))
        buffers = found.fit.weights.buffers
        return Change(change, buffers), state._replace(model=Weights(z.params, buffers), full=full)

    def _heard(self, site: Site, message: Down | Broadcast, state: Client) -> Weights:
        """z after the step that the server has sent; as it is where all of it was sent, to be judged."""
        if isinstance(message, Broadcast):
            return message.model
        if message.step is None:
            return state.model
        made, down = message.step, self._back()
        last = site.job.version - 1
        if down is not None:
            made = down.receive(made.coded, made.shapes, None, _stream(site.place, last))
        half = self._half(state.model.params, state.anchor, state.full, last)
        return Weights(along(half, 1.0, made), state.model.buffers)

    def _filled(self, params: Params, found: Params) -> Params:
        """Directions of all parameters: 0 for those that the model froze."""
        return {name: found[name] if name in found else tr.zeros_like(p) for name, p in params.items()}

    def personal_model(self, site: Site, message: Any, state: Client) -> Predictor:
        """z."""
        return Net(self._heard(site, message, state), site.model)

    def trained_model(self, site: Site, message: Any, update: Tree, state: Client) -> Predictor:
        """z as it was when the client was asked."""
        return Net(state.model, site.model)


def _stream(place: Place, version: int) -> Any:
    """What is drawn alike where the server's step is made and where it is read."""
    return Streams(place.seed).rng("masha", version)


@dataclass(frozen=True)
class Masha2(Masha1):
    """MASHA1 with contractive compressors, whose errors are fed back at both ends.

        z_half <- tau z + (1 - tau) w - eta F(w)
        client m sends c_m = C( v_m ),  v_m = eta (F_m(z_half) - F_m(w)) + e_m;   e_m <- v_m - c_m
        r <- C( u ), sent to all,  u = mean c_m + e;   e <- u - r;                 z <- z_half - r
        with probability 1 - tau = ``refresh``:  w <- z,  clients send F_m(w) whole, and the server F(w), their mean

    C: ``compress`` up and ``compress_down`` down, any compressor; e_m and e start at 0. The rest as in masha1, which it
    is with identity.

    Source: Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov, "Distributed Methods with Compressed Communication for
    Solving Variational Inequalities, with Theoretical Guarantees", NeurIPS 2022, algorithm 2. Deviations: as masha1.
    """

    name = "masha2"
    feeds = "ef:"
    wanted = "errors are fed back here; use ef: and a compressor, as ef:topk:0.1, or identity"

    compress: str = option("ef:topk:0.1", "what clients send: ef: and a compressor, or identity")
    compress_down: str = option("topk:0.1", "what the server sends: a compressor, or identity; errors are fed back")

    def fits(self, scheme: Scheme) -> bool:
        """With error feedback."""
        return scheme.rule == "ef"
