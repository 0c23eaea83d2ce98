"""What clients say of public rows: the rows of a round, and scores of them that travel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from consilience.core.federation import Split
from consilience.core.messages import Stat
from consilience.core.site import Site
from consilience.core.tree import record


@record
class Scores(NamedTuple):
    """Scores ``(rows, classes)`` of the public rows of a round."""

    scores: Stat


def rows_of_round(site: Site, count: int, version: int) -> Split:
    """``count`` public rows (or all, if there are fewer) for the round after ``version`` server updates: the same at
    every site and on the server, so that no row number has to be sent."""
    order = site.shared_rng("public-rows", version).permutation(len(site.public))
    return site.public.rows(torch.from_numpy(order[:count]))
