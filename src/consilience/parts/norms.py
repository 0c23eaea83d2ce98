"""Layers that normalise: their statistics, and which parameters are theirs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from consilience.core.model import Weights
from consilience.core.site import Site
from consilience.core.streams import torch_fork


def statistics(site: Site, weights: Weights) -> Weights:
    """The weights with BatchNorm's statistics of the site's rows: the mean over its batches, in training mode."""
    instance = site.borrow()
    module = instance.fill(weights, train=True)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    rows = site.cast(site.train)
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean of all batches
        with torch_fork(site.streams.torch_seed("dropout", "statistics")), torch.no_grad():
            for start in range(0, len(rows), site.method.batch_size):
                module(rows.x[start : start + site.method.batch_size])
        return instance.weights()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def parameters(module: nn.Module) -> set[str]:
    """Names of the parameters of layers that normalise."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
    layers = ((name, part) for name, part in module.named_modules() if isinstance(part, kinds))
    return {f"{name}.{own}" if name else own for name, part in layers for own, _ in part.named_parameters()}
