"""What may happen after the last round: the global head is fitted once more, on features drawn from Gaussians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.core.errors import ConfigError
from consilience.core.federation import Split
from consilience.core.messages import Reply, Stat
from consilience.core.model import Architecture, Weights
from consilience.core.reduce import weighted_sum
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.tree import record
from consilience.parts.split import alone, head_network, head_of, rejoined, with_head

HEAD = "calibrated-head"
"""The name of the global model's head as a network of its own."""


@record
class Gaussians(NamedTuple):
    """Features by class, of the classes that are there: which ``(m,)`` int64, ascending; rows of each ``(m,)`` int64;
    means ``(m, width)``; covariances ``(m, width (width + 1) / 2)``, each the upper triangle row by row of the unbiased
    covariance, 0 for one row. No other message has fields of these names, since validation goes by them."""

    feature_classes: Stat
    feature_counts: Stat
    feature_means: Stat
    feature_covariances: Stat


def gaussians(features: Tensor, y: Tensor) -> Gaussians:
    """Of features ``(n, width)`` with labels ``(n,)``, computed in float64."""
    counts = torch.bincount(y)
    classes = counts.nonzero().flatten()
    counts = counts[classes]
    width = features.shape[1]
    row, column = torch.triu_indices(width, width)
    means, covariances = [], []
    for c, n in zip(classes, counts.tolist(), strict=True):
        z = features[y == c].double()
        means.append(z.mean(0))
        off = z - means[-1]
        covariances.append((off.T @ off / max(n - 1, 1))[row, column])
    dtype = features.dtype
    return Gaussians(classes, counts, torch.stack(means).to(dtype), torch.stack(covariances).to(dtype))


def pooled(found: Sequence[Gaussians], c: int) -> tuple[int, Tensor, Tensor] | None:
    """Rows, mean ``(width,)`` and unbiased covariance ``(width, width)`` of class ``c`` over all clients' rows
    together, in float64; None if nobody has it:

        n = sum n_k;   mu = sum n_k mu_k / n
        S = ( sum (n_k - 1) S_k + sum n_k (mu_k - mu) (mu_k - mu)^T ) / (n - 1);   0 for one row
    """
    held = [(g, int(i)) for g in found for i in (g.feature_classes == c).nonzero().flatten()]
    if not held:
        return None
    counts = [int(g.feature_counts[i]) for g, i in held]
    n, means = sum(counts), [g.feature_means[i].double() for g, i in held]
    width = len(means[0])
    row, column = torch.triu_indices(width, width)
    mu = weighted_sum(means, [k / n for k in counts])
    within = []
    for k, mean, (g, i) in zip(counts, means, held, strict=True):
        own = torch.zeros(width, width, dtype=torch.float64)
        own[row, column] = own[column, row] = g.feature_covariances[i].double()
        within.append((k - 1) * own + k * torch.outer(mean - mu, mean - mu))
    total = weighted_sum(within, [1.0] * len(within))
    return n, mu, total / max(n - 1, 1)


def drawn(noise: Tensor, mu: Tensor, covariance: Tensor) -> Tensor:
    """Standard normal ``noise`` ``(m, width)`` as draws of N(mu, S); negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    found: Tensor = mu + noise * values.clamp_min(0).sqrt() @ vectors.T
    return found


@dataclass(frozen=True)
class Calibration:
    """CCVR. Clients send their :class:`Gaussians` of the global model's features; the server draws ``virtual`` features
    of each class from the pooled Gaussian and trains the head on them with SGD, from where it is."""

    virtual: int = 500
    epochs: int = 20
    lr: float = 0.05
    batch: int = 128

    def networks(self, model: Architecture) -> dict[str, Architecture]:
        """The head alone."""
        return {HEAD: head_network(model, HEAD)}

    def answer(self, site: Site, model: Weights) -> Gaussians:
        """What a client sends."""
        name = site.place.server_model
        z = torch.cat(site.map(lambda module, rows: module.features(rows.x), model, name=name))
        return gaussians(z, site.train.y)

    def expects(self, place: Place) -> Mapping[str, Expected]:
        """What that must look like."""
        own = place.architectures[place.server_model]
        width = own.width or 0
        return {
            "feature_classes": Shape(torch.int64, ("m",), low=0, high=own.outputs - 1, distinct=True),
            "feature_counts": Shape(torch.int64, ("m",), low=1),
            "feature_means": Shape(own.dtype, ("m", width)),
            "feature_covariances": Shape(own.dtype, ("m", width * (width + 1) // 2)),
        }

    def refit(self, host: Host, model: Weights, replies: Sequence[Reply]) -> Weights:
        """The model with a new head."""
        found, dtype = [reply.update for reply in replies], host.architecture().dtype
        features, labels = [], []
        for c in range(host.task.outputs):
            known = pooled(found, c)
            if known is None:
                continue
            _, mu, covariance = known
            noise = torch.from_numpy(host.rng("virtual", c).standard_normal((self.virtual, len(mu))))
            features.append(drawn(noise, mu, covariance).to(dtype))
            labels.append(torch.full((self.virtual,), c))
        rows = Split(torch.cat(features), torch.cat(labels))
        fit = host.fit(
            alone(head_of(model)), data=rows, model=HEAD, epochs=self.epochs, lr=self.lr, batch_size=self.batch,
            optimizer="sgd", purpose="calibrate",
        )  # fmt: skip
        return with_head(model, rejoined(fit.weights))


def parse(text: str) -> Calibration | None:
    """The stage that ``--then`` names: none, ccvr or ccvr:M. Raises ConfigError."""
    name, _, rest = text.partition(":")
    if text == "none":
        return None
    if name == "ccvr" and not rest and text == name:
        return Calibration()
    if name == "ccvr" and rest.isdecimal() and int(rest):
        return Calibration(virtual=int(rest))
    raise ConfigError(f"then '{text}': none, ccvr, or ccvr:M with M features drawn for each class, at least 1")
