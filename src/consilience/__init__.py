"""Consilience: heterogeneous federated learning, compared honestly.

>>> import consilience as c
>>> federation = c.make_federation("digits", clients=10, partition="dirichlet:0.3")
>>> result = c.run(c.methods.FedAvg(lr=0.1), federation, model="mlp", rounds=2, executor="serial")
>>> len(result.history)
2
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "Federation",
    "Method",
    "Result",
    "Task",
    "__version__",
    "data",
    "make_federation",
    "methods",
    "models",
    "run",
]

_FROM = {
    "run": "simulate",
    "Result": "simulate",
    "make_federation": "data.datasets",
    "Federation": "core.federation",
    "Task": "core.federation",
    "Method": "core.method",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `consilience --help` does not wait for torch.
    import importlib

    if name in _FROM:
        return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
    if name in ("data", "methods", "models"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'consilience' has no attribute '{name}'")
