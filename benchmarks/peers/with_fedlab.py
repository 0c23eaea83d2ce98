"""The workload on FedLab, in the quicker of two ways that it offers.

``processes``: a server and one process per core that trains clients one after another, over gloo; quicker where
models train for long. ``standalone``: all clients one after another in one process of one thread; quicker where the
messages of many clients cost more than their training. The server tests the global model between rounds with all
cores. Batches are picked by their row numbers, several rows at a time.
"""

from __future__ import annotations

import json
import os
import random
import time

import torch
import torch.multiprocessing as mp
import without_torchvision  # noqa: F401  (before FedLab)
from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.client.manager import PassiveClientManager
from fedlab.core.network import DistNetwork
from fedlab.core.server.manager import SynchronousServerManager
from fedlab.core.standalone import StandalonePipeline
from floor import MODELS, test
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from workloads import WORKLOADS, load, options

PORT = "31720"
QUICKER = {"w1": "processes", "w2": "standalone"}


class Silent:
    """A log that nobody keeps."""

    def info(self, *_: object) -> None:
        """Nothing."""

    warning = error = debug = info


class Rows:
    """The rows of this process's clients."""

    def __init__(self, clients: list) -> None:
        self.clients = clients

    def get_dataloader(self, id, batch_size):
        """Shuffled batches of one client."""
        rows = TensorDataset(*self.clients[id])
        return DataLoader(rows, sampler=BatchSampler(RandomSampler(rows), batch_size, drop_last=False), batch_size=None)


class Handler(SyncServerHandler):
    """FedLab's server, which notes when rounds end and tests the model."""

    def prepare(self, workload, held, rounds: int) -> None:
        """What to test on, and when."""
        self.workload, self.held, self.rounds = workload, held, rounds
        self.began, self.ended, self.accuracy = time.perf_counter(), [], 0.0

    def global_update(self, buffer) -> None:
        """Average, then test."""
        super().global_update(buffer)
        number = self.round + 1
        if number % self.workload.every == 0 or number == self.rounds:
            torch.set_num_threads(os.cpu_count() or 1)
            self.accuracy = test(self._model, self._model.state_dict(), *self.held, 250) / len(self.held[0])
            torch.set_num_threads(1)
        self.ended.append(time.perf_counter() - self.began)


class Pipeline(StandalonePipeline):
    """FedLab's loop in one process."""

    def evaluate(self) -> None:
        """The handler has done it."""


def trainer_of(name: str, clients: list) -> SGDSerialClientTrainer:
    """FedLab's trainer of these clients."""
    workload = WORKLOADS[name]
    trainer = SGDSerialClientTrainer(MODELS[workload.model](), len(clients), logger=Silent())
    trainer.setup_dataset(Rows(clients))
    trainer.setup_optim(1, workload.batch, workload.lr)
    return trainer


def serve_clients(rank: int, world: int, name: str) -> None:
    """One process of clients."""
    torch.set_num_threads(1)
    clients, _ = load(WORKLOADS[name])
    per = len(clients) // (world - 1)
    trainer = trainer_of(name, clients[(rank - 1) * per : rank * per])
    PassiveClientManager(DistNetwork(("127.0.0.1", PORT), world, rank), trainer, logger=Silent()).run()


def serve(handler: Handler, name: str) -> None:
    """The server, and the processes of clients that it starts."""
    world = 1 + (os.cpu_count() or 1)
    context = mp.get_context("spawn")
    processes = [context.Process(target=serve_clients, args=(rank, world, name)) for rank in range(1, world)]
    for process in processes:
        process.start()
    SynchronousServerManager(DistNetwork(("127.0.0.1", PORT), world, 0), handler, logger=Silent()).run()
    for process in processes:
        process.join()


def main() -> None:
    """Run one workload."""
    name, rounds, mode = options(mode=("quicker", "processes", "standalone"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    workload = WORKLOADS[name]
    handler = Handler(MODELS[workload.model](), rounds, workload.cohort / workload.clients, logger=Silent())
    clients, held = load(workload)
    handler.prepare(workload, held, rounds)
    if (QUICKER[name] if mode == "quicker" else mode) == "standalone":
        Pipeline(handler, trainer_of(name, clients)).main()
    else:
        serve(handler, name)
    print(json.dumps({"ended": handler.ended, "accuracy": handler.accuracy}))


if __name__ == "__main__":
    main()
