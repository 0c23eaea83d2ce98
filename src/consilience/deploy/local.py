"""A whole deployment on one machine, over TLS and with authenticated nodes: for trying, and for tests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consilience.core.errors import ConfigError
from consilience.deploy import layout, spec
from consilience.deploy.processes import Link, Node, free_port
from consilience.deploy.server import EVENTS
from consilience.experiment import RunSpec, make_federation
from consilience.folder import read_lines

Tell = Callable[[str], None]
OnLine = Callable[[dict[str, Any]], None]


def lay_out(run: RunSpec, sites: int, out: Path, section: dict[str, Any] | None = None) -> tuple[Path, list[Path]]:
    """Folders of a deployment whose sites have the clients of the run's federation: the app's, and the sites'."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give another --out")
    run = replace(run, config=run.config.model_copy(update={"clients": sites}))
    federation = make_federation(run.config)
    if federation.n_clients != sites:
        raise ConfigError(f"--sites {sites}: this partition makes {federation.n_clients} clients")
    run = replace(run, config=run.config.model_copy(update={"sensitive": list(federation.task.sensitive)}))
    names = [f"site{i + 1}" for i in range(sites)]
    if federation.names:
        names = ["".join(c if c.isalnum() or c in "-_." else "-" for c in name) for name in federation.names]
    deployment = spec.make(run, {"sites": names, **(section or {})})
    folders = [out / "sites" / name for name in names]
    app = layout.init(deployment, out / "app")
    named = layout.deal(federation, folders, out / "app" / "server")
    app = replace(app, section=app.section.model_copy(update=named))
    app.write(out / "app" / "run.yaml")
    address = f"127.0.0.1:{free_port()}"
    for folder in folders:
        ca = out / "app" / "server" / "ca.pem"
        layout.make_site(folder, folder.name, "data.npz", app.section.key, address, ca)
        layout.register(out / "app", folder.name, folder / "site.key.pub")
    return out / "app", folders


def run_all(app: Path, folders: Sequence[Path], tell: Tell, on_line: OnLine) -> Path:
    """Run a deployment whose server and sites are all here, to its end; returns the run's folder. Raises
    ConsilienceError, in one clear line, and leaves no process behind."""
    nodes = [Node(folder) for folder in folders]
    port = int(spec_port(folders[0]))
    with serving(app, "127.0.0.1", port) as link, contextlib.ExitStack() as stack:
        for node in nodes:
            node.start()
            stack.callback(node.process.end)
        for node in nodes:  # all are asked before any is waited for
            stack.callback(_ask, node)
        follow(link, nodes, tell, on_line)
    return app / "server" / "run"


def _ask(node: Node) -> None:
    if node.process.alive:
        node.process.terminate()


def spec_port(folder: Path) -> str:
    """The port at which a site's folder says the server is."""
    from consilience.deploy.site import read_about

    return read_about(folder).server.rpartition(":")[2]


@contextlib.contextmanager
def serving(app: Path, host: str, port: int) -> Any:
    """A SuperLink that knows the sites' keys, with the run submitted to it; it ends at the end."""
    link = Link(app, host, port)
    for name in ("failed.txt", "done.txt", "server.pid"):
        (link.folder / name).unlink(missing_ok=True)
    try:
        link.start()
        link.register(spec.read(app / "run.yaml").section.sites)
        link.submit()
        yield link
    finally:
        link.process.end()


@dataclass
class Follower:
    """Tells what is new in a server's folder."""

    folder: Path
    events: int
    lines: int = 0

    def look(self, tell: Tell, on_line: OnLine) -> None:
        """Tell it."""
        found = read_lines(self.folder / EVENTS)
        for event in found[self.events :]:
            name = event["site"]
            tell(f"{f'site {name} ' if name and not name.startswith('node ') else name}{event['what']}")
        self.events = len(found)
        rounds = read_lines(self.folder / "run" / "history.jsonl")
        for line in rounds[self.lines :]:
            on_line(line)
        self.lines = len(rounds)


def follow(link: Link, nodes: Sequence[Node], tell: Tell, on_line: OnLine) -> None:
    """Watch until the run is over. Raises ConsilienceError."""
    follower = Follower(link.folder, len(read_lines(link.folder / EVENTS)))
    trouble: str | None = None
    while True:
        over = link.over()
        follower.look(tell, on_line)
        if over:
            return
        for node in nodes:
            said = node.watch()
            if said is not None and said != trouble:
                trouble = said
                tell(said)
        time.sleep(0.3)


def join(folder: Path, tell: Tell) -> None:
    """Run a site until it is interrupted. Raises ConsilienceError where it cannot join."""
    node = Node(folder)
    node.start()
    tell(f"site {node.name} is up; Ctrl-C ends it")
    try:
        while True:
            said = node.watch()
            if said is not None:
                tell(said)
            time.sleep(0.5)
    finally:
        node.process.end()
