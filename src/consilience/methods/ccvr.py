"""CCVR: the head is fitted once more after training, on virtual features (Luo et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from consilience.core.method import Needs
from consilience.core.training import Search, option
from consilience.methods.fedavg import FedAvg
from consilience.parts.calibrated import Calibrated
from consilience.parts.calibration import Calibration


@dataclass(frozen=True)
class CCVR(Calibrated, FedAvg):
    """FedAvg, and after the last round the head is fitted once more, on features that nobody has.

        client k: for each of its classes the rows n_k,c, and mean mu_k,c and covariance S_k,c of the features f(x)
        n_c = sum_k n_k,c;   mu_c = sum_k (n_k,c / n_c) mu_k,c
        S_c = ( sum_k (n_k,c - 1) S_k,c + sum_k n_k,c (mu_k,c - mu_c) (mu_k,c - mu_c)^T ) / (n_c - 1)
        server: ``virtual`` draws of N(mu_c, S_c) for each class; SGD on CE(h(z), c) from the trained head h

    mu_c and S_c are exactly the mean and unbiased covariance of everybody's features together, however the rows are
    dealt out. Everybody takes part in this stage, features are taken in evaluation mode, and f stays as it is. The
    stage for other methods is ``--then ccvr``, or ``--then ccvr:M`` for M draws, with the other values as here.

    With virtual = 0 or calibration_epochs = 0 it is FedAvg bit for bit.

    Source: Luo, Chen, Hu, Zhang, Liang, Feng, "No Fear of Heterogeneity: Classifier Calibration for Federated Learning
    with Non-IID Data", NeurIPS 2021, algorithm 1 and equations 3 and 4 (here written with differences of means, which
    loses fewer digits). The paper's grid of step sizes and epochs was not found: defaults are this library's.
    Deviations: covariances without rank are drawn from by their eigenvectors; a class that nobody has is not drawn;
    momentum and weight decay are the method's own.
    """

    name = "ccvr"
    family = "skewed data"
    source = "Luo et al., NeurIPS"
    year = 2021
    takes_rules = False
    needs = Needs(split_model=True, classification=True)

    virtual: Annotated[int, Ge(0)] = option(Calibration.virtual, "features drawn for each class")
    calibration_epochs: Annotated[int, Ge(0)] = option(Calibration.epochs, "passes of the server over these")
    calibration_lr: Annotated[float, Gt(0)] = option(Calibration.lr, "the server's step size", Search(1e-3, 1.0))
    calibration_batch: Annotated[int, Ge(1)] = option(Calibration.batch, "features in one of the server's steps")
    weights: Literal["samples", "uniform"] = option("samples", "a client's weight: n_k / sum n, or 1 / cohort")
    aggregator: Literal["mean"] = option("mean", "how updates combine")
    then: Literal["none"] = option("none", "nothing comes after this method's own last stage")

    def stage(self) -> Calibration | None:
        """See :class:`consilience.parts.calibration.Calibration`."""
        if not (self.virtual and self.calibration_epochs):
            return None
        return Calibration(self.virtual, self.calibration_epochs, self.calibration_lr, self.calibration_batch)
