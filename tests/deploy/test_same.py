"""A deployed run and a simulated one are the same bits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from consilience import experiment
from consilience.core.errors import ConfigError
from consilience.exporting import digest
from consilience.folder import read_lines

from .conftest import Make


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    """A line of history without times."""
    return {key: value for key, value in line.items() if key not in ("wall_s", "virtual_s")}


def test_a_deployments_folder(deployed: Make) -> None:
    """It is judged and reported on like every run; what needs the rows says that they are elsewhere."""
    import yaml

    from consilience.exporting import export
    from consilience.report.html import write_report

    folder = deployed(rounds="1").run().path
    assert write_report(folder).is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"] == "deployment of 3 sites"
    for what in (lambda: export(folder, folder / "x"), lambda: experiment.resume(folder, lambda name, line: None)):
        with pytest.raises(ConfigError, match="whose rows are at its sites"):
            what()


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedproto"])
def test_same_answer(method: str, deployed: Make) -> None:
    run = deployed(method)
    folder = run.run()
    simulated = run.simulate()
    ours, theirs = digest(folder.path).split("\n"), simulated.digest.split("\n")
    assert ours[:2] == theirs[:2]
    for here, there in zip(read_lines(folder.path / "history.jsonl"), simulated.history, strict=True):
        assert numbers(here) == numbers(json.loads(json.dumps(there)))
