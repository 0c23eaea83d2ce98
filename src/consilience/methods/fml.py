"""FML: a small common model and each client's own learn from each other (Shen et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from torch import Tensor

from consilience.core.fit import Batch, Models
from consilience.core.messages import Broadcast, ModelUpdate
from consilience.core.method import Method, Needs, Phase
from consilience.core.model import Weights
from consilience.core.predict import Net, Predictor
from consilience.core.shapes import Expected
from consilience.core.site import Place, Site
from consilience.core.training import Search, option
from consilience.core.tree import Tree
from consilience.parts.distillation import kl


@dataclass(frozen=True)
class FML(Method):
    """Each client trains its own model and a copy of the server's small one together; only the small one travels.

        L_own    = alpha CE(o, y) + (1 - alpha) KL( softmax(q) || softmax(o) )     o: scores of the own model
        L_common = beta  CE(q, y) + (1 - beta)  KL( softmax(o) || softmax(q) )     q: scores of the common model
        both step at once on each batch; then g <- sum_k p_k g_k

    What is learned from takes no gradient. The server's model is ``--model``, the clients' are ``--models``. Weights
    are uniform by default. With alpha = 1 the own models are those of ``local``, with beta = 1 the common one is
    FedAvg's, bit for bit.

    Source: Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu, "Federated Mutual Learning", 2020, equations 4 and 5.
    Deviations: none from the paper. (HtFLlib's version lets each model also learn from the other's loss, divides the
    divergence by the number of classes as well, and clips gradients.)
    """

    name = "fml"
    family = "different architectures"
    source = "Shen et al."
    year = 2020
    needs = Needs(architectures="any", classification=True)
    sums = Method.means
    unstacked = "two networks learn from each other"

    alpha: Annotated[float, Ge(0), Le(1)] = option(0.5, "share of the labels in the own model's loss", Search(0.1, 1.0))
    beta: Annotated[float, Ge(0), Le(1)] = option(0.5, "share of the labels in the common one's", Search(0.1, 1.0))
    weights: Literal["samples", "uniform"] = option("uniform", "a client's weight (uniform in the paper)")
    form: Literal["model"] = option("model", "clients send the common model")

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """One training."""
        return self.one_fit(rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The server's architecture."""
        return {"model": place.architectures[place.server_model].spec}

    def sends(self, phase: Phase) -> type:
        """The common model."""
        return ModelUpdate

    def init_client(self, site: Site) -> Tree:
        """The common initial model of its architecture."""
        return site.initial()

    def client_update(self, phase: Phase, site: Site, message: Broadcast, state: Weights) -> tuple[Tree, Tree]:
        """Train both, send the common one."""

        def loss(models: Models, batch: Batch) -> Tensor:
            own, common = models["own"](batch.x), models["common"](batch.x)
            first = self._mixed(self.alpha, site.task.loss(own, batch.y), own, common)
            return first + self._mixed(self.beta, site.task.loss(common, batch.y), common, own)

        both = {"own": state, "common": message.model}
        trained = site.fit(both, model={"own": site.model, "common": site.place.server_model}, loss=loss).weights
        return ModelUpdate(trained["common"]), trained["own"]

    def _mixed(self, share: float, labels: Tensor, scores: Tensor, teacher: Tensor) -> Tensor:
        return labels if share == 1 else share * labels + (1 - share) * kl(scores, teacher)

    def personal_model(self, site: Site, message: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)

    def trained_model(self, site: Site, message: Tree, update: Tree, state: Weights) -> Predictor:
        """The own model."""
        return Net(state, site.model)
