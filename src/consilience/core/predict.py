"""What would be deployed: predictors are trees, so they can be sent, saved and exported like any state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from consilience.core.model import Weights
from consilience.core.tree import record

Scorer = Callable[[Tensor], Tensor]
"""A batch of inputs to scores ``(n, outputs)``: logits, or log-probabilities, or regression outputs."""


class Binder(Protocol):
    """Turns weights into something callable; a Site is one."""

    def bind(self, weights: Weights, model: str = "") -> torch.nn.Module:
        """A module in evaluation mode holding ``weights`` (of the architecture named, or the place's own)."""
        ...


class Predictor(Protocol):
    """A registered record with a way to score a batch."""

    def scorer(self, at: Binder) -> Scorer:
        """The function from a batch to scores, with modules borrowed from ``at``."""
        ...


@record
class Net(NamedTuple):
    """One network. model: its architecture's name, "" for the usual one."""

    weights: Weights
    model: str = ""

    def scorer(self, at: Binder) -> Scorer:
        """The network itself."""
        return at.bind(self.weights, self.model)


@record
class Ensemble(NamedTuple):
    """A weighted mean of class probabilities; ``shares`` sum to 1. Scores are log-probabilities."""

    members: tuple[Net, ...]
    shares: tuple[float, ...]

    def scorer(self, at: Binder) -> Scorer:
        """log sum_m share_m softmax(member_m(x))."""
        scorers = [member.scorer(at) for member in self.members]

        def score(x: Tensor) -> Tensor:
            total = sum(s * f(x).softmax(-1) for s, f in zip(self.shares, scorers, strict=True))
            assert isinstance(total, Tensor)
            return total.clamp_min(torch.finfo(total.dtype).tiny).log()

        return score
