"""Real processes on loopback: SuperLink, SuperNodes, TLS, node authentication; killed, refused, captured and resent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilience import experiment
from consilience.config import settle
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.deploy import keys, ledger, local
from consilience.deploy.processes import Link, Node, running
from consilience.deploy.server import EVENTS
from consilience.exporting import digest
from consilience.folder import read_lines

OPTIONS = {"clients": "2", "rounds": "3", "model": "mlp:16", "partition": "dirichlet:0.5", "eval_clients_every": "0"}
MINUTE = 60.0
LOADER = """\
import os, signal, time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def rows():
    if (HERE / "kill").exists():
        (HERE / "kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    while (HERE / "wait").exists():
        time.sleep(0.1)
    return dict(np.load(HERE / "data.npz"))
"""


class Run:
    """A deployment of two sites on this machine, run in a thread."""

    def __init__(self, root: Path, method: str, **options: Any) -> None:
        section = options.pop("section", {})
        (self.spec,) = experiment.specs(settle({**OPTIONS, **options}), [method])
        self.root = root
        self.app, self.sites = local.lay_out(self.spec, 2, root / "deployed", section)
        for folder in self.sites:
            (folder / f"loader_{folder.name}.py").write_text(LOADER)
            text = (folder / "site.yaml").read_text()
            (folder / "site.yaml").write_text(text.replace("data.npz", f"loader_{folder.name}:rows"))
        self.said: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def folder(self) -> Path:
        return self.app / "server" / "run"

    def _run(self) -> None:
        try:
            local.run_all(self.app, self.sites, self.said.append, lambda line: None)
        except BaseException as error:
            self.error = error

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, minutes: float = 8) -> None:
        """Wait for the end; no process is left behind."""
        self._thread.join(minutes * MINUTE)
        assert not self._thread.is_alive(), self.said
        assert not processes_of(self.root)
        if self.error is not None:
            raise self.error

    def until(self, what: Callable[[], Any], minutes: float = 5) -> Any:
        """Wait for something to be so."""
        over = time.monotonic() + minutes * MINUTE
        while time.monotonic() < over:
            found = what()
            if found:
                return found
            assert self._thread.is_alive(), (self.error, self.said)
            time.sleep(0.1)
        raise AssertionError(self.said)

    def rounds(self) -> int:
        return len(read_lines(self.folder / "history.jsonl"))

    def simulate(self, **more: Any) -> Any:
        config = self.spec.config.model_copy(update={"executor": "serial", **more})
        spec = experiment.RunSpec(self.spec.label, self.spec.method, self.spec.options, config)
        return experiment.execute(spec, self.root / "simulated")

    def same(self) -> None:
        """The deployed run's server and clients lines are the simulated one's."""
        assert digest(self.folder).split("\n")[:2] == self.simulate().digest.split("\n")[:2]


def processes_of(root: Path) -> list[int]:
    """Processes that were started for a deployment under ``root`` and run still."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if str(root).encode() in words and int(path.name) != os.getpid() and running(int(path.name)):
                found.append(int(path.name))
    return found


def told(run: Run) -> list[str]:
    return [f"{event['site']} {event['what']}" for event in read_lines(run.app / "server" / EVENTS)]


def test_a_deployment_is_the_simulation_in_other_places(tmp_path: Path) -> None:
    run = Run(tmp_path, "scaffold", rounds="2")
    run.start()
    run.end()
    run.same()
    assert len(read_lines(run.folder / "history.jsonl")) == 2
    assert (run.folder / "report.html").is_file()
    for site in run.sites:
        assert list((site / "runs").glob("*/export/model.safetensors"))
        assert {line["message"] for line in ledger.read(site)} >= {"hello", "begin", "train", "end"}


@pytest.mark.slow
def test_a_site_that_is_killed_at_its_work(tmp_path: Path) -> None:
    """SIGKILL of the process that trains, and of the SuperNode: both come back, and the bits are the same."""
    run = Run(tmp_path, "scaffold")
    run.start()
    run.until(lambda: run.rounds() == 1)
    (run.sites[0] / "kill").touch()
    run.until(lambda: not (run.sites[0] / "kill").exists())
    run.until(lambda: run.rounds() == 2)
    (run.sites[1] / "wait").touch()
    node = run.until(lambda: [p for p in processes_of(run.sites[1]) if b"flower-supernode" in cmdline(p)])
    for pid in node:
        os.kill(pid, signal.SIGKILL)
    (run.sites[1] / "wait").unlink()
    run.end()
    run.same()
    assert any("SuperNode is started again" in line for line in run.said)


def cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.slow
def test_a_server_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the server's process in the middle of a round: it goes on at that round, to the same bits."""
    run = Run(tmp_path, "scaffold")
    run.start()
    run.until(lambda: (run.folder / "checkpoint" / "00000001.json").exists())
    (run.sites[0] / "wait").touch()  # its job of the second round takes until the server is dead
    os.kill(int((run.app / "server" / "server.pid").read_text()), signal.SIGKILL)
    run.until(lambda: any("the server's process died" in line for line in run.said))
    (run.sites[0] / "wait").unlink()
    run.end()
    run.same()
    assert any("goes on after round" in line for line in told(run))
    assert [line["round"] for line in read_lines(run.folder / "history.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_secret_sums_when_the_server_is_killed(tmp_path: Path) -> None:
    """Each message is answered by a process of its own, from what the site has on disk."""
    run = Run(tmp_path, "scaffold", secure="0.6")
    run.start()
    sessions = lambda: [p for site in run.sites for p in site.glob("runs/*/secret.json")]  # noqa: E731
    run.until(lambda: any(json.loads(p.read_text())["round"] == 2 for p in sessions()))
    os.kill(int((run.app / "server" / "server.pid").read_text()), signal.SIGKILL)
    run.end()
    run.same()
    assert any("goes on after round 1" in line for line in told(run))
    assert all("delta" not in line.get("fields", {}) for site in run.sites for line in ledger.read(site))


@pytest.mark.slow
def test_everything_is_killed_and_started_again(tmp_path: Path) -> None:
    """The server's whole machine and both sites die in the middle of a round; started again, nothing is lost."""
    run = Run(tmp_path, "scaffold")
    run.start()
    run.until(lambda: run.rounds() == 1)
    for pid in processes_of(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(ConsilienceError, match="SuperLink stopped"):
        run.end()
    run.error = None
    run.start()
    run.end()
    run.same()


@pytest.mark.slow
def test_buffered_and_replayed(tmp_path: Path) -> None:
    run = Run(tmp_path, "fedbuff:buffer=1", rounds="4")
    run.start()
    run.end()
    again = run.simulate(replay=str(run.folder / "arrivals.jsonl"))
    assert digest(run.folder) == again.digest


@pytest.mark.slow
def test_a_site_that_does_not_answer_in_time(tmp_path: Path) -> None:
    """It is left out of the round; a late answer is not used."""
    run = Run(tmp_path, "scaffold", section={"timeout": 30.0})
    run.start()
    run.until(lambda: run.rounds() == 1)
    (run.sites[1] / "wait").touch()
    run.until(lambda: any("did not answer in time" in line for line in told(run)))
    (run.sites[1] / "wait").unlink()
    run.end()
    assert [line["round"] for line in read_lines(run.folder / "history.jsonl")] == [1, 2, 3]
    again = run.simulate(replay=str(run.folder / "arrivals.jsonl"))
    assert digest(run.folder).split("\n")[:2] == again.digest.split("\n")[:2]


@pytest.mark.slow
def test_certificates_that_are_wrong(tmp_path: Path) -> None:
    run = Run(tmp_path, "fedavg")
    server = run.app / "server"
    shutil.copytree(server, tmp_path / "kept")
    keys.make_certificates(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca.pem", run.sites[0] / "ca.pem")
    run.start()
    with pytest.raises(ConsilienceError, match=r"site site1 cannot join: the server's certificate is not from"):
        run.end()
    keys.make_certificates(server, days=-1)
    with pytest.raises(ConfigError, match=r"tls.pem: the server's certificate expired on \d{4}-"):
        Link(run.app, "127.0.0.1", 8000)


@pytest.mark.slow
def test_an_expired_certificate_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server does not look (it ran out while it ran), the sites do."""
    run = Run(tmp_path, "fedavg")
    keys.make_certificates(run.app / "server", days=-1)
    monkeypatch.setattr("consilience.deploy.processes.expired", lambda path: None)
    monkeypatch.setattr(Link, "_healthy", lambda self: True)
    monkeypatch.setattr(Link, "register", lambda self, sites: None)
    monkeypatch.setattr(Link, "submit", lambda self: None)
    run.start()
    with pytest.raises(ConsilienceError, match=r"site site\d cannot join: the server's certificate has expired"):
        run.end()


@pytest.mark.slow
def test_a_site_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, "fedavg")
    known = Link.register
    monkeypatch.setattr(Link, "register", lambda self, sites: known(self, {"site1": sites["site1"]}))
    start = Node.__init__
    monkeypatch.setattr(Node, "__init__", lambda self, folder: start(self, folder, patience=5.0))
    run.start()
    with pytest.raises(ConsilienceError, match=r"site site2 cannot join: .*key"):
        run.end()


@pytest.fixture
def attacker(tmp_path: Path) -> Path:
    """A Flower app that sends captured messages to every node, and writes down what it gets."""
    folder = tmp_path / "attacker"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "attacker"\nversion = "0.1.0"\ndependencies = []\n[tool.flwr.app]\npublisher = "nobody"\n'
        '[tool.flwr.app.components]\nserverapp = "attack:app"\nclientapp = "client:app"\n'
        '[tool.flwr.app.config]\nfolder = ""\n'
    )
    (folder / "client.py").write_text("from consilience.deploy.apps import client_app\n\napp = client_app()\n")
    (folder / "attack.py").write_text(
        "import json, pickle, time\nfrom pathlib import Path\n\nfrom flwr.serverapp import ServerApp\n\n"
        "from consilience.deploy.apps import GridWire\nfrom consilience.deploy.seal import Sealed\n\n"
        "app = ServerApp()\n\n\n@app.main()\ndef main(grid, context):\n"
        "    folder = Path(context.run_config['folder'])\n    wire, found = GridWire(grid), []\n"
        "    while len(wire.nodes()) < 2:\n        time.sleep(0.2)\n"
        "    for path in sorted(folder.glob('*.captured')):\n"
        "        message = Sealed(*pickle.loads(path.read_bytes()))\n"
        "        for node in wire.nodes():\n"
        "            sent = wire.push(node, message, 60.0, '0')\n            reply = []\n"
        "            while not reply:\n                time.sleep(0.2)\n                reply = wire.pull([sent])\n"
        "            found.append([path.stem, repr(reply[0][1])])\n"
        "    (folder / 'found.json').write_text(json.dumps(found))\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_captured_messages_sent_again(tmp_path: Path, attacker: Path) -> None:
    """Whoever can submit to the SuperLink can send captured messages once more: the sites do not take them."""
    import pickle

    run = Run(tmp_path, "fedavg", rounds="2")
    capture = tmp_path / "capture.py"
    capture.write_text(
        "import pickle, sys, time\nfrom pathlib import Path\nimport consilience.deploy.apps as apps\n"
        "push = apps.GridWire.push\n\n\ndef tapped(self, node, message, seconds, group):\n"
        f"    path = Path({str(attacker)!r}) / f'{{time.time_ns()}}.captured'\n"
        "    path.write_bytes(pickle.dumps(tuple(message)))\n    return push(self, node, message, seconds, group)\n\n\n"
        "apps.GridWire.push = tapped\n"
    )
    server = run.app / "server_app.py"
    server.write_text(f"exec(open({str(capture)!r}).read())\n" + server.read_text())
    run.start()
    run.end()
    captured = sorted(attacker.glob("*.captured"))
    assert len(captured) >= 8
    message = pickle.loads(captured[-1].read_bytes())
    (attacker / "9-changed.captured").write_bytes(pickle.dumps((message[0].replace(b"2", b"3"), *message[1:])))
    before = [len(ledger.read(site)) for site in run.sites]
    link = Link(run.app, "127.0.0.1", int(local.spec_port(run.sites[0])))
    nodes = [Node(site) for site in run.sites]
    with contextlib.ExitStack() as stack:
        stack.callback(link.process.end)
        link.start()
        for node in nodes:
            stack.callback(node.process.end)
            node.start()
        time.sleep(15)
        link.flwr("run", str(attacker), "fed", "--run-config", f'folder="{attacker}"', "--format", "json")
        over = time.monotonic() + 20 * MINUTE
        while not (attacker / "found.json").exists():
            assert time.monotonic() < over
            time.sleep(0.5)
    found = json.loads((attacker / "found.json").read_text())
    assert found
    assert [what for _, what in found if "Trouble" not in what] == []
    assert any("unauthenticated" in what for name, what in found if name == "9-changed")
    for site, lines in zip(run.sites, before, strict=True):
        new = ledger.read(site)[lines:]
        assert new
        assert all("refused" in line and "bytes" not in line for line in new)
