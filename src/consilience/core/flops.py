"""FLOP of a model, counted by torch's formulas."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from consilience.core.streams import torch_fork


class Flops(NamedTuple):
    """FLOP for one row: forward alone, and forward and backward."""

    forward: float
    training: float


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOP of every operation. torch's own FlopCounterMode does the same, but makes torch import its
    compiler, which takes longer than many a run."""

    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count(module: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype) -> Flops:
    """FLOP of a module for one row of this shape.

    Matrix products and convolutions count; a model with neither, or that cannot be evaluated here, gets two for each
    parameter forward and six in training. (One that always fails will do so at its first client, whose error says
    where.)
    """
    module.train()
    counter, forward = _Counter(), 0  # type: ignore[no-untyped-call]
    with torch_fork(0), torch.enable_grad(), counter, contextlib.suppress(Exception):
        out = module(torch.zeros(2, *input_shape, dtype=dtype))  # BatchNorm wants two rows
        forward = counter.total
        out.sum().backward()
    size = sum(p.numel() for p in module.parameters())
    return Flops(forward / 2 or 2.0 * size, counter.total / 2 or 6.0 * size)
