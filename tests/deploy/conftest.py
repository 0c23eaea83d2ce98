"""Deployments in one process: both halves, our seals and policies, and a transport that is a dictionary."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from consilience import experiment
from consilience.config import settle
from consilience.core.errors import ConsilienceError
from consilience.deploy import layout, spec
from consilience.deploy.post import Trouble
from consilience.deploy.seal import Sealed
from consilience.deploy.server import Server
from consilience.deploy.site import Home
from consilience.folder import RunFolder

if importlib.util.find_spec("flwr") is None:
    collect_ignore_glob = ["test_*.py"]


@dataclass
class Direct:
    """Delivers at once. mangle: may change a message, or eat it (None), on its way to a site (True) or back."""

    folders: list[Path]
    mangle: Callable[[int, Sealed, bool], Sealed | Trouble | None] = lambda node, message, down: message
    sent: list[tuple[int, Sealed]] = field(default_factory=list)
    back: dict[str, Sealed | Trouble] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    ids: Any = field(default_factory=itertools.count)

    def nodes(self) -> set[int]:
        return set(range(100, 100 + len(self.folders))) - self.gone

    def push(self, node: int, message: Sealed, seconds: float, group: str) -> str | None:
        found = f"m{next(self.ids)}"
        self.sent.append((node, message))
        given = self.mangle(node, message, True)
        if given is None:
            return found
        if isinstance(given, Trouble):
            self.back[found] = given
            return found
        try:
            reply = Home(self.folders[node - 100]).answer(given, node)
        except ConsilienceError as error:
            self.back[found] = Trouble(str(error), False)
            return found
        changed = self.mangle(node, reply, False)
        if changed is not None:
            self.back[found] = changed
        return found

    def pull(self, ids: Iterable[str]) -> list[tuple[str, Sealed | Trouble]]:
        return [(found, self.back.pop(found)) for found in ids if found in self.back]


@dataclass
class Deployed:
    """A deployment's folders, ready to run."""

    root: Path
    app: Path
    sites: list[Path]
    settings: Any
    method: str
    said: list[str] = field(default_factory=list)

    def run(self, wire: Any = None) -> RunFolder:
        server = Server(self.app / "server", self.app, wire or Direct(self.sites), self.said.append, pause=0.01)
        return server.run()

    def simulate(self, **more: Any) -> Any:
        (one,) = experiment.specs(settle({**self.settings, **more}), [self.method])
        return experiment.execute(one, self.root / "simulated", executor="serial")


Make = Callable[..., Deployed]


@pytest.fixture
def deployed(tmp_path: Path) -> Make:
    """Makes a deployment of a simulated federation: each client's rows at a site."""

    def make(method: str = "fedavg", section: dict[str, Any] | None = None, **options: Any) -> Deployed:
        usual = {
            "clients": 3, "partition": "dirichlet:0.5", "model": "mlp:16", "rounds": 3, "eval_clients_every": 2,
            "checkpoint_every": 1, "availability": "always",
        }  # fmt: skip
        settings = {**usual, **options}
        (run,) = experiment.specs(settle(settings), [method])
        federation = experiment.make_federation(run.config)
        run = replace(run, config=run.config.model_copy(update={"sensitive": list(federation.task.sensitive)}))
        app = tmp_path / "app"
        sites = [tmp_path / f"site{i}" for i in range(federation.n_clients)]
        named = layout.deal(federation, sites, tmp_path / "given")
        named = {key: str(tmp_path / "given" / name) for key, name in named.items()}
        made = spec.make(run, {"sites": [f"site{i}" for i in range(len(sites))], **named, **(section or {})})
        done = layout.init(made, app)
        for folder in sites:
            layout.make_site(folder, folder.name, "data.npz", done.section.key, "127.0.0.1:8000")
            layout.register(app, folder.name, folder / "site.key.pub")
        return Deployed(tmp_path, app, sites, settings, method)

    return make


@dataclass
class Slow(Direct):
    """Delivers answers after a while, as ``delays`` say in turn, in seconds."""

    delays: Any = field(default_factory=lambda: itertools.cycle((0.05, 0.21, 0.12, 0.3, 0.02)))
    ready: dict[str, float] = field(default_factory=dict)

    def push(self, node: int, message: Sealed, seconds: float, group: str) -> str | None:
        found = super().push(node, message, seconds, group)
        if found is not None:
            self.ready[found] = time.monotonic() + next(self.delays)
        return found

    def pull(self, ids: Iterable[str]) -> list[tuple[str, Sealed | Trouble]]:
        return super().pull([found for found in ids if self.ready[found] <= time.monotonic()])
