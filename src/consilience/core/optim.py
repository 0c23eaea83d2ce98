"""Optimisers by name: plain SGD written out, those of :mod:`consilience.core.optimisers`, and everything else from
torch.optim or pytorch-optimizer."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from consilience.core import tree as tr
from consilience.core.errors import ConfigError, nearest
from consilience.core.optimisers import OASIS, OWN, SGG, Around, Grokfast, Optimizer
from consilience.core.streams import torch_fork
from consilience.core.tree import Tree


class SGD:
    """y <- y - lr d, or with momentum  v <- momentum v + d,  y <- y - lr v  (v = d at the first step)."""

    def __init__(self, parameters: Sequence[Tensor], momentum: float) -> None:
        self._parameters = list(parameters)
        self._momentum = momentum
        self._velocity: list[Tensor] | None = None

    def apply(self, directions: Sequence[Tensor], lr: float, around: Around | None = None) -> None:
        """One step; bit for bit torch.optim.SGD's."""
        steps = list(directions)
        if self._momentum:
            if self._velocity is None:
                self._velocity = [d.clone() for d in steps]
            else:
                torch._foreach_mul_(self._velocity, self._momentum)
                torch._foreach_add_(self._velocity, steps)
            steps = self._velocity
        torch._foreach_add_(self._parameters, steps, alpha=-lr)

    def memory(self) -> Tree:
        """The velocity; None without any."""
        return tr.clone(self._velocity)

    def remember(self, memory: Tree) -> None:
        """Go on from there."""
        self._velocity = tr.clone(memory)


class Library:
    """An optimiser of torch.optim or pytorch-optimizer, fed with directions as gradients; and with estimates of the
    Hessian's diagonal, where it takes any."""

    def __init__(
        self, factory: Callable[..., Any], parameters: Sequence[nn.Parameter], options: dict[str, Any]
    ) -> None:
        self._parameters = list(parameters)
        self._inner = factory(self._parameters, **options)
        self._period = self._inner.update_period if takes_curvature(factory) else 0
        self._count = 0

    def apply(self, directions: Sequence[Tensor], lr: float, around: Around | None = None) -> None:
        """One step of the library's optimiser."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        more: dict[str, Any] = {}
        if self._period:
            assert around is not None, "it asks about the batch"
            if self._count % self._period == 0:
                more["hessian"] = [averaged(d) for d in around.curvature()]
        for p, d in zip(self._parameters, directions, strict=True):
            p.grad = d
        self._inner.step(**more)
        self._count += 1
        for p in self._parameters:
            p.grad = None

    def memory(self) -> Tree:
        """Its state by number of the parameter, and what groups hold."""
        numbers = {p: str(i) for i, p in enumerate(self._parameters)}
        state = {numbers.get(key, key): value for key, value in self._inner.state.items()}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._inner.param_groups]
        return tr.clone({"state": {key: dict(value) for key, value in state.items()}, "groups": groups})

    def remember(self, memory: Tree) -> None:
        """Go on from there."""
        known = tr.clone(memory)
        for i, p in enumerate(self._parameters):
            if str(i) in known["state"]:
                self._inner.state[p] = known["state"][str(i)]
        for group, kept in zip(self._inner.param_groups, known["groups"], strict=True):
            group.update(kept)


def averaged(diagonal: Tensor) -> Tensor:
    """An estimate of the Hessian's diagonal, less noisy: of a convolution's kernels the mean of absolute values over
    each kernel, as AdaHessian takes it (Yao et al., AAAI 2021)."""
    if diagonal.dim() < 3:
        return diagonal
    return diagonal.abs().mean(tuple(range(2, diagonal.dim())), keepdim=True).expand_as(diagonal).contiguous()


SHARPNESS = ("sam", "asam", "gsam", "wsam", "looksam", "friendlysam", "bsam")
"""Names of pytorch-optimizer that are no optimisers of their own."""
NOT_FREE = ("fromage", "nero")
"""Names whose licence (CC BY-NC-SA) would bind users of this library."""
DEFAULTS: dict[str, dict[str, Any]] = {"adahessian": {"eps": 1e-4}}
"""Where its authors' constants are not the library's."""


@functools.cache
def factory(name: str) -> Callable[..., Any]:
    """The optimiser class called ``name``. Raises ConfigError with the nearest name."""
    if name in SHARPNESS:
        raise ConfigError(f"optimizer '{name}' goes in front of another one: sam+NAME or asam+NAME, as in sam+sgd")
    if name in NOT_FREE:
        raise ConfigError(f"optimizer '{name}' is under a licence that forbids commercial use; take another one")
    of_torch = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name in of_torch or name in OWN:
        return of_torch.get(name) or OWN[name]
    own = [*of_torch, *OWN, "oasis"]
    try:
        import pytorch_optimizer
    except ImportError:
        raise ConfigError(
            f"optimizer '{name}' is not in torch.optim{nearest(name, own)} "
            "(pip install pytorch-optimizer for some hundred more)"
        ) from None
    known = {key.lower(): key for key in pytorch_optimizer.get_supported_optimizers()}
    if name not in known:
        raise ConfigError(f"unknown optimizer '{name}'{nearest(name, [*own, *known])}")
    found: Callable[..., Any] = pytorch_optimizer.load_optimizer(known[name])
    return found


@functools.cache
def takes_curvature(made_by: Callable[..., Any]) -> bool:
    """Whether an optimiser's step takes estimates of the Hessian's diagonal."""
    return "hessian" in inspect.signature(made_by.step).parameters if hasattr(made_by, "step") else False


class Front(NamedTuple):
    """What stands in front of an optimiser, with its numbers."""

    kind: str
    numbers: tuple[float, ...]


FRONTS: dict[str, dict[str, float]] = {
    "sam": {"RHO": 0.05},
    "asam": {"RHO": 0.5},
    "grokfast": {"ALPHA": 0.98, "LAMBDA": 2.0},
    "sgg": {"EVERY": 10},
}
"""What may stand in front of an optimiser, and its numbers."""


class Named(NamedTuple):
    """An optimiser's own name, and what stands in front of it, outermost first."""

    own: str
    fronts: tuple[Front, ...]

    @property
    def sharp(self) -> Front | None:
        """Sharpness-aware gradients, if they are wanted."""
        return next((f for f in self.fronts if f.kind in ("sam", "asam") and f.numbers[0]), None)

    @property
    def decays(self) -> bool:
        """Whether weight decay is to be part of the gradient, since the optimiser takes none itself."""
        return self.own in ("sgd", "oasis")

    @property
    def asks(self) -> bool:
        """Whether it asks about the batch of a step, so that only clients can use it."""
        return self.own == "oasis" or (self.own != "sgd" and takes_curvature(factory(self.own)))


@functools.cache
def parse(name: str) -> Named:
    """``FRONT+...+NAME``, a front being ``sam``, ``asam``, ``grokfast`` or ``sgg``, with numbers after colons. Raises
    ConfigError."""
    *before, own = name.split("+")
    fronts = tuple(_front(name, text) for text in before)
    kinds = ["sam" if front.kind == "asam" else front.kind for front in fronts]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f"optimizer '{name}': only one of a kind can stand in front")
    return Named(own, fronts)


def _front(name: str, text: str) -> Front:
    kind, *given = text.split(":")
    if kind not in FRONTS:
        raise ConfigError(f"optimizer '{name}': '{kind}' cannot stand in front of another{nearest(kind, FRONTS)}")
    wanted = FRONTS[kind]
    usage = f"optimizer '{name}': write {':'.join([kind, *wanted])}+NAME"
    try:
        numbers = tuple(float(number) for number in given) or tuple(wanted.values())
    except ValueError:
        raise ConfigError(usage) from None
    if len(numbers) != len(wanted) or not all(0 <= number < math.inf for number in numbers):
        raise ConfigError(f"{usage}, with numbers of at least 0")
    if kind == "grokfast" and numbers[0] >= 1:
        raise ConfigError(f"{usage}, with ALPHA below 1")
    if kind == "sgg" and (numbers[0] < 1 or numbers[0] % 1):
        raise ConfigError(f"{usage}, with a whole EVERY of at least 1")
    return Front(kind, numbers)


class _Bowl:
    """||x||^2 / 2, whose Hessian is 1, for a trial step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters

    def gradient(self, at: Sequence[Tensor] | None = None) -> list[Tensor]:
        return [p.detach().clone() for p in (self.parameters if at is None else at)]

    def curvature(self) -> list[Tensor]:
        return [torch.ones_like(p) for p in self.parameters]


@functools.cache
def _steps(name: str) -> str:
    """Why an optimiser cannot be used here, found by letting it make a step along a gradient; nothing if it can."""
    parameter = nn.Parameter(torch.ones(2, 2))
    try:
        bare = Library(factory(name), [parameter], {"lr": 0.1, **DEFAULTS.get(name, {})})
        bare.apply([torch.ones(2, 2)], 0.1, _Bowl([parameter]))
    except Exception as error:  # libraries have their own
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def check(name: str, momentum: float, weight_decay: float) -> dict[str, float]:
    """The options that an optimiser takes beside lr. Raises ConfigError if it is not known, lacks one of them, or needs
    more than can be given here."""
    given = {key: v for key, v in (("momentum", momentum), ("weight_decay", weight_decay)) if v}
    own = parse(name).own
    if own == "sgd":
        return given
    if own == "oasis":
        accepted: Any = ("weight_decay",)
    else:
        accepted = inspect.signature(factory(own)).parameters
    for key in given:
        if key not in accepted:
            raise ConfigError(f"optimizer '{own}' has no {key}")
    why = "" if own == "oasis" else _steps(own)
    if why:
        raise ConfigError(f"optimizer '{own}' cannot step along a gradient alone: {why}")
    return given


def check_server(name: str, momentum: float) -> None:
    """Raises ConfigError if an optimiser cannot be used by a server, which has a direction and no batch, and must be
    able to write down all that the optimiser remembers."""
    check(name, momentum, 0.0)
    named = parse(name)
    if named.asks or any(front.kind in ("sam", "asam") for front in named.fronts):
        raise ConfigError(f"optimizer '{name}' asks about batches of rows, which a server has none of")
    if not _survives(name, momentum):
        raise ConfigError(f"optimizer '{name}' remembers what no checkpoint holds; a server cannot use it")


@functools.cache
def _survives(name: str, momentum: float) -> bool:
    """Whether it goes on as if nothing had happened after its memory was written down and read."""
    from consilience.core.encode import decode, encode

    def steps(stops: bool) -> Tensor:
        x = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
        made = make(name, [x], 0.1, momentum, 0.0)
        for k in range(12):
            if stops:
                memory, made = made.memory(), make(name, [x], 0.1, momentum, 0.0)
                if k:
                    made.remember(decode(encode(memory)))
            made.apply([x.detach() * torch.tensor([1.0, 10.0]) + k], 0.1)
        return x.detach()

    with torch_fork(0):
        straight = steps(False)
    try:
        with torch_fork(0):
            return torch.equal(straight, steps(True))
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError):
        return False


def make(name: str, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> Optimizer:
    """An optimiser over ``parameters``. Plain SGD and OASIS take no weight decay here: it is part of the gradient. Nor
    is sharpness part of an optimiser: it is in the gradients that it is given."""
    named, made = parse(name), _bare(name, parameters, lr, momentum, weight_decay)
    for front in reversed(named.fronts):
        if front.kind == "grokfast":
            made = Grokfast(made, *front.numbers)
        elif front.kind == "sgg":
            made = SGG(made, [p.data for p in parameters], int(front.numbers[0]))
    return made


def _bare(name: str, parameters: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> Optimizer:
    own = parse(name).own
    if own == "sgd":
        return SGD([p.data for p in parameters], momentum)
    if own == "oasis":
        return OASIS([p.data for p in parameters])
    options = {"lr": lr, **DEFAULTS.get(own, {}), **check(own, momentum, weight_decay)}
    return Library(factory(own), parameters, options)
