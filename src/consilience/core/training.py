"""The hyper-parameters that every method has. Kept apart from torch, so that the command line starts at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt


class Search(NamedTuple):
    """Where ``--tune`` looks for a hyper-parameter: between two values, by equal ratios if ``log``."""

    low: float
    high: float
    log: bool = True

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


def option(default: Any, text: str, search: Search | None = None) -> Any:
    """A hyper-parameter with its default and what it means; ``search``: where ``--tune`` looks for it."""
    return dataclasses.field(default=default, metadata={"help": text, "search": search})


@dataclass(frozen=True)
class Training:
    """How clients train, and how what they send is combined."""

    lr: Annotated[float, Gt(0)] = option(0.05, "local step size", Search(1e-3, 1.0))
    batch_size: Annotated[int, Ge(1)] = option(32, "rows in one local step")
    local_epochs: Annotated[int, Ge(1)] = option(1, "passes over the local data in a round")
    local_steps: Annotated[int, Ge(1)] | None = option(None, "local steps in a round, instead of epochs")
    optimizer: str = option(
        "sgd",
        "local optimiser: of torch.optim or pytorch-optimizer, adamomentum, oasis; after sam+, asam+, grokfast+, sgg+",
    )
    momentum: Annotated[float, Ge(0), Le(1)] = option(0.0, "local momentum; starts anew each round")
    weight_decay: Annotated[float, Ge(0)] = option(0.0, "L2 term of the local objective")
    row_order: str = option(
        "random", "rows: random, curriculum (easy first) or anti, [:global|local|both][:linear|root|step][:A:B]"
    )
    clip: Annotated[float, Gt(0)] | None = option(None, "largest norm of a gradient of the loss (weight decay apart)")
    lr_decay: Annotated[float, Gt(0), Le(1)] = option(1.0, "factor on lr after each round")
    weights: Literal["samples", "uniform", "disco", "ida", "fedau", "fedce"] = option(
        "samples", "a client's weight: n_k / sum n, 1 / cohort, or by a rule: disco, ida, fedau, fedce"
    )
    aggregator: str = option(
        "mean",
        "how updates combine: mean, median, trimmed:F, krum:F, multikrum:F, rfa, cclip[:TAU], upgrad, mgda "
        "or torchjd:NAME; bucketing:S+ or nnm:F+ in front",
    )
    selection: str = option(
        "random", "who of a round's clients train: random (all), or curriculum or anti, :COUNT[:PACING][:ROUNDS:B]"
    )
    then: str = option("none", "after the last round: none, or ccvr[:M] (the head refitted on M virtual rows a class)")
    row_noise: str = option(
        "none", "privacy of a client's rows: NOISE[:CLIP], noise multiplier and largest norm of a row's gradient"
    )
    client_momentum: Annotated[float, Ge(0), Lt(1)] = option(
        0.0, "share of its past in the difference that a client sends: a momentum over rounds, against hostile clients"
    )
    form: Literal["model", "delta"] = option("model", "clients send models or differences")
    buffers: Literal["average", "local"] = option("average", "BatchNorm statistics: averaged like weights, or kept")
    compress: str = option(
        "identity",
        "what is sent up: topk:F, randk:F, qsgd:BITS, sign, bits:B, lowrank:R; ef:, ef21:, econtrol: first",
    )
    compress_down: str = option("identity", "the global model on its way to clients: a compressor as in compress")
