"""The shells around both halves that Flower starts, and its transport of our messages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.core.errors import ConsilienceError
from consilience.deploy.post import Trouble
from consilience.deploy.seal import Sealed, SealError

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

LOST = (0, 3, 4, 5, 8)
"""Flower's errors after which a message may be sent again: not delivered, or the site's process died."""


def records(message: Sealed) -> RecordDict:
    """A sealed message as Flower carries it: blobs go in chunks, as arrays of bytes."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    blobs = {
        f"{i:03d}": Array(dtype="uint8", shape=(len(blob),), stype="consilience", data=blob)
        for i, blob in enumerate(message.blobs)
    }
    sealed = ConfigRecord({"head": message.head, "signature": message.signature})
    return RecordDict({"sealed": sealed, "blobs": ArrayRecord(blobs)})


def from_records(content: RecordDict) -> Sealed:
    """The message in what Flower carried. Raises SealError."""
    try:
        sealed: Any = content["sealed"]
        arrays: Any = content["blobs"]
        blobs = tuple(bytes(arrays[key].data) for key in sorted(arrays))
        return Sealed(bytes(sealed["head"]), bytes(sealed["signature"]), blobs)
    except (KeyError, TypeError, AttributeError) as error:
        raise SealError(f"malformed: {type(error).__name__} {error}") from None


class GridWire:
    """Flower's grid as a transport."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> set[int]:
        """The SuperNodes that are online."""
        return set(self._grid.get_node_ids())

    def push(self, node: int, message: Sealed, seconds: float, group: str) -> str | None:
        """Give a message to the SuperLink."""
        from flwr.app import Message

        out = Message(records(message), dst_node_id=node, message_type="train", ttl=seconds, group_id=group)
        (found,) = self._grid.push_messages([out])
        return found or None

    def pull(self, ids: Iterable[str]) -> list[tuple[str, Sealed | Trouble]]:
        """What the SuperLink has for us."""
        found: list[tuple[str, Sealed | Trouble]] = []
        for message in self._grid.pull_messages(list(ids)):
            found.append((message.metadata.reply_to_message_id, _content(message)))
        return found


def _content(message: Message) -> Sealed | Trouble:
    if message.has_error():
        code, reason = message.error.code, message.error.reason or "no reason given"
        words = {3: "was not reached in time", 5: "is not connected any more", 8: "died at its work"}
        return Trouble(words.get(code, " ".join(str(reason).split())), code in LOST)
    try:
        return from_records(message.content)
    except SealError as error:
        return Trouble(f"its answer is {error}", False)


def client_app() -> ClientApp:
    """A site's half, for the SuperNode whose ``--node-config`` names the site's ``folder``."""
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from consilience.deploy.site import Home

        try:
            home = Home(Path(str(context.node_config["folder"])))
            reply = home.answer(from_records(message.content), context.node_id)
        except Exception as error:  # what goes on here is nobody's business: the server sees our words alone
            told = str(error) if isinstance(error, ConsilienceError) else type(error).__name__
            raise RuntimeError(told) from None
        return Message(records(reply), reply_to=message)

    return app


def server_app(app_folder: Path) -> ServerApp:
    """The server's half; the run's setting ``folder`` says where it keeps its files."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from consilience.deploy.server import main as serve

        serve(Path(str(context.run_config["folder"])), app_folder, GridWire(grid))

    return app
