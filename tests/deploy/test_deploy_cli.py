"""``consilience deploy``: the app that it writes, and what it says when something is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from consilience.cli import main
from consilience.deploy import spec

YAML = """\
model: mlp:8
rounds: 4
lr: 0.1
deploy:
  sites: [north, south]
  timeout: 20
"""


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["deploy", *arguments])
    return int(done.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(YAML)
    return tmp_path


def test_from_a_configuration_to_folders(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("init", "fedprox:mu=0.5", "--config", "run.yaml", "--out", "app") == 0
    app = here / "app"
    assert {path.name for path in app.iterdir()} == {
        "pyproject.toml", "client_app.py", "server_app.py", "run.yaml", "server"
    }  # fmt: skip
    found = spec.read(app / "run.yaml")
    assert found.names == ("north", "south")
    assert found.run.options == {"lr": 0.1, "mu": 0.5}
    assert found.run.label == "fedprox:mu=0.5"
    assert found.run.config.rounds == 4
    assert found.section.timeout == 20
    key = str(app / "server" / "server.key.pub")
    ca = str(app / "server" / "ca.pem")
    for name in found.names:
        assert call("site", name, "--data", "rows.csv", "--server-key", key, "--ca", ca) == 0
        assert call("register", "app", name, f"{name}/site.key.pub") == 0
    found = spec.read(app / "run.yaml")
    assert all(text.startswith("ecdsa-sha2-nistp384 ") for text in found.section.sites.values())
    assert call("ledger", "north") == 2
    assert "nothing has left this site" in capsys.readouterr().err
    assert call("certificate", "app", "--host", "example.org") == 0


def test_flower_builds_the_app(here: Path) -> None:
    """Nothing of the server's folder is in it."""
    import subprocess
    import zipfile

    from consilience.deploy.processes import environment, tool

    assert call("init", "fedavg", "--config", "run.yaml", "--out", "app") == 0
    done = subprocess.run(
        [tool("flwr"), "build", "--app", "app"], env=environment(here), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout
    (fab,) = here.glob("**/*.fab")
    names = zipfile.ZipFile(fab).namelist()
    assert {"client_app.py", "server_app.py", "run.yaml"} <= set(names)
    assert not [name for name in names if "server/" in name or "key" in name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: mlp\n", "no section deploy"),
        ("deploy: {}\n", "deploy.sites"),
        ("deploy: {sites: [a], port: 3}\n", "deploy.port"),
        ("deploy: {sites: ['../a']}\n", "a site's name has letters"),
        ("deploy: {sites: [a]}\nfleet: phones\n", "fleet is for simulations"),
        ("deploy: {sites: [a, b]}\nepsilon: 3\nnoise_multiplier: 1\n", "say the same thing"),
        ("deploy: {sites: [a]}\nsecure: 0.6\n", "hides nothing"),
        ("deploy: {sites: [a]}\nattack: alie:0.2\n", "attack is for simulations"),
        ('deploy: {sites: [a]}\nrobustness: "0.1"\n', "robustness is for simulations"),
        ("deploy: {sites: [a], test: gone.csv}\n", "gone.csv: no such file"),
        ("deploy: {sites: {a: nonsense}}\n", "not a public key"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(text: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(text)
    assert call("init", "fedavg", "--config", "run.yaml", "--out", "app") == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not Path("app").exists()


def test_without_flower(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    for command in (("init", "fedavg", "--config", "run.yaml"), ("local",), ("serve", "app"), ("join", "site")):
        assert call(*command) == 2
        assert capsys.readouterr().err == "consilience: deploying needs Flower: pip install 'consilience[flower]'\n"


def test_a_site_without_a_key(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from consilience.core.errors import ConfigError
    from consilience.deploy.processes import Link

    assert call("init", "fedavg", "--config", "run.yaml", "--out", "app") == 0
    with pytest.raises(ConfigError, match="site north has no key yet: consilience deploy register"):
        Link(here / "app", "127.0.0.1", 8000).register(spec.read(here / "app" / "run.yaml").section.sites)
    assert call("join", "nowhere") == 2
    assert "no such file" in capsys.readouterr().err
