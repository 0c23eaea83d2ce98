"""The workload on FedLab: a server and one process per core that trains clients one after another, by gloo.

This is its cross-process simulation. The server tests the global model between rounds with all cores. Batches are
picked by their row numbers, several rows at a time.
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
from floor import MODELS, test
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from workloads import WORKLOADS, load, options

PORT = "31720"


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
            self.accuracy = test(self._model, self._model.state_dict(), *self.held, 250) / len(self.held[0])
        self.ended.append(time.perf_counter() - self.began)


def serve_clients(rank: int, world: int, name: str) -> None:
    """One process of clients."""
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    clients, _ = load(workload)
    per = len(clients) // (world - 1)
    trainer = SGDSerialClientTrainer(MODELS[workload.model](), per, logger=Silent())
    trainer.setup_dataset(Rows(clients[(rank - 1) * per : rank * per]))
    trainer.setup_optim(1, workload.batch, workload.lr)
    PassiveClientManager(DistNetwork(("127.0.0.1", PORT), world, rank), trainer, logger=Silent()).run()


def main() -> None:
    """Run one workload."""
    name, rounds = options()
    workload, world = WORKLOADS[name], 1 + (os.cpu_count() or 1)
    torch.manual_seed(0)
    random.seed(0)
    handler = Handler(MODELS[workload.model](), rounds, workload.cohort / workload.clients, logger=Silent())
    _, held = load(workload)
    handler.prepare(workload, held, rounds)
    context = mp.get_context("spawn")
    processes = [context.Process(target=serve_clients, args=(rank, world, name)) for rank in range(1, world)]
    for process in processes:
        process.start()
    SynchronousServerManager(DistNetwork(("127.0.0.1", PORT), world, 0), handler, logger=Silent()).run()
    for process in processes:
        process.join()
    print(json.dumps({"ended": handler.ended, "accuracy": handler.accuracy}))


if __name__ == "__main__":
    main()
