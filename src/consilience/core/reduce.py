"""The one reduction: how trees of several clients are summed, everywhere and always in the same order.

The sorted cohort is cut in blocks of 16; within a block terms are added left to right, then the blocks' sums
are added left to right. Whole blocks may be reduced on a worker, so any executor gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.core import tree as tr
from consilience.core.tree import Tree

BLOCK = 16
"""Clients in one block of the canonical reduction."""


def weighted_sum(trees: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """sum_i w_i t_i in canonical order; ``trees`` are in the order of the sorted cohort.

    Floating leaves are summed; integer tensors (step counters), strings and None are those of the first tree.
    """
    if not trees:
        raise ValueError("nothing to sum")
    blocks: list[Tree] = []
    for start in range(0, len(trees), BLOCK):
        block: Tree = None
        for tree, weight in zip(trees[start : start + BLOCK], weights[start : start + BLOCK], strict=True):
            block = add_term(block, tree, weight)
        blocks.append(block)
    return sum_blocks(blocks)


def add_term(total: Tree, tree: Tree, weight: float) -> Tree:
    """total + weight * tree, or the first term of a block where ``total`` is None; ``total`` is changed in place."""
    if total is None:
        return tr.tree_map(lambda leaf: _scaled(leaf, weight), tree)
    return accumulate(total, tree, weight)


def sum_blocks(blocks: Sequence[Tree]) -> Tree:
    """The sum of blocks' sums, in order; the first is changed in place."""
    total = blocks[0]
    for block in blocks[1:]:
        total = accumulate(total, block, 1.0)
    return total


def _scaled(leaf: Tree, weight: float) -> Tree:
    if isinstance(leaf, Tensor):
        return leaf * weight if leaf.is_floating_point() else leaf.clone()
    return leaf * weight if isinstance(leaf, float) else leaf


def accumulate(total: Tree, tree: Tree, weight: float) -> Tree:
    """total + weight * tree; the tensors of ``total`` are changed in place."""
    result = tr.tree_map(lambda a, b: a + weight * b if isinstance(a, float) else a, total, tree)  # same structure?
    sums = [t for t in tr.tensors(total) if t.is_floating_point()]
    terms = [t for t in tr.tensors(tree) if t.is_floating_point()]
    if len(sums) != len(terms):
        raise ValueError("trees of different structure")
    if sums:
        torch._foreach_add_(sums, terms, alpha=weight)
    return result


def sample_weights(samples: Sequence[int]) -> list[float]:
    """n_k / sum n."""
    total = sum(samples)
    return [n / total for n in samples]


def uniform_weights(count: int) -> list[float]:
    """Exactly 1/count each."""
    return [1.0 / count] * count
