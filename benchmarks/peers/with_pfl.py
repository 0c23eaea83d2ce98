"""The workload on pfl-research: one process per core, started by torchrun, as its benchmarks do.

pfl goes through a client's rows in one fixed order, in slices that it keeps, so it picks no rows and draws no order.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from floor import MODELS
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel
from workloads import WORKLOADS, load, options

ACCURACY = "Central val | accuracy"


class Classifier(torch.nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        self.train()
        return torch.nn.functional.cross_entropy(self.body(x), y)

    @torch.no_grad()
    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict:
        """How many are right."""
        self.eval()
        return {"accuracy": Weighted(int((self.body(x).argmax(1) == y).sum()), len(x))}


class Test(CentralEvaluationCallback):
    """pfl's evaluation, spread over the processes, after the rounds that the workload asks for."""

    def __init__(self, held: Dataset, every: int, rounds: int) -> None:
        super().__init__(held, NNEvalHyperParams(local_batch_size=250))
        self.every, self.rounds = every, rounds

    def on_train_begin(self, *, model):
        """No test before training: nobody else does one."""
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Test after rounds ``every``, ``2 * every``, ..., and the last."""
        number = central_iteration + 1
        due = number % self.every == 0 or number == self.rounds
        if not due:
            return False, Metrics()
        return super().after_central_iteration(aggregate_metrics, model, central_iteration=1)


class Clock(TrainingProcessCallback):
    """Notes when rounds ended."""

    def __init__(self) -> None:
        self.began, self.ended, self.accuracy = time.perf_counter(), [], 0.0

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """A round is over."""
        found = dict(aggregate_metrics)
        if StringMetricName(ACCURACY) in found:
            self.accuracy = found[StringMetricName(ACCURACY)].overall_value
        self.ended.append(time.perf_counter() - self.began)
        return False, Metrics()


def main() -> None:
    """Run one workload, as one of the processes that torchrun started."""
    name, rounds = options()
    torch.set_num_threads(1)
    workload, clock = WORKLOADS[name], Clock()
    clients, (x, y) = load(workload)
    torch.manual_seed(0)
    np.random.seed(0)
    body = Classifier(MODELS[workload.model]())
    model = PyTorchModel(body, torch.optim.SGD, torch.optim.SGD(body.parameters(), 1.0))
    order = np.random.permutation(len(clients)).tolist()
    made = {i: Dataset(tuple(clients[i]), user_id=str(i)) for i in order}
    data = FederatedDataset(made.__getitem__, get_user_sampler("minimize_reuse", order))
    train = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=workload.lr, local_batch_size=workload.batch)
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, 10**9, workload.cohort, 0),
        SimulatedBackend(data, data),
        model,
        train,
        callbacks=[Test(Dataset((x, y)), workload.every, rounds), clock],
        send_metrics_to_platform=False,
    )
    if pytorch_ops.distributed.global_rank == 0:
        print(json.dumps({"ended": clock.ended, "accuracy": float(clock.accuracy)}))


if __name__ == "__main__":
    main()
