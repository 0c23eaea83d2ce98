"""How much a node should learn from each other one: weights inferred from losses, under priors on the graph."""

from __future__ import annotations

import torch
from torch import Tensor


def sbm_logits(own: Tensor, others: Tensor, loss: Tensor, block: Tensor, scale: float) -> Tensor:
    """Log-odds of each edge ``(n,)`` under a stochastic block model.

    own: probabilities of the node's block ``(k,)``; others: of the others' ``(n, k)``. loss: ``(n,)``. block: edge
    probabilities ``(k, k)``, from the row's node to the column's."""
    odds = block.log() - (1 - block).log()
    return (others @ (odds.T @ own) - loss) / scale


def sbm_membership(
    gamma: Tensor, others: Tensor, out: Tensor, back: Tensor, block: Tensor, apart: Tensor
) -> tuple[Tensor, Tensor]:
    """One mean-field step of a node's block: its probabilities ``(k,)`` and the new Dirichlet parameters ``(k,)``.

    gamma: Dirichlet parameters before; others: probabilities of the others' blocks ``(n, k)``; out, back: edge
    probabilities to and from them ``(n,)``; apart: which are not the node itself ``(n,)``."""
    on, off = block.log(), (1 - block).log()
    seen = apart[:, None] * others
    logits = on @ (seen.T @ out) + on.T @ (seen.T @ back) + off @ (seen.T @ (1 - out)) + off.T @ (seen.T @ (1 - back))
    phi = (logits + torch.digamma(gamma)).softmax(0)
    return phi, 1 + phi


def attention(mix: Tensor, likeness: Tensor) -> Tensor:
    """softmax_j( sum_l mix_l likeness_jl ): likeness ``(n, layers)``."""
    return (likeness @ mix).softmax(0)


def attention_gradient(mix: Tensor, likeness: Tensor, target: Tensor) -> Tensor:
    """Gradient in ``mix`` of - sum_j target_j log attention_j."""
    return likeness.T @ (attention(mix, likeness) - target)


def strongest(weights: Tensor, count: int) -> Tensor:
    """Which are the ``count`` largest, ties to the first."""
    order = torch.sort(weights, descending=True, stable=True).indices[:count]
    return torch.zeros(len(weights), dtype=torch.bool).index_fill_(0, order, True)
