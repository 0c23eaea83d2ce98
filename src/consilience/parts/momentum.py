"""The server's momentum inside clients' steps (Cheng et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from consilience.core import tree as tr
from consilience.core.fit import Grad
from consilience.core.messages import Reply
from consilience.core.method import Method
from consilience.core.model import Params
from consilience.core.reduce import weighted_sum
from consilience.parts.local_steps import lengths, relative


def mixed(gradient: Params, momentum: Params, beta: float, grad: Grad, previous: Params | None) -> Params:
    """beta grad F(y) + (1 - beta) g, or with the ``previous`` global model
    grad F(y) + (1 - beta) (g - grad F(previous)), both gradients on one batch. ``gradient`` itself at beta = 1."""
    if beta == 1:
        return gradient
    if previous is None:
        scaled = torch._foreach_mul(list(gradient.values()), beta)
    else:
        past = grad(previous)
        scaled = torch._foreach_sub(list(gradient.values()), list(past.values()), alpha=1 - beta)
    torch._foreach_add_(scaled, [momentum[name] for name in gradient], alpha=1 - beta)
    return dict(zip(gradient, scaled, strict=True))


class Moved(NamedTuple):
    """A server step: the parameters after it, the next momentum g, and the step size gamma along it."""

    params: Params
    momentum: Params
    gamma: float


def moved(method: Method, params: Params, replies: Sequence[Reply], shares: Sequence[float], server_lr: float) -> Moved:
    """g = -sum_i p_i Delta_i / (eta_i K_i), and x - gamma g with gamma = eta_g sum_i p_i eta_i K_i. Where clients'
    eta_i K_i are equal the step is that of FedAvg bit for bit."""
    even, length = relative(shares, lengths(method, replies))
    move: Params = weighted_sum([reply.update.delta for reply in replies], even)
    return Moved(tr.axpy(server_lr, move, params), tr.scale(move, -1 / length), server_lr * length)
