"""A site's half of a deployment: opens what the server sends, keeps to its owner's policy, works, notes what leaves.

A site's folder holds ``site.yaml`` (name, data, the server's public key), ``site.key``, ``policy.yaml``,
``ledger.jsonl``, ``noise.key`` (of noise for its rows), and in ``runs/ID`` the states, the messages taken, its part in
secret sums and the exported model of each deployment.
"""

from __future__ import annotations

import fcntl
import json
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilience.config import read_yaml
from consilience.core import tree as tr
from consilience.core.checkpoint import write_atomically
from consilience.core.encode import DecodeError, decode, encode
from consilience.core.errors import CheckpointError, ConfigError, ConsilienceError, NeedsError
from consilience.core.messages import Job, Work
from consilience.core.tree import Elsewhere, Tree
from consilience.core.worker import Call, Worker
from consilience.deploy import budget, data, ledger, policy
from consilience.deploy.budget import Cost
from consilience.deploy.keys import read_private, read_public
from consilience.deploy.masking import Masking
from consilience.deploy.policy import PolicyError
from consilience.deploy.seal import ANY, Sealed, SealError, Window, open_sealed, seal
from consilience.deploy.spec import ID, PROTOCOL
from consilience.deploy.store import Store
from consilience.folder import versions
from consilience.privacy.options import Privacy

WORKED = ("train", "judge", "send", "mix")
"""A worker's functions that the server may ask for."""


class About(BaseModel):
    """site.yaml."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    data: str = Field(min_length=1, description="a csv, parquet or npz file, or package.module:function")
    server_key: str = Field(min_length=1, description="the server's public key, in one line")
    server: str = Field("127.0.0.1:8000", description="its address, HOST:PORT")
    max_bytes: int = Field(200_000_000, description="most bytes of a message")


def read_about(folder: Path) -> About:
    """A site's own settings. Raises ConfigError."""
    try:
        return About.model_validate(read_yaml(folder / "site.yaml"))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{folder / 'site.yaml'}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        ) from None


class Said(NamedTuple):
    """What a site says. fields: what is in it, for the ledger, with bytes. rows: what it has cost its rows."""

    told: dict[str, Any]
    blobs: list[bytearray]
    fields: dict[str, int]
    rows: Cost | None = None


class Home:
    """A site at work, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = read_about(folder)
        self.policy = policy.read(folder / "policy.yaml")
        self._key = read_private(folder / "site.key")
        self._server = read_public(self.about.server_key, f"{folder / 'site.yaml'}: server_key")

    def answer(self, message: Sealed, node: int) -> Sealed:
        """What to say to a message that came to this node. Raises SealError if it must not be believed; then nothing
        leaves."""
        with self._alone():
            try:
                head = open_sealed(self._server, message, {"from": "server", "node": node}, self.about.max_bytes)
                if head["to"] != self.about.name and (head["to"], head["kind"]) != (ANY, "hello"):
                    raise SealError(f"stale: meant for {head['to']!r}, not {self.about.name!r}")
                run, number = self._run(head)
                Window(run / "taken.json").take(number, float(head["expires"]))
            except (SealError, KeyError, TypeError, ValueError) as error:
                why = str(error) if isinstance(error, SealError) else f"malformed: {type(error).__name__} {error}"
                ledger.note(self.folder, {"refused": why})
                raise error if isinstance(error, SealError) else SealError(why) from None
            try:
                said = self._done(head, message.blobs, run)
            except (PolicyError, NeedsError, CheckpointError) as error:
                said = Said({"refused": str(error)}, [], {"refused": 0})
            except Exception as error:  # its text may tell of data, so it stays here
                with (run / "errors.log").open("a") as file:
                    trace = getattr(error, "trace", "") or "".join(traceback.format_exception(error))
                    file.write(f"{time.ctime()}: {error}\n{trace}\n")
                cause = error.__cause__ or error
                told = {"failed": f"{type(cause).__name__} (the site's errors.log has more)"}
                said = Said(told, [], {"failed": 0})
            reply = self._seal(head, said.told, said.blobs)
            cost = {} if said.rows is None else {"rows": said.rows._asdict()}
            line = {
                "run": head["run"], "round": head["round"], "message": head.get("call", head["kind"]),
                "fields": said.fields, "bytes": reply.size, **cost,
            }  # fmt: skip
            ledger.note(self.folder, line)
            return reply

    def _seal(self, head: Mapping[str, Any], told: Mapping[str, Any], blobs: Sequence[bytes | bytearray]) -> Sealed:
        """A reply to the message with this head."""
        who = {"run": head["run"], "round": head["round"], "from": self.about.name, "to": "server"}
        return seal(self._key, {**who, "answers": head["number"], "kind": head["kind"], **told}, blobs)

    def _run(self, head: Mapping[str, Any]) -> tuple[Path, int]:
        """The folder of a message's deployment, and the message's number."""
        name, number = head["run"], head["number"]
        if not isinstance(name, str) or not re.fullmatch(ID, name) or not isinstance(number, int):
            raise SealError("malformed: no run or number")
        folder = self.folder / "runs" / name
        if head["kind"] != "hello" and not (folder / "told.json").exists():
            raise SealError(f"stale: of a run that has not begun here ({name})")
        folder.mkdir(parents=True, exist_ok=True)
        return folder, number

    def _done(self, head: Mapping[str, Any], blobs: Sequence[bytes], run: Path) -> Said:
        """What to say."""
        if head["kind"] == "hello":
            return self._hello(head, run)
        if head["kind"] == "begin":
            write_atomically(run / "about.json", json.dumps(head["about"]))
            write_atomically(run / "shared.safetensors", blobs[0])
            return Said({}, [], {})
        if head["kind"] == "call":
            return self._call(head, blobs, run)
        if head["kind"] == "secret":
            return self._secret(head, blobs, run)
        if head["kind"] == "end":
            return self._end(head, blobs, run)
        raise PolicyError(f"nothing is known of messages of kind {head['kind']!r}")

    def _hello(self, head: Mapping[str, Any], run: Path) -> Said:
        own = versions()
        if head["protocol"] != PROTOCOL:
            raise PolicyError(
                f"version mismatch: the server speaks protocol {head['protocol']} (consilience "
                f"{head['versions']['consilience']}), this site {PROTOCOL} (consilience {own['consilience']})"
            )
        told = head["told"]
        if self.about.name not in told["sites"]:
            raise PolicyError(f"this site is called {self.about.name}, which is not among the deployment's sites")
        policy.check(self.policy, self.about.data, told)
        if (run / "about.json").exists() and _json(run / "told.json") != told:
            raise PolicyError("this deployment began here with another configuration; give this one another deploy.id")
        facts = self._own(told).facts()
        if facts["statistics"] is not None and "statistics" not in self.policy.server_sees:
            raise PolicyError("the policy lets no statistics leave, which a table needs to be made into inputs")
        write_atomically(run / "told.json", json.dumps(told))
        write_atomically(run / "facts.json", json.dumps(facts))
        return Said({"facts": facts, "versions": own}, [], {**dict.fromkeys(facts, 0), "versions": 0})

    def _call(self, head: Mapping[str, Any], blobs: Sequence[bytes], run: Path) -> Said:
        told = _json(run / "told.json")
        name = head["call"]
        if name not in WORKED:
            raise PolicyError(f"nothing is known of the call {name!r}")
        last = self.policy.rounds
        if last is not None and head["round"] > last + (name == "judge"):  # judging names the round to come
            raise PolicyError(f"the policy allows {self.policy.rounds} rounds, not {head['round']}")
        worker = self._worker(told, run)
        limit = self.about.max_bytes
        try:
            shared, args = decode(blobs[0], limit=limit), decode(blobs[1], limit=limit)
        except (DecodeError, IndexError) as error:
            raise PolicyError(f"malformed message: {error}") from None
        job = args[0]
        if not isinstance(job, Job) or job.client != told["sites"].index(self.about.name):
            raise PolicyError("malformed message: the job is not this site's")
        if job.steps is not None and (type(job.steps) is not int or job.steps < 0):
            raise PolicyError("malformed message: steps are a whole number, 0 or more")
        if name in ("send", "mix") and told["config"]["secure"] is not None:
            raise PolicyError("with secret sums nothing goes among neighbours")
        store = Store(run / "states")
        given = tuple(store.get(arg) if isinstance(arg, Elsewhere) else arg for arg in args)
        asked, cost = self._asked(worker, run, blobs, given), None
        if asked:
            worker = replace(worker, place=replace(worker.place, noise=budget.seed(self.folder, asked)))
        if name == "train" or (name == "judge" and args[-1]):
            cost = budget.cost(worker.method, len(worker.federation.data(job.client).train), job.steps, asked)
            budget.check(self.policy, self.folder, cost)
        began = time.perf_counter()
        result = worker.run(Call(name, given, shared))
        seconds = time.perf_counter() - began
        if name in ("train", "mix"):
            state = result[1] if name == "train" else result
            kept = store.put(job.id, job.phase, state)
            named = [arg.key for arg in args if isinstance(arg, Elsewhere)]
            store.prune(job.id, {*head["keep"], *named})
            if name == "mix":
                return Said({}, [encode(kept)], {"hash of the state": 0})
            work = self._allowed(result[0])._replace(seconds=seconds)
            if told["config"]["secure"] is not None:
                work = self._held(worker, job, work, run)
            rest = (work._replace(update=None), kept)
            said = {f: 0 for f in Work._fields if f != "update" and getattr(work, f) is not None}
            return Said({}, [encode(work.update), encode(rest)], {**ledger.fields_of(work.update), **said}, cost)
        if name == "judge":
            if "scores" not in self.policy.server_sees:
                raise PolicyError("the policy lets no scores leave")
            return Said({}, [encode(tuple(self._scored(score) for score in result))], {"scores": 0}, cost)
        return Said({}, [encode(result)], ledger.fields_of(result))

    def _asked(self, worker: Worker, run: Path, blobs: Sequence[bytes], given: tuple[Tree, ...]) -> list[bytes]:
        """All that an answer with noise depends on: the deployment, what is asked in it, this site's state and rows.
        Nothing where there is no noise."""
        if worker.method.row_noise == "none":
            return []
        files = [(run / name).read_bytes() for name in ("told.json", "about.json", "shared.safetensors")]
        rows = worker.federation.data(given[0].client).train
        return [*files, *blobs, tr.digest((given[1:], rows.x, rows.y)).encode()]

    def _held(self, worker: Worker, job: Job, work: Work, run: Path) -> Work:
        """A job's result whose update stays here, for a secret sum: nobody else can look at it, so it is looked at
        here."""
        wrong = None if worker.check is None else worker.check.wrong(job, work.update)
        if wrong is not None:
            raise ConsilienceError(f"this site's update is no use: {': '.join(wrong)}")
        updates = Store(run / "updates")
        kept = updates.put(job.id, job.phase, work.update)
        updates.prune(job.id, ())
        assert kept is not None
        return work._replace(update=kept._replace(sha256=""), loss=float("nan"))

    def _secret(self, head: Mapping[str, Any], blobs: Sequence[bytes], run: Path) -> Said:
        """This site's part in a step of a secret sum."""
        from consilience import methods

        told = _json(run / "told.json")
        config, step = told["config"], head["step"]
        if config["secure"] is None:
            raise PolicyError("this deployment has no secret sums")
        try:
            (blob,) = blobs
            args = decode(blob, limit=self.about.max_bytes)
            recipe = args.get("recipe")
        except (DecodeError, ValueError, AttributeError) as error:
            raise PolicyError(f"malformed message: {error}") from None
        if recipe is not None and not Privacy.of(config).clips_so(recipe):
            raise PolicyError("this update is to be clipped otherwise than the deployment says")
        masking = Masking(
            run / "secret.json", told["sites"].index(self.about.name), config["secure"], self.policy.minimum_cohort
        )

        def kept(key: str) -> Tree:
            methods.make(told["method"], told["options"])  # what an update is made of is known from here on
            return Store(run / "updates").get(Elsewhere(key, ""))

        said = masking.answer(step, head["round"], args, kept)
        return Said({}, [encode(said)], {f"secret sum, {step}": tr.nbytes(said)})

    def _allowed(self, work: Work) -> Work:
        """A job's result without what the policy keeps here."""
        if "losses" not in self.policy.server_sees:
            work = work._replace(loss=float("nan"))
        if "scores" not in self.policy.server_sees:
            return work._replace(before=None, after=None)
        return work._replace(before=self._scored(work.before), after=self._scored(work.after))

    def _scored(self, score: Any) -> Any:
        if score is None:
            return None
        sees = self.policy.server_sees
        hidden = {"groups": "groups", "cluster": "statistics"}
        return score._replace(**{field: None for field, kind in hidden.items() if kind not in sees})

    def _end(self, head: Mapping[str, Any], blobs: Sequence[bytes], run: Path) -> Said:
        """The run is over: commit the last admitted state, and export what this site would deploy."""
        from consilience.exporting import write_model
        from consilience.simulate import single_thread

        told = _json(run / "told.json")
        worker, about = self._worker(told, run), _json(run / "about.json")
        client = told["sites"].index(self.about.name)
        message, name = decode(blobs[0], limit=self.about.max_bytes), decode(blobs[1])
        store = Store(run / "states")
        state = store.get(name)
        with single_thread():
            predictor = worker.personal(message, client, state)
        paths: list[Path] = []
        what = {**about, "method": told["method"], "rounds": head["round"], "client": self.about.name}
        with _readable_by_owner():
            paths = write_model(predictor, run / "export", worker.place, what) if predictor is not None else []
        store.prune(1 << 40, {name.key} if name is not None else ())
        Store(run / "updates").prune(1 << 40, ())
        return Said({"exported": bool(paths)}, [], {"exported": 0})

    def _own(self, told: Mapping[str, Any]) -> data.Own:
        """This site's rows."""
        config = told["config"]
        return data.load(
            self.about.data,
            self.folder,
            client=told["sites"].index(self.about.name),
            split=config["split"],
            seed=config["seed"],
            target=told["target"],
            task=told["task"],
            sensitive=config["sensitive"],
        )

    def _worker(self, told: Mapping[str, Any], run: Path) -> Worker:
        """The worker of a deployment, on this site's rows alone."""
        about = _json(run / "about.json")
        own = self._own(told)
        if json.loads(json.dumps(own.facts())) != _json(run / "facts.json"):
            raise PolicyError("this site's data have changed since the run began")
        shared = decode((run / "shared.safetensors").read_bytes())
        client = told["sites"].index(self.about.name)
        federation = data.Alone(
            name="deployment",
            task=data.task_of(about),
            n_clients=len(told["sites"]),
            input_shape=tuple(about["input_shape"]),
            public=shared["public"],
            client=client,
            own=own.rows(about),
        )
        return worker_of(told, federation, shared["init"], about["rows"])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One message at a time, even if two processes were started for this folder."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def worker_of(told: Mapping[str, Any], federation: Any, init: Tree, rows: int) -> Worker:
    """A worker for a deployment, the same at every site and at the server."""
    from consilience import methods
    from consilience.simulate import prepare

    config = told["config"]
    shared = {key: config[key] for key in ("model", "models", "feature_dim", "topology", "mixing", "seed")}
    method = Privacy.of(config).method(methods.make(told["method"], told["options"]))
    worker = prepare(method, federation, init=init, **shared)
    if not method.counts_rows:
        return worker
    return replace(worker, place=replace(worker.place, rows=rows))


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; the run has to begin anew here") from None


@contextmanager
def _readable_by_owner() -> Iterator[None]:
    import os

    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def failure(error: Exception) -> str:
    """One line for a message that could not be answered."""
    return str(error) if isinstance(error, ConsilienceError) else type(error).__name__


torch.set_num_threads(1)
