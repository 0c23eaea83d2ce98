"""The virtual clock of a fleet: what jobs take on devices and links, who can be reached, who drops out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from consilience.core.errors import ConfigError
from consilience.core.federation import Federation
from consilience.core.messages import Device, Job, Trip
from consilience.core.site import Place
from consilience.core.streams import philox
from consilience.fleet import device as devices_
from consilience.fleet import profiles
from consilience.fleet.availability import Always, Availability, parse


@dataclass(frozen=True)
class Fleet:
    """A core ``Clock``: devices and availability of clients 0 .. n - 1.

    work: FLOP to train on a row, by client. drops: chance that a job is lost on its way. seed: of what is drawn.
    """

    devices: Sequence[Device]
    availability: Availability
    work: Sequence[float]
    drops: float = 0.0
    seed: int = 0

    def trip(
        self, job: Job, start: float, *, down: int, up: int, samples: int, steps: int, flops: float | None = None
    ) -> Trip:
        """Wait, latency + bytes / bandwidth down, FLOP / speed, latency + bytes / bandwidth up.

        A message of no bytes is not sent and takes no time. Where no FLOP are known, they are those of training the
        client's model on the samples.
        """
        device = self.devices[job.client]
        begin = self.availability.returns(job.client, start, job.version)
        wait = begin - start
        download = device.latency + down / device.down if down else 0.0
        upload = device.latency + up / device.up if up else 0.0
        work = samples * self.work[job.client] if flops is None else flops
        compute = samples / device.rate if device.rate is not None else work / device.speed
        whole = wait + download + compute + upload
        lost = math.inf
        if self.drops:
            rng = philox(self.seed, "lost", job.client, job.number, job.phase)
            if rng.random() < self.drops:
                lost = wait + rng.random() * (whole - wait)
        if wait < math.inf:
            away = self.availability.leaves(job.client, begin) - start
            lost = min(lost, away) if away < whole else lost
        return Trip(wait, download, compute, upload, lost if lost < math.inf else None)

    def online(self, clients: np.ndarray, time: float, version: int) -> np.ndarray:
        """Which of these clients can be asked now."""
        return self.availability.online(clients, time, version)

    def returns(self, client: int, time: float, version: int) -> float:
        """When a client can be asked again."""
        return self.availability.returns(client, time, version)

    def device(self, client: int) -> Device:
        """A client's device."""
        return self.devices[client]


def make_devices(
    spec: str | Sequence[Device], federation: Federation, seed: int, correlation: str = "0"
) -> list[Device]:
    """A device for each client: of a profile, a csv file, a function, or as given. Raises ConfigError or DataError."""
    n = federation.n_clients
    if not isinstance(spec, str):
        return devices_.checked(spec, n, "fleet")
    kind, strength = _correlation(correlation)
    named = spec.partition(":")[0] in (*profiles.PROFILES, "lognormal")
    if not named:
        if strength:
            raise ConfigError("--fleet-correlation is for fleets by name; a file or function says who has what")
        if Path(spec).suffix == ".csv" or Path(spec).exists():
            return devices_.read_csv(Path(spec), n)
        if ":" in spec:
            return devices_.from_function(spec, n, seed)
    quantiles = correlated(_amount(kind, federation), strength, seed) if strength else None
    return profiles.draw(spec, n, seed, quantiles)


def _correlation(text: str) -> tuple[str, float]:
    kind, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if kind not in ("", "rows", "labels") or not -1 <= value <= 1:
        raise ConfigError(f"--fleet-correlation {text}: write RHO or labels:RHO, RHO from -1 to 1")
    return kind, value


def _amount(kind: str, federation: Federation) -> np.ndarray:
    """What speed goes with: rows, or the class that a client holds most of."""
    if kind != "labels":
        return np.array([federation.size(client) for client in range(federation.n_clients)], dtype=float)
    counts = label_counts(federation)
    if counts is None:
        raise ConfigError("--fleet-correlation labels:RHO is for a classification")
    return np.asarray(counts.argmax(1), dtype=float)


def label_counts(federation: Federation) -> np.ndarray | None:
    """Training rows of each class, ``(n_clients, classes)``; None if there are no classes."""
    if federation.task.kind != "classification":
        return None
    k = federation.task.outputs
    return np.stack(
        [torch.bincount(federation.data(c).train.y, minlength=k).numpy() for c in range(federation.n_clients)]
    )


def correlated(amount: np.ndarray, rho: float, seed: int) -> np.ndarray:
    """Quantiles in (0, 1), ``(n,)``, that go with ``amount``: a Gaussian copula of correlation ``rho``; ties of
    ``amount`` are broken by the seed."""
    n, normal = len(amount), NormalDist()
    rng = philox(seed, "fleet-correlation")
    order = np.lexsort((rng.random(n), amount))
    ranks = np.empty(n)
    ranks[order] = np.arange(n)
    scores = np.array([normal.inv_cdf((rank + 0.5) / n) for rank in ranks])
    z = rho * scores + math.sqrt(1 - rho * rho) * rng.standard_normal(n)
    return np.array([normal.cdf(value) for value in z])


def make_fleet(
    place: Place,
    federation: Federation,
    *,
    fleet: str | Sequence[Device] = "uniform",
    availability: str = "always",
    correlation: str = "0",
    drops: float = 0.0,
) -> Fleet:
    """The clock of a run. Raises ConfigError or DataError, also if no client that may train is ever online."""
    if not 0 <= drops < 1:
        raise ConfigError(f"--drops {drops:g}: a chance at least 0 and below 1")
    devices = make_devices(fleet, federation, place.seed, correlation)
    labels = label_counts(federation) if ":labels" in availability else None
    when = parse(availability, federation.n_clients, place.seed, labels)
    if not isinstance(when, Always) and not any(when.returns(int(c), 0.0, 0) < math.inf for c in federation.seen):
        raise ConfigError(f"--availability {availability}: no client that may train is ever online")
    work = {name: architecture.flops.training for name, architecture in place.architectures.items()}
    n = federation.n_clients
    of = [work[place.server_model]] * n if place.models is None else [work[place.model_of(c)] for c in range(n)]
    return Fleet(devices, when, of, drops, place.seed)
