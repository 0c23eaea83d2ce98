"""What asynchronous methods share: how much a stale reply counts, and how replies move the global model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from consilience.core import tree as tr
from consilience.core.messages import DeltaUpdate, ModelUpdate, Reply
from consilience.core.method import keep_buffers
from consilience.core.model import Params, Weights
from consilience.core.reduce import weighted_sum

Staleness = Literal["constant", "polynomial", "hinge"]


def discount(kind: Staleness, tau: int, a: float, b: int = 0) -> float:
    """s(tau): 1; (1 + tau)^-a; or 1 up to tau = b and 1 / (a (tau - b) + 1) after it. s(0) = 1 for every kind."""
    if kind == "polynomial":
        return float((1 + tau) ** -a)
    if kind == "hinge" and tau > b:
        return 1 / (a * (tau - b) + 1)
    return 1.0


def mix(model: Weights, other: Weights, alpha: float) -> Weights:
    """(1 - alpha) model + alpha other, buffers too; ``other`` itself at alpha = 1. Integer buffers are ``other``'s."""
    other = keep_buffers(other, model)
    if alpha == 1:
        return other
    mixed: Weights = weighted_sum([other, model], [alpha, 1 - alpha])
    return mixed


def move(model: Weights, replies: Sequence[Reply], shares: Sequence[float], server_lr: float = 1.0) -> Weights:
    """x + eta_g sum_i share_i Delta_i; shares need not sum to 1. Delta_i is what was sent, or, of a model that was
    sent, its difference from ``model``. Buffers are the replies' mean with the same shares, normalised."""
    deltas = [_delta(reply, model.params) for reply in replies]
    params = tr.axpy(server_lr, weighted_sum(deltas, shares), model.params)
    total = sum(shares)
    buffers = weighted_sum([_buffers(reply) for reply in replies], [share / total for share in shares])
    return keep_buffers(Weights(params, buffers), model)


def _delta(reply: Reply, params: Params) -> Params:
    if isinstance(reply.update, DeltaUpdate):
        return reply.update.delta
    found: Params = tr.sub(reply.update.model.params, params)
    return found


def _buffers(reply: Reply) -> Params:
    return reply.update.model.buffers if isinstance(reply.update, ModelUpdate) else reply.update.buffers
