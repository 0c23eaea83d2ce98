"""Messages to clients, and their sizes: what is equal is one object, so that it is counted and sent once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from consilience.core.encode import encoded_size
from consilience.core.events import Clock
from consilience.core.federation import Federation
from consilience.core.messages import ClientInfo, Summed
from consilience.core.method import Phase
from consilience.core.site import Place
from consilience.core.tree import Tree


class Outbox:
    """Builds messages from the server's state."""

    def __init__(self, place: Place, federation: Federation, clock: Clock) -> None:
        self._place, self._federation, self._clock = place, federation, clock
        self._messages: dict[Any, Tree] = {}
        self._sizes: dict[int, tuple[Tree, int]] = {}

    def message(self, server: Tree, phase: Phase, client: int, slot: int) -> tuple[Tree, int]:
        """The broadcast to a client and its encoded bytes."""
        message = self._shared(self._place.method.broadcast(phase, server, self._info(client, slot)))
        if message is None:
            return None, 0
        if self._sizes.get(id(message), (None, 0))[0] is not message:
            self._sizes = {id(message): (message, encoded_size(message))}
        return self._sizes[id(message)]

    def deployed(self, server: Tree, client: int) -> Tree:
        """What a client would deploy from."""
        return self._shared(self._place.method.deploy(server, self._info(client, 0)))

    def forget(self) -> None:
        """Let go of the messages of a version that is past."""
        self._messages, self._sizes = {}, {}

    def _info(self, client: int, slot: int) -> ClientInfo:
        device = self._clock.device(client)
        samples, model = self._federation.size(client), self._place.model_of(client)
        return ClientInfo(client, samples, model, self._place.architectures, slot, device)

    def _shared(self, message: Tree) -> Tree:
        """One object for messages made of the same tensors, so that an executor sends them once."""
        key = _identity(message)
        if key not in self._messages and len(self._messages) >= 64:
            self._messages.clear()
        return self._messages.setdefault(key, message)


def _identity(message: Tree) -> Any:
    """What two messages have in common exactly if they are made of the same tensors under the same names."""
    if isinstance(message, Tensor):
        return id(message)
    if isinstance(message, dict):
        return tuple(message), tuple(map(_identity, message.values()))
    if isinstance(message, (tuple, list)):
        return type(message), tuple(map(_identity, message))
    return type(message), repr(message)  # 1, 1.0 and True are equal, and 0.0 is -0.0


def size_of(message: Tree) -> int:
    """Encoded bytes; a message that is not sent costs nothing."""
    if isinstance(message, Summed):
        size: int = message.bytes
        return size
    return 0 if message is None else encoded_size(message)
