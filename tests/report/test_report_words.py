"""Names, numbers and units."""

from __future__ import annotations

import pytest

from consilience import methods
from consilience.report.words import (
    MINUS,
    Scale,
    byte_unit,
    count_unit,
    display,
    fixed,
    listed,
    p_value,
    plural,
    signed,
    time_unit,
)


@pytest.mark.parametrize(
    ("label", "method", "name"),
    [
        ("fedavg", "fedavg", "FedAvg"),
        ("fedprox:mu=1,lr=0.1", "fedprox", "FedProx mu=1 lr=0.1"),
        ("scaffold-2", "scaffold", "SCAFFOLD-2"),
        ("mine", "fedavg", "mine"),
        ("local", "local", "Local"),
    ],
)
def test_display(label: str, method: str, name: str) -> None:
    assert display(label, method) == name


def test_numbers() -> None:
    assert fixed(-1.25, 1) == f"{MINUS}1.2"
    assert fixed(-0.04) == "0.0"
    assert fixed(1234.5, 0) == "1,234"
    assert [signed(v) for v in (0.31, -0.31, 0.01)] == ["+0.3", f"{MINUS}0.3", "0.0"]
    assert [p_value(p).replace("\u00a0", " ") for p in (0.0001, 0.004, 0.2)] == ["p < 0.001", "p = 0.004", "p = 0.20"]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert [plural(1, "seed"), plural(2, "seed"), plural(2, "class")] == ["1 seed", "2 seeds", "2 classes"]


def test_units_follow_the_largest_value() -> None:
    assert [byte_unit([v]).text(v).replace("\u00a0", " ") for v in (312, 45_600, 4.2e6, 231e6, 5e9)] == [
        "312 bytes",
        "45.6 kB",
        "4.2 MB",
        "231 MB",
        "5.0 GB",
    ]
    assert time_unit([10, 600, None]).name == "min"
    assert count_unit([999]).text(999) == "999"


def test_scales() -> None:
    assert Scale(lower=False).text(0.8593) == "85.9\u00a0%"
    assert Scale(lower=True).text(0.8593) == "0.859"
    assert Scale(lower=False).gap(-0.012) == "1.2\u00a0points"


@pytest.mark.parametrize("name", methods.NAMES)
def test_methods_are_spelled_as_their_classes(name: str) -> None:
    """But for hyphens and letters that authors write large or small otherwise; or in words, which begin large."""
    shown = display(name, name).replace("-", "")
    if " " in shown:
        assert shown[0].isupper()
        return
    made = methods.get(name).__name__.replace("Momentum", "M")
    assert shown.casefold() == made.casefold()
    assert shown == made or shown.upper() == shown or shown[1:] == made[1:]
