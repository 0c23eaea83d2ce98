"""What nodes get from their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consilience.core.messages import Inbox
from consilience.core.tree import Tree


def inboxes(
    nodes: Sequence[int], sent: Mapping[int, Tree], weights: Mapping[int, Mapping[int, float]]
) -> dict[int, Inbox]:
    """What each of these nodes gets when all of ``sent``, by node, is there at once. The weight of neighbours that sent
    nothing stays at home."""
    found = {}
    for node in nodes:
        row = weights[node]
        own = {n: w for n, w in sorted(row.items()) if n in sent}
        if len(own) < len(row):
            own[node] += 1.0 - sum(own.values())
        found[node] = Inbox({n: sent[n] for n in own}, own)
    return found


def traffic(boxes: Mapping[int, Inbox], sizes: Mapping[int, int]) -> dict[int, tuple[int, int]]:
    """Bytes up and down of each node, where a message costs once for each neighbour that gets it."""
    got = {node: sum(sizes[n] for n in box.messages if n != node) for node, box in boxes.items()}
    takers = dict.fromkeys(boxes, 0)
    for node, box in boxes.items():
        for n in box.messages:
            takers[n] += n != node
    return {node: (takers[node] * sizes[node], got[node]) for node in boxes}
