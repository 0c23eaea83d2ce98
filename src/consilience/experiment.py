"""From a configuration to runs on disk: one, or methods x seeds side by side."""

from __future__ import annotations

import datetime as dt
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from consilience.config import Config, Settings, parse_method, read_yaml, settle
from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError, nearest

OnLine = Callable[[str, dict[str, Any]], None]
"""Called with a run's label and each line of its history."""


@dataclass(frozen=True)
class RunSpec:
    """One run: a method with its own options, a seed, and everything else."""

    label: str
    method: str
    options: Mapping[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """Its folder in a comparison, and its name in the progress display."""
        return f"{re.sub(r'[^A-Za-z0-9._=-]+', '_', self.label)}-seed{self.config.seed}"

    def file(self, command: str) -> dict[str, Any]:
        """What config.yaml says."""
        from consilience.folder import versions

        flat = {**Settings(self.config, {}).flat(), "out": None, "seeds": 1}
        return {
            "method": self.method,
            "label": self.label,
            "options": dict(self.options),
            **flat,
            "command": command,
            "versions": versions(),
        }


def specs(settings: Settings, names: Sequence[str]) -> list[RunSpec]:
    """A run for each method and seed, checked: methods exist, options are right, nothing is asked for twice."""
    from consilience import methods

    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"method '{twice}' is given twice")
    if settings.reference is not None and settings.reference not in names:
        raise ConfigError(
            f"reference '{settings.reference}' is not among the methods{nearest(settings.reference, names)}"
        )
    found = []
    for text in names:
        name, own = parse_method(text)
        options = {**settings.training, **own}
        made = methods.make(name, options)
        options = {key: getattr(made, key.removeprefix("base.")) for key in options}
        for k in range(settings.config.seeds):
            config = settings.config.model_copy(update={"seed": settings.config.seed + k, "seeds": 1})
            found.append(RunSpec(text, name, options, config))
    return found


def make_federation(config: Config) -> Any:
    """The federation of a configuration."""
    from consilience.data.datasets import make_federation as make

    return make(
        config.data,
        clients=config.clients,
        partition=config.partition,
        split=config.split,
        public=config.public,
        unseen=config.unseen,
        sensitive=config.sensitive,
        seed=config.seed,
    )


def _arguments(spec: RunSpec, federation: Any) -> dict[str, Any]:
    """The arguments that :func:`consilience.simulate.prepare` and ``run`` share."""
    config = spec.config
    init = None
    if config.init is not None:
        from consilience.architectures import resolve
        from consilience.exporting import read_weights

        init = read_weights(Path(config.init), resolve(config.model, federation, config.feature_dim))
    return {
        "model": config.model,
        "models": config.models,
        "feature_dim": config.feature_dim,
        "topology": config.topology,
        "mixing": config.mixing,
        "seed": config.seed,
        "attack": config.attack,
        "init": init,
    }


def _timing(config: Config) -> dict[str, Any]:
    """The arguments of ``run`` that say who is when where."""
    keys = (
        "fleet", "fleet_correlation", "availability", "drops", "schedule", "concurrency", "over_selection", "late",
    )  # fmt: skip
    clock = None
    if config.replay is not None:
        from consilience.fleet.real import Replay

        clock = Replay(config.replay)
    return {**{key: getattr(config, key) for key in keys}, "clock": clock}


def _privacy(config: Config) -> Any:
    """What is to be private."""
    from consilience.privacy.options import Privacy

    return Privacy.of(config.model_dump())


def _devices(config: Config) -> dict[str, Any]:
    """The arguments of ``prepare`` that say who has which device."""
    return {"fleet": config.fleet, "fleet_correlation": config.fleet_correlation}


def check(spec: RunSpec, federation: Any) -> Any:
    """Refuse what cannot run, before anything is written; returns the worker, for planning."""
    from consilience import loggers, methods
    from consilience.core.events import cohort_size
    from consilience.measure import adversarial
    from consilience.simulate import prepare, timing

    loggers.check(spec.config.log)
    if spec.config.address is not None and spec.config.executor != "ray":
        raise ConfigError("--address goes with --executor ray")
    config, privacy = spec.config, _privacy(spec.config)
    privacy.check(spec.options)
    method = privacy.method(methods.make(spec.method, spec.options))
    worker = prepare(method, federation, **_arguments(spec, federation), **_devices(config))
    _, schedule = timing(worker, participation=config.participation, **_timing(config))
    cohort, always = cohort_size(config.participation, federation.n_seen), config.availability == "always"
    privacy.release(worker, schedule, rounds=config.rounds, cohort=cohort, available=always)
    if adversarial.parse(config.robustness) is not None:
        adversarial.check(worker)
    return worker


def execute(
    spec: RunSpec,
    folder: Path,
    *,
    command: str = "",
    resume: bool = False,
    executor: str | None = None,
    federation: Any = None,
    on_line: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Do one run and return its Result. federation: the configuration's, if it has been made already."""
    from consilience import methods
    from consilience.loggers import logging_to
    from consilience.simulate import cluster, run

    config = spec.config
    federation = federation or make_federation(config)
    where = executor or config.executor
    address = config.address if where == "ray" else None
    with cluster(where, address, config.workers), logging_to(config.log, folder, spec.file(command)) as log:

        def told(line: dict[str, Any]) -> None:
            log(line)
            if on_line is not None:
                on_line(line)

        return run(
            methods.make(spec.method, spec.options),
            federation,
            **_arguments(spec, federation),
            rounds=config.rounds,
            participation=config.participation,
            **_timing(config),
            privacy=_privacy(config),
            robustness=config.robustness,
            eval_every=config.eval_every,
            eval_clients_every=config.eval_clients_every,
            eval_clients=config.eval_clients,
            checkpoint_every=config.checkpoint_every,
            executor=where,
            workers=config.workers,
            address=address,
            client_state_memory=config.client_state_memory,
            out=folder,
            resume=resume,
            config=spec.file(command),
            on_line=told,
        )


def trial(spec: RunSpec, federation: Any) -> Any:
    """A run that leaves nothing behind and judges as little as the loop allows; returns its Result."""
    from consilience import methods
    from consilience.simulate import run

    config = spec.config
    return run(
        methods.make(spec.method, spec.options),
        federation,
        **_arguments(spec, federation),
        rounds=config.rounds,
        participation=config.participation,
        **_timing(config),
        privacy=_privacy(config),
        eval_every=config.rounds,
        eval_clients_every=0,
        eval_clients=1,
        executor=config.executor,
        workers=config.workers,
        address=config.address,
    )


def compare(
    settings: Settings,
    names: Sequence[str],
    folder: Path,
    *,
    command: str,
    on_line: OnLine,
    tell: Callable[[str], None] = lambda text: None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Run every method with every seed, write leaderboard.json and report.html, and return the leaderboard.

    With at least as many runs as workers, whole runs go side by side, each in a process of its own (with ray: on a CPU
    of the cluster); otherwise one after another, each over all workers. The results are the same bits either way.
    tell: called with a sentence about every trial where methods are tuned first.
    """
    runs = specs(settings, names)
    if not resume:
        free(folder)
        check_all(settings, runs)
    with on_cluster(settings.config):
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
            record(settings, names, folder, command)
        if settings.tune is not None:
            from consilience.tuning import tune

            runs = tune(runs, settings.tune, folder, tell)
        _run_all([spec for spec in runs if not (folder / spec.name / "digest.txt").exists()], folder, command, on_line)
    return conclude(folder)


def on_cluster(config: Config) -> AbstractContextManager[None]:
    """Inside, what the configuration's executor runs on is there. Raises ConfigError."""
    from consilience.simulate import cluster

    return cluster(config.executor, config.address, config.workers)


def free(folder: Path) -> None:
    """Refuse a folder that something may not be written into: a file, or a folder that is not empty."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; --out wants a folder")
    if folder.exists() and any(folder.iterdir()):
        more = ", or resume it" if (folder / "compare.yaml").exists() else ""
        raise ConfigError(f"{folder} is not empty; give another --out{more}")


def profile(config: Config, folder: Path, *, command: str) -> dict[str, Any]:
    """Measure the federation of a configuration; write profile.json, partition.json and report.html; return it."""
    from consilience.data.federation import save_partition
    from consilience.folder import versions
    from consilience.measure.profile import profile as measure
    from consilience.report.profile_page import write_profile

    free(folder)
    federation = make_federation(config)
    found = {**measure(federation, config.seed), "fleet": _fleet(config, federation)}
    found |= {"command": command, "versions": versions()}
    folder.mkdir(parents=True, exist_ok=True)
    save_partition(folder / "partition.json", federation)
    write_atomically(folder / "profile.json", json.dumps(found))
    write_profile(folder)
    return found


def _fleet(config: Config, federation: Any) -> list[dict[str, Any]]:
    """The fleet of a configuration in numbers; it is that of every method, so any that takes all models will do."""
    from consilience import methods
    from consilience.fleet.clock import make_fleet
    from consilience.fleet.summary import summarise
    from consilience.simulate import prepare

    worker = prepare(
        methods.get("local").make({}),
        federation,
        model=config.model,
        models=config.models,
        feature_dim=config.feature_dim,
        seed=config.seed,
        **_devices(config),
    )
    fleet = make_fleet(
        worker.place, federation, fleet=config.fleet, availability=config.availability,
        correlation=config.fleet_correlation, drops=config.drops,
    )  # fmt: skip
    return summarise(fleet, federation)


def check_all(settings: Settings, runs: Sequence[RunSpec]) -> None:
    """Refuse whatever cannot run, before anything is written."""
    for spec in {spec.config.seed: spec for spec in runs}.values():
        federation = make_federation(spec.config)
        for other in (s for s in runs if s.config.seed == spec.config.seed):
            check(other, federation)
        if settings.target is not None and settings.target > 1 and federation.task.kind == "classification":
            raise ConfigError(f"--target {settings.target:g}: an accuracy is at most 1, as in 0.85")
    if settings.tune is not None:
        from consilience.tuning import prepare

        prepare(runs)


def record(settings: Settings, names: Sequence[str], folder: Path, command: str) -> None:
    """Write compare.yaml, from which a comparison is resumed and judged."""
    told = {
        **settings.flat(),
        "methods": list(names),
        "reference": settings.reference,
        "target": settings.target,
        "tune": settings.tune,
        **({"federations": [dict(f) for f in settings.federations]} if settings.federations else {}),
        "command": command,
    }
    write_atomically(folder / "compare.yaml", yaml.safe_dump(told, sort_keys=False))


def conclude(folder: Path) -> list[dict[str, Any]]:
    """Judge the runs in a comparison's folder: leaderboard.json and report.html."""
    from consilience.measure.board import board
    from consilience.report.html import write_report
    from consilience.report.load import read_runs

    asked = read_yaml(folder / "compare.yaml")
    rows = board(read_runs(folder), reference=asked.get("reference"), target=asked.get("target"))
    write_atomically(folder / "leaderboard.json", json.dumps(rows, indent=1))
    write_report(folder)
    return rows


def _run_all(todo: Sequence[RunSpec], folder: Path, command: str, on_line: OnLine) -> None:
    from consilience.beside import InProcesses, OnRay, run_beside

    if not todo:
        return
    config = todo[0].config
    workers = config.workers or _most(config)
    if config.executor in ("serial", "stacked") or workers == 1 or len(todo) < workers:
        for spec in todo:
            one(spec, folder, command, None, lambda line, label=spec.name: on_line(label, line))  # type: ignore[misc]
        return
    places = (OnRay if config.executor == "ray" else InProcesses)(folder, command)
    run_beside(todo, places, workers, on_line)


def _most(config: Config) -> int:
    """CPUs that there are."""
    from consilience.execute.processes import cores
    from consilience.execute.ray import cpus

    return cpus() if config.executor == "ray" else cores()


def one(
    spec: RunSpec,
    folder: Path,
    command: str,
    executor: str | None,
    on_line: Callable[[dict[str, Any]], None],
    federation: Any = None,
) -> None:
    """Do a run of a comparison, or go on with it."""
    path = folder / spec.name
    begun = (path / "config.yaml").exists()
    execute(spec, path, command=command, resume=begun, executor=executor, federation=federation, on_line=on_line)


def resume(
    folder: Path, on_line: OnLine, tell: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]] | Any:
    """Go on with a run or a comparison that was interrupted. Returns what ``execute`` or ``compare`` would."""
    if (folder / "compare.yaml").exists():
        settings, command = read_comparison(folder)
        if settings.federations:
            from consilience.suite import compare_on_all

            return compare_on_all(
                settings, settings.methods, folder, command=command, on_line=on_line, tell=tell, resume=True
            )
        return compare(settings, settings.methods, folder, command=command, on_line=on_line, tell=tell, resume=True)
    simulated(folder)
    spec, command = read_spec(folder)
    result = execute(spec, folder, command=command, resume=True, on_line=lambda line: on_line(spec.name, line))
    _report(folder)
    return result


def read_comparison(folder: Path) -> tuple[Settings, str]:
    """The settings of a comparison's folder, and the command that began it."""
    written = read_yaml(folder / "compare.yaml")
    command = written.pop("command", "")
    return settle(written), command


def labels(folder: Path) -> tuple[list[str], int]:
    """Names of the runs that a folder holds, and their rounds."""
    if (folder / "compare.yaml").exists():
        settings, _ = read_comparison(folder)
        if settings.federations:
            from consilience.suite import labels as of_all

            return of_all(settings, settings.methods), settings.config.rounds
        return [spec.name for spec in specs(settings, settings.methods)], settings.config.rounds
    spec, _ = read_spec(folder)
    return [spec.name], spec.config.rounds


def _report(folder: Path) -> Path:
    from consilience.report.html import write_report

    return write_report(folder)


def simulated(folder: Path) -> None:
    """Raise ConfigError where a folder is the run of a deployment, whose data are not here."""
    path = folder / "config.yaml"
    if path.exists() and "deployment" in read_yaml(path):
        raise ConfigError(
            f"{folder} is a deployment's run, whose rows are at its sites; `consilience deploy serve APP` goes on with "
            "it, and its models are in export/ here and at the sites"
        )


def read_spec(folder: Path) -> tuple[RunSpec, str]:
    """The run that a folder holds, and the command that began it. Raises ConfigError."""
    if (folder / "compare.yaml").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/config.yaml"))
        runs = f"name one of its runs: {', '.join(inside)}" if inside else "none of its runs has begun"
        raise ConfigError(f"{folder} is a comparison; {runs}")
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: no run there (no config.yaml)")
    record = read_yaml(folder / "config.yaml")
    try:
        values = {key: record[key] for key in Config.model_fields if key in record}
        config = settle(values).config
        return RunSpec(record["label"], record["method"], record["options"], config), record.get("command", "")
    except KeyError as error:
        raise ConfigError(f"{folder / 'config.yaml'}: {error} is missing; this is not the file of a run") from None


def run_one(
    spec: RunSpec, folder: Path, federation: Any, *, command: str, on_line: Callable[[dict[str, Any]], None]
) -> Any:
    """Do one run on the federation of its configuration and write its report."""
    result = execute(spec, folder, command=command, federation=federation, on_line=on_line)
    _report(folder)
    return result


def default_folder(what: str) -> Path:
    """A new folder under runs/, named by time and what is run."""
    stamp = dt.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stamp}-{what}"


def command_line() -> str:
    """The command that is being run, for the report."""
    return shlex.join(["consilience", *sys.argv[1:]])
