"""Federations from arrays, files and names: partitioners, preprocessing and data sets."""

from __future__ import annotations

from typing import Any

__all__ = [
    "from_arrays",
    "from_client_files",
    "from_file",
    "from_huggingface",
    "from_torch",
    "load",
    "make_federation",
    "save_partition",
]

_FROM = {"load": "datasets", "make_federation": "datasets"}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that nothing slow is imported for a name's sake.
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'consilience.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_FROM.get(name, 'federation')}"), name)


def __dir__() -> list[str]:
    return __all__
