"""Whether torch.compile gives the gradients that PyTorch gives without it, and what a step then costs.

    python benchmarks/compiled.py

For each model and each way to compile, gradients of two batch sizes are compared with plain ones in float32, the
second after the first, as a client's partial last batch comes after whole ones. Needs a C++ compiler. Results go to
``benchmarks/results/compiled.json``.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from pathlib import Path

import torch
import workloads
from torch import Tensor, nn

from consilience.core.checkpoint import write_atomically
from consilience.models import architecture

RESULTS = Path(__file__).parent / "results" / "compiled.json"
BATCHES, STEPS = (32, 24), 50
WAYS = {"default": None, "dynamic=False": False, "dynamic=True": True}


def gradients(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of the cross-entropy, by parameter."""
    return list(torch.autograd.grad(nn.functional.cross_entropy(module(x), y), list(module.parameters())))


def difference(plain: list[Tensor], other: list[Tensor]) -> float:
    """The largest norm of a parameter's difference, in norms of its plain gradient."""
    return max(float((b - a).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(plain, other, strict=True))


def step_ms(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Milliseconds of a gradient, best of several tries."""
    best = float("inf")
    for _ in range(STEPS):
        began = time.perf_counter()
        gradients(module, x, y)
        best = min(best, time.perf_counter() - began)
    return 1000 * best


def main() -> None:
    """Compare, print and keep."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        sys.exit("torch.compile needs a C++ compiler on a CPU, and there is no g++, clang++ or c++ on the path")
    torch.set_num_threads(1)
    found: dict[str, object] = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    channels_last = architecture("lenet", (1, 28, 28), 10).build()
    models = {"mlp": workloads.mlp(), "lenet": workloads.lenet(), "lenet, channels-last": channels_last}
    for name, plain in models.items():
        draw = torch.Generator().manual_seed(0)
        rows = [(torch.randn(n, 1, 28, 28, generator=draw), torch.arange(n) % 10) for n in BATCHES]
        line: dict[str, object] = {"plain": {"step_ms": step_ms(plain, *rows[0])}}
        for way, dynamic in WAYS.items():
            torch._dynamo.reset()
            module = torch.compile(copy.deepcopy(plain), dynamic=dynamic)
            off = [difference(gradients(plain, *batch), gradients(module, *batch)) for batch in rows]
            line[way] = {"differences": dict(zip(BATCHES, off, strict=True)), "step_ms": step_ms(module, *rows[0])}
        found[name] = line
        print(name, json.dumps(line), flush=True)
    write_atomically(RESULTS, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
