"""What can be configured: the options of the command line, which are the keys of configuration files.

One pydantic model checks both; unknown keys are refused with the nearest right one. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from consilience.core.errors import ConfigError, nearest
from consilience.core.training import Training
from consilience.core.units import parse_bytes


def _number(value: Any) -> Any:
    """A string with a decimal point is a fraction, without one a count."""
    if isinstance(value, str):
        try:
            return int(value) if value.lstrip("+-").isdigit() else float(value)
        except ValueError:
            return value
    return value


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _joined(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _memory(value: Any) -> str:
    try:
        parse_bytes(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return str(value)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


LOGGERS = ("tensorboard", "mlflow", "wandb")
"""What a run's history can be passed on to."""


def _loggers(value: Any) -> Any:
    names = list(dict.fromkeys(_listed(value)))
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"no logger '{name}'{nearest(str(name), LOGGERS)}")
    return names


Share = Annotated[int | float, BeforeValidator(_number)]
Listed = Annotated[list[str], BeforeValidator(_listed)]


class Config(BaseModel):
    """Everything about a run but its method."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: str = Field("digits", description="a data set by name, or a csv, parquet or npz file, or a folder of them")
    model: str = Field("mlp", description="the server's model, and everybody's without --models")
    models: Annotated[str | None, BeforeValidator(_joined)] = Field(
        None, description="the clients' models: NAME*SHARE,... or NAME@RATE,... (widths), memory:..., or a csv file"
    )
    feature_dim: int | None = Field(None, ge=1, description="features that every model's head is given (the model's)")
    clients: int = Field(10, ge=1, description="how many clients")
    partition: str = Field("iid", description="who holds what: parts joined with +, as in dirichlet:0.1+rotate:4")
    split: Annotated[tuple[float, ...], BeforeValidator(_listed)] = Field(
        (0.8, 0.1, 0.1), description="shares of each client's rows to train, validate and test on"
    )
    sensitive: Listed = Field([], description="columns of groups to report differences between")
    public: int = Field(0, ge=0, description="unlabelled rows that everybody may see")
    unseen: Share = Field(0, ge=0, description="clients that never train: a fraction or a count")
    participation: Share = Field(1.0, gt=0, description="clients a round: a fraction (with a point) or a count")
    rounds: int = Field(50, ge=1, description="server updates to make")
    eval_every: int = Field(1, ge=1, description="rounds between judgements of the global model")
    eval_clients_every: int = Field(10, ge=0, description="rounds between judgements of clients; 0: only the end")
    eval_clients: int | None = Field(None, ge=1, description="clients judged (all)")
    fleet: str = Field("uniform", description="devices: a profile, a csv file, or package.module:function")
    fleet_correlation: str = Field("0", description="RHO: fast devices have many rows; labels:RHO: certain labels")
    availability: str = Field("always", description="when clients can be reached: a rule or a trace file")
    drops: float = Field(0.0, ge=0, lt=1, description="chance that a job is lost on its way")
    schedule: str | None = Field(None, description="when the server combines (the method's)")
    concurrency: int | None = Field(None, ge=1, description="jobs in flight of an asynchronous schedule (the cohort)")
    over_selection: float = Field(1.0, ge=1, description="times the cohort that a deadline's rounds ask")
    late: Literal["discard", "partial"] = Field("discard", description="at a deadline: drop late work, or cut it short")
    replay: str | None = Field(None, description="a deployment's arrivals.jsonl, to combine what came when it came")
    topology: str = Field(
        "complete", description="who exchanges with whom in which round, for methods without a server"
    )
    mixing: Literal["metropolis", "uniform"] = Field("metropolis", description="weights of neighbours")
    attack: str | None = Field(
        None, description="NAME:FRACTION[:STRENGTH][:blind]: what hostile clients do, as alie:0.2"
    )
    robustness: Annotated[str | None, BeforeValidator(_text)] = Field(
        None, description="EPS[:LOW:HIGH]: judge the last global model on inputs moved by EPS at most, within 0:1"
    )
    epsilon: float | None = Field(None, gt=0, description="client-level differential privacy that the run may spend")
    delta: float = Field(1e-6, gt=0, lt=1, description="chance at which epsilon may fail; well below 1 / clients")
    dp_clip: str = Field("1.0", description="norm of an update: C, layers:C, dim:C, normalise:C, adaptive:QUANTILE[:C]")
    dp_mechanism: Literal["poisson", "fixed", "tree"] = Field("poisson", description="who is drawn, and how it counts")
    noise_multiplier: float | None = Field(None, ge=0, description="noise by the clipping norm, instead of --epsilon")
    secure: float | None = Field(None, gt=0.5, le=1, description="sums are secret; share of a cohort that must be left")
    init: str | None = Field(None, description="a safetensors file to start from")
    seed: int = Field(0, ge=0, description="of everything random")
    seeds: int = Field(1, ge=1, description="repetitions, with seeds seed, seed + 1, ...")
    executor: Literal["auto", "serial", "processes", "stacked", "ray"] = Field("auto", description="where clients run")
    workers: int | None = Field(None, ge=1, description="worker processes (cores; with ray: CPUs of the cluster)")
    address: str | None = Field(None, description="with ray: HOST:PORT of a running cluster, or auto (one of its own)")
    client_state_memory: Annotated[str, BeforeValidator(_memory)] = Field(
        "1GB", description="clients' states to keep in memory; others go to files in the run's folder"
    )
    checkpoint_every: int = Field(10, ge=0, description="rounds between checkpoints; 0: only at the end")
    log: Annotated[list[str], BeforeValidator(_loggers)] = Field(
        [], description="pass the history on to tensorboard, mlflow, wandb (extras of these names)"
    )
    out: str | None = Field(None, description="folder to write (runs/...)")


TRAINING = {f.name: f for f in dataclasses.fields(Training)}
"""Training options: fields of every method, that a run's configuration may set for all."""

COMPARE_KEYS = {
    "methods": "a list of METHOD[:key=value,...]",
    "reference": "a method to compare with",
    "target": "an accuracy (a loss in a regression) whose cost is asked",
    "tune": "trials for each method, judged on validation data",
    "federations": "a list of mappings of options, or of KEY=VALUE,..., each a federation to compare on",
}


@dataclass(frozen=True)
class Settings:
    """A checked configuration, the training options that were given, and what only ``compare`` takes."""

    config: Config
    training: Mapping[str, Any]
    methods: tuple[str, ...] = ()
    reference: str | None = None
    target: float | None = None
    tune: int | None = None
    federations: tuple[Mapping[str, Any], ...] = ()

    def flat(self) -> dict[str, Any]:
        """As one mapping, as configuration files have it."""
        found = self.config.model_dump(mode="json")
        found["split"] = list(self.config.split)
        return {**found, **self.training}


def settle(given: Mapping[str, Any], file: str | Path | None = None) -> Settings:
    """Settings from options (None: not given) over a YAML file's keys over the defaults. Raises ConfigError."""
    values: dict[str, Any] = {} if file is None else read_yaml(Path(file))
    values = {key.replace("-", "_"): value for key, value in values.items()}
    values.update({key: value for key, value in given.items() if value is not None})
    known = [*Config.model_fields, *TRAINING, *COMPARE_KEYS]
    for key in values:
        if key not in known:
            where = f"{file}: " if file is not None else ""
            raise ConfigError(f"{where}unknown option '{key}'{nearest(key, known)}")
    names = values.pop("methods", None) or ()
    names = [names] if isinstance(names, str) else names
    reference = values.pop("reference", None)
    target = _at_least(values.pop("target", None), "target", float, 0.0)
    tune = _at_least(values.pop("tune", None), "tune", int, 1)
    federations = tuple(_federation(entry) for entry in values.pop("federations", None) or ())
    training = {key: values.pop(key) for key in list(values) if key in TRAINING}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    if isinstance(config.participation, float) and config.participation > 1:
        raise ConfigError(f"--participation {config.participation}: a fraction is at most 1.0; a count has no point")
    return Settings(
        _rooted(config), training, tuple(_spec(name) for name in names), reference, target, tune, federations
    )


def _at_least(value: Any, key: str, kind: type[Any], least: float) -> Any:
    """A number that is not below ``least`` (above it, if that is 0)."""
    if value is None:
        return None
    try:
        found = kind(str(value))
    except ValueError:
        found = None
    if found is None or not math.isfinite(found) or found < least or (least == 0 and found == 0):
        raise ConfigError(
            f"--{key} {value!r}: a number {'above 0' if least == 0 else f'from {least} on'} ({COMPARE_KEYS[key]})"
        )
    return found


def _federation(entry: Any) -> dict[str, Any]:
    """The options of one federation, from a mapping or from KEY=VALUE,..."""
    if isinstance(entry, str):
        _, entry = parse_method(f"federation:{entry}")
    if not isinstance(entry, Mapping) or not entry:
        raise ConfigError(f"federations: {entry!r} is neither KEY=VALUE,... nor a mapping of options")
    found = {str(key).replace("-", "_"): value for key, value in entry.items()}
    for key in found:
        if key not in Config.model_fields or key in ("out", "seed", "seeds"):
            known = [k for k in Config.model_fields if k not in ("out", "seed", "seeds")]
            raise ConfigError(f"federations: '{key}' is no option of a federation{nearest(key, known)}")
    return found | _absolute(found)


_PATHS = ("init", "data", "models", "partition", "replay")
"""Options that may name a file."""


def _rooted(config: Config) -> Config:
    """The configuration with absolute paths, so that what a run wrote down holds in any folder."""
    return config.model_copy(update=_absolute(config.model_dump(include=set(_PATHS))))


def _absolute(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that name a file, with its absolute path."""
    from consilience.data.spec import NAMES, is_file

    init, data, models, partition, replay = (str(options.get(key) or "") for key in _PATHS)
    name, _, rest = data.partition(":")
    found = {key: str(Path(path).absolute()) for key, path in (("init", init), ("replay", replay)) if path}
    if data and name not in NAMES and Path(data).exists():
        found["data"] = str(Path(data).absolute())
    elif name == "fashion-mnist" and rest:
        found["data"] = f"{name}:{Path(rest).absolute()}"
    if models.endswith(".csv"):
        found["models"] = str(Path(models).absolute())
    if partition and is_file(partition):
        found["partition"] = str(Path(partition).absolute())
    return found


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = str(first["loc"][0])
    description = Config.model_fields[key].description
    return f"--{key.replace('_', '-')} {first['input']!r}: {first['msg'].lower()} ({description})"


def _spec(entry: Any) -> str:
    """A method entry of a file: a string, or a mapping with ``name`` and its options."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        options = ",".join(f"{key}={value}" for key, value in entry.items() if key != "name")
        return f"{entry['name']}:{options}" if options else entry["name"]
    raise ConfigError(f"methods: {entry!r} is neither METHOD[:key=value,...] nor a mapping with a name")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{path}: a configuration is a mapping of options to values")
    return found


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """``name:key=value,...`` as (name, options)."""
    name, _, rest = text.partition(":")
    options: dict[str, str] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"method '{text}': '{part}' is not key=value")
        options[key.strip().replace("-", "_")] = value.strip()
    return name.strip(), options
