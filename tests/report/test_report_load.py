"""Reading run folders, and what is said of damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from consilience.core.errors import Refused
from consilience.report.load import RunFolder, read_runs


def refused(path: Path) -> str:
    with pytest.raises(Refused) as caught:
        read_runs(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run(make_run: Callable[..., Path]) -> None:
    run = RunFolder.read(make_run("fedprox", 3, label="fedprox:mu=0.1"))
    assert (run.method, run.label, run.seed, run.finished) == ("fedprox", "fedprox:mu=0.1", 3, True)
    assert run.history[-1]["round"] == 50
    assert len(run.clients) == 6 * 20
    assert sorted(run.digests) == ["clients", "history", "server"]
    assert [r.path for r in read_runs(run.path)] == [run.path]


def test_a_comparison_is_ordered_by_label_and_seed(make_compare: Callable[..., Path]) -> None:
    runs = read_runs(make_compare(["scaffold", "fedavg"], 2))
    assert [(r.label, r.seed) for r in runs] == [("fedavg", 0), ("fedavg", 1), ("scaffold", 0), ("scaffold", 1)]


def test_runs_that_have_not_begun_are_left_out(make_compare: Callable[..., Path]) -> None:
    folder = make_compare(["scaffold", "fedavg"], 1)
    (folder / "fedavg-seed0" / "history.jsonl").unlink()
    assert [r.label for r in read_runs(folder)] == ["scaffold"]
    (folder / "scaffold-seed0" / "history.jsonl").write_text("")
    assert "none of the 2 runs" in refused(folder)


def test_no_runs(tmp_path: Path) -> None:
    assert "holds no run" in refused(tmp_path)
    assert "no folder" in refused(tmp_path / "nowhere")


def test_unfinished_run_has_no_digests(make_run: Callable[..., Path]) -> None:
    run = RunFolder.read(make_run(finished=False))
    assert not run.finished


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("history.jsonl", '{"round": 0}\n', "line 1 is damaged: it has no wall_s"),
        ("history.jsonl", '{"round": 0, "wa', "line 1 is damaged: not JSON"),
        ("history.jsonl", "[1]\n", "line 1 is damaged"),
        ("history.jsonl", "", "no evaluated round"),
        ("clients.jsonl", '{"client": 1}\n', "clients.jsonl line 1 is damaged: it has no round"),
        ("federation.json", "{", "federation.json is not JSON"),
        ("federation.json", "[]", "not a JSON object"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
        ("config.yaml", "- a", "not a YAML mapping"),
    ],
)
def test_damage_is_one_line_that_names_the_place(
    make_run: Callable[..., Path], name: str, text: str, said: str
) -> None:
    folder = make_run()
    (folder / name).write_text(text)
    with pytest.raises(Refused) as caught:
        _ = RunFolder.read(folder).clients
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_federation(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    (folder / "federation.json").unlink()
    assert "has no federation.json" in refused(folder)
