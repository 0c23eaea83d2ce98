"""Methods that weigh or combine replies in another way than their own, ask before they train, end with a stage more,
send momenta, or travel compressed: made of a method and a rule, an aggregator, a selection, a calibration or
compressors.

Such a method is a subclass of it with :class:`Weighed`, :class:`Combined`, :class:`Chosen`, :class:`Calibrated`,
:class:`Momenta` or :class:`Compressed` in front, so that all else that it sends, trains and deploys is its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from consilience.core.errors import ConfigError
from consilience.core.messages import Kind, kinds
from consilience.core.method import Method, sums_suffice
from consilience.parts import aggregators, calibration, feedback, selection
from consilience.parts.calibrated import Calibrated
from consilience.parts.chosen import Chosen
from consilience.parts.combined import Combined
from consilience.parts.compressed import Compressed
from consilience.parts.history import Momenta
from consilience.parts.weighed import Asked, Weighed
from consilience.parts.weights import RULES
from consilience.privacy import rows


def composed(method: Method) -> Method:
    """The method as its options ``weights``, ``aggregator``, ``then`` and ``compress`` want it; itself if it does that
    already. Raises ConfigError where these do not fit."""
    mixins: list[type[Method]] = []
    if not isinstance(method, rows.Guarded) and rows.parse(method.row_noise) is not None:
        rows.check(method)
        mixins.append(rows.Guarded)
    if not isinstance(method, Compressed) and _compresses(method):
        if feedback.parse(method.compress) is not None:
            method = _differing(method, "only differences are compressed")
        mixins.append(Compressed)
    if not isinstance(method, Momenta) and method.client_momentum:
        method = _differing(method, "only differences are given a momentum; use client_momentum=0")
        if not method.takes_momentum:
            raise ConfigError(f"{method.name} relies on what its clients have sent; use client_momentum=0")
        if not _may_send(method, Kind.DELTA):
            raise ConfigError(f"{method.name} sends no differences that could have a momentum; use client_momentum=0")
        mixins.append(Momenta)
    if not isinstance(method, Calibrated) and calibration.parse(method.then) is not None:
        if type(method).global_model not in (Method.global_model, Weighed.global_model):
            raise ConfigError(f"{method.name} has no global model of its own head; use then=none")
        mixins.append(Calibrated)
    if not isinstance(method, Chosen) and selection.parse(method.selection) is not None:
        if type(method).global_model not in (Method.global_model, Weighed.global_model) or (
            method.needs.architectures != "same"
        ):
            raise ConfigError(f"{method.name} has no one model that clients can be asked about; use selection=random")
        mixins.append(Chosen)
    if not isinstance(method, Weighed) and method.weights in RULES:
        rule = RULES[method.weights]
        if not method.takes_rules:
            raise ConfigError(f"{method.name} weighs clients in its own way; use weights=samples or uniform")
        if rule.steps:
            method = _differing(method, f"weights={method.weights} need not sum to 1")
        mixins.append(Weighed if rule.phase is None else Asked)
    if not isinstance(method, Combined) and (how := aggregators.parse(method.aggregator)) is not None:
        if not (sums_suffice(method) or isinstance(method, Weighed) or method.takes_aggregator):
            raise ConfigError(f"{method.name} combines in its own way and takes no aggregator; use aggregator=mean")
        if how.differences:
            method = _differing(method, f"aggregator={method.aggregator} works on differences")
        mixins.append(Combined)
    return _made(tuple(mixins), type(method), _fields(method)) if mixins else method


def _compresses(method: Method) -> bool:
    """Whether anything of the method's messages is to be compressed. Raises ConfigError where it cannot be."""
    up = None if method.compresses == "both" else feedback.parse(method.compress)
    down = None if method.compresses else feedback.parse(method.compress_down, "--compress-down")
    if up is None and down is None:
        return False
    if any(phase.over == "neighbours" for phase in method.program()):
        raise ConfigError(f"{method.name} has no server; compress and compress-down are for messages from and to one")
    if up is not None and not _may_send(method, Kind.MODEL, Kind.DELTA, Kind.CONTROL):
        raise ConfigError(f"{method.name} sends neither differences nor controls; use compress=identity")
    if down is not None and down.rule != "plain":
        raise ConfigError("compress-down feeds its errors back in its own way; give a compressor alone, as topk:0.01")
    if down is not None and method.buffers == "local":
        raise ConfigError("compress-down sends the global model's buffers; use buffers=average")
    return True


def _may_send(method: Method, *wanted: Kind) -> bool:
    """Whether any phase sends a field of one of these kinds, as far as the method says what it sends."""
    sent = [method.sends(phase) for phase in method.program()]
    return None in sent or any(kind in wanted for t in sent if isinstance(t, type) for kind in kinds(t).values())


def _differing(method: Method, why: str) -> Method:
    """The method with clients that send differences. Raises ConfigError where it cannot have such."""
    try:
        return method if method.form == "delta" else dataclasses.replace(method, form="delta")
    except ConfigError:
        raise ConfigError(f"{method.name} sends whole models, and {why}") from None


def _fields(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


_known: dict[Any, type[Method]] = {}


def _made(mixins: tuple[type[Method], ...], base: type[Method], fields: dict[str, Any]) -> Method:
    """``base`` with mixins in front; pickled as the call that made it, since the class has no name to be found by."""
    if (mixins, base) not in _known:
        name = "".join(m.__name__ for m in mixins) + base.__name__
        space: dict[str, Any] = {"__reduce__": lambda self: (_made, (mixins, base, _fields(self)))}
        space["__module__"] = base.__module__
        outside = (rows.Guarded, Compressed, Momenta, Calibrated, Chosen)
        first = tuple(m for m in mixins if m in outside)
        needs = dataclasses.replace(base.needs, loss=True) if Chosen in first else base.needs
        if Calibrated in first:
            needs = dataclasses.replace(needs, split_model=True, classification=True)
        space["needs"] = needs
        if Momenta in mixins and {*mixins} <= {Momenta, rows.Guarded} and sums_suffice(base(**fields)):
            space["sums"] = base.sums  # a momentum in the place of a difference changes nothing of what is wanted
        rest = mixins[len(first) :]
        parents: tuple[type, ...]
        parents = (*first, base, *rest) if issubclass(base, Weighed) else (*mixins, base)  # weights, then combining
        _known[mixins, base] = cast(type[Method], type(name, parents, space))
    return _known[mixins, base](**fields)
