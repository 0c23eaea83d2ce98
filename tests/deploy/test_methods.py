"""Every method is the same bits deployed and simulated."""

from __future__ import annotations

from typing import Any

import pytest

from consilience import methods
from consilience.exporting import digest

from .conftest import Make

OWN = {
    "fedbuff": ":buffer=3", "feddf": ":server_steps=3", "fedgen": ":share=head,generator_steps=3",
    "fedmd": ":warm_up=1",
    "fedtgp": ":server_epochs=2", "fald": ":burn_in=1,thin=2,keep=2", "fedlex": ":explore_epochs=2,patience=1",
}  # fmt: skip
SHAPES = ("fedavg", "fedmd", "dpsgd", "fedkd")
"""One in the quick suite for each shape: plain, two phases and public rows, neighbours, two models."""


def deployable() -> list[Any]:
    names = [n for n, cls in methods.every().items() if not cls.needs.pooled_data and n != "fedcompass"]
    return [pytest.param(name, marks=() if name in SHAPES else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", deployable())
def test_the_same_bits(name: str, deployed: Make) -> None:
    cls = methods.get(name)
    options: dict[str, str] = {"rounds": "2"}
    if cls.needs.public_data:
        options["public"] = "60"
    if cls.needs.architectures == "any":
        options |= {"models": "mlp:16*0.5,logistic*0.5", "feature_dim": "8"}
    if cls.needs.architectures == "widths" or name in ("heterofl", "fedrolex", "feddropout"):
        options["models"] = "mlp:16@1.0,0.5,0.25"
    if cls().default_schedule() != "rounds":
        options["schedule"] = "rounds"
    run = deployed(f"{name}{OWN.get(name, '')}", **options)
    folder = run.run().path
    simulated = run.simulate()
    assert digest(folder).split("\n")[:2] == simulated.digest.split("\n")[:2]
