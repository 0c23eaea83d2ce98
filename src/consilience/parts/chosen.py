"""Methods of which a round's clients are asked first, and some of them train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType

import torch

from consilience.core.messages import Broadcast, ClientInfo, Reply
from consilience.core.method import Phase
from consilience.core.shapes import Expected, Shape
from consilience.core.site import Host, Place, Site
from consilience.core.tree import Tree
from consilience.parts import selection
from consilience.parts.selection import Selection
from consilience.parts.standing import Remembering, Standing

SELECT = Phase("select", asks=True)
"""The question."""
CHOSEN = "chosen"
"""Who was chosen, among :class:`Standing`'s memories."""


class Chosen(Remembering):
    """Mixin: of a round's clients some train, by how the global model does on their rows."""

    def picks(self) -> Selection:
        """Who; what the option ``selection`` names."""
        found = selection.parse(self.selection)
        assert found is not None
        return found

    def program(self) -> tuple[Phase, ...]:
        """The question, and the method's phases."""
        return (SELECT, *super().program())

    def sends(self, phase: Phase) -> type | UnionType | None:
        """The method's, or an answer."""
        return selection.Difficulty if phase == SELECT else super().sends(phase)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """The method's; none for an answer."""
        return 0 if phase == SELECT else super().least_samples(phase, rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The method's, and the answer."""
        return {**super().expects(place, model), "train_loss": Shape(torch.float64, (), low=0)}

    def memories(self, host: Host) -> dict[str, Tree]:
        """Nobody chosen, too."""
        return {**super().memories(host), CHOSEN: []}

    def proceed(self, phase: Phase, server: Standing) -> Sequence[int] | None:
        """Those who were chosen."""
        return server.memory[CHOSEN] if phase == SELECT else super().proceed(phase, server)

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The method's, or the global model."""
        if phase == SELECT:
            return Broadcast(server.server.model)
        return super().broadcast(phase, server, client)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The method's, or an answer."""
        if phase == SELECT:
            return self.picks().answer(site, message.model), state
        return super().client_update(phase, site, message, state)

    def aggregate(
        self, phase: Phase, host: Host, server: Standing, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Standing:
        """The method's, or the choice."""
        if phase == SELECT:
            return server._replace(memory={**server.memory, CHOSEN: self.picks().choose(host, replies)})
        return super().aggregate(phase, host, server, replies, cohort)
