"""The documentation is true: its Python runs, its generated parts are current, its commands and paths exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consilience import experiment, methods
from consilience.config import COMPARE_KEYS, TRAINING, Config, Settings, settle

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """A page's code blocks in a language: (title, text)."""
    return [(m[2] or "", m[3]) for m in BLOCK.finditer(page.read_text("utf-8")) if m[1] == language]


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/quickstart.md",
        "docs/data.md",
        "docs/heterogeneity.md",
        "docs/api.md",
        "docs/personalisation.md",
    ],
)
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(ROOT / name, "python")
    assert found
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "page"}
    for _, text in found:
        exec(compile(text, name, "exec"), space)


@pytest.mark.slow
def test_the_tutorial_can_be_followed(tmp_path: Path) -> None:
    """Its Python and its commands, in their order, with fewer rounds and seeds."""
    text = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    less = {"--rounds 30": "--rounds 2", "--seeds 10": "--seeds 2"}
    done = 0
    for match in BLOCK.finditer(text):
        lines = match[3].splitlines() if match[1] == "console" else []
        steps = [[sys.executable, "-c", match[3]]] if match[1] == "python" else []
        for line in lines:
            if line.startswith("$ "):
                for many, few in less.items():
                    line = line.replace(many, few)
                steps.append([sys.executable, "-m", *shlex.split(line[2:])])
        for step in steps:
            ran = subprocess.run(step, cwd=tmp_path, text=True, capture_output=True, check=False)
            assert ran.returncode == 0, (step, ran.stderr)
            done += 1
    assert done == 9
    for file in ("risk.csv", "runs/ward/tables/leaderboard.tex", "runs/ward/fedadam-seed0/export/config.json"):
        assert (tmp_path / file).is_file()


@pytest.mark.slow
def test_the_deployment_can_be_followed(tmp_path: Path) -> None:
    """The hospitals' walk: files, Python and commands in their order; the sites run beside the server."""
    pytest.importorskip("flwr")
    less = {"--rounds 20": "--rounds 2", "--seeds 3": "--seeds 2", "18000": str(free_port())}
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8").partition("## Try it in one command")[0]
    sites: list[subprocess.Popen[bytes]] = []
    run = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT / "src")}}
    try:
        for match in BLOCK.finditer(text):
            if match[2]:
                (tmp_path / match[2]).write_text(match[3], "utf-8")
            steps = [[sys.executable, "-c", match[3]]] if match[1] == "python" else []
            for line in match[3].splitlines() if match[1] == "console" else []:
                if line.startswith("$ "):
                    for many, few in less.items():
                        line = line.replace(many, few)
                    steps.append([sys.executable, "-m", "consilience.cli", *shlex.split(line[2:])[1:]])
            for step in steps:
                if "join" in step:
                    sites.append(subprocess.Popen(step, **run))  # type: ignore[call-overload]
                    continue
                ran = subprocess.run(step, text=True, capture_output=True, check=False, **run)  # type: ignore[call-overload]
                assert ran.returncode == 0, (step, ran.stdout, ran.stderr)
    finally:
        for site in sites:
            site.terminate()
        assert [site.wait(60) for site in sites] == [0, 0, 0]
    assert len(sites) == 3
    assert (tmp_path / "ward/server/run/report.html").is_file()
    history = (tmp_path / "ward/server/run/history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["global"]["accuracy"] > 0.6
    for name in ("private", "public", "self"):
        assert list((tmp_path / "hospitals" / name / "runs").glob("*/export/model.safetensors"))


def free_port() -> int:
    from consilience.deploy.processes import free_port

    return free_port()


def test_design_shows_the_real_interface() -> None:
    (_, text), *_ = blocks(ROOT / "docs" / "design.md", "python")
    (shown,) = ast.parse(text).body
    assert isinstance(shown, ast.ClassDef)
    real = ast.parse((ROOT / "src" / "consilience" / "core" / "method.py").read_text("utf-8")).body
    (cls,) = (node for node in real if isinstance(node, ast.ClassDef) and node.name == "Method")
    functions = {node.name: [a.arg for a in node.args.args] for node in cls.body if isinstance(node, ast.FunctionDef)}
    for node in shown.body:
        if isinstance(node, ast.FunctionDef):
            assert [a.arg for a in node.args.args] == functions[node.name], node.name
        else:
            assert isinstance(node, ast.AnnAssign)
            assert isinstance(node.target, ast.Name)
            assert hasattr(methods.get("fedavg"), node.target.id)


def test_the_worked_example_works(tmp_path: Path) -> None:
    """The pieces of CONTRIBUTING.md, put into a copy of the package: its own test and the conformance suite pass."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", ".mypy_cache"))
    conformance, slow = ROOT / "tests" / "conformance", shutil.ignore_patterns("__pycache__", "test_dying.py")
    shutil.copytree(conformance, tmp_path / "tests" / "conformance", ignore=slow)
    for title, text in blocks(ROOT / "CONTRIBUTING.md", "python"):
        path = tmp_path / title
        if path.name == "__init__.py":
            registry = path.read_text("utf-8")
            assert registry.count("_WHERE = {\n") == 1
            path.write_text(registry.replace("_WHERE = {\n", "_WHERE = {\n" + text), "utf-8")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error",
         "-c", os.devnull, "-o", "markers=slow: takes long", "--rootdir", str(tmp_path), str(tmp_path / "tests"), "-k",
         "fedexp"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")}, cwd=tmp_path, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 7, done.stdout


def generate() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current() -> None:
    for path, text in generate().files().items():
        assert path.is_file(), f"{path}: run `python docs/generate.py`"
        assert path.read_text("utf-8") == text, f"{path}: run `python docs/generate.py`"


def test_no_page_of_a_method_that_is_gone() -> None:
    assert {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} == set(methods.NAMES)


def test_every_method_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    for name in methods.NAMES:
        assert f"methods/{name}.md" in nav


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for language in ("sh", "console"):
            for _, text in blocks(page, language):
                lines = [line.removeprefix("$ ") for line in text.splitlines() if language == "sh" or line[:2] == "$ "]
                found += [line for line in lines if line.startswith("consilience ")]
    return sorted(set(found))


def test_there_are_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("command", commands())
def test_commands_are_right(command: str) -> None:
    """Every command in the pages has known options, right values, and methods that exist."""
    import typer

    from consilience.cli import app

    known = typer.main.get_command(app)
    assert hasattr(known, "commands")
    _, name, *rest = shlex.split(command, comments=True)
    assert name in known.commands
    if name not in ("run", "compare", "profile", "plan"):
        return
    options: dict[str, str] = {}
    names = []
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            options[word[2:].replace("-", "_")] = rest.pop(0)
        else:
            names.append(word)
    options.pop("config", None)
    own = {
        key: options.pop(key)
        for key in list(options)
        if key not in {*Config.model_fields, *TRAINING, *COMPARE_KEYS, "federation"}
    }
    assert name == "run" or not own
    if "federation" in options:
        options["federations"] = [options.pop("federation")]  # type: ignore[assignment]
    settings = settle(options)
    for text in names:
        assert methods.get(text.partition(":")[0]).options().keys() >= own.keys()
    if names and text != "fedexp":
        assert experiment.specs(settings, names)


def test_configuration_file_is_right(tmp_path: Path) -> None:
    ((_, text),) = blocks(ROOT / "docs" / "configuration.md", "yaml")
    (tmp_path / "study.yaml").write_text(text, "utf-8")
    settings = settle({}, tmp_path / "study.yaml")
    assert len(experiment.specs(settings, settings.methods)) == 6


def test_the_small_partition_file_is_right(tmp_path: Path) -> None:
    from consilience import make_federation

    ((_, text),) = blocks(ROOT / "docs" / "data.md", "json")
    (tmp_path / "own.json").write_text(text, "utf-8")
    federation = make_federation("digits", partition=str(tmp_path / "own.json"))
    assert [federation.size(client) for client in range(federation.n_clients)] == [3, 2]


def keys(value: Any) -> set[str]:
    """The keys of nested objects; not those of lists' entries, which are named apart."""
    if not isinstance(value, dict):
        return set()
    return set(value) | {key for child in value.values() for key in keys(child)}


def test_every_file_and_key_is_described(tmp_path: Path) -> None:
    import yaml

    text = (ROOT / "docs" / "files.md").read_text("utf-8")
    told = {part for code in re.findall(r"`([^`]+)`", text) for part in (code, *re.split(r"[./]", code))}
    folder = tmp_path / "both"
    options = {"clients": "5", "rounds": "2", "model": "mlp:8", "unseen": "1", "seeds": "2", "executor": "serial"}
    experiment.compare(settle(options), ["fedavg", "local"], folder, command="x", on_line=lambda label, line: None)
    run = folder / "fedavg-seed0"
    from consilience.exporting import export

    export(run, run / "export")
    for path in sorted([*folder.glob("*.*"), *(p for p in run.rglob("*") if p.is_file())]):
        assert path.name in told or path.parent.name == "checkpoint", path
        if path.suffix == ".jsonl":
            found = {key for line in path.read_text().splitlines() for key in keys(json.loads(line))}
        elif path.suffix == ".json":
            value = json.loads(path.read_text())
            found = keys(value[0] if isinstance(value, list) else value)
            if path.name == "partition.json":
                found |= keys(value["clients"][0])
        elif path.suffix == ".yaml":
            found = keys(yaml.safe_load(path.read_text())) - set(Settings(Config(), {}).flat()) - set(TRAINING)
        else:
            continue
        assert found <= told, f"{path.name}: docs/files.md does not tell {sorted(found - told)}"


def test_every_key_of_a_profile_is_described(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "files.md").read_text("utf-8")
    told = set(re.findall(r"`(\w+)`", text))
    found = experiment.profile(settle({"clients": "3", "partition": "shards:4"}).config, tmp_path / "p", command="x")
    inner = [found["clients"][0], found["identities"][0], *found["suggestions"][:1]]
    assert set().union(*map(keys, [found, *inner])) <= told


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" not in target
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|src|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists() or "fedexp" in path, path


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(methods.NAMES)
    for page in pages:
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://", page.read_text("utf-8")), page
