"""The environments of other frameworks: each in a folder of its own under ``benchmarks/.cache``, made on first use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache"
TORCH = "torch==2.13.0"
"""The same PyTorch for everybody."""


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={os.cpu_count()}")


@dataclass(frozen=True)
class Peer:
    """Another framework.

    packages: what pip installs, together with PyTorch. alone: installed without dependencies and whatever Python it
    asks for. launch: what Python runs the script by. newer: the folder of a package for Python 3.14, which is
    rewritten for an older one.
    """

    script: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    launch: tuple[str, ...] = ()
    newer: str | None = None


PEERS = {
    "flower": Peer("with_flower.py", ("flwr==1.42.0", "ray==2.60.0")),
    "pfl": Peer("with_pfl.py", ("pfl[pytorch]==0.6.0",), launch=TORCHRUN),
    "blazefl": Peer("with_blazefl.py", ("numpy==2.4.6", "tqdm==4.70.1"), alone=("blazefl==3.0.0",), newer="blazefl"),
    "fedlab": Peer("with_fedlab.py", ("fedlab==1.3.0",)),
}


def command(name: str) -> list[str]:
    """How to run a peer's script, without its arguments. Installs the peer if need be."""
    return [str(python(name)), *PEERS[name].launch, str(HERE / PEERS[name].script)]


def environment() -> dict[str, str]:
    """Variables for a peer's process: our data and models can be imported, and nothing reports home."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    equal = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}  # or Ray's workers would give way to others
    return {**os.environ, **quiet, **equal, "PYTHONPATH": str(HERE.parent)}


def python(name: str) -> Path:
    """The Python of a peer's environment, which is made anew when the wanted versions have changed."""
    peer, folder = PEERS[name], CACHE / name
    found, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join([TORCH, *peer.packages, *peer.alone])
    if done.exists() and done.read_text() == wanted:
        return found
    print(f"installing {name} into {folder} ...", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH, *peer.packages], check=True)
    if peer.alone:
        subprocess.run([*pip, "--no-deps", "--ignore-requires-python", *peer.alone], check=True)
    if peer.newer and sys.version_info < (3, 14):
        _older(next(folder.glob("lib/python*/site-packages")) / peer.newer)
    done.write_text(wanted)
    return found


def _older(package: Path) -> None:
    """Let a package for Python 3.14 run on this one: annotations are not evaluated, and generic functions
    (``def f[T](x: T)``) are written without their variable. What it computes stays as it is."""
    for path in package.rglob("*.py"):
        text = re.sub(r"^(def \w+)\[T\]\(", r"\1(", path.read_text(), flags=re.MULTILINE)
        path.write_text(f"from __future__ import annotations\n{text}")
