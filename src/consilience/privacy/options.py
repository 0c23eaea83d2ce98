"""What may be asked of a run's privacy, checked, and the release that it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, NeedsError
from consilience.core.events import Schedule
from consilience.core.messages import Release
from consilience.core.method import Method
from consilience.core.streams import seed_of
from consilience.core.worker import Worker
from consilience.privacy import suits
from consilience.privacy.clip import parse
from consilience.privacy.ledger import LEDGER, Ledger
from consilience.privacy.mechanism import make, solved
from consilience.schedule.rounds import Rounds

if TYPE_CHECKING:
    from consilience.privacy.numbers import Parties
    from consilience.privacy.secret import Secret

KEYS = ("epsilon", "delta", "noise_multiplier", "dp_clip", "dp_mechanism", "secure")
"""A configuration's options of privacy."""


@dataclass(frozen=True)
class Privacy:
    """Options of privacy. epsilon: to be spent by the whole run at ``delta``; noise: or the noise multiplier itself.
    clip, mechanism: as in :func:`consilience.privacy.clip.parse` and :data:`consilience.privacy.mechanism.MECHANISMS`.
    secure: sums are secret, and can be made as long as this share of the clients that were asked is left; with noise as
    well, that is added to the sum.

    Raises ConfigError.
    """

    epsilon: float | None = None
    delta: float = 1e-6
    noise: float | None = None
    clip: str = "1.0"
    mechanism: str = "poisson"
    secure: float | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.noise is not None:
            raise ConfigError("--epsilon and --noise-multiplier say the same thing; give one of them")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ConfigError(f"--epsilon {self.epsilon:g}: above 0 and finite")
        if not 0 < self.delta < 1:
            raise ConfigError(f"--delta {self.delta:g}: between 0 and 1, and well below 1 / clients")
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise ConfigError(f"--noise-multiplier {self.noise:g}: 0 or more")
        if math.isinf(parse(self.clip).norm) and (self.epsilon is not None or self.noise):
            raise ConfigError("--dp-clip inf clips nothing, so no noise could cover it; give a finite norm")
        make(self.mechanism, 1, 1, 1)
        if self.secure is not None and not 0.5 < self.secure <= 1:
            raise ConfigError(
                f"--secure {self.secure:g}: above 0.5, so that no two halves can be unmasked, and at most 1"
            )
        if self.secure is not None and self.asked and self.mechanism == "poisson":
            raise ConfigError(
                "--secure with differential privacy: a round of --dp-mechanism poisson may have a single client, and a "
                "sum of one hides nothing; give fixed or tree"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Privacy:
        """From a configuration's values."""
        return cls(*(config[key] for key in KEYS))

    @property
    def asked(self) -> bool:
        """Whether anything is to be private."""
        return self.epsilon is not None or self.noise is not None

    @property
    def clips(self) -> str:
        """How clients clip what is added up in secret; empty where they do not."""
        return str(parse(self.clip)) if self.asked else ""

    def clips_so(self, recipe: Any) -> bool:
        """Whether a recipe clips as this says; an adaptive bound may be any."""
        clip, norm = getattr(recipe, "clip", None), getattr(recipe, "norm", None)
        own = parse(self.clip)
        most = math.inf if own.kind == "adaptive" else own.norm
        return clip == self.clips and (not self.asked or (type(norm) is float and 0 < norm <= most))

    def method(self, method: Method) -> Method:
        """The method as it runs with this."""
        return suits.uniform(method) if self.asked else method

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options of a method that were asked for and that privacy would overrule."""
        for key, right in (("weights", "uniform"), ("form", "delta")):
            if self.asked and options.get(key, right) != right:
                raise ConfigError(
                    f"{key}={options[key]} with differential privacy: only {key}={right} is covered by it"
                )

    def release(
        self,
        worker: Worker,
        schedule: Schedule,
        *,
        rounds: int,
        cohort: int,
        available: bool,
        folder: Path | None = None,
        parties: Parties | None = None,
        secret: str | None = None,
    ) -> Release | None:
        """The release of a run, checked against its method and schedule; None if nothing was asked for. available:
        whether all clients can always be reached. folder: where the ledger is kept. parties: of secret sums; by default
        they are simulated. secret: what keys noise and draws; by default the run's seed does."""
        method, place = worker.method, worker.place
        self.fits(method, cohort, len(place.architectures))
        masked = None if self.secure is None else self._secret(worker, schedule, parties)
        if not self.asked:
            return masked
        buffer = suits.buffers_of(method, place)
        if buffer is not None:
            raise NeedsError(
                f"model '{place.model_of(0)}' has buffers ('{buffer}') that privacy does not cover; keep them at the "
                "clients with --buffers local"
            )
        if not isinstance(schedule, Rounds) or not available:
            raise ConfigError("differential privacy draws the clients itself: it needs --schedule rounds and "
                              "--availability always")  # fmt: skip
        clip, clients = parse(self.clip), worker.federation.n_seen
        if clip.kind == "adaptive" and self.mechanism == "tree":
            raise ConfigError(
                "--dp-clip adaptive changes the bound within a tree; give --dp-mechanism tree a fixed one"
            )
        mechanism = make(self.mechanism, clients, cohort, rounds, place.seed if secret is None else seed_of(secret))
        noise = self.noise if self.epsilon is None else solved(mechanism, self.epsilon, self.delta)
        assert noise is not None
        from consilience.privacy.central import Central

        made = method.sends(method.program()[0])
        assert isinstance(made, type)
        return Central(
            made, mechanism, clip, noise, self.delta, suits.weights(method, mechanism.cohort),
            suits.template(method, place), Ledger(None if folder is None else folder / LEDGER),
            secret or f"seed {place.seed}", self.epsilon, masked,
        )  # fmt: skip

    def fits(self, method: Method, cohort: int, models: int = 1) -> None:
        """Refuse a method that cannot run with this, as far as that does not depend on its models and data. cohort:
        clients of a round. models: architectures in the run. Raises ConfigError or NeedsError."""
        for asked, what in ((self.secure is not None, "secure aggregation"), (self.asked, "differential privacy")):
            why = suits.why_not(method, models) if asked else None
            if why is not None:
                raise NeedsError(f"{method.name} {why}: it cannot run with {what}\n{fitting(self.asked)}")
        odd = suits.no_difference(method) if self.asked else None
        if odd is not None:
            raise NeedsError(
                f"{method.name} sends '{odd}', which is no difference: differential privacy cannot bound it"
            )
        if self.secure is not None and cohort < 2:
            raise ConfigError(
                "secure aggregation: the sum of one client's update hides nothing; ask two or more a round"
            )

    def _secret(self, worker: Worker, schedule: Schedule, parties: Parties | None) -> Secret:
        """Secret sums."""
        method, place = worker.method, worker.place
        if not isinstance(schedule, Rounds):
            raise ConfigError(
                "secure aggregation waits for a cohort that knows of each other: it needs --schedule rounds"
            )
        template = suits.template(method, place)
        if any(not leaf.is_floating_point() for leaf in tr.tensors(template)):
            raise NeedsError(f"model '{place.model_of(0)}' counts batches in its buffers, which have no sum; keep "
                             "them at the clients with --buffers local")  # fmt: skip
        from consilience.privacy.numbers import Simulated
        from consilience.privacy.secret import Secret

        assert self.secure is not None
        return Secret(method, self.secure, template, parties or Simulated(place.seed), worker.federation.size)


def fitting(differences: bool) -> str:
    """The methods that run on sums, in words; differences: of differences with equal weights."""
    from consilience import methods
    from consilience.core.method import sums_suffice

    found = []
    for name, cls in methods.every().items():
        try:
            made = suits.uniform(cls.make({})) if differences else cls.make({})
        except (NeedsError, ConfigError):
            continue
        known = len(made.program()) == 1 and sums_suffice(made) and isinstance(made.sends(made.program()[0]), type)
        if known and not (differences and suits.no_difference(made)):
            found.append(name)
    return f"methods that fit: {', '.join(found)}"


NONE = Privacy()
"""Nothing private."""
