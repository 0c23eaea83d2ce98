"""What a mixin keeps at the server beside the method's own state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from consilience.core.messages import ClientInfo, Reply
from consilience.core.method import Method, Phase
from consilience.core.predict import Predictor
from consilience.core.site import Host
from consilience.core.tree import Tree, record


@record
class Standing(NamedTuple):
    """The method's own server state, and by mixin what it keeps."""

    server: Tree
    memory: dict[str, Tree]


def own(server: Tree) -> Any:
    """The method's own server state."""
    return server.server if isinstance(server, Standing) else server


def with_own(server: Tree, state: Tree) -> Tree:
    """The server's state with another one of the method's own in it."""
    return server._replace(server=state) if isinstance(server, Standing) else state


class Remembering(Method):
    """Mixin for mixins: the server's state is a :class:`Standing`, of which the method itself sees its own."""

    def memories(self, host: Host) -> dict[str, Tree]:
        """What mixins keep, at first."""
        return {}

    def init_server(self, host: Host) -> Standing:
        """The method's, and what mixins keep."""
        return Standing(super().init_server(host), self.memories(host))

    def select(self, server: Standing, view: Any) -> Sequence[int] | None:
        """The method's."""
        return super().select(server.server, view)

    def proceed(self, phase: Phase, server: Standing) -> Sequence[int] | None:
        """The method's."""
        return super().proceed(phase, server.server)

    def broadcast(self, phase: Phase, server: Tree, client: ClientInfo) -> Tree:
        """The method's, which may have come by ``deploy``."""
        return super().broadcast(phase, own(server), client)

    def deploy(self, server: Standing, client: ClientInfo) -> Tree:
        """The method's."""
        return super().deploy(server.server, client)

    def aggregate(
        self, phase: Phase, host: Host, server: Standing, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Standing:
        """The method's."""
        return server._replace(server=super().aggregate(phase, host, server.server, replies, cohort))

    def report(self, server: Standing) -> Mapping[str, float]:
        """The method's."""
        return super().report(server.server)

    def global_model(self, server: Standing) -> Predictor | None:
        """The method's."""
        return super().global_model(server.server)
