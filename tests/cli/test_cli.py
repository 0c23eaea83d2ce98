"""The command line as a user has it: child processes, their exit codes, what they print and what they leave."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command import consilience, here
from safetensors.torch import load_file

from consilience import cli, experiment, plan, simulate
from consilience.config import Config
from consilience.core.messages import ClientInfo

SMALL = ["--model", "mlp:16", "--rounds", "3", "--workers", "2"]
ALONE = ["--model", "mlp:16", "--rounds", "3", "--executor", "serial"]
"""The same run, without processes of its own."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run and one finished comparison."""
    where = tmp_path_factory.mktemp("cli")
    done = consilience("run", "scaffold", *SMALL, "--partition", "dirichlet:0.3", "--out", "one", cwd=where)
    assert done.returncode == 0, done.stderr
    names = ["local", "fedavg", "fedprox:mu=0.1", "centralised"]
    done = consilience("compare", *names, *SMALL, "--seeds", "2", "--unseen", "0.2", "--out", "many", cwd=where)
    assert done.returncode == 0, done.stderr
    assert "report: many/report.html" in done.stdout
    return where


def test_help_and_version(tmp_path: Path) -> None:
    shown = consilience("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in ("run", "compare", "methods", "plan", "report", "resume", "digest", "predict", "export"):
        assert command in shown.stdout
    assert consilience("--version", cwd=tmp_path).stdout.startswith("0.")
    options = consilience("run", "--help", cwd=tmp_path).stdout
    assert "--partition" in options
    assert "--batch-size" in options


@pytest.mark.parametrize("command", ["run", "compare", "plan", "predict", "export"])
def test_help_tells_of_arguments_once_and_as_written(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "\\" not in shown
    words = {"run": "METHOD:key=value", "compare": "METHOD:key=value", "plan": "METHOD:key=value"}
    assert shown.count(words.get(command, "FOLDER  a ")) == 1
    assert command == "compare" or shown.count("[required]") == (2 if command == "predict" else 1)


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    code = "import sys, consilience.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_a_runs_files(place: Path) -> None:
    one = place / "one"
    names = {path.name for path in one.iterdir()}
    assert {"config.yaml", "partition.json", "history.jsonl", "clients.jsonl", "checkpoint", "report.html"} <= names
    lines = [json.loads(line) for line in (one / "history.jsonl").read_text().splitlines()]
    keys = {"round", "wall_s", "virtual_s", "bytes_up", "bytes_down", "samples", "global"}
    assert all(keys <= line.keys() for line in lines)
    assert {"accuracy", "loss"} <= lines[-1]["global"].keys()
    assert {"mean", "worst10", "std", "jain", "before", "after"} <= lines[-1]["clients"].keys()
    config = yaml.safe_load((one / "config.yaml").read_text())
    assert config["method"] == "scaffold"
    assert config["partition"] == "dirichlet:0.3"


def test_a_comparisons_files(place: Path) -> None:
    board = json.loads((place / "many" / "leaderboard.json").read_text())
    keys = {"method", "metric", "accuracy", "accuracy_ci", "clients_mean", "worst10", "bytes", "wall_s", "virtual_s"}
    assert all(keys <= row.keys() and row["seeds"] == 2 for row in board)
    assert {row["metric"] for row in board} == {"clients.mean"}
    assert [row["accuracy"] for row in board] == sorted((row["accuracy"] for row in board), reverse=True)
    assert {row["method"] for row in board} == {"local", "fedavg", "fedprox:mu=0.1", "centralised"}
    last = json.loads((place / "many" / "fedavg-seed1" / "history.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["unseen"]["mean"] <= 1
    assert (place / "many" / "report.html").stat().st_size > 10_000


def test_a_method_combined_otherwise_is_a_run_like_any(place: Path) -> None:
    options = ["--weights", "fedce", "--aggregator", "trimmed:0.1", "--partition", "dirichlet:0.3"]
    done = here("run", "fedprox", *ALONE, *options, "--out", "ruled", cwd=place)
    assert done.returncode == 0, done.stderr
    assert here("digest", "ruled", cwd=place).stdout == (place / "ruled" / "digest.txt").read_text()
    for command in (["resume", "ruled"], ["predict", "ruled", "digits"], ["export", "ruled"], ["report", "ruled"]):
        done = here(*command, cwd=place)
        assert done.returncode == 0, (command, done.stderr)
    refused = here("run", "fedlex", "--weights", "ida", "--out", "no", cwd=place)
    assert refused.returncode == 2
    assert "weighs clients in its own way" in refused.stderr
    assert not (place / "no").exists()


def test_digest_is_the_same_on_any_executor(place: Path) -> None:
    expected = here("digest", "one", cwd=place).stdout
    assert [line.split()[0] for line in expected.splitlines()] == ["server", "clients", "history"]
    assert expected == (place / "one" / "digest.txt").read_text()
    config = place / "again.yaml"
    config.write_text("model: mlp:16\nrounds: 3\npartition: dirichlet:0.3\nexecutor: serial\n")
    done = here("run", "scaffold", "--config", str(config), "--out", "again", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "\n".join(json.loads(done.stdout)["digest"]) + "\n" == expected


def test_partition_file_makes_the_same_federation(place: Path) -> None:
    done = here("run", "scaffold", *ALONE, "--partition", "one/partition.json", "--out", "filed", cwd=place)
    assert done.returncode == 0, done.stderr
    assert here("digest", "filed", cwd=place).stdout == here("digest", "one", cwd=place).stdout


def test_resume_after_a_kill(place: Path) -> None:
    more = ["--checkpoint-every", "1", "--partition", "dirichlet:0.3", "--out", "killed"]
    killed = consilience("run", "scaffold", *SMALL, *more, cwd=place, env={"CONSILIENCE_FAILPOINT": "aggregate:3"})
    assert killed.returncode == -9
    unfinished = here("digest", "killed", cwd=place)
    assert unfinished.returncode == 2
    assert "2 of 3 rounds" in unfinished.stderr
    resumed = here("resume", "killed", cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    assert here("digest", "killed", cwd=place).stdout == here("digest", "one", cwd=place).stdout


def test_resume_a_comparison(place: Path) -> None:
    arguments = ["compare", "fedavg", "scaffold", *ALONE, "--out", "halves"]
    whole = here(*arguments, cwd=place)
    assert whole.returncode == 0, whole.stderr
    before = (place / "halves" / "leaderboard.json").read_text()
    (place / "halves" / "scaffold-seed0" / "digest.txt").unlink()
    (place / "halves" / "leaderboard.json").unlink()
    resumed = here("resume", "halves", cwd=place)
    assert resumed.returncode == 0, resumed.stderr
    rows = [
        [{k: v for k, v in row.items() if k != "wall_s"} for row in json.loads(text)]
        for text in (before, (place / "halves" / "leaderboard.json").read_text())
    ]
    assert rows[0] == rows[1]


def test_side_by_side_after_threads_have_run_in_the_parent(tmp_path: Path) -> None:
    """Rows enough that pooling them uses several threads, in the parent's check and again in each forked run."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "big.npz", x=rng.normal(size=(9000, 32)).astype(np.float32), y=np.arange(9000) % 2)
    done = consilience(
        "compare", "centralised", "--data", "big.npz", "--clients", "2", "--seeds", "2", *SMALL, "--out", "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_methods_and_cards(tmp_path: Path) -> None:
    listed = json.loads(here("methods", "--json", cwd=tmp_path).stdout)
    keys = {"name", "family", "summary", "source", "year", "needs", "schedule", "options", "confidence"}
    assert all(keys <= card.keys() for card in listed)
    assert "scaffold" in {card["name"] for card in listed}
    for card in listed:  # equations stand apart by four spaces, all else at the margin
        lines = card["text"].splitlines()
        indents = {len(line) - len(line.lstrip()) for line in lines if line}
        assert not indents & {1, 2, 3}, card["name"]
        assert any(line.startswith(("Source:", "Sources:")) for line in lines) or card["family"] == "baseline", card[
            "name"
        ]
    shown = here("methods", "scaffold", cwd=tmp_path).stdout
    assert "c_i+ = c_i - c + (x - y_i) / (K_i eta)" in shown
    assert "Karimireddy" in shown


def test_plan_knows_the_bytes(place: Path) -> None:
    planned = here("plan", "scaffold", *SMALL, "--partition", "dirichlet:0.3", "--json", cwd=place)
    (row,) = json.loads(planned.stdout)
    last = json.loads((place / "one" / "history.jsonl").read_text().splitlines()[-1])
    assert (row["bytes_up"], row["bytes_down"]) == (last["bytes_up"], last["bytes_down"])
    assert 0 <= row["seconds"] <= row["seconds_high"]
    assert row["memory"] > 0


def test_plan_counts_judgements() -> None:
    config = Config(rounds=10, clients=7, eval_every=3, eval_clients_every=4, model="mlp:16")
    spec = experiment.RunSpec("fedavg", "fedavg", {}, config)
    worker = experiment.check(spec, experiment.make_federation(config))
    server, info = worker.method.init_server(worker.host(0, "init")), ClientInfo(0, worker.federation.size(0), "", {})
    times = [n for n, _ in plan._judging(worker, server, config, info)]
    assert times == [4, 2 * 7, 7]  # of one chunk in rounds 3, 6, 9, 10; of clients in 4, 8; after training, in 10


@pytest.mark.parametrize(
    ("method", "options", "more"),
    [
        ("fedavg", {"then": "ccvr"}, {}), ("finalmerge", {}, {"topology": "none"}), ("fedmd", {}, {"public": 20}),
        ("fedlex", {}, {}), ("fedavg", {"selection": "curriculum:2"}, {}),
    ],
    ids=["end", "merge and take", "two phases", "start", "chosen"],
)  # fmt: skip
def test_plan_counts_every_phase(method: str, options: dict[str, Any], more: dict[str, Any]) -> None:
    config = Config(**{"rounds": 3, "clients": 4, "model": "mlp:8", "executor": "serial", **more})
    spec = experiment.RunSpec(method, method, options, config)
    federation = experiment.make_federation(config)
    row = plan._row(spec, experiment.check(spec, federation))
    found = experiment.trial(spec, federation).history[-1]
    assert (row["bytes_down"], row["bytes_up"]) == (found["bytes_down"], found["bytes_up"])


@pytest.mark.parametrize(
    ("method", "schedule", "options", "jobs"),
    [
        ("fedavg", None, {}, 4),
        ("fedavg", "rounds", {"participation": 0.5}, 4),
        ("fedavg", "async", {}, 1),
        ("fedasync", None, {}, 1),
        ("fedavg", "buffered:3", {}, 3),
        ("fedbuff", None, {}, 2),
        ("fedavg", "tiered:2", {}, 2),
        ("fedavg", "deadline:1000", {"over_selection": 1.5}, 6),
    ],
)
def test_plan_counts_the_jobs_of_an_update(
    method: str, schedule: str | None, options: dict[str, Any], jobs: int
) -> None:
    own = {"buffer": 2} if method == "fedbuff" else {}
    config = Config(clients=8, rounds=6, model="mlp:16", schedule=schedule, **{"participation": 4, **options})
    spec = experiment.RunSpec(method, method, own, config)
    federation = experiment.make_federation(config)
    worker = experiment.check(spec, federation)
    row = plan._row(spec, worker)
    assert row["cohort"] == jobs
    result = simulate.run(
        worker.method, federation, model="mlp:16", rounds=6, schedule=schedule,
        executor="serial", eval_clients_every=0, **{"participation": 4, **options},
    )  # fmt: skip
    moved, one = result.history[-1]["bytes_up"], row["bytes_up"] // (6 * jobs)
    if worker.method.schedule == "rounds" and schedule in (None, "rounds", "tiered:2", "deadline:1000"):
        assert row["bytes_up"] == moved
    else:  # replies that came with the last one that was combined
        assert row["bytes_up"] <= moved < row["bytes_up"] + 4 * one


def test_predict_and_export(place: Path) -> None:
    predicted = here("predict", "one", "digits", cwd=place)
    assert predicted.returncode == 0, predicted.stderr
    rows = list(csv.reader(io.StringIO(predicted.stdout)))
    assert rows[0] == ["predicted", *(f"p_{c}" for c in range(10))]
    last = json.loads((place / "one" / "history.jsonl").read_text().splitlines()[-1])
    assert f"accuracy {last['global']['accuracy']:.4f} on {len(rows) - 1} rows" in predicted.stderr
    exported = here("export", "one", "--out", "model", cwd=place)
    assert exported.returncode == 0, exported.stderr
    tensors = load_file(place / "model" / "model.safetensors")
    assert tensors["head.weight"].shape == (10, 16)
    own = here("run", "fedavg", *ALONE, "--init", "model/model.safetensors", "--out", "warm", cwd=place)
    assert own.returncode == 0, own.stderr
    mine = here("export", "many/local-seed0", "--client", "3", "--out", "mine", cwd=place)
    assert mine.returncode == 0, mine.stderr
    none = here("export", "many/local-seed0", "--out", "none", cwd=place)
    assert none.returncode == 2
    assert "has no global model" in none.stderr


TABLE = "age,colour,verdict\n" + "".join(
    f"{i % 50},{'red' if i % 3 else 'blue'},{'yes' if i % 3 else 'no'}\n" for i in range(120)
)
NET = """
import torch


def net(shape, outputs):
    return torch.nn.Linear(shape[0], outputs)
"""


def test_a_run_on_a_file_works_from_anywhere(tmp_path: Path) -> None:
    """Data and first weights given by relative paths; then resume, predict and export from another folder."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "cases.csv").write_text(TABLE)
    small = ["--data", "cases.csv", "--clients", "3", "--model", "logistic", "--rounds", "2", "--executor", "serial"]
    first = here("run", "fedavg", *small, "--out", "first", cwd=home)
    assert first.returncode == 0, first.stderr
    assert here("export", "first", "--out", ".", cwd=home).returncode == 0
    again = [*small, "--init", "model.safetensors", "--partition", "first/partition.json", "--out", "again"]
    killed = consilience("run", "fedavg", *again, cwd=home, env={"CONSILIENCE_FAILPOINT": "aggregate:2"})
    assert killed.returncode == -9
    resumed = here("resume", "../home/again", cwd=away)
    assert resumed.returncode == 0, resumed.stderr
    predicted = here("predict", "../home/again", "../home/cases.csv", cwd=away)
    assert predicted.returncode == 0, predicted.stderr
    rows = list(csv.DictReader(io.StringIO(predicted.stdout)))
    right = sum(row["predicted"] == ("yes" if i % 3 else "no") for i, row in enumerate(rows)) / 120
    assert predicted.stderr == f"accuracy {right:.4f} on 120 rows\n"
    unlabelled = TABLE.replace("verdict", "label").replace(",yes", ",").replace(",no", ",maybe", 1)
    (away / "new.csv").write_text(unlabelled)  # of 40 rows with a label, 1 is of no class
    predicted = here("predict", "../home/again", "new.csv", cwd=away)
    rows = list(csv.DictReader(io.StringIO(predicted.stdout)))
    right = sum(row["predicted"] == "no" for row in rows[3::3]) / 40
    assert predicted.stderr == f"accuracy {right:.4f} on 40 rows\n"


def test_predict_reads_arrays_as_a_run_does(tmp_path: Path) -> None:
    """Bytes are scaled, and labels that are not 0, 1, ... are numbered, in both."""
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=200)
    x = (40 + 90 * y[:, None] + rng.integers(60, size=(200, 4))).astype(np.uint8)
    np.savez(tmp_path / "train.npz", x=x[:150], y=3 * y[:150] + 2, x_test=x[150:], y_test=3 * y[150:] + 2)
    np.savez(tmp_path / "new.npz", x=x[150:], y=3 * y[150:] + 2)
    small = ["--data", "train.npz", "--clients", "3", "--model", "logistic", "--rounds", "3", "--executor", "serial"]
    assert here("run", "fedavg", *small, "--out", "run", cwd=tmp_path).returncode == 0
    last = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    predicted = here("predict", "run", "new.npz", cwd=tmp_path)
    assert predicted.stderr == f"accuracy {last['global']['accuracy']:.4f} on 50 rows\n"
    assert {row["predicted"] for row in csv.DictReader(io.StringIO(predicted.stdout))} <= {"2", "5"}


def test_ones_own_model_is_found_beside_one(tmp_path: Path) -> None:
    """As installed: the command's own folder is searched first, not the current one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "consilience").write_text("from consilience.cli import main\nmain()\n")
    (tmp_path / "mymod.py").write_text(NET)
    command = [sys.executable, "bin/consilience", "run", "fedavg", "--model", "mymod:net", "--data", "quadratic"]
    command += ["--rounds", "1", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_comparison_is_no_run_but_has_some(place: Path) -> None:
    for command in (["digest", "many"], ["predict", "many", "digits"], ["export", "many"]):
        done = here(*command, cwd=place)
        assert done.returncode == 2
        assert done.stderr.startswith("consilience: many is a comparison; name one of its runs: centralised-seed0, ")
        assert done.stderr.count("\n") == 1


REFUSED: list[tuple[list[str], str]] = [
    (["run", "fedagv"], "unknown method 'fedagv'; did you mean 'fedavg'?"),
    (["run", "fedavg", "--roundz", "3"], "did you mean '--rounds'?"),
    (["run", "fedavg", "--mu_b", "1"], "no option '--mu_b' of run or fedavg; fedasmu has it\n"),
    (["run", "fedavg", "--xyzzy", "1"], "no option '--xyzzy' of run or fedavg\n"),
    (["compare", "local", "fedavg:mu_b=1"], "fedavg has no option 'mu_b'; fedasmu has it\n"),
    (
        ["compare", "fedavg", "--mu_b", "1"],
        "no option '--mu_b' of compare; fedasmu has it (write METHOD:mu_b=VALUE)\n",
    ),
    (["compare", "fedavg", "--roundz", "1"], "no option '--roundz' of compare; did you mean '--rounds'?\n"),
    (["run", "fedprox", "--mu", "-1"], "mu='-1'"),
    (["run", "fedprox:mu=x"], "mu='x'"),
    (["run", "fedavg", "--rounds", "0"], "--rounds '0'"),
    (["run", "fedavg", "--lr", "fast"], "lr='fast'"),
    (["run", "fedavg", "--clients", "100000"], "at most 1438 clients"),
    (["run", "fedavg", "--data", "no.csv"], "no.csv"),
    (["run", "fedavg", "--data", "digitz"], "did you mean 'digits'?"),
    (["run", "fedavg", "--partition", "dirichlet:-1"], "dirichlet"),
    (["run", "fedavg", "--model", "lenet"], "lenet"),
    (["run", "fedavg", "--model", "nothing.here:factory"], "nothing"),
    (["run", "fedavg", "--models", "mlp*0.5,logistic*0.5"], "methods that fit it: local"),
    (["run", "fedavg", "--split", "0.5,0.1,0.1"], "split"),
    (["run", "fedavg", "--participation", "1.5"], "participation"),
    (["run", "fedavg", "--config", "no.yaml"], "no.yaml: no such file"),
    (["run", "fedavg", "--optimizer", "sgdd"], "optimizer 'sgdd'"),
    (["run", "fedavg", "--init", "no.safetensors"], "no.safetensors"),
    (["run", "scaffold:control=3"], "control='3'"),
    (["compare", "fedavg", "fedavg"], "given twice"),
    (["compare"], "name the methods"),
    (["run", "fedavg", "--split", "0.5,0.5"], "split"),
    (["digest", "nowhere"], "nowhere"),
    (["resume", "nowhere"], "nowhere"),
    (["report", "nowhere"], "nowhere"),
    (["predict", "nowhere", "digits"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_refused_in_one_line_and_nothing_left(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:  # in this process: starting torch forty times would take minutes
        cli.main(arguments)
    shown = capsys.readouterr()
    assert left.value.code == 2, shown
    assert words in shown.err
    assert shown.err.startswith("consilience: ")
    assert len(shown.err.strip().splitlines()) <= 3
    assert not shown.out
    assert not list(tmp_path.iterdir())


def test_refusal_of_a_child_process(tmp_path: Path) -> None:
    done = consilience("run", "fedagv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "consilience: unknown method 'fedagv'; did you mean 'fedavg'?\n"


def test_unknown_key_in_a_file_names_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rouns: 3\n")
    done = here("run", "fedavg", "--config", "run.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "run.yaml: unknown option 'rouns'; did you mean 'rounds'?" in done.stderr


def test_bad_data_is_refused(tmp_path: Path) -> None:
    x = np.zeros((100, 3), np.float32)
    x[7, 1] = np.nan
    np.savez(tmp_path / "bad.npz", x=x, y=np.arange(100) % 2)
    done = here("run", "fedavg", "--data", "bad.npz", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "7" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_run_is_not_overwritten(place: Path) -> None:
    before = (place / "one" / "history.jsonl").read_bytes()
    done = here("run", "fedavg", *SMALL, "--out", "one", cwd=place)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert (place / "one" / "history.jsonl").read_bytes() == before


def test_other_things_in_the_way_of_out(place: Path, tmp_path: Path) -> None:
    before = (place / "many" / "report.html").read_bytes()
    done = here("run", "fedavg", *SMALL, "--out", "many", cwd=place)
    assert done.returncode == 2
    assert (place / "many" / "report.html").read_bytes() == before
    (tmp_path / "file").touch()
    done = here("run", "fedavg", *SMALL, "--out", "file", cwd=tmp_path)
    assert done.returncode == 2
    assert "is a file" in done.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "consilience.cli", "run", "fedavg", "--rounds", "100000", "--out", "long"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whoever runs in the background ignores Ctrl-C
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    ) as child:
        history = tmp_path / "long" / "history.jsonl"
        for _ in range(600):
            if history.exists() and history.stat().st_size > 5000:
                break
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        try:
            _, shown = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 1
    assert shown.strip() == "consilience: interrupted; `consilience resume FOLDER` goes on"


def test_a_regressions_scores_are_no_per_cent(tmp_path: Path) -> None:
    done = consilience("run", "fedavg", "--data", "quadratic", "--model", "logistic", "--rounds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "%" not in done.stdout.replace("Worst 10 %", "")


def test_a_clients_failure_shows_where(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\nclass Bad(torch.nn.Module):\n"
        "    def __init__(self, shape, outputs):\n        super().__init__()\n"
        "        self.inner = torch.nn.Linear(64, outputs)\n\n"
        "    def forward(self, x):\n        raise RuntimeError('no such luck')\n"
    )
    done = consilience(
        "run", "fedavg", "--model", "mine:Bad", "--out", "out", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 1
    assert "client 0, round 1, phase train, in client_update: RuntimeError: no such luck" in done.stderr
    assert "mine.py" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_damaged_checkpoints(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place / "one", tmp_path / "one")
    for path in (tmp_path / "one" / "checkpoint").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    done = here("digest", "one", cwd=tmp_path)
    assert done.returncode == 2
    assert "no whole checkpoint" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_a_line(tmp_path: Path) -> None:
    where: Any = tmp_path / "out"
    code = (
        "import pathlib, sys\n"
        "from consilience import cli, folder\n"
        "real = pathlib.Path.open\n"
        "def full(self, mode='r', *a, **k):\n"
        "    instead = self.name == 'history.jsonl' and 'a' in mode\n"
        "    return real(pathlib.Path('/dev/full') if instead else self, mode, *a, **k)\n"
        "pathlib.Path.open = full\n"
        f"cli.main(['run', 'fedavg', '--rounds', '2', '--executor', 'serial', '--out', {str(where)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert consilience("resume", "out", cwd=tmp_path).returncode == 0
