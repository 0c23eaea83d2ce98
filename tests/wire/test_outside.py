"""Nothing from outside is ever run: what could do that is not in the code, but where it is said why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import consilience

SOURCE = Path(consilience.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "imp"}
"""What makes objects of bytes by running code."""
CALLS = {"eval", "exec", "compile", "__import__"}
ALLOWED = {
    ("execute/ray.py", "pickle"): "what travels between a cluster's own processes, as Ray itself sends it",
}
"""(file, module) of what is there all the same, and why that is not data from outside."""


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def safe_yaml(call: ast.Call) -> bool:
    """Whether ``yaml.load`` is told a safe loader."""
    given = [*call.args[1:], *(k.value for k in call.keywords if k.arg == "Loader")]
    return any(dotted(value).endswith(("SafeLoader", "CSafeLoader")) for value in given)


def found_in(text: str) -> list[str]:
    """What a module's source does that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module in ("yaml", "torch"):
            unsafe = {"load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader"}
            found += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in unsafe]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2]
            options = {k.arg: k.value for k in node.keywords}
            if name in CALLS or name in {f"builtins.{call}" for call in CALLS}:
                found.append(name)
            if name.endswith("torch.load") and not _true(options.get("weights_only")):
                found.append("torch.load")
            if name.endswith("torch.jit.load"):
                found.append("torch.jit.load")
            if "yaml" in name and last in ("load", "load_all") and not safe_yaml(node):
                found.append("yaml.load")
            if "yaml" in name and last in ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all"):
                found.append(name)
            if last in ("load", "loadtxt", "genfromtxt") and _true(options.get("allow_pickle")):
                found.append("allow_pickle")
            if last == "read_pickle":
                found.append(name)
            if last in ("system", "popen") or _true(options.get("shell")):
                found.append(f"{name} with a shell")
    return found


def _true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_nothing_in_the_source_runs_what_it_reads() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 150
    found = {(path.relative_to(SOURCE).as_posix(), what) for path in files for what in found_in(path.read_text())}
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle", "from pickle import loads", "import os, joblib", "import torch; torch.load(p)",
        "torch.load(p, weights_only=False)", "torch.jit.load(p)", "yaml.load(t)", "yaml.load(t, Loader=yaml.Loader)",
        "yaml.unsafe_load(t)", "from yaml import load", "eval(x)", "exec(x)", "builtins.eval(x)",
        "np.load(p, allow_pickle=True)", "pd.read_pickle(p)", "os.system(x)", "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_what_would_run_it_is_found(bad: str) -> None:
    assert found_in(bad)


@pytest.mark.parametrize(
    "good",
    ["torch.load(p, weights_only=True)", "yaml.safe_load(t)", "yaml.load(t, Loader=yaml.CSafeLoader)", "model.eval()",
     "np.load(p, allow_pickle=False)", "json.loads(t)", "re.compile(t)"],
)  # fmt: skip
def test_what_does_not_is_not(good: str) -> None:
    assert not found_in(good)
