"""Models by name, nested widths of them, and the user's own as ``package.module:factory``."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re

from torch import nn

from consilience.core.errors import ConfigError, nearest
from consilience.core.model import Architecture, Factory, SplitModel, check_factory
from consilience.models import frozen, players, small, transformer, vgg
from consilience.models.adapters import Adapted

_RESNETS, _VGGS = ("resnet8", "resnet14", "resnet20"), ("vgg5", "vgg8", "vgg11")
_SMALL = ("logistic", "linear", "mlp", "lenet", "cnn")
NAMES = (*_SMALL, *_RESNETS, "resnet8:batchnorm", *_VGGS, "transformer", "frozen", "players")
ADAPTER, LORA = "+adapter", "+lora"
ADVERSARY = re.compile(r"(.+)\+adversary(?::(.*))?")
_FAMILY = {"mlp": "mlp", **dict.fromkeys(_RESNETS, "resnet"), **dict.fromkeys(_VGGS, "vgg")}
"""Families of models whose parts have common names."""


def factory(name: str) -> Factory:
    """How to make the model called ``name``; ``NAME+adapter`` has adapters, ``NAME+lora:RANK`` low-rank ones,
    ``NAME+adversary:RHO`` somebody who moves inputs. Raises ConfigError with the nearest right name."""
    opposed = ADVERSARY.fullmatch(name)
    if opposed:
        return functools.partial(players.Opposed, factory(opposed[1]), _strength(name, opposed[2]))
    if name.endswith(ADAPTER):
        return functools.partial(Adapted, factory(name.removesuffix(ADAPTER)))
    lora = re.fullmatch(r"(.+)\+lora(:[1-9]\d*)?", name)
    if lora:
        return functools.partial(transformer.with_lora, factory(lora[1]), int((lora[2] or ":4")[1:]))
    kind, _, detail = name.partition(":")
    resnet = re.fullmatch(r"resnet(8|14|20)(:batchnorm)?", name)
    if resnet:
        norm = nn.BatchNorm2d if resnet[2] else small.group_norm
        return functools.partial(small.ResNet, norm=norm, blocks=(int(resnet[1]) - 2) // 6)
    if detail and kind not in ("mlp", *_RESNETS):
        return _imported(name)
    if kind == "mlp" and re.fullmatch(r"\d+(x\d+)*", detail or "200") and "0" not in (detail or "200").split("x"):
        return functools.partial(small.MLP, widths=tuple(int(w) for w in (detail or "200").split("x")))
    plain: dict[str, Factory] = {
        "logistic": small.Linear,
        "linear": small.Homogeneous,
        "lenet": small.LeNet,
        "cnn": small.CNN,
        "transformer": transformer.Transformer,
        "frozen": frozen.Frozen,
        "players": players.Players,
        "vgg5": vgg.VGG,
        "vgg8": functools.partial(vgg.VGG, convolutions=2),
        "vgg11": functools.partial(vgg.VGG, convolutions=3),
    }
    if name not in plain:
        hint = "; widths look like mlp:200x100" if kind == "mlp" else nearest(name, NAMES)
        raise ConfigError(f"unknown model '{name}'{hint}, or your own as package.module:factory")
    return plain[name]


def architecture(name: str, input_shape: tuple[int, ...], outputs: int) -> Architecture:
    """The architecture called ``name``, or ``NAME@RATE`` for a nested width, for these inputs and outputs.

    Raises ConfigError.
    """
    whole, at, text = name.partition("@")
    changed = whole.endswith(ADAPTER) or LORA in whole or ADVERSARY.fullmatch(whole) is not None
    family = whole if changed else _FAMILY.get(whole.partition(":")[0], whole)
    made = Architecture(name, factory(whole), input_shape, outputs, family=family)
    if at and changed:
        raise ConfigError(f"model '{name}': a model with adapters or an adversary has no nested widths")
    if not at:
        return made
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1:
        raise ConfigError(f"model '{name}': a rate is above 0 and at most 1, as in {whole}@0.5")
    if rate == 1:
        return dataclasses.replace(made, name=whole)
    if whole == "frozen":
        raise ConfigError(f"model '{name}': frozen comes trained and cannot be cut")
    if whole in ("logistic", "linear", "transformer"):
        raise ConfigError(f"model '{name}': {whole} has no hidden layer to cut")
    return dataclasses.replace(made, factory=functools.partial(_cut, made.factory, rate), whole=whole, rate=rate)


def _strength(name: str, text: str | None) -> float:
    """The penalty on an adversary, 1 where none is said."""
    try:
        rho = 1.0 if text is None else float(text)
    except ValueError:
        rho = math.nan
    if not 0 < rho < math.inf:
        raise ConfigError(f"model '{name}': the adversary's penalty is a number above 0, as in mlp+adversary:0.5")
    return rho


def pooled(made: Architecture, width: int) -> Architecture:
    """The architecture with its features pooled to ``width`` of them. Raises ConfigError if it is not split."""
    if made.width is None:
        raise ConfigError(f"--feature-dim {width}: model '{made.name}' is no split model (features and head)")
    return dataclasses.replace(made, factory=functools.partial(_pool, made.factory, width))


def _cut(factory: Factory, rate: float, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    return factory(input_shape, outputs, rate=rate)  # type: ignore[call-arg]


def _pool(factory: Factory, width: int, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    model = factory(input_shape, outputs)
    assert isinstance(model, SplitModel)
    return small.Pooled(model, width, outputs)


def _imported(name: str) -> Factory:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model '{name}' cannot be imported: {error}") from error
    return check_factory(found, name)
