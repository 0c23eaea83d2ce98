"""The command line. Imports what is slow only when it is needed, so that --help answers at once."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from consilience import __version__
from consilience.command import Command
from consilience.config import TRAINING, Config, Settings, parse_method, settle
from consilience.core.errors import ClientError, ConfigError, ConsilienceError, nearest
from consilience.deploy.cli import deploy

if TYPE_CHECKING:
    from rich.console import Console


app = typer.Typer(
    help="Heterogeneous federated learning, compared honestly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(deploy, name="deploy")


def _consoles() -> tuple[Console, Console]:
    """For results (stdout) and for progress and errors (stderr)."""
    from rich.console import Console

    return Console(), Console(stderr=True)


def _option(name: str, text: str, panel: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    annotation = Annotated[
        str | None, typer.Option(flag, help=text, metavar="", rich_help_panel=panel, show_default=False)
    ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that run, compare, profile and plan share; it gets them as one mapping ``given``."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    options = [
        _option(name, f"{f.description}{_default(f.default)}", "Options") for name, f in Config.model_fields.items()
    ]
    options += [_option(name, f"{f.metadata['help']}{_default(f.default)}", "Training") for name, f in TRAINING.items()]
    names = [p.name for p in options]

    def called(**values: Any) -> Any:
        given = {name: values.pop(name) for name in names}
        return command(given=given, **values)

    called.__signature__ = inspect.Signature(own + options)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in own + options}
    called.__doc__, called.__name__ = command.__doc__, command.__name__
    return called


def _default(value: Any) -> str:
    if value is None or value == []:
        return ""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" [{text}]"


ConfigFile = Annotated[str | None, typer.Option("--config", help="a YAML file with these options as keys", metavar="")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Folder = Annotated[Path, typer.Argument(help="a run's or a comparison's folder")]
OfClient = Annotated[int | None, typer.Option("--client", help="this client's own model", metavar="")]


def _version(shown: bool) -> None:
    if shown:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks of errors")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Heterogeneous federated learning, compared honestly."""


INTERRUPTED = 130
"""What typer returns when Ctrl-C was pressed."""
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("run", cls=Command, context_settings=EXTRA)
@_shared
def run_command(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="a method, as METHOD or METHOD:key=value,...")],
    given: dict[str, Any],
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Train one method. Its own options may follow as --key value; see `methods METHOD`."""
    from consilience import experiment

    settings = settle(given, config)
    spec_text = _with_extra(method, context.args)
    if settings.config.seeds > 1:
        _compare(settings, [spec_text], as_json)
        return
    (spec,) = experiment.specs(settings, [spec_text])
    federation = experiment.make_federation(spec.config)
    experiment.check(spec, federation)
    folder = Path(settings.config.out or experiment.default_folder(spec.method))
    out, err = _consoles()
    from consilience.report.load import RunFolder
    from consilience.report.terminal import Progress, run_summary

    with Progress(err, labels=[spec.label], rounds=spec.config.rounds) as progress:
        result = experiment.run_one(
            spec,
            folder,
            federation,
            command=experiment.command_line(),
            on_line=lambda line: progress.update(spec.label, line),
        )
    if as_json:
        typer.echo(
            json.dumps({"folder": str(folder), "digest": result.digest.split("\n")[:3], "last": result.history[-1]})
        )
        return
    out.print(run_summary(RunFolder.read(folder)))
    _tell_refused(err, result)
    typer.echo(f"report: {folder / 'report.html'}")


def _tell_refused(err: Console, result: Any) -> None:
    if result.refused:
        version, first = result.refused[0]
        err.print(
            f"{len(result.refused)} updates were refused (refused.jsonl), the first in round {version}: "
            f"client {first.client}, {first.field} {first.reason}"
        )


@app.command("compare", cls=Command)
@_shared
def compare_command(
    methods: Annotated[list[str] | None, typer.Argument(help="methods, as METHOD or METHOD:key=value,...")] = None,
    *,
    given: dict[str, Any],
    config: ConfigFile = None,
    as_json: AsJson = False,
    reference: Annotated[str | None, typer.Option("--reference", help="a method to compare with", metavar="")] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="an accuracy, as 0.85: what does reaching it cost?", metavar="")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option("--tune", help="trials for each method first, judged on validation data", metavar=""),
    ] = None,
    federation: Annotated[
        list[str] | None,
        typer.Option(
            "--federation",
            help="options of one federation as KEY=VALUE,...; give several to rank over them",
            metavar="",
        ),
    ] = None,
) -> None:
    """Train several methods on the same federations and show which wins, for whom and at what cost."""
    own = {"reference": reference, "target": target, "tune": tune, "federations": federation or None}
    settings = settle({**given, **own}, config)
    names = list(methods or settings.methods)
    if not names:
        raise ConfigError("name the methods to compare, as in `consilience compare local fedavg scaffold`")
    _compare(settings, names, as_json)


def _compare(settings: Settings, names: Sequence[str], as_json: bool) -> None:
    from consilience import experiment

    folder = Path(settings.config.out or experiment.default_folder("compare"))
    from consilience import suite

    several = bool(settings.federations)
    runs = suite.labels(settings, names) if several else [spec.name for spec in experiment.specs(settings, names)]
    from consilience.report.terminal import Progress

    _, err = _consoles()
    with Progress(err, labels=runs, rounds=settings.config.rounds) as progress:
        rows = (suite.compare_on_all if several else experiment.compare)(
            settings,
            names,
            folder,
            command=experiment.command_line(),
            on_line=progress.update,
            tell=lambda text: err.print(text, markup=False, highlight=False),
        )
    _show_leaderboard(rows, folder, as_json)


def _show_leaderboard(rows: list[dict[str, Any]], folder: Path, as_json: bool) -> None:
    from consilience.report.terminal import show_comparison

    if as_json:
        typer.echo(json.dumps(rows))
        return
    show_comparison(_consoles()[0], rows, folder)
    typer.echo(f"report: {folder / 'report.html'}")


def _with_extra(method: str, extra: Sequence[str]) -> str:
    """A method's text with the ``--key value`` pairs that followed it on the command line."""
    pairs = []
    rest = list(extra)
    while rest:
        flag = rest.pop(0)
        key, equals, value = flag.partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument '{flag}'")
        if not equals:
            if not rest:
                raise ConfigError(f"option '{flag}' wants a value")
            value = rest.pop(0)
        pairs.append(f"{_own_option(method, key)}={value}")
    if not pairs:
        return method
    return f"{method}{',' if ':' in method else ':'}{','.join(pairs)}"


def _own_option(method: str, flag: str) -> str:
    """The method's field that ``--flag`` names. Raises ConfigError with the nearest option of all, or who has it."""
    from consilience import methods

    key = flag.lstrip("-").replace("-", "_")
    name, _ = parse_method(method)
    cls = methods.get(name)
    if key not in cls.options():
        known = [f"--{k.replace('_', '-')}" for k in [*Config.model_fields, *cls.options()]]
        raise ConfigError(f"no option '{flag}' of run or {name}{methods.takers(key) or nearest(flag, known)}")
    return key


@app.command("methods", cls=Command)
def methods_command(
    name: Annotated[str | None, typer.Argument(help="show this method's card")] = None,
    as_json: AsJson = False,
) -> None:
    """List all methods, or show one's card: equations, options, needs, source."""
    from consilience.cards import card, cards, show_card, show_cards

    if as_json:
        typer.echo(json.dumps(cards() if name is None else card(name)))
        return
    out, _ = _consoles()
    if name is None:
        show_cards(out)
    else:
        show_card(out, name)


@app.command("profile", cls=Command)
@_shared
def profile_command(*, given: dict[str, Any], config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Measure a federation's heterogeneity in bits, before any training: what kind, how much, which methods suit."""
    from consilience import experiment

    settings = settle(given, config)
    folder = Path(settings.config.out or experiment.default_folder("profile"))
    found = experiment.profile(settings.config, folder, command=experiment.command_line())
    if as_json:
        typer.echo(json.dumps(found))
        return
    from consilience.report.profile import show

    out, _ = _consoles()
    for part in show(found):
        out.print(part, highlight=False)
    typer.echo(f"report: {folder / 'report.html'}")


@app.command("plan", cls=Command)
@_shared
def plan_command(
    methods: Annotated[list[str], typer.Argument(help="methods, as METHOD or METHOD:key=value,...")],
    *,
    given: dict[str, Any],
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Estimate time, memory and bytes before running: measures one client's work, and multiplies."""
    from consilience.plan import plan, plan_table

    rows = plan(settle(given, config), methods)
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        _consoles()[0].print(plan_table(rows))


@app.command("report", cls=Command)
def report_command(
    folder: Folder,
    form: Annotated[
        str | None,
        typer.Option("--format", help="csv, parquet or latex: write the report's tables instead", metavar=""),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="with --format: folder to write (FOLDER/tables)", metavar="")
    ] = None,
) -> None:
    """Write report.html (and a comparison's leaderboard.json) anew from the files of a folder, or its tables."""
    from consilience import experiment
    from consilience.report.html import write_report

    if form is not None:
        from consilience.report.tables import write_tables

        for path in write_tables(folder, form, out):
            typer.echo(path)
        return
    if out is not None:
        raise ConfigError("--out goes with --format; report.html is written into the folder that it reports on")
    if (folder / "profile.json").exists():
        from consilience.report.profile_page import write_profile

        typer.echo(f"report: {write_profile(folder)}")
    elif (folder / "compare.yaml").exists():
        from consilience import suite

        several = bool(experiment.read_comparison(folder)[0].federations)
        _show_leaderboard((suite.conclude if several else experiment.conclude)(folder), folder, False)
    else:
        typer.echo(f"report: {write_report(folder)}")


@app.command("resume", cls=Command)
def resume_command(folder: Folder) -> None:
    """Go on with a run or comparison that was interrupted; the result is the same bits."""
    from consilience import experiment
    from consilience.report.load import RunFolder
    from consilience.report.terminal import Progress, run_summary

    labels, rounds = experiment.labels(folder)
    out, err = _consoles()
    with Progress(err, labels=labels, rounds=rounds) as progress:
        done = experiment.resume(folder, progress.update, lambda text: err.print(text, markup=False, highlight=False))
    if isinstance(done, list):
        _show_leaderboard(done, folder, False)
        return
    out.print(run_summary(RunFolder.read(folder)))
    typer.echo(f"report: {folder / 'report.html'}")


@app.command("digest", cls=Command)
def digest_command(folder: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Print SHA-256 of the final server state, all client states, and the history without wall times."""
    from consilience.exporting import digest

    typer.echo(digest(folder), nl=False)


@app.command("predict", cls=Command)
def predict_command(
    folder: Annotated[Path, typer.Argument(help="a run's folder")],
    data: Annotated[str, typer.Argument(help="a data set by name, or a csv, parquet or npz file")],
    client: OfClient = None,
    out: Annotated[Path | None, typer.Option("--out", help="a csv file to write", metavar="")] = None,
) -> None:
    """Predict with a run's global model (or a client's), as csv."""
    import csv
    import io

    from consilience.core.checkpoint import write_atomically
    from consilience.exporting import predict

    names, rows, right = predict(folder, data, client)
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    if out is None:
        typer.echo(text.getvalue(), nl=False)
    else:
        write_atomically(out, text.getvalue())
    if right is not None:
        typer.echo(f"accuracy {right.accuracy:.4f} on {right.rows} rows", err=True)


@app.command("export", cls=Command)
def export_command(
    folder: Annotated[Path, typer.Argument(help="a run's folder")],
    client: OfClient = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write (FOLDER/export)", metavar="")] = None,
) -> None:
    """Write a model as model.safetensors (names as load_state_dict takes them) and config.json."""
    from consilience.exporting import export

    for path in export(folder, out or folder / "export", client):
        typer.echo(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 refused, 1 failed while running."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if os.getcwd() not in sys.path:  # for --model package.module:factory; last, so that it hides nothing installed
        sys.path.append(os.getcwd())
    try:
        code = app(given, prog_name="consilience", standalone_mode=False)
        if code == INTERRUPTED:
            _fail("interrupted; `consilience resume FOLDER` goes on", 1)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(_usage(error), 2)
    except BrokenPipeError:
        os._exit(0)  # whoever read our output has seen enough
    except Exception as error:
        if debug:
            raise
        _fail(*_explained(error))


def _usage(error: click.ClickException) -> str:
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        from consilience import methods

        known = [name for param in error.ctx.command.params for name in param.opts if name.startswith("--")]
        key = error.option_name.lstrip("-").replace("-", "_")
        others = methods.takers(key) if error.ctx.command.name in ("compare", "plan") else ""
        told = f"{others} (write METHOD:{key}=VALUE)" if others else nearest(error.option_name, known)
        return f"no option '{error.option_name}' of {error.ctx.command.name}{told}"
    return error.format_message().strip().rstrip(".")


def _explained(error: Exception) -> tuple[str, int]:
    """One to three lines for an error, and the exit code."""
    if isinstance(error, ClientError):
        last = error.trace.strip().splitlines()
        return f"{error}\n{_innermost(last)}", error.exit_code
    if isinstance(error, ConsilienceError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; what was saved before is whole, and can be resumed", 1
    return f"{type(error).__name__}: {error} (a bug; --debug shows where)", 1


def _innermost(trace: Sequence[str]) -> str:
    """The last place that a client's traceback names."""
    places = [line.strip() for line in trace if line.strip().startswith("File ")]
    return f"at {places[-1]} (--debug shows the whole traceback)" if places else ""


def _fail(message: str, code: int) -> None:
    typer.echo(f"consilience: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
