"""``consilience deploy``: from a configuration to sites at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilience.command import Command

if TYPE_CHECKING:
    from rich.console import Console

deploy = typer.Typer(
    help="Run a method at real sites, over Flower (extra `flower`).", no_args_is_help=True, add_completion=False,
    rich_markup_mode=None,
)  # fmt: skip

App = Annotated[Path, typer.Argument(help="the app's folder, as `deploy init` made it")]
SiteFolder = Annotated[Path, typer.Argument(help="the site's folder, as `deploy site` made it")]
Host = Annotated[str, typer.Option("--host", help="address at which the server listens", metavar="")]
Port = Annotated[int, typer.Option("--port", help="its port", metavar="")]


def _errors() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@deploy.command("init", cls=Command)
def init_command(
    method: Annotated[str, typer.Argument(help="a method, as METHOD or METHOD:key=value,...")],
    config: Annotated[Path, typer.Option("--config", help="run.yaml: a run's options, and deploy.sites", metavar="")],
    out: Annotated[Path | None, typer.Option("--out", help="folder to write (deploy-METHOD)", metavar="")] = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="name or address of the server, for its certificate", metavar="")
    ] = None,
) -> None:
    """Write a Flower app (pyproject.toml, client_app.py, server_app.py, run.yaml), keys and certificates."""
    from consilience.deploy import layout, spec
    from consilience.deploy.keys import need_flower

    need_flower()
    deployment = spec.read(config, method)
    folder = out or Path(f"deploy-{deployment.run.method}")
    hosts = ("localhost", "127.0.0.1", *(host or ()))
    done = layout.init(deployment, folder, hosts)
    typer.echo(f"app: {folder} ({len(done.names)} sites: {', '.join(done.names)})")
    typer.echo(f"for the sites: {folder / 'server' / 'server.key.pub'} and {folder / 'server' / 'ca.pem'}")


@deploy.command("certificate", cls=Command)
def certificate_command(
    app: App,
    host: Annotated[list[str] | None, typer.Option("--host", help="name or address of the server", metavar="")] = None,
) -> None:
    """Make a new certificate for the server, from the same authority."""
    from consilience.deploy.keys import make_certificates, need_flower
    from consilience.deploy.server import check_key

    need_flower()
    check_key(app / "server")
    make_certificates(app / "server", ("localhost", "127.0.0.1", *(host or ())))
    typer.echo(app / "server" / "tls.pem")


@deploy.command("site", cls=Command)
def site_command(
    name: Annotated[str, typer.Argument(help="the site's name, as run.yaml has it")],
    data: Annotated[
        str, typer.Option("--data", help="csv, parquet or npz file, or package.module:function", metavar="")
    ],
    server_key: Annotated[str, typer.Option("--server-key", help="the server's public key, or its file", metavar="")],
    ca: Annotated[Path, typer.Option("--ca", help="the server's ca.pem", metavar="")],
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of the server", metavar="")] = "127.0.0.1:8000",
    out: Annotated[Path | None, typer.Option("--out", help="folder to write (NAME)", metavar="")] = None,
) -> None:
    """Make a site's folder: its key, its settings, a policy to fill in. The key's .pub goes to the server."""
    from consilience.deploy import layout
    from consilience.deploy.keys import need_flower

    need_flower()
    folder = out or Path(name)
    source = str(Path(data).absolute()) if Path(data).exists() else data
    layout.make_site(folder, name, source, server_key, server, ca)
    typer.echo(f"site: {folder}; for the server: {folder / 'site.key.pub'}")


@deploy.command("register", cls=Command)
def register_command(
    app: App,
    name: Annotated[str, typer.Argument(help="the site's name")],
    key: Annotated[Path, typer.Argument(help="its public key (site.key.pub)")],
) -> None:
    """Put a site's public key into the app's run.yaml."""
    from consilience.core.errors import ConfigError
    from consilience.deploy import layout
    from consilience.deploy.keys import need_flower

    need_flower()
    if not key.is_file():
        raise ConfigError(f"{key}: no such file")
    layout.register(app, name, key)
    typer.echo(f"{name} may join {app}")


@deploy.command("serve", cls=Command)
def serve_command(app: App, host: Host = "127.0.0.1", port: Port = 8000) -> None:
    """Start the server and run to the end; started again, it goes on where it was."""
    from consilience.deploy import local
    from consilience.deploy.keys import need_flower

    need_flower()
    words = f"stopped; `consilience deploy serve {app}` goes on where it was"
    with _stoppable(words), local.serving(app, host, port) as link, _progress(app) as (tell, on_line):
        tell(f"listens at {host}:{port}")
        local.follow(link, [], tell, on_line)
    _done(app)


@deploy.command("join", cls=Command)
def join_command(folder: SiteFolder) -> None:
    """Start a site, and let it take part until it is interrupted."""
    from consilience.deploy import local
    from consilience.deploy.keys import need_flower

    need_flower()
    err = _errors()
    with _stoppable(""):
        local.join(folder, lambda text: err.print(text, markup=False, highlight=False))


@deploy.command("local", cls=Command)
def local_command(
    method: Annotated[str, typer.Argument(help="a method, as METHOD or METHOD:key=value,...")] = "fedavg",
    sites: Annotated[int, typer.Option("--sites", min=1, help="how many sites", metavar="")] = 4,
    config: Annotated[str | None, typer.Option("--config", help="a YAML file of a run's options", metavar="")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="rounds, over the file's", metavar="")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder to write (runs/...)", metavar="")] = None,
) -> None:
    """Try a deployment here: TLS, authenticated nodes, a site for each client of the configuration's data."""
    from consilience import experiment
    from consilience.config import read_yaml, settle
    from consilience.deploy import local
    from consilience.deploy.keys import need_flower

    need_flower()
    values: dict[str, Any] = {} if config is None else read_yaml(Path(config))
    section = dict(values.pop("deploy", None) or {})
    section.pop("sites", None)
    settings = settle({**values, **({} if rounds is None else {"rounds": rounds}), "clients": sites, "out": None})
    (run,) = experiment.specs(settings, [method])
    folder = out or experiment.default_folder(f"deploy-{run.method}")
    app, folders = local.lay_out(run, sites, folder, section)
    with _stoppable(f"stopped; {folder} holds what was done"), _progress(app) as (tell, on_line):
        local.run_all(app, folders, tell, on_line)
    _done(app)


@deploy.command("ledger", cls=Command)
def ledger_command(
    folder: SiteFolder,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Show what has left a site: round, message, fields, bytes; and what was refused."""
    import json

    from rich.console import Console

    from consilience.deploy import ledger

    if as_json:
        typer.echo(json.dumps(ledger.read(folder)))
    else:
        Console().print(ledger.show(folder))


@contextmanager
def _stoppable(words: str) -> Iterator[None]:
    """Ctrl-C and a request to terminate end what is inside in good order; then fail with these words, if any."""
    import signal

    from consilience.core.errors import ConsilienceError

    def stop(*signals: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if words:
            raise ConsilienceError(words) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _done(app: Path) -> None:
    from consilience.report.load import RunFolder
    from consilience.report.terminal import run_summary

    folder = app / "server" / "run"
    from rich.console import Console

    Console().print(run_summary(RunFolder.read(folder)))
    typer.echo(f"run: {folder}")
    typer.echo(f"report: {folder / 'report.html'}")


class _progress:
    """Live progress of a deployment: (what to call with a sentence, what with a line of history)."""

    def __init__(self, app: Path) -> None:
        from consilience.deploy import spec
        from consilience.report.terminal import Progress

        run = spec.read(app / "run.yaml").run
        self._label, self._err = run.label, _errors()
        self._progress = Progress(self._err, labels=[run.label], rounds=run.config.rounds)

    def __enter__(self) -> tuple[Any, Any]:
        progress = self._progress.__enter__()

        def tell(text: str) -> None:
            self._err.print(text, markup=False, highlight=False)

        return tell, lambda line: progress.update(self._label, line)

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)
