"""The workload on BlazeFL, by its threads, which it recommends: one per core.

They are meant for a Python without a global lock, but were quicker with one too than its processes, of which it
makes a new pool each round.
Batches are picked by their row numbers, several rows at a time, which its examples do row by row.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # what torch.optim imports on first use, in each worker of each round if not here
from blazefl.contrib.fedavg import (
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from floor import MODELS
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from workloads import WORKLOADS, load, options


class Rows:
    """The workload's data, which forked workers inherit: only the name travels with a job."""

    loaded: tuple | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        Rows.loaded = load(WORKLOADS[name])

    def get_dataset(self, type_, cid):
        """Rows of a client, or of the test set."""
        clients, held = Rows.loaded
        return TensorDataset(*(held if cid is None else clients[cid]))

    def set_dataset(self, type_, cid, dataset) -> None:
        """Nothing has changed."""

    def get_dataloader(self, type_, cid, batch_size=None, generator=None):
        """Batches: shuffled for training."""
        rows = self.get_dataset(type_, cid)
        order = SequentialSampler(rows) if cid is None else RandomSampler(rows, generator=generator)
        size = 250 if cid is None else batch_size
        return DataLoader(rows, sampler=BatchSampler(order, size, drop_last=False), batch_size=None)


class Select:
    """Makes models."""

    def select_model(self, model_name):
        """A new module."""
        return MODELS[model_name]()


def main() -> None:
    """Run one workload."""
    name, rounds, mode = options(mode=("threads", "processes"))
    workload, cores = WORKLOADS[name], os.cpu_count() or 1
    began, ended, accuracy = time.perf_counter(), [], 0.0
    rows, select = Rows(name), Select()
    torch.manual_seed(0)
    ratio = workload.cohort / workload.clients
    handler = FedAvgBaseServerHandler(
        select, workload.model, rows, rounds, workload.clients, ratio, "cpu", workload.batch, 0
    )
    with tempfile.TemporaryDirectory() as folder:
        common = ("cpu", workload.clients, 1, workload.batch, workload.lr, 0, cores)
        if mode == "processes":
            trainer = FedAvgProcessPoolClientTrainer(select, workload.model, Path(folder), rows, *common)
        else:
            trainer = FedAvgThreadPoolClientTrainer(select, workload.model, rows, *common)
        while not handler.is_stopped():
            torch.set_num_threads(1)
            trainer.local_process(handler.downlink_package(), handler.sample_clients())
            for package in trainer.uplink_package():
                handler.load(package)
            if handler.round % workload.every == 0 or handler.is_stopped():
                torch.set_num_threads(cores)
                accuracy = handler.get_summary()["server_acc"]
            ended.append(time.perf_counter() - began)
    print(json.dumps({"ended": ended, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
