"""The server's half of a deployment: the one server loop, on real time and real sites.

Its folder holds ``server.key``, ``noise.key`` (of its noise and draws), ``events.jsonl`` (what happened with whom),
``registered.json`` and ``run``, a run's folder as every other, with ``arrivals.jsonl`` beside its files. If ``run`` has
begun, it is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from consilience.core.checkpoint import write_atomically
from consilience.core.encode import encode
from consilience.core.errors import CheckpointError, ConfigError, ConsilienceError
from consilience.core.evaluate import Evaluation
from consilience.core.events import cohort_size
from consilience.core.outbox import Outbox
from consilience.core.run import run as run_loop
from consilience.core.setup import Setup
from consilience.core.snapshot import Snapshot
from consilience.core.streams import SERVER
from consilience.core.units import parse_bytes
from consilience.core.worker import Worker
from consilience.deploy import data, spec
from consilience.deploy.data import Known
from consilience.deploy.keys import secret_of
from consilience.deploy.post import Post, Wire
from consilience.deploy.site import worker_of
from consilience.deploy.spec import Deployment
from consilience.deploy.sums import AtSites, kept_there
from consilience.execute.flower import Flower
from consilience.fleet.real import Wall
from consilience.folder import RunFolder, describe
from consilience.privacy.options import Privacy
from consilience.wire.decode import stages

EVENTS = "events.jsonl"
ARRIVALS = "arrivals.jsonl"
SUM = "sum.json"


@dataclass
class Server:
    """A deployment's server. app: the folder with run.yaml. on_event: called with what happened, in a sentence."""

    folder: Path
    app: Path
    wire: Wire
    on_event: Callable[[str], None] = print
    pause: float = 0.2

    def run(self) -> RunFolder:
        """Gather the sites, run to the end, let everybody export; returns the run's folder."""
        deployment = spec.read(self.app / "run.yaml")
        write_atomically(self.folder / "server.pid", str(os.getpid()))
        post = Post(self.wire, deployment, self.folder / "server.key", self.tell, self.pause)
        post.gather(self._waiting())
        about = self._registered(deployment, post)
        worker, shared = self._worker(deployment, about)
        self._begin(post, deployment, about, shared)
        recorder, snapshot, spent = self._recorder(deployment, worker)
        executor = Flower(worker, post, deployment.names, deployment.section.max_bytes)
        executor.keep(recorder.states)
        ids = {name: i for i, name in enumerate(deployment.names)}
        begin = 0.0 if snapshot is None else snapshot.time
        clock = Wall(lambda: frozenset(ids[n] for n in post.there()), recorder.path / ARRIVALS, begin)
        if snapshot is not None:
            self.tell("", f"goes on after round {snapshot.version}")
        last = run_loop(executor, self._setup(deployment, worker, clock, recorder, spent, post), snapshot)
        self._end(post, deployment, executor, last, clock, about)
        recorder.finish(last, {})
        from consilience.report.html import write_report

        write_report(recorder.path)
        self.tell("", f"done: {last.version} rounds")
        return recorder

    def tell(self, name: str, what: str) -> None:
        """Note what happened, with a site's name or none."""
        note(self.folder, name, what)
        self.on_event(f"{f'site {name} ' if name and not name.startswith('node ') else f'{name} '.lstrip()}{what}")

    def _waiting(self) -> Callable[[list[str]], None]:
        told: list[list[str]] = []

        def waiting(missing: list[str]) -> None:
            if missing and missing not in told:
                told.append(missing)
                self.tell("", f"waits for {', '.join(missing)}")

        return waiting

    def _registered(self, deployment: Deployment, post: Post) -> dict[str, Any]:
        """What the sites have together, as it was when the deployment began."""
        path = self.folder / "registered.json"
        facts = {name: post.facts[name] for name in deployment.names}
        if path.exists():
            known = json.loads(path.read_text())
            changed = [name for name in deployment.names if known["facts"].get(name) != facts[name]]
            if changed:
                raise ConsilienceError(f"site {changed[0]} has other data than when this deployment began")
            return dict(known["about"])
        test = [] if deployment.section.test is None else [self._own(deployment, deployment.section.test).facts()]
        about = data.together(list(facts.values()), list(facts), test)
        write_atomically(path, json.dumps({"facts": facts, "about": about}))
        return about

    def _own(self, deployment: Deployment, source: str) -> data.Own:
        """The server's own rows."""
        config, section = deployment.run.config, deployment.section
        return data.load(
            source, self.folder, client=SERVER, split=config.split, seed=config.seed, target=section.target,
            task=section.task, sensitive=config.sensitive,
        )  # fmt: skip

    def _worker(self, deployment: Deployment, about: dict[str, Any]) -> tuple[Worker, dict[str, Any]]:
        """The server's worker, and what every site must have beside its own data."""
        from consilience.architectures import resolve
        from consilience.exporting import read_weights

        config, section = deployment.run.config, deployment.section
        counts = [
            json.loads((self.folder / "registered.json").read_text())["facts"][n]["rows"] for n in deployment.names
        ]
        test = None if section.test is None else self._own(deployment, section.test).rows(about).test
        public = None if section.public is None else self._own(deployment, section.public).rows(about).test.x
        federation = Known(
            name=f"deployment of {len(counts)} sites", task=data.task_of(about), n_clients=len(counts),
            input_shape=tuple(about["input_shape"]), test=test, public=public, names=deployment.names,
            about={"features": about["features"], "sensitive": about["groups"]}, counts=counts,
        )  # fmt: skip
        init = None
        if config.init is not None:
            init = read_weights(Path(config.init), resolve(config.model, federation, config.feature_dim))
        worker = worker_of(deployment.told(), federation, init, about["rows"])
        return worker, {"public": public, "init": init}

    def _begin(self, post: Post, deployment: Deployment, about: dict[str, Any], shared: dict[str, Any]) -> None:
        """Tell every site what holds for all."""
        blob = encode(shared)
        tickets = {name: post.send(name, "begin", 0, {"about": about}, [blob]) for name in deployment.names}
        for name, ticket in tickets.items():
            answer = post.answer(ticket)
            if answer.blobs is None:
                raise ConsilienceError(f"site {name} cannot begin: {_why(answer.head)}")

    def _recorder(self, deployment: Deployment, worker: Worker) -> tuple[RunFolder, Snapshot | None, float]:
        """Where to write, what to go on from, and the wall seconds already spent."""
        path, run = self.folder / "run", deployment.run
        budget = parse_bytes(run.config.client_state_memory)
        identity = hashlib.sha256(
            json.dumps(
                [deployment.section.id, deployment.told(), (self.folder / "registered.json").read_text()]
            ).encode()
        ).hexdigest()
        if (path / "config.yaml").exists():
            written = yaml.safe_load((path / "config.yaml").read_text())
            if written.get("identity") != identity:
                raise CheckpointError(f"{path}: another deployment began there; give this one a folder of its own")
            return RunFolder.resume(path, budget)
        path.mkdir(parents=True, exist_ok=True)
        about = describe(worker.federation, content=False)
        write_atomically(path / "federation.json", json.dumps(about))
        told = {
            **run.file("consilience deploy"), "data": worker.federation.name, "partition": "natural:site",
            "deployment": deployment.section.id, "identity": identity,
        }  # fmt: skip
        write_atomically(path / "config.yaml", yaml.safe_dump(told, sort_keys=False))
        return RunFolder(path, budget), None, 0.0

    def _setup(
        self, deployment: Deployment, worker: Worker, clock: Wall, recorder: RunFolder, spent: float, post: Post
    ) -> Setup:
        from consilience.measure.metrics import Standard
        from consilience.simulate import timing

        config = deployment.run.config
        cohort, secret = cohort_size(config.participation, len(deployment.names)), config.secure is not None
        _, schedule = timing(
            worker, participation=config.participation, clock=clock, schedule=config.schedule,
            concurrency=config.concurrency, over_selection=config.over_selection, late=config.late,
        )  # fmt: skip
        sites = AtSites(post, deployment.names, deployment.section.max_bytes, recorder.path / SUM) if secret else None
        release = Privacy.of(config.model_dump()).release(
            worker, schedule, rounds=config.rounds, cohort=cohort, available=True, folder=recorder.path, parties=sites,
            secret=secret_of(self.folder / "noise.key").hex(),
        )  # fmt: skip
        return Setup(
            rounds=config.rounds,
            cohort=cohort,
            schedule=schedule,
            clock=clock,
            measures=Standard(),
            recorder=recorder,
            stages=(kept_there,) if secret else stages(worker),
            release=release,
            evaluation=Evaluation(
                config.eval_every, config.eval_clients_every, config.eval_clients, worker.place.chunk
            ),
            checkpoint_every=1,
            elapsed=spent,
        )

    def _end(
        self, post: Post, deployment: Deployment, executor: Flower, last: Snapshot, clock: Wall, about: dict[str, Any]
    ) -> None:
        """Every site exports its model, the server its own."""
        from consilience.exporting import write_model

        worker = executor.worker
        outbox = Outbox(worker.place, worker.federation, clock)
        tickets = {}
        for client, name in enumerate(deployment.names):
            blobs = [encode(outbox.deployed(last.server, client)), encode(last.states.get(client))]
            tickets[name] = post.send(name, "end", last.version, {}, blobs)
        model = worker.method.global_model(last.server)
        if model is not None:
            what = {
                "input_shape": about["input_shape"], "features": about["features"], "method": deployment.run.label,
                "rounds": last.version, "client": None,
            }  # fmt: skip
            write_model(model, self.folder / "run" / "export", worker.place, what)
        for name, ticket in tickets.items():
            answer = post.answer(ticket)
            if answer.blobs is None:
                self.tell(name, f"has not exported its model: {_why(answer.head)}")


def note(folder: Path, name: str, what: str) -> None:
    """Append to the events, with a site's name or none."""
    with (folder / EVENTS).open("a") as file:
        file.write(json.dumps({"time": round(time.time(), 3), "site": name, "what": what}) + "\n")


def _why(head: dict[str, Any]) -> str:
    return str(head.get("refused") or head.get("failed") or "no answer")


def main(folder: Path, app: Path, wire: Wire) -> None:
    """Run a server. At the end ``done.txt`` is written, or one clear line to ``failed.txt``, for whoever started it."""
    from consilience.execute.memory import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    for name in ("failed.txt", "done.txt"):
        (folder / name).unlink(missing_ok=True)
    try:
        done = Server(folder, app, wire).run()
        write_atomically(folder / "done.txt", str(done.path))
    except Exception as error:
        ours = isinstance(error, ConsilienceError)
        write_atomically(folder / "failed.txt", str(error) if ours else f"{type(error).__name__}: {error} (a bug)")
        print(f"consilience: {error}", file=sys.stderr)
        if not ours:
            raise


def failed(folder: Path) -> str | None:
    """Why the server stopped, or None if it did not."""
    path = folder / "failed.txt"
    return path.read_text().strip() if path.exists() else None


def check_key(folder: Path) -> None:
    """Raise ConfigError where a folder is no server's."""
    if not (folder / "server.key").exists():
        raise ConfigError(f"{folder}: no server.key there; `consilience deploy init` makes a server's folder")


def events(folder: Path, since: int = 0) -> Sequence[dict[str, Any]]:
    """What happened, from the line ``since`` on."""
    from consilience.folder import read_lines

    return read_lines(folder / EVENTS)[since:]
