"""When a method's phases happen."""

from __future__ import annotations

from collections.abc import Sequence

from consilience.core.errors import ConfigError
from consilience.core.method import At, Coin, Phase
from consilience.core.streams import philox


class Program:
    """A method's phases, and their chains: each "client" phase with the one that it continues; in gossip, where nobody
    waits for all others, each phase among neighbours too. Raises ConfigError."""

    def __init__(self, phases: Sequence[Phase], seed: int, gossip: bool = False) -> None:
        self.phases, self._seed = phases, seed
        self.chains = _chains(phases, ("client", "neighbours") if gossip else ("client",))

    @property
    def first(self) -> int:
        """Index of a round's first phase that is not only a question."""
        return next(c[0] for c in self.chains if self.phases[c[0]].inner)

    def at(self, when: str) -> list[tuple[int, ...]]:
        """The chains of the start or the end of a run."""
        return [c for c in self.chains if self.phases[c[0]].when == when]

    def of_round(self, version: int) -> list[tuple[int, ...]]:
        """The chains of the round that follows ``version``."""
        return [c for c in self.chains if self._happens(self.phases[c[0]], version)]

    def _happens(self, phase: Phase, version: int) -> bool:
        if isinstance(phase.when, Coin):
            return bool(philox(self._seed, "coin", phase.name, version).random() < phase.when.p)
        if isinstance(phase.when, At):
            return phase.when.round == version + 1
        return phase.when == "round"


def _chains(program: Sequence[Phase], linked: Sequence[str]) -> list[tuple[int, ...]]:
    """Phases grouped so that each one over what is ``linked`` follows the one it continues."""
    chains: list[tuple[int, ...]] = []
    for i, phase in enumerate(program):
        if phase.over in linked:
            if not chains:
                raise ConfigError("a program cannot begin with a phase that continues another")
            chains[-1] = (*chains[-1], i)
        else:
            chains.append((i,))
    if not any(program[c[0]].inner for c in chains):
        raise ConfigError("a program needs a phase in every round")
    return chains
