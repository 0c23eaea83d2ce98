"""Amounts as people write them. Nothing here imports torch."""

from __future__ import annotations

import re

from consilience.core.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: int | str) -> int:
    """Bytes of a number, or of a text as in ``500MB`` or ``1.5 GB`` (thousands, not 1024s). Raises ConfigError.

    >>> parse_bytes("1.5 GB")
    1500000000
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", str(text).strip().upper())
    if found is None:
        raise ConfigError(f"'{text}' is no amount of memory; write it as in 500MB or 2GB")
    return int(float(found[1]) * UNITS[found[2]])
