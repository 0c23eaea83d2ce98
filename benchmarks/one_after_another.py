"""What ``consilience compare`` would be without running whole runs side by side: one run after another, each over all
cores. Takes the same arguments; for ``speed.py --workload compare``."""

from __future__ import annotations

import sys
from unittest import mock

from consilience import experiment
from consilience.cli import main


def _in_turn(todo, folder, command, on_line, workers) -> None:
    for spec in todo:
        experiment._one(spec, folder, command, None, lambda line, name=spec.name: on_line(name, line))


if __name__ == "__main__":
    sys.argv[1:1] = ["compare"]
    with mock.patch.object(experiment, "_side_by_side", _in_turn):
        main()
