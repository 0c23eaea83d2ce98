"""What hostile clients send, as numbers: each attack makes vectors from what colluders would honestly send and from
what they know of others.

All work on differences from what was broadcast (or on controls, scores and prototypes as they are), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri  # type: ignore[import-untyped]
from torch import Tensor


@dataclass(frozen=True)
class Scene:
    """What colluders have to go by.

    own: ``(m, d)``, what they would honestly send. known: ``(k, d)``, honest updates that they know, at least one.
    clients: how many updates the server gets. hostile: how many of these are theirs. share: the weight of theirs in the
    mean. strength: the attack's number, None for its own. rng: of a colluder, by its row.
    """

    own: Tensor
    known: Tensor
    clients: int
    hostile: int
    share: float
    strength: float | None
    rng: Callable[[int], np.random.Generator]

    def number(self, usual: float) -> float:
        """The strength asked for, or the usual one."""
        return usual if self.strength is None else self.strength

    def all(self, row: Tensor) -> Tensor:
        """The same from everybody."""
        return row.expand_as(self.own)


def gaussian(s: Scene) -> Tensor:
    """N(0, s^2 I), s = 1: no training at all (Blanchard et al., NeurIPS 2017, with s = 200)."""
    noise = [torch.from_numpy(s.rng(i).standard_normal(s.own.shape[1])) for i in range(len(s.own))]
    return s.number(1.0) * torch.stack(noise)


def signflip(s: Scene) -> Tensor:
    """-s u, s = 1: the way back (Li et al., "RSA", AAAI 2019)."""
    return -s.number(1.0) * s.own


def z_max(clients: int, hostile: int) -> float:
    """ALIE's z: so that, of normal values, enough honest ones lie farther out than the colluders for a majority,

    z = Phi^-1((n - m - s) / (n - m)),   s = floor(n / 2 + 1) - m,   at least 0
    """
    honest = clients - hostile
    supporters = math.floor(clients / 2 + 1) - hostile
    share = (honest - supporters) / honest if honest else 0.5
    return max(0.0, float(ndtri(min(max(share, 0.5), 1 - 1e-9))))


def alie(s: Scene) -> Tensor:
    """A little is enough: mu - z sigma, coordinate by coordinate, z from :func:`z_max` (Baruch, Baruch, Goldberg,
    NeurIPS 2019). Deviation: mu and sigma are those of all honest updates; with ``blind``, the colluders' own, as in
    the paper.
    """
    return s.all(s.known.mean(0) - s.number(z_max(s.clients, s.hostile)) * s.known.std(0, correction=0))


def ipm(s: Scene) -> Tensor:
    """Inner-product manipulation: -s mu, s = 0.5 (Xie, Koyejo, Gupta, "Fall of Empires", UAI 2019: 0.1 to 100)."""
    return s.all(-s.number(0.5) * s.known.mean(0))


def mimic(s: Scene) -> Tensor:
    """All send what one honest client sends, so that it counts too much (Karimireddy, He, Jaggi, ICLR 2022). Deviation:
    the first honest one of the round, the same while all take part; the paper looks for the one farthest out along
    the direction of most variance, and then stays with it."""
    return s.all(s.known[0])


def _farthest(s: Scene, slope: Tensor, bounds: Tensor, offsets: Tensor) -> Tensor:
    """mu + gamma p for the largest gamma with a gamma^2 + 2 b gamma + c <= bound for each (b, c, bound)."""
    a = slope.square().sum()
    mu = s.known.mean(0)
    if not a:
        return s.all(mu)
    b, room = offsets @ slope, bounds - offsets.square().sum(1)
    gamma = ((b.square() + a * room).clamp(min=0).sqrt() - b) / a
    return s.all(mu + float(gamma.min().clamp(min=0)) * slope)


def minmax(s: Scene) -> Tensor:
    """mu - gamma sigma with the largest gamma by which the update is no farther from any honest one than two honest
    ones are from each other (Shejwalkar, Houmansadr, "Manipulating the Byzantine", NDSS 2021; along the standard
    deviation). The paper's search by halving is a quadratic equation for each honest client, solved here."""
    offsets = s.known.mean(0) - s.known
    limit = _pairs(s.known).max()
    return _farthest(s, -s.known.std(0, correction=0), limit.expand(len(offsets)), offsets)


def minsum(s: Scene) -> Tensor:
    """As :func:`minmax`, with sums of squared distances to all honest updates in the place of the largest."""
    limit, slope, mu = _pairs(s.known).sum(1).max(), -s.known.std(0, correction=0), s.known.mean(0)
    spread = (s.known - mu).square().sum()
    a = len(s.known) * slope.square().sum()  # the sum over i of 2 b_i gamma is 0: offsets from the mean
    gamma = float(((limit - spread).clamp(min=0) / a).sqrt()) if a else 0.0
    return s.all(mu + gamma * slope)


def _pairs(rows: Tensor) -> Tensor:
    """Squared distances, ``(k, k)``."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()


def replace(s: Scene) -> Tensor:
    """Model replacement: s u, with s = 1 / (the colluders' weight), so that the mean becomes their model where the
    others have converged (Bagdasaryan, Veit, Hua, Estrin, Shmatikov, AISTATS 2020). They train on the backdoor's
    data."""
    return s.number(1 / s.share) * s.own


def honest(s: Scene) -> Tensor:
    """What is sent is honest, the data were not."""
    return s.own


def fdla(rows: Tensor, strength: float | None) -> Tensor:
    """Scores ``(n, classes)`` with each row's values in another order: the best class gets the least value, each other
    class the value of the class ranked before it, so that the second becomes the first with the first's confidence.

    After Tang, Wu, Gao, Wen, Wang, Sun, "Logits Poisoning Attack in Federated Distillation", KSEM 2024; the order is
    reconstructed from its description.
    """
    values, ranked = rows.sort(dim=1, descending=True, stable=True)
    return torch.empty_like(rows).scatter_(1, ranked, values.roll(1, dims=1))


def pcfdla(rows: Tensor, strength: float | None) -> Tensor:
    """As :func:`fdla` with a peak that the attacker sets: the second class gets s times the row's largest absolute
    value (s = 2), the others stay as they are (Tang et al., "Peak-Controlled Logits Poisoning Attack in Federated
    Distillation", Discover Computing 2025; reconstructed from its description)."""
    second = rows.topk(2, dim=1).indices[:, 1:]
    peak = (2.0 if strength is None else strength) * rows.abs().max(1, keepdim=True).values
    return rows.scatter(1, second, peak)


VECTORS: Mapping[str, Callable[[Scene], Tensor]] = {
    "gaussian": gaussian, "signflip": signflip, "labelflip": honest, "alie": alie, "ipm": ipm, "mimic": mimic,
    "minmax": minmax, "minsum": minsum, "replace": replace, "backdoor": honest,
}  # fmt: skip
"""Attacks on updates as vectors, by name; those whose updates are honest poison data."""
SCORES: Mapping[str, Callable[[Tensor, float | None], Tensor]] = {"fdla": fdla, "pcfdla": pcfdla}
"""Attacks on scores, by name."""
NAMES = (*VECTORS, *SCORES)
"""All attacks."""
