"""Gossip: nodes without a server go on each at its own pace (Hegedus et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from consilience.schedule.immediate import Immediate


@dataclass(frozen=True)
class Gossip(Immediate):
    """A node trains, sends to neighbours, mixes what has come to it since it last did so, and begins anew as soon as
    its messages are out. Nobody waits for anybody; ``concurrency`` nodes are at work (None: as many as a cohort has).

    A server update, and so a round, is one node's round. To whom a node sends is what the topology says for the node's
    own count of rounds, of those who can be reached then. A letter waits until its reader mixes; of one sender the
    newest counts. Its weight is the topology's when it was sent, and the rest stays at home; where letters leave a
    node less than the topology does, all weights are scaled down alike (with ``onepeer`` or ``matching``: the mean of
    what has come and the own model). The mean of all models moves, as messages are sent and not swapped.

    On instant devices, where all letters of a round are there before anybody mixes, nodes do what they do in rounds,
    bit for bit.

    Source: Hegedus, Danner, Jelasity, "Gossip Learning as a Decentralized Alternative to Federated Learning", DAIS
    2019: send to a peer, merge what comes, train, all at one's own time. Deviations: nodes begin when they are done,
    not at fixed intervals; what comes is merged when the reader has trained, with the topology's weights, not by age.
    """
