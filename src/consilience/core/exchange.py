"""What nodes get from their neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from consilience.core.messages import Inbox
from consilience.core.tree import Tree, record


@record
class Letter(NamedTuple):
    """A message on its way between nodes, or waiting for its reader. phase: index in the program. weight: that the
    topology gave it when it was sent. arrives: virtual time."""

    to: int
    sender: int
    phase: int
    weight: float
    arrives: float
    message: Tree


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


def posted(letters: Sequence[Letter], letter: Letter, time: float) -> list[Letter]:
    """A node's letters and one more; of those of its sender that have come by now, only the newest is kept."""
    key = (letter.sender, letter.phase)
    come = [old for old in letters if (old.sender, old.phase) == key and old.arrives <= time]
    return [old for old in letters if all(old is not other for other in come[:-1])] + [letter]


def opened(
    letters: Sequence[Letter], node: int, phase: int, own: Tree, row: Mapping[int, float], time: float
) -> tuple[Inbox, list[Letter]]:
    """What a node reads when it mixes: its own message and the newest letter of each sender that has come by now; and
    the letters that are left. row: the topology's weights for the node.

    Letters have the weights that they were sent with, and the rest stays at home; where less would stay there than
    ``row`` says, all weights are scaled down alike.
    """
    come = [letter for letter in letters if letter.phase == phase and letter.arrives <= time]
    newest = {letter.sender: letter for letter in come}
    weights = {sender: letter.weight for sender, letter in newest.items()}
    if weights != {n: w for n, w in row.items() if n != node}:
        sent, kept = math.fsum(weights.values()), row.get(node, 0.0)
        if 1.0 - sent >= kept:
            weights[node] = 1.0 - sent
        else:
            weights = {n: w / (sent + kept) for n, w in {**weights, node: kept}.items()}
    else:
        weights = dict(row)
    messages = {**{sender: letter.message for sender, letter in newest.items()}, node: own}
    nodes = sorted(messages)
    left = [letter for letter in letters if all(letter is not other for other in come)]
    return Inbox({n: messages[n] for n in nodes}, {n: weights[n] for n in nodes}), left
