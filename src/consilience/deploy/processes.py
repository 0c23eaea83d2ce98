"""Flower's processes: a SuperLink with the server's half, SuperNodes with the sites', started, watched and ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError, ConsilienceError
from consilience.deploy import server as server_side
from consilience.deploy.keys import expired
from consilience.deploy.site import read_about

START = 90.0
"""Seconds in which a SuperLink must answer."""
RESTARTS = 3
"""Times that a server's process that died is started again, to go on from its checkpoint."""
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONWARNINGS": "ignore"}
REASONS = (
    (r"certificate has expired", "the server's certificate has expired"),
    (r"unable to get local issuer|self.signed|certificate signature failure|CERTIFICATE_VERIFY_FAILED",
     "the server's certificate is not from the authority in ca.pem"),
    (r"mismatch.*(?:address|host)|(?:address|host)name mismatch|doesn't match",
     "the server's certificate is for another host"),
    (r"code: 2001|must be registered", "this site's key is not registered at the server"),
    (r"code: 2004|Failed to activate", "the server does not take this site's key: not registered, or online already"),
    (r"[Aa]ddress already in use", "its port is in use"),
    (r"[Vv]ersion.{0,40}(?:mismatch|incompatible)|incompatible.{0,40}[Vv]ersion", "Flower's versions do not fit"),
)  # fmt: skip
"""What Flower's logs say, and what it means."""


def tool(name: str) -> str:
    """A program of Flower's. Raises ConfigError where it is missing."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(f"{name} is not beside {sys.executable}: pip install 'consilience[flower]'")
    return str(path)


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Process:
    """A program with its log, in a session of its own, so that all it starts ends with it. folder: where a site's
    loader function may be found."""

    name: str
    command: Sequence[str]
    home: Path
    folder: Path | None = None
    _process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What it says."""
        return self.home / f"{self.name}.log"

    def start(self) -> None:
        """Start it."""
        self.home.mkdir(parents=True, exist_ok=True)
        env = {**environment(self.home), "PYTHONPATH": _path(self.folder)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True,
                cwd=self.home,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its id."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def why(self) -> str:
        """Why it ended, as far as its log tells."""
        text = self.log.read_text(errors="replace")[-20000:] if self.log.exists() else ""
        for pattern, words in REASONS:
            if re.search(pattern, text):
                return words
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"it ended ({lines[-1] if lines else 'without a word'}); see {self.log}"

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process is not None:
            self._process.terminate()

    def end(self, seconds: float = 10.0) -> None:
        """Ask it to end; after so many seconds, make it."""
        if self._process is None:
            return
        if self.alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pid in self._family():  # Flower starts some in sessions of their own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + seconds
        while self._family() and time.monotonic() < until:
            time.sleep(0.05)

    def _family(self) -> list[int]:
        """Processes that this one has started, or their own, as the folder in their environment tells (on Linux)."""
        mark = f"FLWR_HOME={self.home.resolve() / 'flwr'}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            pid = int(path.parent.name)
            with contextlib.suppress(OSError):
                if mark in path.read_bytes() and pid != os.getpid() and running(pid):
                    found.append(pid)
        return found


class Link:
    """The server's side: a SuperLink that listens at ``host:port``, and the run that is submitted to it."""

    def __init__(self, app: Path, host: str, port: int) -> None:
        self.app, self.folder, self.host, self.port = app.resolve(), app.resolve() / "server", host, port
        server_side.check_key(self.folder)
        over = expired(self.folder / "tls.pem")
        if over is not None:
            raise ConfigError(f"{self.folder / 'tls.pem'}: the server's certificate expired on {over}; "
                              f"`consilience deploy certificate {app}` makes a new one")  # fmt: skip
        self.address = f"127.0.0.1:{port}" if host in ("0.0.0.0", "127.0.0.1") else f"{host}:{port}"
        command = [
            tool("flower-superlink"), "--ssl-ca-certfile", str(self.folder / "ca.pem"),
            "--ssl-certfile", str(self.folder / "tls.pem"), "--ssl-keyfile", str(self.folder / "tls.key"),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--database", str(self.folder / "superlink.db"), "--host", host, "--port", str(port),
        ]  # fmt: skip
        self.process = Process("superlink", command, self.folder)
        self._starts = 0

    def start(self) -> None:
        """Start it, and wait until it answers. Raises ConsilienceError."""
        self.process.start()
        until = time.monotonic() + START
        while not self._healthy():
            if not self.process.alive:
                raise ConsilienceError(f"the server cannot listen at {self.address}: {self.process.why()}")
            if time.monotonic() > until:
                raise ConsilienceError(f"the SuperLink at {self.address} did not answer in {START:g} s")
            time.sleep(0.2)
        config = (
            f'[superlink]\ndefault = "fed"\n\n[superlink.fed]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.folder / "ca.pem"}"\n'
        )
        (self.folder / "flwr").mkdir(exist_ok=True)
        write_atomically(self.folder / "flwr" / "config.toml", config)

    def _healthy(self) -> bool:
        import ssl

        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        try:
            with urllib.request.urlopen(f"https://{self.address}/health", timeout=5, context=context) as reply:
                return bool(reply.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def flwr(self, *arguments: str) -> str:
        """Run Flower's command line against this SuperLink. Raises ConsilienceError."""
        env = {**environment(self.folder), "NO_COLOR": "1", "COLUMNS": "200"}
        done = subprocess.run(
            [tool("flwr"), *arguments], env=env, text=True, capture_output=True, check=False, timeout=300
        )  # fmt: skip
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise ConsilienceError(f"flwr {arguments[0]} failed: {said[-300:]}")
        return done.stdout

    def register(self, keys: dict[str, str]) -> None:
        """Let the sites with these public keys join. Those that may already stay so."""
        for name, key in keys.items():
            if not key:
                raise ConfigError(f"site {name} has no key yet: consilience deploy register {self.app} {name} KEY.pub")
            path = self.folder / f"{name}.pub"
            if path.exists() and path.read_text().strip() == key:
                continue
            write_atomically(self.folder / "new.pub", key + "\n")
            try:
                self.flwr("supernode", "register", str(self.folder / "new.pub"), "fed")
            except ConsilienceError as error:
                if "already" not in str(error):
                    raise
            (self.folder / "new.pub").replace(path)

    def submit(self) -> None:
        """Start the server's half; once more, it goes on from its checkpoint."""
        self._starts += 1
        (self.folder / "server.pid").unlink(missing_ok=True)
        found = self.flwr("run", str(self.app), "fed", "--run-config", f'folder="{self.folder}"', "--format", "json")
        write_atomically(self.folder / "submitted.json", found)

    def over(self) -> bool:
        """Whether the run is done. A process that died is started again. Raises ConsilienceError where the run has
        failed, in one clear line."""
        why = server_side.failed(self.folder)
        if why is not None:
            raise ConsilienceError(why)
        if (self.folder / "done.txt").exists():
            return True
        if not self.process.alive:
            raise ConsilienceError(f"the SuperLink stopped: {self.process.why()}; start again, and the run goes on")
        pid = self.folder / "server.pid"
        if pid.exists() and not running(int(pid.read_text())):
            why = server_side.failed(self.folder)  # it may just have told
            if why is None and not (self.folder / "done.txt").exists():
                if self._starts > RESTARTS:
                    raise ConsilienceError(f"the server's process died {self._starts} times; see {self.process.log}")
                server_side.note(self.folder, "", "the server's process died; it goes on from its checkpoint")
                self.submit()
        return False


class Node:
    """A site's side: a SuperNode for a site's folder, started again when its connection was refused for a while."""

    def __init__(self, folder: Path, patience: float = 120.0) -> None:
        self.folder = folder.resolve()
        about = read_about(self.folder)
        self.name, self.patience = about.name, patience
        ca = self.folder / "ca.pem"
        if not ca.exists():
            raise ConfigError(f"{ca}: the server's authority is missing; get ca.pem from the server")
        command = [
            tool("flower-supernode"), "--root-certificates", str(ca), "--superlink", about.server,
            "--auth-supernode-private-key", str(self.folder / "site.key"), "--port", str(free_port()),
            "--node-config", f'folder="{self.folder}"',
        ]  # fmt: skip
        self.process = Process("supernode", command, self.folder, self.folder)
        self._refused: float | None = None
        self._next = 0.0

    def start(self) -> None:
        """Start it."""
        self.process.log.unlink(missing_ok=True)
        self.process.start()

    def watch(self) -> str | None:
        """Start it again if it died; what happened, in a sentence. Raises ConsilienceError if it is no use."""
        now = time.monotonic()
        if self.process.alive or now < self._next:
            return None
        why = self.process.why()
        if "certificate" in why or "versions" in why:
            raise ConsilienceError(f"site {self.name} cannot join: {why}")
        self._refused = self._refused or now
        if "key" in why and now - self._refused > self.patience:
            raise ConsilienceError(f"site {self.name} cannot join: {why}")
        self._next = now + 5.0
        self.start()
        return f"site {self.name}'s SuperNode is started again: {why}"


def environment(home: Path) -> dict[str, str]:
    """What Flower's programs are given: its folder, its other programs, no news to anybody."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, **QUIET, "FLWR_HOME": str(home.resolve() / "flwr"), "PATH": path}


def _path(folder: Path | None) -> str:
    """PYTHONPATH for another working directory, with ``folder``."""
    given = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join([*given, *([] if folder is None else [str(folder)])])


def running(pid: int) -> bool:
    """Whether a process runs (one that waits to be buried does not)."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True


def run_id(folder: Path) -> Any:
    """Flower's number of the run that was submitted last."""
    return json.loads((folder / "submitted.json").read_text()).get("run-id")
