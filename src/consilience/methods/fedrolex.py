"""FedRolex: the trained window of each layer rolls on from round to round (Alam et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from consilience.methods.heterofl import HeteroFL, Server
from consilience.parts import submodel


@dataclass(frozen=True)
class FedRolex(HeteroFL):
    """HeteroFL whose clients train units j, j + 1, ..., around the end, in the round after j server updates.

        a client of rate r has of a layer of n units those with number (j + s) mod n, s = 0 .. ceil(r n) - 1

    So in n rounds every unit is trained equally often, and the server's model may be larger than any client's. All
    clients of a round have the same offset, which follows from the round: nothing is sent for it. The first round is
    HeteroFL's, bit for bit. A client deploys the window of the round to come.

    Source: Alam, Liu, Yan, Zhang, "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
    NeurIPS 2022, algorithm 1. Deviations: none; the official code's other weightings and its partial overlap are left
    out.
    """

    name = "fedrolex"
    source = "Alam et al., NeurIPS"
    year = 2022

    def units(
        self, whole: Mapping[str, int], kept: Mapping[str, int], server: Server, version: int, client: int
    ) -> dict[str, Tensor]:
        """A window that rolls on."""
        return submodel.rolling(whole, kept, version)
