"""Methods after whose last round the global model's head is fitted once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType

from consilience.core.messages import Broadcast, ClientInfo, Reply
from consilience.core.method import Method, Phase
from consilience.core.model import Architecture
from consilience.core.shapes import Expected
from consilience.core.site import Host, Place, Site
from consilience.core.tree import Tree
from consilience.parts import calibration
from consilience.parts.calibration import Calibration
from consilience.parts.standing import own, with_own

CALIBRATE = Phase("calibrate", when="end")
"""The last phase."""


class Calibrated(Method):
    """Mixin: after the last round the global model's head is fitted once more."""

    def stage(self) -> Calibration | None:
        """How; by default what the option ``then`` names. None: not at all."""
        return calibration.parse(self.then)

    def networks(self, models: Mapping[str, Architecture]) -> Mapping[str, Architecture]:
        """The method's, and the head alone."""
        stage = self.stage()
        made = super().networks(models)
        return made if stage is None else {**made, **stage.networks(next(iter(models.values())))}

    def program(self) -> tuple[Phase, ...]:
        """The method's phases, and the last one."""
        return super().program() + (() if self.stage() is None else (CALIBRATE,))

    def sends(self, phase: Phase) -> type | UnionType | None:
        """The method's, or statistics of features."""
        return calibration.Gaussians if phase == CALIBRATE else super().sends(phase)

    def least_samples(self, phase: Phase, rows: int, steps: int | None) -> int:
        """The method's; none in the last phase."""
        return 0 if phase == CALIBRATE else super().least_samples(phase, rows, steps)

    def expects(self, place: Place, model: str) -> Mapping[str, Expected]:
        """The method's, and the last phase's."""
        stage = self.stage()
        return {**super().expects(place, model), **({} if stage is None else stage.expects(place))}

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The method's, or the global model."""
        return Broadcast(own(server).model) if phase == CALIBRATE else super().broadcast(phase, server, client)

    def client_update(self, phase: Phase, site: Site, message: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The method's, or statistics of the model's features."""
        stage = self.stage()
        if phase == CALIBRATE and stage is not None:
            return stage.answer(site, message.model), state
        return super().client_update(phase, site, message, state)

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """The method's, or the refitted model."""
        stage = self.stage()
        if phase != CALIBRATE or stage is None:
            return super().aggregate(phase, host, server, replies, cohort)
        state = own(server)
        return with_own(server, state._replace(model=stage.refit(host, state.model, replies)))
