"""The floor of a federated simulation: what is left when everything but the arithmetic is taken away.

    python benchmarks/floor.py w1 --rounds 20 --layout contiguous

Two forked processes of one thread hold all data in memory and train half of a round's clients each with plain
SGD, in eager PyTorch as anybody would write it; each adds up what its clients made, so that two state dicts travel
a round, however many clients there are. The parent averages, and lets the two test half of the global test set
each. No history, no messages, no checks, no checkpoints. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time

import torch
from torch import nn
from workloads import WORKLOADS, Workload, lenet, load, mlp

MODELS = {"lenet": lenet, "mlp": mlp}


def train(model: nn.Module, data: tuple, batch: int, lr: float, seed: int, correction: list | None) -> int:
    """One epoch of plain SGD (with SCAFFOLD's correction, if there is one); returns the number of steps."""
    model.train()
    x, y = data
    parameters = list(model.parameters())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    steps = 0
    for start in range(0, len(x), batch):
        index = order[start : start + batch]
        for p in parameters:
            p.grad = None
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.add_(p.grad if correction is None else p.grad + correction[i], alpha=-lr)
        steps += 1
    return steps


def work(model: nn.Module, state: dict, clients: list, jobs: list, workload: Workload) -> tuple:
    """Train these clients; returns the weighted sum of their states, the weight, and their new controls."""
    total = {name: torch.zeros_like(value) for name, value in state.items()}
    weight, controls = 0, []
    for client, seed, control in jobs:
        model.load_state_dict(state)
        correction = None if control is None else [c - c_i for c, c_i in zip(*control, strict=True)]
        steps = train(model, clients[client], workload.batch, workload.lr, seed, correction)
        share = 1 if workload.scaffold else len(clients[client][0])
        weight += share
        for name, value in model.state_dict().items():
            total[name].add_(value, alpha=share)
        if correction is not None:
            moved = zip(state.values(), model.state_dict().values(), correction, strict=True)
            controls.append([(x - y) / (steps * workload.lr) - fix for x, y, fix in moved])
    return total, weight, controls


def test(model: nn.Module, state: dict, x: torch.Tensor, y: torch.Tensor, batch: int) -> int:
    """How many of these rows are right."""
    model.load_state_dict(state)
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(x), batch):
            right += int((model(x[start : start + batch]).argmax(1) == y[start : start + batch]).sum())
    return right


def serve(pipe, workload: Workload, model: nn.Module, clients: list, held: tuple, part: slice) -> None:
    """Train and test what the parent asks for, for ever."""
    torch.set_num_threads(1)
    while True:
        kind, state, jobs = pipe.recv()
        if kind == "test":
            pipe.send(test(model, state, held[0][part], held[1][part], 250))
        else:
            pipe.send(work(model, state, clients, jobs, workload))


def main() -> None:
    """Run one workload."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    options = parser.parse_args()
    began = time.perf_counter()
    workload = WORKLOADS[options.workload]
    clients, held = load(workload)
    torch.manual_seed(0)
    model = MODELS[workload.model]()
    if options.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    zeros = [torch.zeros_like(v) for v in state.values()]
    control, own = zeros, dict.fromkeys(range(len(clients)), zeros)
    pipes = []
    half = len(held[0]) // 2
    for part in (slice(0, half), slice(half, None)):
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        args = (theirs, workload, model, clients, held, part)
        context.Process(target=serve, args=args, daemon=True).start()
        pipes.append(ours)
    generator = torch.Generator().manual_seed(1)
    ended, accuracy = [], 0.0
    for number in range(options.rounds):
        cohort = torch.randperm(len(clients), generator=generator)[: workload.cohort].tolist()
        jobs = [(i, 1000 * number + i, (control, own[i]) if workload.scaffold else None) for i in cohort]
        for k, pipe in enumerate(pipes):
            pipe.send(("train", state, jobs[k::2]))
        sums, weights, controls = zip(*(pipe.recv() for pipe in pipes), strict=True)
        state = {name: (sums[0][name] + sums[1][name]) / sum(weights) for name in state}
        renewed = zip([*cohort[::2], *cohort[1::2]], [*controls[0], *controls[1]], strict=workload.scaffold)
        for client, new in renewed:
            control = [c + (a - b) / len(clients) for c, a, b in zip(control, new, own[client], strict=True)]
            own[client] = new
        if (number + 1) % workload.every == 0 or number + 1 == options.rounds:
            for pipe in pipes:
                pipe.send(("test", state, None))
            accuracy = sum(pipe.recv() for pipe in pipes) / len(held[0])
        ended.append(time.perf_counter() - began)
    print(json.dumps({"ended": ended, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
