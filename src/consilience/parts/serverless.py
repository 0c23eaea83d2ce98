"""Methods without a server: what they have no need to say."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType

from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Method, Phase
from consilience.core.predict import Predictor
from consilience.core.site import Host
from consilience.core.tree import Tree


class Serverless(Method):
    """Mixin: the server knows nothing, says nothing and hears nothing; nodes exchange along a topology."""

    def init_server(self, host: Host) -> Tree:
        """There is none."""
        return None

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """Nothing."""
        return None

    def sends(self, phase: Phase) -> type | UnionType:
        """Nothing to the server."""
        return NoneType

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """Nothing."""
        return server

    def global_model(self, server: Tree) -> Predictor | None:
        """There is none."""
        return None
