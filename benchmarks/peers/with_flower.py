"""The workload on Flower: its simulation, with one Ray actor of one CPU per core.

Clients keep the data mapped, train with the floor's loop, and the server tests the global model with all cores,
between rounds, as Flower's tutorials do.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time

import torch
from floor import MODELS, test, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server import Grid
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from workloads import WORKLOADS, load, options

logging.getLogger("flwr").setLevel(logging.WARNING)
WORKLOAD, ROUNDS = os.environ.get("WORKLOAD", "w1"), int(os.environ.get("ROUNDS", "1"))
client_app, server_app = ClientApp(), ServerApp()


@functools.cache
def prepared() -> tuple:
    """What a process keeps: the workload, its data, and a module to fill."""
    workload = WORKLOADS[WORKLOAD]
    clients, held = load(workload)
    torch.manual_seed(0)
    return workload, clients, held, MODELS[workload.model]()


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """One client's round."""
    workload, clients, _, model = prepared()
    client = int(context.node_config["partition-id"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    seed = 1000 * int(message.content["config"]["server-round"]) + client
    train(model, clients[client], workload.batch, workload.lr, seed, None)
    rows = MetricRecord({"num-examples": len(clients[client][0])})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": rows}), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """The rounds."""
    workload, _, (x, y), model = prepared()
    began, ended, accuracy = time.perf_counter(), [], [0.0]

    def judge(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if number and (number % workload.every == 0 or number == ROUNDS):
            accuracy[0] = test(model, arrays.to_torch_state_dict(), x, y, 250) / len(x)
        if number:
            ended.append(time.perf_counter() - began)
        return MetricRecord({"accuracy": accuracy[0]}) if number else None

    strategy = FedAvg(
        fraction_train=workload.cohort / workload.clients,
        fraction_evaluate=0.0,
        min_train_nodes=workload.cohort,
        min_available_nodes=workload.clients,
    )
    strategy.start(grid, ArrayRecord(model.state_dict()), ROUNDS, evaluate_fn=judge)
    print(json.dumps({"ended": ended, "accuracy": accuracy[0]}))


def main() -> None:
    """Run one workload."""
    name, rounds = options()
    os.environ["WORKLOAD"], os.environ["ROUNDS"] = name, str(rounds)
    import with_flower  # under its own name, so that actors import it and keep what it has cached

    run_simulation(
        server_app=with_flower.server_app,
        client_app=with_flower.client_app,
        num_supernodes=WORKLOADS[name].clients,
        backend_config={
            "init_args": {"num_cpus": os.cpu_count()},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main()
