"""Comparisons with a reference, a target, tuning, groups, and over several federations, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import consilience, here

from consilience import suite
from consilience.config import settle

SMALL = ["--model", "mlp:16", "--clients", "4", "--rounds", "3", "--workers", "2", "--seeds", "2"]


@pytest.fixture
def census(tmp_path: Path) -> Path:
    """A table with two sensitive columns, of which one matters."""
    rng = np.random.default_rng(0)
    sex, town = rng.integers(0, 2, 600), rng.integers(0, 3, 600)
    x = rng.normal(size=(600, 2)) + sex[:, None]
    y = (x.sum(1) + rng.normal(size=600) > 1).astype(int)
    rows = "".join(
        f"{a:.3f},{b:.3f},{'fm'[s]},t{t},{'no' if label == 0 else 'yes'}\n"
        for (a, b), s, t, label in zip(x, sex, town, y, strict=True)
    )
    path = tmp_path / "census.csv"
    path.write_text("a,b,sex,town,label\n" + rows)
    return path


def test_reference_target_and_groups(census: Path) -> None:
    where = census.parent
    options = [*SMALL, "--data", str(census), "--sensitive", "sex,town", "--reference", "fedavg", "--target", "0.5"]
    done = consilience("compare", "fedavg", "fedprox:mu=1", "local", *options, "--out", "c", cwd=where)
    assert done.returncode == 0, done.stderr
    for said in ("Difference from fedavg", "Cost to reach 50.0", "Against FedAvg:"):
        assert said in done.stdout
    rows = {row["method"]: row for row in json.loads((where / "c" / "leaderboard.json").read_text())}
    prox = rows["fedprox:mu=1"]
    assert prox["reference"] == "fedavg"
    assert prox["difference"] == pytest.approx(prox["accuracy"] - rows["fedavg"]["accuracy"])
    assert rows["fedavg"]["difference"] is None
    assert prox["p_smallest"] == 1.0  # two seeds and two methods
    assert 0 <= prox["p_holm"] <= 1
    assert prox["to_target"]["rounds"]["beyond"] <= 3
    assert prox["gain"]["of"] == 8
    assert set(prox["groups"]) == {"sex", "town"}
    found = prox["groups"]["sex"]
    assert found["unique"] + found["redundant"] == pytest.approx(found["global_bits"])
    assert found["demographic_parity"] > 0
    page = (where / "c" / "report.html").read_text()
    for title in ("How sure", "Cost to reach 50.0", "Fairness between groups"):
        assert title in page
    again = here("report", "c", cwd=where)
    assert again.returncode == 0
    assert json.loads((where / "c" / "leaderboard.json").read_text()) == list(rows.values())


def test_tuning_is_the_same_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options = ["compare", "fedavg", "fedprox:mu=0.5", "local", *SMALL, "--tune", "3"]
    whole = consilience(*options, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "trial 3 of 3" in whole.stderr
    record = json.loads((tmp_path / "whole" / "tuning.json").read_text())
    assert {len(own["trials"]) for own in record["methods"].values()} == {3}
    assert record["seed"] == 2
    assert record["methods"]["fedavg"]["trials"][0]["options"] == {"lr": 0.05}
    assert set(record["methods"]["fedprox:mu=0.5"]["space"]) == {"lr"}  # mu was set
    for label, own in record["methods"].items():
        values = [trial["value"] for trial in own["trials"]]
        assert values[own["best"]] == max(values)
        folder = tmp_path / "whole" / f"{label.replace(':', '_')}-seed1"
        assert (
            yaml.safe_load((folder / "config.yaml").read_text())["options"]["lr"]
            == own["trials"][own["best"]]["options"]["lr"]
        )
    assert "Every method had 3 trials" in (tmp_path / "whole" / "report.html").read_text()

    killed = consilience(*options, "--out", "killed", cwd=tmp_path, env={"CONSILIENCE_FAILPOINT": "aggregate:10"})
    assert killed.returncode == -9
    lines = (tmp_path / "killed" / "trials.jsonl").read_text()
    assert 0 < len(lines.splitlines()) < 9
    (tmp_path / "killed" / "trials.jsonl").write_text(lines + '{"method": "fed')  # a line that was cut off
    resumed = consilience("resume", "killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "killed" / "tuning.json").read_text()) == record
    for run in ("fedavg-seed0", "local-seed1"):
        digests = [(tmp_path / folder / run / "digest.txt").read_text() for folder in ("whole", "killed")]
        assert digests[0] == digests[1]


def test_several_federations(tmp_path: Path) -> None:
    config = tmp_path / "many.yaml"
    config.write_text(
        "methods: [fedavg, local]\nmodel: mlp:16\nclients: 4\nrounds: 2\nworkers: 2\n"
        "federations:\n- partition: iid\n- {partition: 'dirichlet:0.1', clients: 5}\n"
    )
    done = consilience("compare", "--config", str(config), "--out", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "so few federations cannot show a difference" in " ".join(done.stdout.split())
    rows = json.loads((tmp_path / "s" / "leaderboard.json").read_text())
    assert {row["method"] for row in rows} == {"fedavg", "local"}
    assert rows[0]["mean_rank"] <= rows[1]["mean_rank"]
    ranks = json.loads((tmp_path / "s" / "ranks.json").read_text())
    assert ranks["smallest"] == 0.5
    parts = sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert parts == ["1-partition=iid", "2-partition=dirichlet_0.1_clients=5"]
    page = (tmp_path / "s" / "report.html").read_text()
    for part in parts:
        assert f'href="{part}/report.html"' in page
        assert (tmp_path / "s" / part / "report.html").exists()
    before = (tmp_path / "s" / parts[1] / "fedavg-seed0" / "digest.txt").read_text()
    (tmp_path / "s" / parts[1] / "fedavg-seed0" / "digest.txt").unlink()
    resumed = consilience("resume", "s", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "s" / parts[1] / "fedavg-seed0" / "digest.txt").read_text() == before
    assert here("report", "s", cwd=tmp_path).returncode == 0


def test_files_of_federations_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "a,y\n" + "".join(f"{i},{i % 2}\n" for i in range(40))
    for name in ("north.csv", "south.csv", "old/north.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(rows)
    monkeypatch.chdir(tmp_path)
    settings = settle({"federations": ["data=north.csv,clients=4", {"data": "south.csv", "partition": "iid"}]})
    assert settings.federations[0] == {"data": str(tmp_path / "north.csv"), "clients": "4"}
    monkeypatch.chdir(tmp_path / "old")
    each = suite.parts(settings)
    assert list(each) == ["1-data=north.csv_clients=4", "2-data=south.csv_partition=iid"]
    assert [own.config.data for own in each.values()] == [str(tmp_path / f"{name}.csv") for name in ("north", "south")]
    same = suite.titles([{"data": str(tmp_path / "north.csv")}, {"data": str(tmp_path / "old" / "north.csv")}])
    assert same == [f"data={tmp_path / 'north.csv'}", f"data={tmp_path / 'old' / 'north.csv'}"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "85"], "an accuracy is at most 1"),
        (["--target", "much"], "--target 'much': a number above 0"),
        (["--tune", "0"], "--tune '0': a number from 1 on"),
        (["--tune", "2", "--split", "0.9,0,0.1"], "no client has any"),
        (["--federation", "partition=iid"], "give at least two"),
        (["--federation", "partition=iid", "--federation", "partition=iid"], "given twice"),
        (["--federation", "partiton=iid", "--federation", "clients=3"], "did you mean 'partition'"),
        (["--federation", "seed=1", "--federation", "clients=3"], "'seed' is no option of a federation"),
        (
            ["--federation", "clients=3", "--federation", "partition=natural:nobody"],
            "federation partition=natural:nobody:",
        ),
        (["--sensitive", "sex"], "no column 'sex' to be sensitive"),
    ],
)
def test_refusals_leave_nothing(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = here("compare", "fedavg", "local", *arguments, "--out", "no", cwd=tmp_path)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "no").exists()
