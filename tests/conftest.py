"""Shared by all tests: one torch thread, and ``import helpers``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of bugs that are known and not mended yet: see known_failures.txt."""
    listed = (Path(__file__).parent / "known_failures.txt").read_text().splitlines()
    known = {line for line in listed if not line.startswith("#")}
    for item in items:
        if item.nodeid in known:
            item.add_marker(pytest.mark.xfail(reason="a known bug, listed in known_failures.txt", strict=False))
