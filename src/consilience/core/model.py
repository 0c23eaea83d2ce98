"""Models: weights as trees, architectures as factories, and module instances that are refilled in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.flops import Flops, count
from consilience.core.streams import philox, torch_fork
from consilience.core.tree import record

Params = dict[str, Tensor]
"""Parameters by name."""
Axes = dict[str, tuple[str, ...]]
"""By parameter or buffer, for each of its dimensions the layer along whose units it runs; "" for inputs and kernels."""
OUTPUTS = "outputs"
"""The axis of a model's outputs."""


@record
class Weights(NamedTuple):
    """All of a model's numbers. Buffers (BatchNorm statistics, counters) are not parameters: methods average
    them as the buffer policy says and never put them into momentum, controls, distances or clipping."""

    params: Params
    buffers: Params


class SplitModel(nn.Module):
    """A model in two parts: ``features`` maps inputs to ``(n, width)``, ``head`` maps those to outputs."""

    def __init__(self, features: nn.Module, head: nn.Module, width: int) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


Factory = Callable[[tuple[int, ...], int], nn.Module]
"""``factory(input_shape, outputs)`` makes a module; its initial values come from torch's global generator."""


@dataclass(frozen=True)
class Architecture:
    """A model's name and how to make it.

    input_shape: shape of one input. outputs: classes or targets. dtype: of parameters and inputs. family: of models
    whose parts have common names, as nets of different depth; "" for a model of no family. whole, rate: of a nested
    width, the name of the model that it is a slice of and the share of each hidden layer that it has.
    """

    name: str
    factory: Factory
    input_shape: tuple[int, ...]
    outputs: int
    dtype: torch.dtype = torch.float32
    family: str = ""
    whole: str = ""
    rate: float = 1.0

    @property
    def key(self) -> str:
        """What tells its instances apart from those of others."""
        return f"{self.name}|{self.dtype}"

    @functools.cached_property
    def spec(self) -> Weights:
        """Weights whose names, shapes and dtypes are those of the model."""
        return read(self.build())

    @functools.cached_property
    def axes(self) -> Axes:
        """What its nested widths are cut by. Raises ConfigError if the model does not say."""
        module = self.build()
        own = getattr(module, "axes", None)
        if not callable(own) or isinstance(own, Tensor):
            raise ConfigError(
                f"model '{self.name}' cannot be cut: it has no method axes() that says along which layer's units each "
                "dimension of each parameter runs"
            )
        found: Axes = own()
        return found

    @functools.cached_property
    def flops(self) -> Flops:
        """FLOP for one row, forward and in training."""
        return count(self.build(), self.input_shape, self.dtype)

    @functools.cached_property
    def width(self) -> int | None:
        """Features that the head is given; None for a model that is not split."""
        module = self.build()
        return module.width if isinstance(module, SplitModel) else None

    def build(self, seed: int = 0) -> nn.Module:
        """A module whose initial values are drawn with ``seed``; no global generator moves."""
        with torch_fork(seed):
            try:
                module = self.factory(self.input_shape, self.outputs)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"model '{self.name}' cannot be made for inputs {self.input_shape}: {error}"
                ) from error
        if not isinstance(module, nn.Module):
            raise ConfigError(f"model '{self.name}': its factory returned {type(module).__name__}, not a torch Module")
        module = module.to(self.dtype)
        # Convolutions on a CPU are about 16 % faster so; results do not depend on how a tensor came to be laid out.
        return module.to(memory_format=torch.channels_last) if _last_pays(module) else module  # type: ignore[call-overload]

    def initial(self, seed: int, component: int = 0) -> Weights:
        """Initial weights: the same for everybody with the same seed, architecture and component."""
        return read(self.build(int(philox(seed, "model", self.name, component).integers(2**63))))


def _last_pays(module: nn.Module) -> bool:
    """Whether there are convolutions and all of them can be laid out with channels last: the backward pass of a strided
    1x1 convolution of fewer than 8 channels then writes outside its memory (seen with torch 2.13 on x86)."""
    found = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    broken = any(c.in_channels < 8 and c.kernel_size == (1, 1) and c.stride != (1, 1) for c in found)
    return bool(found) and not broken


def read(module: nn.Module) -> Weights:
    """A copy of a module's weights."""
    return Weights(tr.clone(dict(module.named_parameters())), tr.clone(_buffers(module)))


def _buffers(module: nn.Module) -> Params:
    """A module's persistent buffers by name."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


class Instance:
    """A module that lives as long as its worker and is refilled instead of made anew."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.module = architecture.build()
        self.parameters = dict(self.module.named_parameters())
        self.buffers = _buffers(self.module)
        self.frozen = {name for name, p in self.parameters.items() if not p.requires_grad}
        """Parameters that the model's maker wants left alone."""
        passing = [buffer for name, buffer in self.module.named_buffers() if name not in self.buffers]
        self._passing = [(buffer, buffer.clone()) for buffer in passing]
        """Buffers that belong to no state, with what they held when new: no borrower sees the last one's."""
        self.home = {name: p.data for name, p in self.parameters.items()}
        """The module's own storage."""
        self.tally: Callable[[float], None] | None = None
        """Whom to tell the FLOP of rows that pass, in evaluation mode."""
        seen = self.module.features if isinstance(self.module, SplitModel) else self.module
        seen.register_forward_hook(self._tell)
        self.row: tuple[str, int] | None = None
        """Which row of which common storage that is, in a stack."""
        for part in self.module.modules():
            if isinstance(part, _BatchNorm) and part.track_running_stats:
                part.register_forward_pre_hook(_lone)
                part.register_forward_hook(_no_longer, always_call=True)

    @property
    def remembers(self) -> bool:
        """Whether the module has buffers that belong to no state, which its own code may move."""
        return bool(self._passing)

    def move(self, params: Params, buffers: Params) -> None:
        """Let the module's own storage be these tensors from now on."""
        for name, tensor in params.items():
            self.parameters[name].data = self.home[name] = tensor
        for name, tensor in buffers.items():
            self.buffers[name].data = tensor

    def _tell(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.tally is not None and isinstance(output, Tensor):
            self.tally(len(output) * self.architecture.flops.forward)

    def fill(self, weights: Weights, *, train: bool, tally: Callable[[float], None] | None = None) -> nn.Module:
        """Copy ``weights`` in and set the mode; parameters want gradients only in training mode. tally: is told the
        FLOP of rows that pass."""
        self.tally = tally
        self.point(self.home)
        _copy(self.home, weights.params, self.architecture.name)
        _copy(self.buffers, weights.buffers, self.architecture.name)
        for buffer, fresh in self._passing:
            buffer.copy_(fresh)
        self.module.train(train)
        for name, p in self.parameters.items():
            p.requires_grad_(train and name not in self.frozen)
        return self.module

    def point(self, params: Params) -> None:
        """Let the parameters be these tensors, without copying."""
        for name, tensor in params.items():
            p = self.parameters[name]
            if p.data_ptr() != tensor.data_ptr():
                p.data = tensor

    def weights(self) -> Weights:
        """A copy of the weights held now."""
        return Weights(tr.clone(self.home), tr.clone(self.buffers))


def _lone(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Before a BatchNorm in training. One value in each channel has no variance, so such a batch (the one row that an
    epoch's end may leave) is normalised by the running statistics, and leaves them as they are."""
    if norm.training and inputs and inputs[0].numel() == inputs[0].shape[1]:
        norm.training, norm.lone = False, True  # type: ignore[assignment]


def _no_longer(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """After it: back to training."""
    if norm.__dict__.pop("lone", False):
        norm.training = True


def _copy(target: Params, source: Params, name: str) -> None:
    if target.keys() != source.keys():
        differing = sorted(target.keys() ^ source.keys())
        raise ValueError(f"weights do not fit model '{name}': {', '.join(differing[:3])} on one side only")
    if target:
        torch._foreach_copy_(list(target.values()), [source[key] for key in target])


class Pool:
    """The module instances of one worker. What a job borrows goes back when the job ends."""

    def __init__(self) -> None:
        self._free: dict[str, list[Instance]] = {}
        self._lent: list[Instance] = []

    def borrow(self, architecture: Architecture) -> Instance:
        """An instance that nobody else uses until :meth:`release`."""
        free = self._free.setdefault(architecture.key, [])
        instance = free.pop() if free else self.make(architecture)
        self._lent.append(instance)
        return instance

    def make(self, architecture: Architecture) -> Instance:
        """A new instance."""
        return Instance(architecture)

    def mark(self) -> int:
        """A point to which :meth:`release` can go back."""
        return len(self._lent)

    def release(self, mark: int = 0) -> None:
        """Give back everything borrowed since ``mark``."""
        while len(self._lent) > mark:
            instance = self._lent.pop()
            self._free.setdefault(instance.architecture.key, []).append(instance)


def check_factory(factory: object, name: str) -> Factory:
    """``factory`` if it can be called as ``factory(input_shape, outputs)``; ConfigError otherwise."""
    if not callable(factory):
        raise ConfigError(
            f"model '{name}' is not callable; give package.module:factory with factory(input_shape, outputs)"
        )
    try:
        inspect.signature(factory).bind((1,), 1)
    except TypeError as error:
        raise ConfigError(f"model '{name}' must take (input_shape, outputs): {error}") from error
    except ValueError:
        pass  # a builtin without a signature: calling it will tell
    return factory
