"""Models by name, and the user's own as ``package.module:factory``."""

from __future__ import annotations

import functools
import importlib
import re

from torch import nn

from consilience.core.errors import ConfigError, nearest
from consilience.core.model import Architecture, Factory, check_factory
from consilience.models import small

NAMES = ("logistic", "mlp", "lenet", "cnn", "resnet8", "resnet8:batchnorm")


def factory(name: str) -> Factory:
    """How to make the model called ``name``. Raises ConfigError with the nearest right name."""
    kind, _, detail = name.partition(":")
    if detail and kind not in ("mlp", "resnet8"):
        return _imported(name)
    if kind == "mlp" and re.fullmatch(r"\d+(x\d+)*", detail or "200") and "0" not in (detail or "200").split("x"):
        return functools.partial(small.MLP, widths=tuple(int(w) for w in (detail or "200").split("x")))
    if name == "resnet8:batchnorm":
        return functools.partial(small.ResNet8, norm=nn.BatchNorm2d)
    plain: dict[str, Factory] = {
        "logistic": small.Linear,
        "lenet": small.LeNet,
        "cnn": small.CNN,
        "resnet8": small.ResNet8,
    }
    if name not in plain:
        hint = "; widths look like mlp:200x100" if kind == "mlp" else nearest(name, NAMES)
        raise ConfigError(f"unknown model '{name}'{hint}, or your own as package.module:factory")
    return plain[name]


def architecture(name: str, input_shape: tuple[int, ...], outputs: int) -> Architecture:
    """The architecture called ``name`` for these inputs and outputs."""
    return Architecture(name, factory(name), input_shape, outputs)


def _imported(name: str) -> Factory:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model '{name}' cannot be imported: {error}") from error
    return check_factory(found, name)
