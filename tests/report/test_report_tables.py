"""A report's tables as files: what they hold is what the folder says, in every format."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from consilience import cli
from consilience.core.errors import ConfigError, DataError
from consilience.measure.board import board
from consilience.report.latex import escaped
from consilience.report.load import read_runs
from consilience.report.tables import tables, write_tables

Make = Callable[..., Path]


def asked(folder: Path, **more: object) -> Path:
    """A comparison's folder that was asked for more."""
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **more}))
    return folder


@pytest.fixture
def compared(make_compare: Make) -> Path:
    return asked(make_compare(["local", "fedavg", "scaffold"], 3), reference="fedavg", target=0.7)


def test_csv_is_what_the_folder_says(compared: Path) -> None:
    files = write_tables(compared, "csv")
    assert [f.name for f in files] == [
        f"{n}.csv" for n in ("leaderboard", "differences", "target", "history", "clients")
    ]
    assert {f.parent for f in files} == {compared / "tables"}
    found = {f.stem: pd.read_csv(f) for f in files}
    runs = read_runs(compared)
    rows = board(runs, reference="fedavg", target=0.7)

    best = found["leaderboard"].iloc[0]
    assert list(found["leaderboard"]["method"]) == [row["method"] for row in rows]
    assert best["accuracy"] == rows[0]["accuracy"]
    assert [best["accuracy_low"], best["accuracy_high"]] == rows[0]["accuracy_ci"]
    assert found["leaderboard"].set_index("method").loc["fedavg", "gain.of"] == 60
    assert found["leaderboard"].set_index("method")["gain.mean"].isna()["local"]

    held = found["differences"].set_index("method")
    assert set(held.index) == {"local", "scaffold"}
    scaffold = next(row for row in rows if row["method"] == "scaffold")
    assert held.loc["scaffold", "p_holm"] == scaffold["p_holm"]
    assert held.loc["scaffold", "difference_low"] == scaffold["difference_ci"][0]

    cost = found["target"].set_index(["method", "cost"])
    assert cost.loc[("scaffold", "rounds"), "median"] == scaffold["to_target"]["rounds"]["median"]

    history = found["history"]
    for run in runs:
        own = history[(history["method"] == run.label) & (history["seed"] == run.seed)]
        for line in run.history[::10]:
            at = own[own["round"] == line["round"]].set_index("measure")
            assert at.loc["clients.before.mean", "value"] == line["clients"]["before"]["mean"]
            assert set(at["bytes_up"]) == {line["bytes_up"]}
            assert ("global.accuracy" in at.index) == ("global" in line)
    spent = {"round", "wall_s", "virtual_s", "steps", "samples", "bytes_up", "bytes_down"}
    lines = [pd.json_normalize(line).iloc[0].dropna() for run in runs for line in run.history]
    numbers = sum(len(set(line.index) - spent) for line in lines)
    assert len(history) == numbers
    assert len(found["clients"]) == sum(len(run.clients) for run in runs)


def test_parquet_and_csv_hold_the_same(compared: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for one, other in zip(
        write_tables(compared, "csv", tmp_path / "c"), write_tables(compared, "parquet", tmp_path / "p"), strict=True
    ):
        assert other.suffix == ".parquet"
        pd.testing.assert_frame_equal(pd.read_csv(one), pd.read_parquet(other), check_dtype=False, rtol=1e-12)
    assert not (compared / "tables").exists()


def test_latex_reads_as_a_table(compared: Path) -> None:
    files = write_tables(compared, "latex")
    assert [f.name for f in files] == ["leaderboard.tex", "differences.tex"]
    for file in files:
        text = file.read_text("utf-8")
        assert text.isascii()
        columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
        assert columns
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns[1]) - 1}
        for part in ("\\toprule", "\\midrule", "\\bottomrule", "\\end{tabular}"):
            assert text.count(part) == 1
        assert not re.search(r"(?<!\\)[%#_]", "\n".join(rows))
    best = board(read_runs(compared))[0]
    assert f"{best['method']} & {100 * best['accuracy']:.1f}" in files[0].read_text()


def test_everything_is_escaped() -> None:
    assert escaped("fedprox:mu_x=1 & 5 %~^\\{}#$") == (
        r"fedprox:mu\_x=1 \& 5 \%\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\#\$"
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on PATH")
def test_latex_is_typeset(compared: Path, tmp_path: Path) -> None:
    inner = "".join(f"\\input{{{file.as_posix()}}}\n\n" for file in write_tables(compared, "latex"))
    page = tmp_path / "page.tex"
    page.write_text(
        f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{inner}\\end{{document}}\n"
    )
    done = subprocess.run(["pdflatex", "-halt-on-error", page.name], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_regression_and_one_run(make_compare: Make, make_run: Make) -> None:
    folder = make_compare(["fedavg", "scaffold"], 2, regression=True)
    found = tables(folder)
    assert found["leaderboard"][0]["loss_low"] < found["leaderboard"][0]["loss"]
    assert "Loss" in write_tables(folder, "latex")[0].read_text()
    alone = tables(make_run("fedavg"))
    assert [row["method"] for row in alone["leaderboard"]] == ["fedavg"]
    assert alone["differences"] == []


def test_several_federations(tmp_path: Path, make_compare: Make) -> None:
    one = make_compare(["fedavg", "scaffold"], 2)
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "compare.yaml").write_text(yaml.safe_dump({"federations": [{"clients": 20}, {"clients": 21}]}))
    for name in ("1-a", "2-b"):
        shutil.copytree(one, folder / name)
    ranks = {"order": ["scaffold", "fedavg"], "mean": {"scaffold": 1.0, "fedavg": 2.0}}
    ranks["ranks"] = {part: {"scaffold": 1.0, "fedavg": 2.0} for part in ("1-a", "2-b")}
    (folder / "ranks.json").write_text(json.dumps(ranks))
    found = tables(folder)
    assert len(found["leaderboard"]) == len(found["ranks"]) == 4
    for rows in (found["leaderboard"], found["history"]):
        assert {row["federation"] for row in rows} == {"1-a", "2-b"}
    text = write_tables(folder, "latex")[0].read_text()
    assert text.count("\\begin{tabular}") == 2
    assert "% federation 2-b" in text


def test_a_profile_has_its_own_tables(tmp_path: Path) -> None:
    term = {"value": 1.2, "low": 1.0, "high": 1.3, "max": 3.0}
    clients = [{"client": 0, "rows": 12, "position": [0.1, 0.2]}]
    (tmp_path / "profile.json").write_text(json.dumps({"bits": {"label_skew": term}, "clients": clients}))
    assert tables(tmp_path) == {"bits": [{"term": "label_skew", **term}], "clients": [{"client": 0, "rows": 12}]}
    with pytest.raises(DataError, match="nothing that goes into a latex table"):
        write_tables(tmp_path, "latex")


def test_refusals_write_nothing(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="one of csv, parquet, latex"):
        write_tables(compared, "excel")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'consilience\[parquet\]'"):
        write_tables(compared, "parquet")
    assert not (compared / "tables").exists()
    with pytest.raises(DataError):
        write_tables(tmp_path / "absent", "csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write_tables(compared, "csv", tmp_path / "file")


def test_the_command(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", str(compared), *arguments])
        return int(ended.value.code or 0)

    assert run("--format", "latex", "--out", str(tmp_path / "t")) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "t" / f"{n}.tex") for n in ("leaderboard", "differences")
    ]
    assert run("--out", str(tmp_path / "t")) == 2
    assert "--out goes with --format" in capsys.readouterr().err
    assert run("--format", "pdf") == 2
    assert capsys.readouterr().err == "consilience: --format pdf: one of csv, parquet, latex\n"


def test_rounds_that_are_best_on_validation_data(make_compare: Make) -> None:
    folder = make_compare(["local", "fedavg"], 2)
    assert pd.read_csv(write_tables(folder, "csv")[0])["best_round_low"].isna().all()
    for peak, seed in ((20, 0), (30, 1)):
        path = folder / f"fedavg-seed{seed}" / "history.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if "clients" in line:
                line["clients"]["valid"] = {"mean": 1 - abs(line["round"] - peak) / 100}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = pd.read_csv(write_tables(folder, "csv")[0]).set_index("method")
    assert [rows.loc["fedavg", f"best_round_{end}"] for end in ("low", "high")] == [20, 30]
    assert pd.isna(rows.loc["local", "best_accuracy"])
    assert "best_rounds" not in rows.columns
