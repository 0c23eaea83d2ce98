"""Class statistics that travel: means of features (prototypes) or of scores, for the classes that somebody has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from consilience.core.messages import Stat
from consilience.core.model import Weights
from consilience.core.predict import Binder, Net, Scorer
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Shape
from consilience.core.site import Site
from consilience.core.tree import record

UNKNOWN = 50.0
"""How far below the worst known class a class without a prototype scores, so that losses stay finite."""


@record
class Prototypes(NamedTuple):
    """A mean for each class that is there. classes: ``(m,)`` int64, ascending. means: ``(m, width)``. counts: ``(m,)``
    int64, what each is the mean of (rows, or clients)."""

    classes: Stat
    means: Stat
    counts: Stat


def shapes(classes: int, width: int, dtype: torch.dtype) -> dict[str, Shape]:
    """What :class:`Prototypes` from a client must look like."""
    return {
        "classes": Shape(torch.int64, ("m",), low=0, high=classes - 1, distinct=True),
        "means": Shape(dtype, ("m", width)),
        "counts": Shape(torch.int64, ("m",), low=1),
    }


def none(width: int, dtype: torch.dtype) -> Prototypes:
    """No class yet."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Prototypes(empty, torch.zeros(0, width, dtype=dtype), empty)


class Means:
    """Means by class of vectors that are added batch by batch, summed in float64."""

    def __init__(self, classes: int, width: int, dtype: torch.dtype) -> None:
        self._sums = torch.zeros(classes, width, dtype=torch.float64)
        self._counts = torch.zeros(classes, dtype=torch.int64)
        self._dtype = dtype

    def add(self, vectors: Tensor, y: Tensor) -> None:
        """vectors: ``(b, width)``, y: ``(b,)``."""
        self._sums.index_add_(0, y, vectors.detach().double())
        self._counts += torch.bincount(y, minlength=len(self._counts))

    def found(self) -> Prototypes:
        """The means of the classes that occurred."""
        classes = self._counts.nonzero().flatten()
        counts = self._counts[classes]
        return Prototypes(classes, (self._sums[classes] / counts[:, None]).to(self._dtype), counts)


def of_site(site: Site, model: Weights) -> Prototypes:
    """Class means of a model's features over the site's training rows, in evaluation mode."""
    architecture = site.architecture()
    means = Means(architecture.outputs, architecture.width or 0, architecture.dtype)
    for features, y in site.map(lambda module, rows: (module.features(rows.x), rows.y), model):
        means.add(features, y)
    return means.found()


def average(found: Sequence[Prototypes], classes: int, *, by_rows: bool) -> Prototypes:
    """For each class the mean over those who have it, weighted by their rows of it or equally; a class of one client
    keeps that client's mean bit for bit. counts: by how many it is held. In the order of ``found``."""
    width, dtype = found[0].means.shape[1], found[0].means.dtype
    held = [_spread(p, classes) for p in found]
    totals = torch.stack([row if by_rows else (row > 0).double() for row in held]).sum(0)
    dense = []
    for p, row in zip(found, held, strict=True):
        own = row if by_rows else (row > 0).double()
        shares = (own[p.classes] / totals[p.classes]).to(dtype)
        dense.append(torch.zeros(classes, width, dtype=dtype).index_copy_(0, p.classes, p.means * shares[:, None]))
    mean = weighted_sum(dense, [1.0] * len(dense))
    there = totals.nonzero().flatten()
    return Prototypes(there, mean[there], torch.stack([(row > 0).long() for row in held]).sum(0)[there])


@record
class Row(NamedTuple):
    """One client's mean of one class, ``(width,)``."""

    mean: Stat


def combined(
    found: Sequence[Prototypes], combine: Callable[[tuple[Sequence[Row], dict[str, list[float]]]], Row]
) -> Prototypes:
    """One in the place of several: each class's mean by a rule over those who have it, who count equally (by how many
    rows a mean is of is for a client to say, and a hostile one would lie)."""
    classes = torch.unique(torch.cat([p.classes for p in found]))
    means = []
    for c in classes.tolist():
        rows = [Row(p.means[p.classes == c][0]) for p in found if bool((p.classes == c).any())]
        means.append(combine((rows, {"mean": [1 / len(rows)] * len(rows)})).mean)
    empty = found[0].means.new_zeros(0, found[0].means.shape[1])
    return Prototypes(classes, torch.stack(means) if means else empty, torch.ones_like(classes))


def outside(p: Prototypes, classes: Tensor) -> Prototypes:
    """Those of other classes than these."""
    kept = ~torch.isin(p.classes, classes)
    return Prototypes(*(part[kept] for part in p))


def renewed(old: Prototypes, fresh: Prototypes) -> Prototypes:
    """The fresh ones, and the old ones of classes that have none among these."""
    joined = [torch.cat(parts) for parts in zip(outside(old, fresh.classes), fresh, strict=True)]
    order = joined[0].argsort()
    return Prototypes(*(part[order] for part in joined))


def without(mean: Prototypes, own: Prototypes) -> Prototypes:
    """Equal means over others: (n m - k o) / (n - k) for means ``m`` of ``n``, of which ``k`` have the mean ``o``;
    classes of which nothing is left are gone. All classes of ``own``, at least one, are in ``mean``."""
    size = int(mean.classes.max()) + 1
    n, k = (_spread(p, size)[mean.classes] for p in (mean, own))
    given = dense(own, size)[0][mean.classes]
    others = (n[:, None] * mean.means.double() - k[:, None] * given.double()) / (n - k).clamp_min(1)[:, None]
    left = n > k
    means = torch.where(k[:, None] > 0, others.to(mean.means.dtype), mean.means)
    return Prototypes(mean.classes[left], means[left], (n - k).long()[left])


def _spread(p: Prototypes, classes: int) -> Tensor:
    return torch.zeros(classes, dtype=torch.float64).index_copy_(0, p.classes, p.counts.double())


def dense(p: Prototypes, classes: int) -> tuple[Tensor, Tensor]:
    """(means ``(classes, width)`` with zeros where there is none, whether there is one ``(classes,)``)."""
    there = torch.zeros(classes, dtype=torch.bool)
    there[p.classes] = True
    means = p.means.new_zeros(classes, p.means.shape[1])
    means[p.classes] = p.means
    return means, there


def pull(z: Tensor, means: Tensor, there: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of features and their class's mean, over all of ``(b, width)``; rows of classes without
    a mean count as 0."""
    target = torch.where(there[y][:, None], means[y], z.detach())
    return F.mse_loss(z, target)


def distances(z: Tensor, means: Tensor) -> Tensor:
    """||z_i - m_c||, ``(b, classes)``, with a gradient that is finite at 0."""
    squares = (z[:, None, :] - means[None, :, :]).square().sum(2)
    return (squares + torch.finfo(z.dtype).eps).sqrt()


def margin_contrast(z: Tensor, means: Tensor, y: Tensor, margin: float | Tensor) -> Tensor:
    """Cross-entropy of negative distances, where the own class's is made longer by the margin (Zhang et al., "FedTGP",
    AAAI 2024, equations 6 and 7): it must be shorter than all others by that much."""
    longer = margin * F.one_hot(y, len(means)).to(z.dtype)
    return F.cross_entropy(-(distances(z, means) + longer), y)


def gaps(means: Tensor) -> Tensor:
    """Distance from each mean to the nearest other one, ``(m,)``; infinite for a lone one."""
    apart = torch.cdist(means.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist")
    apart.fill_diagonal_(math.inf)
    return apart.min(1).values


@record
class Nearest(NamedTuple):
    """Scores by the distance of a model's features to prototypes: - ||f(x) - p_c||^2, and :data:`UNKNOWN` below the
    worst of these for classes without one."""

    net: Net
    prototypes: Prototypes
    outputs: int

    def scorer(self, at: Binder) -> Scorer:
        """The function from a batch to scores."""
        module, p = at.bind(self.net.weights, self.net.model), self.prototypes

        def score(x: Tensor) -> Tensor:
            z = module.features(x)  # type: ignore[operator]
            known = -torch.cdist(z, p.means, compute_mode="donot_use_mm_for_euclid_dist").square()
            scores = (known.min(1, keepdim=True).values - UNKNOWN).expand(len(x), self.outputs).clone()
            return scores.index_copy_(1, p.classes, known)

        return score
