"""The folders of a deployment, as they are made: the Flower app with the server's folder, and the sites'."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from consilience.core.checkpoint import write_atomically
from consilience.core.errors import ConfigError
from consilience.core.federation import Federation, Split
from consilience.deploy import spec
from consilience.deploy.keys import make_certificates, make_key, read_public
from consilience.deploy.spec import Deployment

PYPROJECT = """\
[project]
name = "consilience-{name}"
version = "0.1.0"
description = "{method} at {n} sites, deployed by consilience"
dependencies = ["consilience[flower]"]

[tool.flwr.app]
publisher = "consilience"
fab-exclude = ["server/**"]

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
folder = ""
"""
CLIENT_APP = '''\
"""A site's half of this deployment; all of it is in the installed package."""

from consilience.deploy.apps import client_app

app = client_app()
'''
SERVER_APP = '''\
"""The server's half of this deployment; what is run is in run.yaml beside this file."""

from pathlib import Path

from consilience.deploy.apps import server_app

app = server_app(Path(__file__).parent)
'''
SERVER_NOTE = "The server's own: keys, and the run. It is not part of the app and must not leave this machine.\n"
POLICY = """\
# What this site's owner allows; the site enforces it. Remove a # to set a rule.
# data: [{data}]                  # sources that may be used
# methods: [{method}]             # methods that may run
# rounds: 100                     # most rounds of one deployment
# minimum_cohort: 3               # fewest sites whose updates are combined at once
# server_sees: [sizes, statistics, updates, sums, losses, scores, groups]   # what may leave
# epsilon: 3                      # most that all deployments may spend on a row here, with row_noise
# delta: 1.0e-5                   # at which it is counted
{}
"""


def init(deployment: Deployment, out: Path, hosts: Sequence[str] = ("localhost", "127.0.0.1")) -> Deployment:
    """Write the app into ``out`` and the server's keys and certificates into ``out/server``; returns the deployment
    with its id and the server's key. Files that the server reads go to its folder. Raises ConfigError."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give another --out")
    made = not out.exists()
    server = out / "server"
    try:
        server.mkdir(parents=True)
        section = deployment.section
        update: dict[str, Any] = {"key": make_key(server / "server.key"), "id": section.id or _new_id(deployment)}
        for what in ("test", "public"):
            source = getattr(section, what)
            if source is not None and ":" not in source:
                update[what] = _taken(Path(source), server)
        update["sites"] = {name: _key(text, name) for name, text in section.sites.items()}
        found = replace(deployment, section=section.model_copy(update=update))
        make_certificates(server, tuple(hosts))
        about = {"name": found.section.id.lower(), "method": found.run.label, "n": len(found.names)}
        write_atomically(server / "README.md", SERVER_NOTE)
        write_atomically(out / "pyproject.toml", PYPROJECT.format(**about))
        write_atomically(out / "client_app.py", CLIENT_APP)
        write_atomically(out / "server_app.py", SERVER_APP)
        found.write(out / "run.yaml")
    except BaseException:
        if made:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return found


def _new_id(deployment: Deployment) -> str:
    return f"{deployment.run.method}-{secrets.token_hex(4)}"


def _taken(source: Path, folder: Path) -> str:
    """Copy a file that the server needs into its folder; its name there."""
    if not source.is_file():
        raise ConfigError(f"{source}: no such file")
    shutil.copyfile(source, folder / source.name)
    return source.name


def _key(text: str, name: str) -> str:
    """A site's public key: itself, or in the file that is named."""
    if text and not text.startswith("ecdsa-") and Path(text).is_file():
        text = Path(text).read_text().strip()
    if text:
        read_public(text, f"deploy.sites.{name}")
    return text


def register(app: Path, name: str, key: Path) -> None:
    """Put a site's public key into the app's run.yaml. Raises ConfigError."""
    deployment = spec.read(app / "run.yaml")
    if name not in deployment.names:
        raise ConfigError(f"{name} is not among the deployment's sites ({', '.join(deployment.names)})")
    sites = {**deployment.section.sites, name: _key(str(key), name)}
    replace(deployment, section=deployment.section.model_copy(update={"sites": sites})).write(app / "run.yaml")


def make_site(folder: Path, name: str, data: str, server_key: str, server: str, ca: Path | None = None) -> str:
    """A site's folder: site.yaml, its key, a policy to fill in; returns its public key. Raises ConfigError."""
    if (folder / "site.yaml").exists():
        raise ConfigError(f"{folder} is a site's folder already")
    if Path(server_key).is_file():
        server_key = Path(server_key).read_text().strip()
    read_public(server_key, "--server-key")
    folder.mkdir(parents=True, exist_ok=True)
    if ca is not None:
        shutil.copyfile(ca, folder / "ca.pem")
    public = make_key(folder / "site.key")
    if not (folder / "policy.yaml").exists():
        policy = POLICY.replace("{data}", data).replace("{method}", "fedavg")
        write_atomically(folder / "policy.yaml", policy)
    about = {"name": name, "data": data, "server_key": server_key, "server": server}
    write_atomically(folder / "site.yaml", yaml.safe_dump(about, sort_keys=False))
    return public


def deal(federation: Federation, folders: Sequence[Path], server: Path) -> dict[str, str]:
    """Give each site the rows of one client of a federation, as data.npz in its folder, and the server the test and
    public rows; returns what of these the section ``deploy`` names."""
    for client, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        own = federation.data(client)
        _save(folder / "data.npz", federation, {"": own.train, "_valid": own.valid, "_test": own.test})
    found: dict[str, str] = {}
    server.mkdir(parents=True, exist_ok=True)
    if federation.test is not None:
        _save(server / "test.npz", federation, {"": federation.test})
        found["test"] = "test.npz"
    if federation.public is not None:
        blank = Split(federation.public, federation.rows.y[:1].repeat(len(federation.public)))  # type: ignore[attr-defined]
        _save(server / "public.npz", federation, {"": blank})
        found["public"] = "public.npz"
    return found


def _save(path: Path, federation: Federation, parts: Mapping[str, Split]) -> None:
    task = federation.task
    arrays: dict[str, Any] = {}
    for suffix, rows in parts.items():
        arrays[f"x{suffix}"], arrays[f"y{suffix}"] = rows.x.numpy(), rows.y.numpy()
        for i, name in enumerate(task.sensitive if rows.sensitive is not None else ()):
            assert rows.sensitive is not None
            words = np.array(federation.about["sensitive"][name])
            arrays[f"{name}{suffix}"] = words[rows.sensitive[:, i].numpy()]
    if task.kind == "classification":
        arrays["classes"] = np.array(task.classes or [str(c) for c in range(task.outputs)])
    np.savez(path, **arrays)
