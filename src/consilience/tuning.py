"""The same number of trials for every method, judged on validation rows; the winners are run anew on other seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError, DataError
from consilience.core.training import Search, Training

if TYPE_CHECKING:
    from consilience.config import Config
    from consilience.core.federation import Federation
    from consilience.experiment import RunSpec
    from consilience.simulate import Result

RECORD, TRIALS = "tuning.json", "trials.jsonl"


@dataclass(frozen=True)
class Objective:
    """What trials are judged by: the mean over clients of the model each would deploy, or the global model on all
    validation rows together. ``lower``: a loss, less is better."""

    metric: str
    lower: bool


def space(spec: RunSpec) -> dict[str, Search]:
    """The hyper-parameters that a method declares a search for, but those that its label sets."""
    from consilience import methods
    from consilience.config import parse_method

    _, fixed = parse_method(spec.label)
    found = {name: field.metadata.get("search") for name, field in methods.get(spec.method).options().items()}
    return {name: search for name, search in found.items() if search is not None and name not in fixed}


def tune(runs: Sequence[RunSpec], budget: int, folder: Path, tell: Callable[[str], None]) -> list[RunSpec]:
    """The runs with the options that ``budget`` trials found best for each label.

    Trials run on a seed after those of the runs, so that nobody is tuned on a partition it is then judged on; the first
    one has the options as given. In the others every method tries the same values of the options that all have (see
    :func:`common`), so that none is ahead by luck in drawing them; Optuna's TPE proposes its own options, from a
    stream of the label. Every trial is written to ``folder`` as it ends, and not run again when a comparison is
    resumed. Raises ConfigError without Optuna or validation rows.
    """
    firsts, config, federation, objective = prepare(runs)
    done = _read(folder / TRIALS)
    whole = [json.dumps(line) + "\n" for lines in done.values() for line in lines]
    write_atomically(folder / TRIALS, "".join(whole))  # without a last line that was cut off
    told: dict[str, Any] = {}
    best: dict[str, dict[str, Any]] = {}
    for spec in firsts:
        trial_spec = dataclasses.replace(spec, config=config)
        trials = _study(trial_spec, budget, objective, federation, done.get(spec.label, []), folder, tell)
        winner = _best(trials, objective)
        best[spec.label] = {**spec.options, **trials[winner]["options"]}
        told[spec.label] = {
            "space": {name: str(search) for name, search in space(spec).items()},
            "trials": trials,
            "best": winner,
        }
    record = {"budget": budget, "seed": config.seed, **dataclasses.asdict(objective), "methods": told}
    write_atomically(folder / RECORD, json.dumps(record, indent=1))
    return [dataclasses.replace(spec, options=best[spec.label]) for spec in runs]


def common(name: str, search: Search, seed: int, number: int) -> float:
    """What trial ``number`` > 0 on ``seed`` tries of an option that all methods have, whatever method and budget.

    Multiples of the golden ratio, modulo 1, from a start of the seed (Kronecker's sequence): the first n are spread
    evenly for every n, so that few trials leave no wide part of the range out.
    """
    share = (_stream(f"tune {seed} {name}") / 2**32 + number * (math.sqrt(5) - 1) / 2) % 1
    if search.log:
        value: float = search.low * (search.high / search.low) ** share
        return min(value, search.high)
    return search.low + share * (search.high - search.low)


def prepare(runs: Sequence[RunSpec]) -> tuple[list[RunSpec], Config, Federation, Objective]:
    """One run of each label, the configuration and the federation of trials, and what they are judged by. Raises
    ConfigError where nothing can be tuned."""
    from consilience import experiment

    _optuna()
    firsts = list({spec.label: spec for spec in runs}.values())
    seed = max(spec.config.seed for spec in runs) + 1
    config = firsts[0].config.model_copy(update={"seed": seed})
    federation = experiment.make_federation(config)
    if not any(len(federation.data(int(c)).valid) for c in federation.seen):
        raise ConfigError("--tune judges trials on validation rows, and no client has any: give --split three shares")
    return firsts, config, federation, _objective(firsts, federation)


def _optuna() -> Any:
    """Optuna, quiet. Raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("--tune needs Optuna: pip install 'consilience[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _objective(specs: Sequence[RunSpec], federation: Federation) -> Objective:
    """The metric that will rank these methods, on validation rows."""
    from consilience import experiment

    every = True
    for spec in specs:
        worker = experiment.check(spec, federation)
        every &= worker.method.global_model(worker.method.init_server(worker.host(0, "init"))) is not None
    if federation.task.kind == "operator":
        raise ConfigError("--tune needs a task with a loss")
    return Objective("global" if every else "clients.mean", federation.task.kind != "classification")


def _study(
    spec: RunSpec,
    budget: int,
    objective: Objective,
    federation: Federation,
    recorded: Sequence[Mapping[str, Any]],
    folder: Path,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All trials of one label; those recorded are told to the sampler, not run."""
    optuna = _optuna()
    searched = space(spec)
    stream = _stream(f"tune {spec.config.seed} {spec.label}")
    sampler = optuna.samplers.TPESampler(seed=stream, n_startup_trials=min(10, max(2, budget // 2)))
    study = optuna.create_study(direction="minimize" if objective.lower else "maximize", sampler=sampler)
    kinds = {name: type(_default(spec, name)) for name in searched}
    given = {name: kind(spec.options.get(name, _default(spec, name))) for name, kind in kinds.items()}
    study.enqueue_trial({name: min(max(given[name], s.low), s.high) for name, s in searched.items()})
    shared = {name: s for name, s in searched.items() if name in {field.name for field in dataclasses.fields(Training)}}
    for number in range(1, budget):  # the sampler sees these, and proposes what is left open
        study.enqueue_trial({name: common(name, s, spec.config.seed, number) for name, s in shared.items()})
    trials: list[dict[str, Any]] = []
    for number in range(budget if searched else 1):
        asked = study.ask()
        options = {name: _suggested(asked, name, s, kinds[name]) for name, s in searched.items()}
        if number == 0:  # as given, to the last bit, also where it lies outside the search
            options = dict(given)
        known = recorded[number] if number < len(recorded) else None
        if known is not None and known["options"] == options:
            value = known["value"]
        else:
            value = _trial(dataclasses.replace(spec, options={**spec.options, **options}), objective, federation)
            _append(folder / TRIALS, {"method": spec.label, "number": number, "options": options, "value": value})
        if value is None:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, value)
        trials.append({"options": options, "value": value})
        shown = "diverged" if value is None else f"{value:.4f}"
        tell(f"tuning {spec.label}: trial {number + 1} of {budget}, validation {_noun(objective)} {shown}")
    return trials


def _suggested(asked: Any, name: str, search: Search, kind: type) -> float:
    """What the sampler proposes: a whole number where the option is one."""
    if kind is int:
        found: int = asked.suggest_int(name, int(search.low), int(search.high), log=search.log)
        return found
    return float(asked.suggest_float(name, search.low, search.high, log=search.log))


def _noun(objective: Objective) -> str:
    return "loss" if objective.lower else "accuracy"


def _stream(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _default(spec: RunSpec, name: str) -> Any:
    from consilience import methods

    return methods.get(spec.method).options()[name].default


def _trial(spec: RunSpec, objective: Objective, federation: Federation) -> float | None:
    """The validation score of one run, None where it is no number. Nothing of it is judged on test rows but one
    client at the end, which the loop does anyway and nobody looks at."""
    from consilience import experiment

    result = experiment.trial(spec, federation)
    value = validation_score(result, objective)
    return value if math.isfinite(value) else None


def validation_score(result: Result, objective: Objective) -> float:
    """A finished run on the validation rows of the clients that may train."""
    from consilience.core.messages import Job
    from consilience.simulate import single_thread

    worker, server = result.worker, result.server
    scores = []
    with single_thread():
        for client in map(int, worker.federation.seen):
            rows = worker.federation.data(client).valid
            if not len(rows):
                continue
            site, _ = worker.site(Job(-1, client, 0, 0, 0, 0))
            if objective.metric == "global":
                predictor = worker.method.global_model(server)
                site = worker.host(result.snapshot.version, "validate")
            else:
                predictor = worker.deployed(server, client, result.states.get(client))
            found = site.evaluate(predictor, rows)
            worker.release()
            if found.n:
                scores.append((found.n, found.loss if objective.lower else found.accuracy or 0.0))
    if not scores:
        raise DataError("no client could be judged on validation rows")
    if objective.metric == "global":
        return sum(n * value for n, value in scores) / sum(n for n, _ in scores)
    return sum(value for _, value in scores) / len(scores)


def _best(trials: Sequence[Mapping[str, Any]], objective: Objective) -> int:
    """The first of the best trials; the options as given where all diverged."""
    known = [
        (value if objective.lower else -value, i) for i, t in enumerate(trials) if (value := t["value"]) is not None
    ]
    return min(known)[1] if known else 0


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    from consilience.folder import read_lines

    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        found.setdefault(line["method"], []).append(line)
    return found


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
