"""Methods whose updates are combined by an aggregator instead of summed."""

from __future__ import annotations

from collections.abc import Sequence

from consilience.core.messages import Reply, kinds
from consilience.core.method import Method, Phase
from consilience.core.site import Host
from consilience.core.tree import Tree
from consilience.parts import aggregators, prototypes
from consilience.parts.prototypes import Prototypes


class Combined(Method):
    """Mixin: updates are combined by an aggregator instead of summed."""

    def aggregate(
        self, phase: Phase, host: Host, server: Tree, replies: Sequence[Reply], cohort: Sequence[int]
    ) -> Tree:
        """One update in the place of several, and the method's own step along it. Prototypes are combined class by
        class; a phase in which nothing is sent is the method's own."""
        updates = [reply.update for reply in replies]
        if updates[0] is None:
            return super().aggregate(phase, host, server, replies, cohort)
        how = aggregators.parse(self.aggregator)
        assert how is not None
        rng = host.rng("aggregator")
        if isinstance(updates[0], Prototypes):
            update: Tree = prototypes.combined(updates, lambda rows: how.combine(*rows, rng))
        else:
            weights = self.sums(replies) or dict.fromkeys(kinds(type(updates[0])), self.shares(replies))
            update = how.combine(updates, weights, rng)
        samples = sum(reply.samples for reply in replies)
        one = replies[0]._replace(update=update, samples=samples, share=None)
        return super().aggregate(phase, host, server, [one], cohort)
