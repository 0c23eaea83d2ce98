"""Server optimisers by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import LINEAR64, NOISY, federation, loop, reply, vector, worker

from consilience.core import optim
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.messages import DeltaUpdate
from consilience.core.method import Method
from consilience.core.model import Architecture, Weights
from consilience.core.snapshot import Snapshot
from consilience.methods import FedAvg, FedAvgM, FedOpt

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1}
DELTAS = np.random.default_rng(0).standard_normal((5, 18)) * np.linspace(0.01, 1, 18)


def trained(method: Method, model: Architecture = NOISY) -> Snapshot:
    return loop(worker(method, federation(dtype=model.dtype), model), 4, cohort=3).snapshots[4]


def model_digest(method: Method) -> str:
    return tr.digest(trained(method).server.model)


def test_sgd_is_fedavg_bit_for_bit_and_with_momentum_fedavgm() -> None:
    plain = model_digest(FedAvg(form="delta", **USUAL))
    assert model_digest(FedOpt(server_optimizer="sgd", server_lr=1.0, **USUAL)) == plain
    assert model_digest(FedOpt(server_optimizer="grokfast:0.9:0+sgd", server_lr=1.0, **USUAL)) == plain
    for lr, beta in ((1.0, 0.9), (0.3, 0.5)):
        own = FedOpt(server_optimizer="sgd", server_lr=lr, server_momentum=beta, **USUAL)
        one, two = (trained(m, LINEAR64) for m in (own, FedAvgM(server_lr=lr, server_momentum=beta, **USUAL)))
        torch.testing.assert_close(vector(one.server.model), vector(two.server.model), rtol=1e-12, atol=1e-14)
        assert model_digest(own) != plain


def path(name: str, **more: Any) -> np.ndarray:
    """The server's parameters after each of five mean differences."""
    method = FedOpt(server_optimizer=name, server_lr=0.1, **more)
    at = worker(method, federation(dtype=torch.float64), LINEAR64)
    host, phase = at.host(0, "train"), at.program[0]
    server, found = method.init_server(host), []
    shapes = {key: p.shape for key, p in server.model.params.items()}
    for d in DELTAS:
        parts = torch.from_numpy(d).split([shape.numel() for shape in shapes.values()])
        delta = {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        server = method.aggregate(phase, host, server, [reply(0, DeltaUpdate(delta, {}))], [0])
        assert isinstance(server.model, Weights)
        found.append(vector(server.model).numpy())
    return np.array(found)


def test_adam_and_a_filter_by_hand() -> None:
    for name, lam in (("adam", 0.0), ("grokfast:0.5:3+adam", 3.0)):
        x, m, v, slow, wanted = vector(LINEAR64.initial(0)).numpy().copy(), 0.0, 0.0, -DELTAS[0], []
        for k, d in enumerate(DELTAS, 1):
            slow = 0.5 * slow - 0.5 * d
            g = -d + lam * slow
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            x = x - 0.1 * m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
            wanted.append(x)
        np.testing.assert_allclose(path(name), wanted, rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["diffgrad", "shampoo", "prodigy", "schedulefreesgd", "sgg:2+adam", "adamomentum", "lamb"]
)
def test_a_memory_that_is_written_down_is_as_good_as_one_that_is_kept(name: str) -> None:
    """The same optimiser, alive over all steps."""
    pytest.importorskip("pytorch_optimizer")
    params = {key: torch.nn.Parameter(p.clone()) for key, p in LINEAR64.initial(0).params.items()}
    made, wanted = optim.make(name, list(params.values()), 0.1, 0.0, 0.0), []
    for d in DELTAS:
        parts = torch.from_numpy(-d).split([p.numel() for p in params.values()])
        made.apply([part.view(p.shape) for part, p in zip(parts, params.values(), strict=True)], 0.1)
        wanted.append(torch.cat([p.detach().flatten() for p in params.values()]).numpy())
    np.testing.assert_array_equal(path(name), wanted)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("oasis", "asks about batches"),
        ("sam+sgd", "asks about batches"),
        ("adahessian", "asks about batches"),
        ("madgrad", "what no checkpoint holds"),
        ("adamm", "did you mean 'adam'"),
    ],
)
def test_what_a_server_cannot_use_is_refused(name: str, why: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match=why):
        FedOpt(server_optimizer=name)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="adam' has no momentum"):
        FedOpt(server_momentum=0.9)
    with pytest.raises(ConfigError, match="form=delta"):
        FedOpt(form="model")
