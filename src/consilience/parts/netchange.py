"""Models turned into wider and deeper ones that compute the same, and back (after Net2Net; Chen et al., 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consilience.core.errors import ConfigError
from consilience.core.model import OUTPUTS, Architecture, Params, Weights
from consilience.core.streams import philox
from consilience.parts import submodel

CLOSE = 1e-3
"""How much of its size the output of a converted model may differ: BatchNorm's epsilon, and rounding."""


class Change:
    """How weights of ``small`` become weights of ``big`` and back.

    Unit j of a layer of ``big`` is a copy of unit g(j) of the same layer of ``small``: g(j) = j as far as there are
    units, then drawn with ``seed``. A layer that ``small`` lacks passes on what it is given.

    Needs models that say their axes and whose parts have common names; as everywhere, dimension 0 of a parameter runs
    along the units that its layer gives and dimension 1 along those that it takes. Raises ConfigError where ``big``
    lacks a layer or units of ``small``.
    """

    def __init__(self, small: Architecture, big: Architecture, seed: int) -> None:
        self.small, self.big = small, big
        self.same = small.spec.params.keys() == big.spec.params.keys() and all(
            p.shape == big.spec.params[name].shape for name, p in small.spec.params.items()
        )
        self._of = self._origins()
        few, many = submodel.sizes(small), submodel.sizes(big)
        self.copies: dict[str, Tensor] = {}
        """By layer of ``big``, whose copy each unit is, ``(units,)``."""
        for axis, n in many.items():
            if n < few[self._of[axis]]:
                raise ConfigError(
                    f"layer '{axis}' of model '{big.name}' has {n} units, fewer than the {few[self._of[axis]]} of "
                    f"'{small.name}' that it stands for; give a model as --model that is nowhere narrower"
                )
            self.copies[axis] = _copies(few[self._of[axis]], n, axis, seed)

    def _origins(self) -> dict[str, str]:
        """For each layer of the big model, the layer of the small one whose units it gives."""
        own = set(submodel.sizes(self.small))
        found: dict[str, str] = {}
        for name, dims in self.big.axes.items():
            taken = dims[1] if len(dims) > 1 else ""
            if dims and dims[0] in own:
                found.setdefault(dims[0], dims[0])
            elif dims and dims[0] not in ("", OUTPUTS, *found):
                if taken not in found:
                    raise ConfigError(f"model '{self.small.name}' has no layer whose units '{name}' could pass on")
                found[dims[0]] = found[taken]
        for name, dims in self.small.axes.items():
            if [found.get(axis, axis) for axis in self.big.axes.get(name, ())] != list(dims):
                raise ConfigError(
                    f"'{name}' of model '{self.small.name}' has no counterpart in '{self.big.name}'; "
                    "give a model as --model that has all layers of the others"
                )
        return found

    def up(self, weights: Weights) -> Weights:
        """To-Wider and To-Deeper: the same function as a bigger model. Where clients keep buffers, none are made."""
        if self.same:
            return weights
        params = {name: self._wider(weights.params, name, p) for name, p in self.big.spec.params.items()}
        if not weights.buffers:
            return Weights(params, {})
        return Weights(params, {n: self._wider(weights.buffers, n, b) for n, b in self.big.spec.buffers.items()})

    def down(self, weights: Weights) -> Weights:
        """To-Narrower and To-Shallower, which undo :meth:`up` to the last bits: what copies give is the mean of what
        they were, and who takes it adds up its weights for them; layers that the small model lacks are dropped."""
        if self.same:
            return weights
        return Weights(
            *({n: self._narrower(part[n], n) for n in own if n in part} for part, own in self._parts(weights))
        )

    def _parts(self, weights: Weights) -> list[tuple[Params, Params]]:
        return [(weights.params, self.small.spec.params), (weights.buffers, self.small.spec.buffers)]

    def _wider(self, given: Params, name: str, spec: Tensor) -> Tensor:
        if name not in given:
            return self._passing(name, spec)
        value = given[name]
        for d, axis in enumerate(self.big.axes[name]):
            if axis in self.copies and value.shape[d] != spec.shape[d]:
                places, counts = self._places(axis, spec.shape[d])
                value = value.index_select(d, places)
                value = value / _along(counts[places].to(value.dtype), d, value.dim()) if d == 1 else value
        return value

    def _narrower(self, value: Tensor, name: str) -> Tensor:
        dtype = value.dtype
        for d, axis in enumerate(self.big.axes[name]):
            places, counts = self._places(axis, value.shape[d]) if axis in self.copies else (None, None)
            if places is None or counts is None or len(counts) == value.shape[d]:
                continue
            shape = [len(counts) if i == d else n for i, n in enumerate(value.shape)]
            value = torch.zeros(shape, dtype=torch.float64).index_add_(d, places, value.double())
            value = value if d == 1 else value / _along(counts.double(), d, value.dim())
        return value.to(dtype)

    def _places(self, axis: str, length: int) -> tuple[Tensor, Tensor]:
        """Along a dimension of the big model, whose copy each place is; of each place of the small one, how many."""
        copies = self.copies[axis]
        each = length // len(copies)  # behind a flatten, a channel has several places
        places = (copies[:, None] * each + torch.arange(each)).flatten()
        return places, torch.bincount(places)

    def _passing(self, name: str, spec: Tensor) -> Tensor:
        """A parameter or buffer of a layer that passes on what it is given. In a residual block it is its last norm
        that is 0, so that a client can still learn the block."""
        dims = self.big.axes[name]
        if spec.dim() > 1:
            gives, takes = self.copies[dims[0]], self.copies[dims[1]]
            share = torch.bincount(takes)[takes].to(spec.dtype)
            kernel = torch.zeros_like(spec)
            middle: tuple[Any, ...] = (slice(None), slice(None), *(n // 2 for n in spec.shape[2:]))
            kernel[middle] = (gives[:, None] == takes[None, :]).to(spec.dtype) / share
            return kernel
        skipped = bool(dims) and self._of[dims[0]] == dims[0]
        one = name.endswith(".running_var") or (name.endswith(".weight") and not skipped)
        return torch.ones_like(spec) if one else torch.zeros_like(spec)

    def check(self) -> None:
        """Raise ConfigError if the bigger model does not compute what the smaller one does: with activations that are
        not the identity for what ReLU gives, or norms over several units of which some are copied."""
        weights = self.small.initial(0)
        x = torch.from_numpy(philox(0, "netchange check").standard_normal((4, *self.small.input_shape)))
        wanted, found = _scores(self.small, weights, x), _scores(self.big, self.up(weights), x)
        if float((found - wanted).abs().max()) > CLOSE * max(1.0, float(wanted.abs().max())):
            raise ConfigError(
                f"model '{self.small.name}' as a '{self.big.name}' computes something else: units can be copied and "
                "layers put in between in plain ReLU nets (mlp, vgg) and BatchNorm, not where GroupNorm sees copies"
            )


def _copies(few: int, many: int, axis: str, seed: int) -> Tensor:
    drawn = philox(seed, "netchange", axis).integers(few, size=many - few)
    return torch.cat([torch.arange(few), torch.from_numpy(drawn)])


def _along(values: Tensor, d: int, dims: int) -> Tensor:
    return values.view([-1 if i == d else 1 for i in range(dims)])


def _scores(architecture: Architecture, weights: Weights, x: Tensor) -> Tensor:
    module = architecture.build().eval()
    module.load_state_dict({**weights.params, **weights.buffers})
    with torch.no_grad():
        scores: Tensor = module(x.to(architecture.dtype))
    return scores
