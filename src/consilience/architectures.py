"""Which client has which architecture: shares, nested widths, by the memory of devices, or client by client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from consilience.core.errors import ConfigError, DataError
from consilience.core.federation import Federation
from consilience.core.messages import Device
from consilience.core.model import Architecture, Factory, check_factory
from consilience.core.streams import philox, torch_fork
from consilience.fleet.device import client_id, number, read_rows

Model = str | Factory | Architecture
"""A model by name, factory or as it is."""
BATCH = 32
"""Rows of a batch for which a device's memory must do."""


def resolve(model: Model, federation: Federation, feature_dim: int | None = None) -> Architecture:
    """An architecture for this federation's inputs and outputs; feature_dim: features that its head is given."""
    from consilience import models

    if isinstance(model, Architecture):
        made = model
    elif isinstance(model, str):
        made = models.architecture(model, federation.input_shape, federation.task.outputs)
    else:
        name = getattr(model, "__qualname__", type(model).__name__)
        made = Architecture(name, check_factory(model, name), federation.input_shape, federation.task.outputs)
    return made if feature_dim is None else models.pooled(made, feature_dim)


def assign(
    models: str | Sequence[Model],
    federation: Federation,
    seed: int,
    feature_dim: int | None = None,
    devices: Callable[[], Sequence[Device]] | None = None,
) -> list[Architecture]:
    """The architecture of each client.

    models: one for each client; or ``NAME[@RATE][*SHARE],...``, dealt at random; or ``memory:`` and such a list,
    where each client gets the one that needs most of what fits its device; or a csv file with columns ``client`` and
    ``model``. A rate alone goes on with the name before it. Raises ConfigError or DataError.
    """
    n = federation.n_clients
    if not isinstance(models, str):
        if len(models) != n:
            raise ConfigError(f"models: {len(models)} given for {n} clients; give one for each")
        return [resolve(model, federation, feature_dim) for model in models]
    if models.endswith(".csv"):
        named = _read(Path(models), n)
    else:
        names, shares = parse(models.removeprefix("memory:"))
        if models.startswith("memory:"):
            known = [resolve(name, federation, feature_dim) for name in names]
            return _fitting(known, devices() if devices is not None else (), n)
        named = _dealt(names, shares, n, seed)
    made = {name: resolve(name, federation, feature_dim) for name in dict.fromkeys(named)}
    return [made[name] for name in named]


def parse(text: str) -> tuple[list[str], list[float]]:
    """Names and shares of ``NAME[@RATE][*SHARE],...``. Raises ConfigError."""
    names: list[str] = []
    shares: list[float] = []
    whole = ""
    for part in text.split(","):
        name, _, share = part.strip().partition("*")
        if whole and _is_number(name):
            name = f"{whole}@{name}"
        whole = name.partition("@")[0] if "@" in name else ""
        if not name or not _is_number(share or "1"):
            raise ConfigError(f"--models: '{part}' is not NAME*SHARE or NAME@RATE, as in lenet*0.5,mlp*0.5")
        names.append(name)
        shares.append(float(share or 1.0))
    if not min(shares) > 0:
        raise ConfigError(f"--models '{text}': shares must be above 0")
    return names, shares


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _dealt(names: Sequence[str], shares: Sequence[float], n: int, seed: int) -> list[str]:
    """A name for each client: as many of each as its share says (largest remainders), in an order of the seed."""
    exact = [share / sum(shares) * n for share in shares]
    counts = [int(e) for e in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    dealt = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    return [dealt[i] for i in philox(seed, "architectures").permutation(n)]


def _read(path: Path, n: int) -> list[str]:
    """The names in a csv file, by client."""
    found: dict[int, str] = {}
    for line, row in read_rows(path):
        where = f"{path} line {line}"
        if not row.get("client") or not row.get("model"):
            raise DataError(f"{where}: columns 'client' and 'model' are wanted")
        client = client_id(number(row["client"], f"{where}, client"), n, where)
        if client in found:
            raise DataError(f"{where}: client {client} has a model already")
        found[client] = row["model"]
    missing = [client for client in range(n) if client not in found]
    if missing:
        raise DataError(f"{path}: client {missing[0]} has no model ({len(found)} of {n} clients have one)")
    return [found[client] for client in range(n)]


def _fitting(known: Sequence[Architecture], devices: Sequence[Device], n: int) -> list[Architecture]:
    """For each client, of the architectures that its device can train the one that needs most memory."""
    if len(devices) != n or not all(device.memory for device in devices):
        raise ConfigError("--models memory:...: this fleet says nothing of memory; --fleet phones does")
    needed = {a.name: training_memory(a) for a in known}
    ordered = sorted(known, key=lambda a: -needed[a.name])
    found = []
    for client, device in enumerate(devices):
        fits = next((a for a in ordered if needed[a.name] <= device.memory), None)
        if fits is None:
            least = ordered[-1]
            raise ConfigError(
                f"--models memory:...: client {client} has {device.memory / 1e6:.3g} MB; '{least.name}', the smallest, "
                f"needs {needed[least.name] / 1e6:.3g} MB to train"
            )
        found.append(fits)
    return found


def training_memory(architecture: Architecture) -> int:
    """Bytes to train with a batch of :data:`BATCH` rows: weights, gradients and momentum, and what the layers give."""
    module = architecture.build().train()
    activations = 0

    def add(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal activations
        activations += output.numel() * output.element_size()

    for part in module.modules():
        if not any(part.children()):
            part.register_forward_hook(add)
    with torch_fork(0), torch.no_grad():
        module(torch.zeros(BATCH, *architecture.input_shape, dtype=architecture.dtype))
    held = [*module.parameters(), *module.buffers()]
    return 3 * sum(t.numel() * t.element_size() for t in held) + activations
