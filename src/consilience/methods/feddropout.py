"""Federated Dropout: random sub-models (Caldas et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from consilience.core.streams import philox
from consilience.methods.heterofl import HeteroFL, Server
from consilience.parts import submodel


@dataclass(frozen=True)
class FedDropout(HeteroFL):
    """HeteroFL whose clients get a random part of each layer, drawn anew for each client and round.

        a client of rate r has of a layer of n units a uniformly random subset of ceil(r n)

    Inputs and outputs are whole. A client trains what it is given and need not know which units these are. The expected
    coverage of a number in a round is the cohort times the rates of its two layers.

    Source: Caldas, Konecny, McMahan, Talwalkar, "Expanding the Reach of Federated Learning by Reducing Client Resource
    Requirements", 2018; with rates by client as in Alam et al., NeurIPS 2022. Deviations: what HeteroFL adds is on here
    as well, for an even comparison, and can be switched off.
    """

    name = "feddropout"
    source = "Caldas et al."
    year = 2018

    def units(
        self, whole: Mapping[str, int], kept: Mapping[str, int], server: Server, version: int, client: int
    ) -> dict[str, Tensor]:
        """A random subset."""
        return submodel.chance(whole, kept, philox(server.seed, "units", version, client))
