"""When a method's phases happen."""

from __future__ import annotations

from collections.abc import Sequence

from consilience.core.errors import ConfigError
from consilience.core.method import Coin, Phase
from consilience.core.streams import philox


class Program:
    """A method's phases, and their chains: each "client" phase with the one that it continues. Raises ConfigError."""

    def __init__(self, phases: Sequence[Phase], seed: int) -> None:
        self.phases, self._seed = phases, seed
        self.chains = _chains(phases)

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
        return phase.when == "round"


def _chains(program: Sequence[Phase]) -> list[tuple[int, ...]]:
    """Phases grouped so that each "client" phase follows the one it continues."""
    chains: list[tuple[int, ...]] = []
    for i, phase in enumerate(program):
        if phase.over == "client":
            if not chains:
                raise ConfigError("a program cannot begin with a phase over one client")
            chains[-1] = (*chains[-1], i)
        else:
            chains.append((i,))
    if not any(program[c[0]].inner for c in chains):
        raise ConfigError("a program needs a phase in every round")
    return chains
