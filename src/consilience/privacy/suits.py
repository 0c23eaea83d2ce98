"""Which methods can run on sums alone, and in which form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, NeedsError
from consilience.core.messages import Job, Kind, Reply, kinds
from consilience.core.method import Method, sums_suffice
from consilience.core.model import Weights
from consilience.core.site import Place
from consilience.core.tree import Tree


def uniform(method: Method) -> Method:
    """A method with equal weights and differences up, as private sums need it; other rules than numbers of samples are
    refused. Raises NeedsError."""
    if method.weights not in ("samples", "uniform"):
        raise NeedsError(
            f"{method.name}: weights={method.weights} come from clients' data; privacy has weights=uniform"
        )
    try:
        return dataclasses.replace(method, weights="uniform", form="delta")
    except ConfigError:
        raise NeedsError(f"{method.name} sends whole models or has weights of its own; privacy wants equal weights of "
                         "differences (form=delta)") from None  # fmt: skip


def why_not(method: Method, models: int) -> str | None:
    """Why a method, as it is, cannot run on sums of updates of so many architectures alone; None if it can."""
    program = method.program()
    made = method.sends(method.program()[0])
    if len(program) != 1 or program[0].over != "cohort" or program[0].when != "round":
        return "has more phases than one round trip"
    if not isinstance(made, type) or not sums_suffice(method):
        return "needs every client's update, not only their sum"
    if type(method).select is not Method.select:
        return "chooses the clients itself"
    if method.counts_rows or method.needs.pooled_data:
        return "uses clients' rows otherwise than through updates"
    if models > 1:
        return "has clients of different architectures here"
    return None


def no_difference(method: Method) -> str | None:
    """A field of the updates that is no difference, so that its length means nothing; None if all are."""
    made = method.sends(method.program()[0])
    assert isinstance(made, type)
    return next((f for f, kind in kinds(made).items() if kind in (Kind.MODEL, Kind.RANKS, Kind.STAT)), None)


def buffers_of(method: Method, place: Place) -> str | None:
    """A buffer that would be let out beside the sums, if there is one."""
    if method.buffers == "local":
        return None
    spec = next(iter(place.architectures.values())).spec
    return next(iter(spec.buffers), None)


def weights(method: Method, cohort: int) -> dict[str, float]:
    """The weight of a client in the sum of each field. Raises NeedsError if it differs between clients."""
    nothing = (0, 0, 0, 0.0, float("nan"))
    asked = [Reply(Job(i, i, 1, 0, 0, 0), None, i + 1, *nothing) for i in range(cohort)]
    found = method.sums(asked)
    assert found is not None
    if any(len(set(shares)) > 1 for shares in found.values()):
        raise NeedsError(f"{method.name}: clients' weights depend on their data; privacy wants equal ones")
    return {name: shares[0] for name, shares in found.items()}


def template(method: Method, place: Place) -> dict[str, Tree]:
    """Zeros like each field of an update. Raises NeedsError where its shape is not known beforehand."""
    made = method.sends(method.program()[0])
    assert isinstance(made, type)
    name = place.model_of(0)
    spec = place.architectures[name].spec
    buffers = {} if method.buffers == "local" else spec.buffers
    own: Mapping[Any, Any] = method.expects(place, name)
    usual: dict[Any, Any] = {
        Kind.DELTA: spec.params, Kind.CONTROL: spec.params, Kind.BUFFERS: buffers,
        Kind.MODEL: Weights(spec.params, buffers),
    }  # fmt: skip
    fields = {}
    for field, kind in kinds(made).items():
        shape = {} if kind is Kind.BUFFERS and not buffers else own.get(field, usual.get(kind))
        if isinstance(shape, Weights) and not buffers:
            shape = shape._replace(buffers={})
        if not isinstance(shape, dict | Weights):
            raise NeedsError(f"{method.name}: '{field}' has no shape that is known beforehand")
        fields[field] = tr.zeros_like(shape)
    return fields
