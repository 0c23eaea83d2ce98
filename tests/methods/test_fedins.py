"""FedIns: pools of scales and shifts, the extractor that comes trained, and runs against loops written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import consilience
from consilience.core import tree as tr
from consilience.core.errors import ConfigError
from consilience.core.events import draw_cohort
from consilience.core.messages import Broadcast
from consilience.core.model import Weights
from consilience.core.streams import philox
from consilience.methods import FedAvg, FedIns, FedPer
from consilience.models import architecture
from consilience.models.frozen import FILE
from consilience.models.pool import BASE, Pool, pool
from consilience.simulate import prepare
from tests.helpers import NORMED, federation, loop, site, worker

USUAL: dict[str, Any] = {"batch_size": 4, "lr": 0.1, "local_epochs": 2}
DEEP = architecture("mlp:7x6", (5,), 3)


def after(method: Any, rounds: int = 3, model: Any = DEEP, cohort: int = 3) -> Any:
    return loop(worker(method, model=model), rounds, cohort=cohort).snapshots[rounds]


def filled(model: Any, entries: int, top: int, seed: int = 0) -> Pool:
    made: Any = pool(model, entries, top).build(seed)
    return made.eval()  # type: ignore[no-any-return]


# --- pools -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp:9x8", "lenet", "resnet8", "frozen"])
def test_a_fresh_pool_leaves_features_as_they_are(name: str) -> None:
    model = architecture(name, (1, 28, 28), 10)
    made, x = filled(model, 4, 2), torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        plain, (_, chosen) = made.base.features(x), made.likeness(x)
        assert torch.equal(made.features(x, chosen), plain)
        made.scales[0].data *= 1.5
        assert not torch.equal(made.features(x, chosen), plain)
        assert torch.equal(made.base.features(x), plain)


def test_each_row_has_its_own_entries() -> None:
    """A batch gives what its rows give one by one, computed here without the pool's own code."""
    made = filled(architecture("mlp:9x8", (1, 6, 6), 10), 5, 2)
    torch.manual_seed(1)
    for p in made.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    x = torch.rand(6, 1, 6, 6)
    first, second = made.base.features[1], made.base.features[3]
    used = set()
    with torch.no_grad():
        scores, cosines = made.both(x)
        for row in range(6):
            query = second(first(x[row].flatten()).relu()).relu()
            like = torch.stack([query @ key / (query.norm() * key.norm()) for key in made.keys])
            best = like.argsort(descending=True)[:2].tolist()
            used.add(tuple(sorted(best)))
            torch.testing.assert_close(cosines[row], like[best])
            scale, shift = ([sum(part[i][e] for e in best) / 2 for i in (0, 1)] for part in (made.scales, made.shifts))
            z = (first(x[row].flatten()) * scale[0] + shift[0]).relu()
            z = (second(z) * scale[1] + shift[1]).relu()
            wanted = sum(made.weight[e] @ z + made.bias[e] for e in best) / 2
            torch.testing.assert_close(scores[row], wanted)
    assert len(used) > 1


def test_the_base_takes_no_part_in_training() -> None:
    made = filled(architecture("resnet8:batchnorm", (1, 28, 28), 10), 3, 1)
    before = {n: b.clone() for n, b in made.base.named_buffers()}
    made.train()
    made(torch.rand(4, 1, 28, 28)).sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in made.base.named_buffers())
    assert all(p.grad is None for p in made.base.parameters())
    assert all(p.grad is not None for n, p in made.named_parameters() if not n.startswith(BASE) and n != "keys")


# --- reductions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model", "delta"])
@pytest.mark.parametrize(("entries", "top"), [(1, 1), (4, 2)])
def test_without_the_pull_of_keys_it_is_fedavg_on_the_pool(form: Any, entries: int, top: int) -> None:
    same: dict[str, Any] = {"form": form, "weights": "uniform", **USUAL}
    found = after(FedIns(entries=entries, top=top, key_weight=0, **same)).server.model
    made = pool(DEEP, entries, top)
    base = {f"{BASE}{n}": p for n, p in DEEP.initial(0).params.items()}
    start = Weights({**made.initial(0).params, **base}, {})
    for method in (FedPer(personal="base.*", **same), FedAvg(**same)):
        if form == "model" and method.name == "fedavg":
            continue  # the mean of frozen numbers that are equal may differ from them in the last bit
        plain = loop(prepare(method, federation(), model=made, seed=0, init=start), 3, cohort=3).snapshots[3].server
        assert tr.digest(found.params) == tr.digest({n: plain.model.params[n] for n in found.params})
    pulled = after(FedIns(entries=entries, top=top, **same)).server.model
    assert tr.digest(found.params) != tr.digest(pulled.params)


def test_entries_that_nobody_chooses_stay_as_they_are() -> None:
    method = FedIns(entries=6, top=1, form="delta", **USUAL)
    at = worker(method, model=DEEP)
    start = method.init_server(at.host(0, "train")).model
    chosen = set()
    made: Any = pool(DEEP, 6, 1).build()
    made.load_state_dict({**start.params, **{f"{BASE}{n}": p for n, p in DEEP.initial(0).params.items()}})
    for k in range(5):
        chosen |= set(made.likeness(site(at, k).train.x)[1].flatten().tolist())
    rest = [e for e in range(6) if e not in chosen]
    end = loop(at, 1).snapshots[1].server.model
    assert chosen
    assert rest
    for name, p in end.params.items():
        assert torch.equal(p[rest], start.params[name][rest]), name
    assert not torch.equal(end.params["weight"], start.params["weight"])


def test_only_the_pool_travels() -> None:
    memory = loop(worker(method := FedIns(entries=2, top=1, **USUAL), model=DEEP), 2)
    own = tr.nbytes(memory.snapshots[2].server.model)
    assert not any(name.startswith(BASE) for name in memory.snapshots[2].server.model.params)
    sent = memory.snapshots[1].totals.bytes_up / 5
    assert own <= sent <= own + 1600
    assert tr.digest(memory.snapshots[2].server.base) == tr.digest(DEEP.initial(0))
    at = worker(method, model=DEEP)
    message = Broadcast(memory.snapshots[2].server.model)
    deployed: Any = method.personal_model(site(at), message, None)
    assert tr.digest(deployed) == tr.digest(method.global_model(memory.snapshots[2].server))


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="top=3"):
        FedIns(entries=2)


def test_batch_norms_of_the_base_keep_their_statistics() -> None:
    snapshot = after(FedIns(entries=2, top=1, **USUAL), model=NORMED)
    assert not snapshot.server.model.buffers
    assert tr.digest(snapshot.server.base.buffers) == tr.digest(NORMED.initial(0).buffers)


# --- the extractor ---------------------------------------------------------------------------------------------


def test_the_extractor_comes_trained_and_stays() -> None:
    assert FILE.stat().st_size < 300_000
    stored = load_file(FILE)
    model = architecture("frozen", (1, 28, 28), 10)
    assert all(torch.equal(model.initial(s).params[f"features.{n}"], t) for n, t in stored.items() for s in (0, 1))
    assert not torch.equal(model.initial(0).params["head.weight"], model.initial(1).params["head.weight"])
    data = consilience.make_federation("digits", clients=3, seed=0)
    result = consilience.run(FedAvg(form="delta", **USUAL), data, rounds=2, model="frozen", executor="serial", seed=0)
    end = result.server.model.params
    assert all(torch.equal(end[f"features.{n}"], t) for n, t in stored.items())
    assert not torch.equal(end["head.weight"], architecture("frozen", (1, 8, 8), 10).initial(0).params["head.weight"])


def test_models_that_it_is_not_for() -> None:
    for shape in ((3, 28, 28), (28,), (1, 6, 6)):
        with pytest.raises(ConfigError, match="frozen takes images"):
            architecture("frozen", shape, 10).build()
    with pytest.raises(ConfigError, match="comes trained"):
        architecture("frozen@0.5", (1, 28, 28), 10)


# --- against a loop written out --------------------------------------------------------------------------------

SEED, CLIENTS, COHORT, ROUNDS, LR, EPOCHS, OM, ENTRIES, TOP = 5, 5, 3, 4, 0.2, 2, 0.3, 5, 2
P = dict[str, Tensor]


def forward(p: P, base: P, x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.flatten(1)
    plain = (flat @ base["features.1.weight"].T + base["features.1.bias"]).relu()
    rows, pulls = [], []
    for f, q in zip(flat, plain, strict=True):
        cos = torch.stack([(q * k).sum() / (q.norm() * k.norm()) for k in p["keys"]])
        best = cos.detach().topk(TOP).indices
        z = f @ base["features.1.weight"].T + base["features.1.bias"]
        z = (z * p["scales.0"][best].mean(0) + p["shifts.0"][best].mean(0)).relu()
        rows.append(p["weight"][best].mean(0) @ z + p["bias"][best].mean(0))
        pulls.append(1 - cos[best].sum())
    return torch.stack(rows), torch.stack(pulls)


def test_a_run_in_float64() -> None:
    made = FedIns(lr=LR, batch_size=10_000, local_epochs=EPOCHS, key_weight=OM, entries=ENTRIES, top=TOP)
    data = consilience.make_federation("digits", clients=CLIENTS, partition="shards:3", seed=SEED)
    result = consilience.run(
        made, data, rounds=ROUNDS, participation=COHORT, seed=SEED, executor="serial", model="mlp:12"
    )
    host = result.worker.host(0, "x")
    base = {n: p.double() for n, p in host.initial().params.items()}
    x = {n: p.double() for n, p in host.initial("pool").params.items() if not n.startswith(BASE)}
    assert set(x) == set(result.server.model.params)
    for version in range(ROUNDS):
        sent = []
        for k in (int(k) for k in draw_cohort(philox(SEED, "cohort", version, 0), data.seen, COHORT)):
            p = x
            train = data.data(k).train
            for _ in range(EPOCHS):
                leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
                scores, pulls = forward(leaves, base, train.x.double())
                ((1 - OM) * F.cross_entropy(scores, train.y) + OM * pulls.mean()).backward()
                p = {n: t.detach() if t.grad is None else (t - LR * t.grad).detach() for n, t in leaves.items()}
            sent.append(p)
        x = {n: torch.stack([p[n] for p in sent]).mean(0) for n in x}
    found = {n: p.double() for n, p in result.server.model.params.items()}
    torch.testing.assert_close(found, x, rtol=1e-3, atol=5e-5)
    assert np.isfinite(result.history[-1]["global"]["loss"])
