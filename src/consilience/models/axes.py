"""Along which units of which layer each dimension of each parameter runs: what nested widths are cut by."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from consilience.core.errors import ConfigError
from consilience.core.model import OUTPUTS, Axes, SplitModel


class Nested(SplitModel):
    """A split model of plain layers, whose narrower forms are slices of it."""

    def axes(self) -> Axes:
        """See :attr:`consilience.core.model.Architecture.axes`."""
        found: Axes = {}
        walk(self.head, "head", walk(self.features, "features", "", found), found, last=OUTPUTS)
        return found


class Residual(nn.Module):
    """``relu(body(x) + skip(x))``, where ``skip`` is the identity or makes the shape of what ``body`` gives."""

    body: nn.Sequential
    skip: nn.Module


def walk(module: nn.Module, name: str, units: str, found: Axes, last: str | None = None) -> str:
    """Note the axes of a module's parameters and buffers in ``found``; returns the units that it gives.

    units: what it is given ("" for inputs). last: what its own last layer gives, if not units of its own. Raises
    ConfigError for a layer whose axes are not known.
    """
    if isinstance(module, Residual):
        plain = isinstance(module.skip, nn.Identity)
        given = walk(module.body, f"{name}.body", units, found, units if plain else last)
        return given if plain else walk(module.skip, f"{name}.skip", units, found, given)
    if isinstance(module, nn.Sequential):
        parts = list(module.named_children())
        layers = [key for key, part in parts if isinstance(part, nn.Linear | nn.Conv2d | Residual)]
        for key, part in parts:
            units = walk(part, f"{name}.{key}", units, found, last if layers and key == layers[-1] else None)
        return units
    if isinstance(module, nn.Linear | nn.Conv2d):
        own = name if last is None else last
        kernel = ("",) * (module.weight.dim() - 2)
        found[f"{name}.weight"] = (own, units, *kernel)
        if module.bias is not None:
            found[f"{name}.bias"] = (own,)
        return own
    if isinstance(module, nn.GroupNorm | _BatchNorm):
        for key, value in [*module.named_parameters(), *module.named_buffers()]:
            found[f"{name}.{key}"] = (units,) * value.dim()
        return units
    if next(module.parameters(), None) is not None:
        raise ConfigError(f"layer '{name}' ({type(module).__name__}): which units its parameters have is not known")
    return units
