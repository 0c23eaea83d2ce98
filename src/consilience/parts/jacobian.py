"""Aggregators of the library TorchJD, by name: clients' updates are the rows of a Jacobian."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, nearest
from consilience.core.reduce import weighted_sum
from consilience.parts.aggregating import Aggregator, looked_at, vectors_of

NAMES = {
    "alignedmtl": "AlignedMTL", "config": "ConFIG", "graddrop": "GradDrop", "gradvac": "GradVac", "imtlg": "IMTLG",
    "pcgrad": "PCGrad",
}  # fmt: skip
"""TorchJD's name of each: those that need nothing else, and whose vector grows with the rows."""


@dataclass
class Jacobian(Aggregator):
    """A vector A(J) of the rows J_i = n p_i u_i, scaled so that clients who agree get what they agree on:

        A(J) / A((1, .., 1)^T)

    with a new A for each round: GradVac's memory of earlier ones is not kept. Buffers and other fields are weighted
    means. What A draws comes from the server's stream. Sources: the classes of TorchJD (Quinton, Rey, 2024) name them.
    """

    name: str

    differences = True

    def combine(
        self, updates: Sequence[Any], weights: Mapping[str, Sequence[float]], rng: np.random.Generator | None = None
    ) -> Any:
        """The vector in the place of the models' differences."""
        field = looked_at(type(updates[0])) or updates[0]._fields[0]
        own = weights[field]
        total = math.fsum(own)
        scales = torch.tensor([len(own) * w / total for w in own], dtype=torch.float64)
        seed = 0 if rng is None else int(rng.integers(2**62))
        vector = self._vector(scales[:, None] * vectors_of(updates), seed) * total
        made = {
            name: weighted_sum([getattr(u, name) for u in updates], list(weights[name]))
            for name in updates[0]._fields
            if name != field
        }
        return type(updates[0])(**{field: tr.filled(getattr(updates[0], field), vector), **made})

    def _vector(self, rows: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found: Tensor = _made(self.name)(rows)
            one: Tensor = _made(self.name)(rows.new_ones(len(rows), 1))
        return found.div(one)


def _made(name: str) -> Any:
    import torchjd.aggregation

    return getattr(torchjd.aggregation, NAMES[name])()


def parse(name: str, text: str) -> Jacobian:
    """From what follows ``torchjd:``. Raises ConfigError."""
    if name not in NAMES:
        raise ConfigError(f"aggregator '{text}': torchjd:NAME, NAME one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    try:
        import torchjd  # noqa: F401
    except ImportError:
        raise ConfigError(f"aggregator '{text}' needs TorchJD: pip install 'consilience[jacobian]'") from None
    return Jacobian(name)
