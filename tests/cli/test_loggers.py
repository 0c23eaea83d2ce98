"""Histories passed on to TensorBoard, MLflow and Weights & Biases: the real libraries, read back by their readers."""

from __future__ import annotations

import json
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consilience import cli, experiment
from consilience.config import LOGGERS, settle
from consilience.core.errors import ConfigError
from consilience.folder import read_lines
from consilience.loggers import NEEDS, check, logging_to, numbers

SMALL = {"model": "mlp:8", "clients": "4", "rounds": "6", "eval_clients_every": "3", "checkpoint_every": "2"}
SMALL |= {"executor": "serial", "fleet": "phones", "lr": "0.1"}
FEDAVG = {"label": "fedavg", "seed": 0, "options": {"lr": 0.1}}


def spec(**more: Any) -> experiment.RunSpec:
    (found,) = experiment.specs(settle({**SMALL, **more}), ["fedavg"])
    return found


def need(name: str) -> None:
    for module in NEEDS[name]:
        pytest.importorskip(module)


def steps_of(name: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a tool's own reader finds: (step, value) by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"tensorboard": _from_tensorboard, "mlflow": _from_mlflow, "wandb": _from_wandb}[name](folder)


def _from_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag.replace("/", "."): [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def _from_mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("consilience").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "fedavg-seed0"
    assert run.data.params["options.lr"] == "0.1"
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics
    }


def _from_wandb(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, dict[int, float]] = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        records: list[Any] = []
        until = time.monotonic() + 60
        while not (records and records[-1].HasField("exit")):  # wandb's service writes on after finish() has returned
            assert time.monotonic() < until, "the record never ended"
            records = [Record.FromString(data) for data in _records(file.read_bytes())]
        for record in records:
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                if not key.startswith("_"):
                    found.setdefault(key, {})[record.history.step.num] = value
    return {key: sorted(of.items()) for key, of in found.items()}


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log of the LevelDB format: blocks of 32 KiB with pieces of (checksum, length, kind)."""
    at, held = 7, b""  # after the file's own head, which counts as part of the first block
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


@pytest.mark.parametrize("name", LOGGERS)
def test_every_line_arrives(name: str, tmp_path: Path) -> None:
    need(name)
    lines = [
        {"round": r, "bytes_up": 10 * r, "wall_s": r / 2, "virtual_s": 0.0, "samples": r, "global": {"accuracy": r / 8}}
        for r in range(4)
    ]
    lines[2]["clients"] = {"mean": 0.5, "before": {"mean": None}}
    with logging_to([name], tmp_path, FEDAVG) as log:
        assert not list(tmp_path.iterdir())  # a run that is refused leaves nothing
        for line in lines:
            log(line)
    found = steps_of(name, tmp_path)
    assert found["global.accuracy"] == [(r, r / 8) for r in range(4)]
    assert found["bytes_up"] == [(r, 10 * r) for r in range(4)]
    assert found["clients.mean"] == [(2, 0.5)]
    assert set(found) == {"global.accuracy", "bytes_up", "wall_s", "virtual_s", "samples", "clients.mean"}


@pytest.mark.parametrize("name", LOGGERS)
def test_no_digest_depends_on_a_logger_and_a_resumed_run_tells_once(name: str, tmp_path: Path) -> None:
    need(name)
    plain = experiment.execute(spec(), tmp_path / "plain")
    logged = spec(log=name)

    def stop(line: dict[str, Any]) -> None:
        if line["round"] == 5:  # the last checkpoint is of round 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.execute(logged, tmp_path / "logged", on_line=stop)
    result = experiment.execute(logged, tmp_path / "logged", resume=True)
    assert (tmp_path / "logged" / "digest.txt").read_text() == (tmp_path / "plain" / "digest.txt").read_text()
    assert result.digest == plain.digest
    found = steps_of(name, tmp_path / "logged")
    lines = [(line["round"], numbers(line)) for line in read_lines(tmp_path / "logged" / "history.jsonl")]
    assert [step for step, _ in lines] == list(range(1, 7))
    assert {key for _, of in lines for key in of} == set(found)
    for key, of in found.items():
        told = [(step, values[key]) for step, values in lines if key in values]
        assert [step for step, _ in of] == [step for step, _ in told], key
        if key != "wall_s":
            assert [value for _, value in of] == pytest.approx([value for _, value in told], rel=1e-6)


def test_a_comparison_logs_each_run_in_its_folder(tmp_path: Path) -> None:
    need("tensorboard")
    options = {**SMALL, "seeds": "2", "workers": "2", "executor": "auto"}
    for log in ([], ["tensorboard"]):
        settings = settle({**options, "log": log})
        folder = tmp_path / f"with{len(log)}"
        experiment.compare(settings, ["fedavg", "local"], folder, command="x", on_line=lambda label, line: None)
    for run in sorted((tmp_path / "with1").glob("*-seed*")):
        assert max(steps_of("tensorboard", run)["samples"])[0] == 6
        assert (run / "digest.txt").read_text() == (tmp_path / "with0" / run.name / "digest.txt").read_text()


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_extra_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    command = ["run", "fedavg", "--rounds", "1", "--model", "mlp:8", "--executor", "serial", "--log", name]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--out", "one"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"consilience: --log {name}: pip install 'consilience[{name}]'\n"
    assert not (tmp_path / "one").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sqlalchemy").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in [m for m in sys.modules if m.partition(".")[0] in ("sqlalchemy", "mlflow", "alembic", "wandb")]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "wandb").mkdir()
    with pytest.raises(ConfigError, match=r"consilience\[wandb\]"):
        check(["wandb"])


def test_an_unknown_logger_is_refused() -> None:
    with pytest.raises(ConfigError, match="no logger 'tensorbord'; did you mean 'tensorboard'"):
        settle({"log": "tensorbord,wandb"})
    assert settle({"log": "wandb,mlflow,wandb"}).config.log == ["wandb", "mlflow"]
