"""Curriculum: clients begin with their easy rows (Vahidian et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from consilience.core.training import option
from consilience.methods.fedavg import FedAvg


@dataclass(frozen=True)
class Curriculum(FedAvg):
    """FedAvg whose clients train on easy rows first.

        order a client's rows by their losses under the global model;  the pool at local step s is the first g(s)
        g(s) = b n + (1 - b) n s / (a K), at most n and at least 32;   K local steps, n rows, a = 0.8, b = 0.2

    ``row_order`` says what is easy, how the pool grows, or ``anti`` for hard rows first (see
    :mod:`consilience.core.order`); every method takes it, as ``fedprox:row_order=curriculum``. ``selection`` is the
    curriculum over clients. With b = 1 it is FedAvg, bit for bit.

    Source: Vahidian, Kadaveru, Baek, Wang, Kungurtsev, Chen, Shah, Lin, "When Do Curricula Work in Federated
    Learning?", ICCV 2023, with its a, b and linear pacing. Deviations: those of the order.
    """

    name = "curriculum"
    family = "skewed data"
    source = "Vahidian et al., ICCV"
    year = 2023

    row_order: str = option("curriculum:global:linear:0.8:0.2", "order in which a client's rows are used")
