"""Just One Byte: one byte per gradient, by shared randomness and no derivatives (Zelikman et al., 2023)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.federation import Split
from consilience.core.fit import shuffled
from consilience.core.messages import ClientInfo, Reply, Stat
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Params, Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import record

LEVELS = 64
"""Sizes that a byte tells apart, beside the sign: exp(q / 8) for q from -64 to 63."""


@record
class Scalars(NamedTuple):
    """What goes up. codes: ``(k,)``, a byte (or a number) each. made: updates that the sender's replica had. seen: its
    digest, or "" in most jobs."""

    codes: Stat
    made: Stat
    seen: Stat


@record
class Update(NamedTuple):
    """One update of the replicas. jobs: ``(j, 3)`` int32, of each job its client, that client's number of it, and how
    many scalars it gave; codes: all of them in that order. before: digest of the replica that it changes."""

    jobs: Tensor
    codes: Tensor
    before: str


@record
class Replay(NamedTuple):
    """What comes down. whole: the replica, or None where its last updates follow: how many jobs each has, and the jobs
    and codes of all of them. made: updates that made the replica."""

    whole: Weights | None
    rounds: Stat
    jobs: Stat
    codes: Stat
    made: Stat


@record
class Relay(NamedTuple):
    """The server: its own replica, how many updates made it, the last of them, and how many each client has at least
    (-1: its replica differs, so it needs a new one)."""

    model: Weights
    made: int
    log: tuple[Update, ...]
    has: dict[int, int]


@record
class Replica(NamedTuple):
    """A client's replica, and how many updates made it."""

    model: Weights
    made: int


@dataclass(frozen=True)
class OneByte(Method):
    """Everybody has the same model and sends, for each gradient, one byte: how steep the loss is along a direction that
    all can draw.

        client m, its job b, batch j:  z = N(0, I), drawn from (seed, m, b, j)
            rho = (F(x + eps z; batch) - F(x - eps z; batch)) / (2 eps),           two forward passes
            sent: sign(rho) and q = round(8 ln |rho|) in [-64, 63]: 8 bits, read as rho' = sign(rho) exp(q / 8)
        all, in the order of clients, jobs and batches:  x <- x - lr rho' z / sqrt(N),   N scalars in this update
                                                         (scale "mean": / N)

    |rho'| is off by at most 6.5 % between 3.4e-4 and 2600, and the nearest of these outside; a loss that is not a
    number counts as the smallest. Everybody applies what was read, the sender included, so that all replicas have the
    same bits. A client that was away gets the bytes that it missed; one that missed more than ``history`` updates the
    model, and so does one whose replica differs, as on another kind of processor: every ``check_every``-th of its jobs
    a client sends a digest of its own. Newcomers start from the common initial model.

    ``local_epochs`` or ``local_steps`` say how many batches, and thereby scalars, a client has in a round. The variance
    of a step grows with the number of parameters, so lr must be far smaller than for gradients. The model is asked in
    evaluation mode: no dropout, and BatchNorm keeps the statistics that it begins with. Parameters that a model's maker
    froze stay. ``weights``, ``form``, optimizer, momentum and clip have no meaning here. Attacks on what is sent
    (``--attack``, those on data apart) find no numbers in bytes and are refused; with precision="full" they do.

    One client, one batch and precision="full" is MeZO (Malladi et al., 2023).

    Source: Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized
    Language Model Finetuning Using Shared Randomness", 2023. Deviations: a server passes the bytes on, where machines
    broadcast to each other; 8 bits strictly, the sign included (theirs: a sign and 255 levels); x is not moved to x +
    eps z and back in place, so there is no drift to undo, for one more copy of x; eps and lr are not learned.
    """

    name = "onebyte"
    family = "zeroth order"
    source = "Zelikman et al."
    year = 2023
    needs = Needs(loss=True)
    own_batches = "draws the batches of its own directions"
    unstacked = "it takes no gradients"

    lr: Annotated[float, Gt(0)] = option(0.01, "step size", Search(1e-4, 1.0))
    eps: Annotated[float, Gt(0)] = option(1e-3, "how far along a direction the loss is asked", Search(1e-4, 1e-1))
    scale: Literal["sqrt", "mean"] = option("sqrt", "a step's N scalars are divided by sqrt(N), or by N")
    precision: Literal["byte", "full"] = option("byte", "how a scalar is sent: 8 bits, or in the model's dtype")
    history: Annotated[int, Ge(0)] = option(100, "updates that are kept for clients that were away")
    check_every: Annotated[int, Ge(1)] = option(64, "jobs of a client between digests of its replica")

    def check(self) -> None:
        """Steps are those of plain SGD."""
        if self.optimizer != "sgd" or self.momentum or self.weight_decay or self.clip is not None:
            raise ConfigError(
                "onebyte takes plain steps along random directions; use optimizer=sgd without momentum, "
                "weight_decay and clip"
            )

    # --- the server's half -------------------------------------------------------------------------------------

    def init_server(self, host: Host) -> Relay:
        """The common initial model."""
        return Relay(host.initial(), 0, (), {})

    def broadcast(self, phase: Phase, server: Relay, client: ClientInfo) -> Replay:
        """The bytes that the client has missed, or the model."""
        has = server.has.get(client.id, 0)
        if server.made - has > len(server.log):  # always where has is -1
            return self._whole(server)
        missed = server.log[len(server.log) - (server.made - has) :]
        if not missed:
            return self._whole(server)._replace(whole=None)
        return Replay(
            None,
            torch.tensor([len(update.jobs) for update in missed], dtype=torch.int32),
            torch.cat([update.jobs for update in missed]),
            torch.cat([update.codes for update in missed]),
            server.made,
        )

    def deploy(self, server: Relay, client: ClientInfo) -> Replay:
        """The model."""
        return self._whole(server)

    def _whole(self, server: Relay) -> Replay:
        nothing = torch.zeros(0, dtype=torch.int32)
        return Replay(server.model, nothing, nothing.reshape(0, 3), torch.zeros(0, dtype=torch.uint8), server.made)

    def aggregate(
        self, phase: Phase, host: Host, server: Relay, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Relay:
        """Apply the bytes to the server's replica, and note who has what."""
        before, has, good = tr.digest(server.model), dict(server.has), []
        digests = [update.before for update in server.log] + [before]
        for reply in replies:
            ago = server.made - reply.update.made
            known = digests[-1 - ago] if 0 <= ago < len(digests) else ""
            same = not reply.update.seen or not known or reply.update.seen == known
            has[reply.job.client] = min(reply.update.made, server.made) if same else -1
            if same:
                good.append(reply)
        has = dict(sorted(has.items()))
        if not any(len(reply.update.codes) for reply in good):
            return server._replace(has=has)
        jobs = [[r.job.client, r.job.number, len(r.update.codes)] for r in good]
        codes = torch.cat([r.update.codes for r in good])
        update = Update(torch.tensor(jobs, dtype=torch.int32), codes, before)
        model = self._applied(host, server.model, update.jobs, codes, server.made)
        log = (*server.log, update)
        return Relay(model, server.made + 1, log[len(log) - min(len(log), self.history) :], has)

    # --- the client's half -------------------------------------------------------------------------------------

    def init_client(self, site: Site) -> Replica:
        """The common initial model."""
        return Replica(site.initial(), 0)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """Two passes over the rows of each batch."""
        return 2 * self.one_fit(rows, steps)

    def client_update(self, phase: Phase, site: Site, message: Replay, state: Replica) -> tuple[Scalars, Replica]:
        """Bring the replica up to date and measure how steep the loss is along this job's directions."""
        replica = self._caught_up(site, message, state)
        rows, slopes, losses = site.cast(site.train), list[float](), list[float]()
        count = self.steps_of(len(rows), site.job.steps) if len(rows) else 0
        frozen = site.borrow().frozen
        batches = itertools.islice(shuffled(site.rng("batches"), len(rows), self.batch_size), count) if count else ()
        for j, batch in enumerate(batches):
            z = self._direction(site, replica.model.params, frozen, site.id, site.job.number, j)
            up, down = (self._loss(site, replica.model, s * self.eps, z, rows.rows(batch)) for s in (1, -1))
            slopes.append((up - down) / (2 * self.eps))
            losses.append((up + down) / 2)
            site.computed.add(2 * len(batch), 1, 0.0)  # FLOP are counted where rows pass the model
        site.last_loss = sum(losses) / len(losses) if losses else math.nan
        seen = tr.digest(replica.model) if site.job.number % self.check_every == 0 else ""
        return Scalars(self._coded(slopes, site.architecture().dtype), replica.made, seen), replica

    def sends(self, phase: Phase) -> type:
        """Scalars."""
        return Scalars

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """A row of codes, a count and a digest."""
        dtype = torch.uint8 if self.precision == "byte" else place.network(model).dtype
        return {
            "codes": Shape(dtype, ("scalars",)),
            "made": lambda found: None if type(found) is int and found >= 0 else ("", "is no count of updates"),
            "seen": lambda found: None if isinstance(found, str) else ("", "is no digest"),
        }

    def _loss(self, site: Site, model: Weights, shift: float, z: Params, rows: Split) -> float:
        """Mean loss of a batch at x + shift z, summed in float64."""
        moved = Net(Weights(tr.axpy(shift, z, model.params), model.buffers))
        scores = site.scores(moved, rows.x)
        return float(site.task.losses(scores, rows.y).double().mean())

    # --- what both ends do alike -------------------------------------------------------------------------------

    def _caught_up(self, site: Site, message: Replay, state: Replica) -> Replica:
        """The replica with the updates that it lacks."""
        if message.whole is not None:
            return Replica(message.whole, message.made)
        counts = message.rounds.tolist()
        model, first = state.model, message.made - len(counts)
        ends = list(itertools.accumulate(counts))
        scalars = [0, *itertools.accumulate(message.jobs[:, 2].tolist())]
        for i, (end, count) in enumerate(zip(ends, counts, strict=True)):
            if first + i >= state.made:  # the server knows of at least how many a client has
                jobs = message.jobs[end - count : end]
                codes = message.codes[scalars[end - count] : scalars[end]]
                model = self._applied(site, model, jobs, codes, first + i)
        return Replica(model, message.made)

    def _applied(self, site: Site, model: Weights, jobs: Tensor, codes: Tensor, made: int) -> Weights:
        """x after one update."""
        n, params, frozen = len(codes), tr.clone(model.params), site.borrow().frozen
        size = self.rate(made) / (math.sqrt(n) if self.scale == "sqrt" else n)
        slopes = iter(self._read(codes))
        for client, number, count in jobs.tolist():
            for j, slope in zip(range(count), slopes, strict=False):
                for name, z in self._direction(site, params, frozen, client, number, j).items():
                    params[name].add_(z, alpha=-size * slope)
        return Weights(params, model.buffers)

    def _direction(self, site: Site, params: Params, frozen: set[str], client: int, number: int, j: int) -> Params:
        """z, the same wherever it is drawn."""
        rng = site.shared_rng("direction", client, number, j)
        found = {}
        for name, p in params.items():
            wide = np.float64 if p.dtype == torch.float64 else np.float32
            z = torch.from_numpy(rng.standard_normal(tuple(p.shape), dtype=wide)).to(p.dtype)
            found[name] = torch.zeros_like(p) if name in frozen else z
        return found

    def _coded(self, slopes: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Scalars as they are sent."""
        if self.precision == "full":
            return torch.tensor(slopes, dtype=dtype)
        return torch.tensor([encode(slope) for slope in slopes], dtype=torch.uint8)

    def _read(self, codes: Tensor) -> Iterator[float]:
        """Scalars as they are read."""
        return map(float, codes.tolist()) if self.precision == "full" else map(decode, codes.tolist())

    # --- what would be deployed --------------------------------------------------------------------------------

    def personal_model(self, site: Site, message: Replay, state: Replica) -> Predictor:
        """The common model."""
        return Net(self._caught_up(site, message, state).model, site.model)


def encode(slope: float) -> int:
    """A number as a byte: the sign, then 7 bits for the nearest of the powers exp(q / 8)."""
    size = abs(slope)
    q = -LEVELS if not size > 0 else LEVELS - 1 if size == math.inf else round(8 * math.log(size))
    return (128 if slope < 0 else 0) + max(-LEVELS, min(LEVELS - 1, q)) + LEVELS


def decode(byte: int) -> float:
    """The number that a byte stands for, in single precision so that it is the same everywhere."""
    size = float(np.float32(math.exp((byte % 128 - LEVELS) / 8)))
    return -size if byte >= 128 else size
