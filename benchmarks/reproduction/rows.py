"""The rows of the table. A new method is one entry of ``ROWS``."""

from __future__ import annotations

from dataclasses import dataclass

from consilience import methods
from consilience.config import parse_method


@dataclass(frozen=True)
class Row:
    """A method, the skew it was made for, and what its paper says.

    method: with options that stay fixed. setting: of ``settings.SETTINGS``. claim: data, setting and number of the
    paper, with what is not known said. own: its hyper-parameter that is tuned beside lr. beats: the baselines whose
    score it must exceed for the claim to hold. score: "accuracy" or "ece" (mean of the last rounds), or "final", the
    accuracy after the last round, of the global model. missing: why the claim itself cannot be tested here; what was
    run is shown all the same.
    """

    method: str
    setting: str
    claim: str
    own: str | None = None
    beats: tuple[str, ...] = ("fedavg",)
    score: str = "accuracy"
    missing: str = ""

    @property
    def name(self) -> str:
        """How the command line calls it."""
        name, own = parse_method(self.method)
        return "-".join([name, *(own[key].partition(":")[0] for key in ("aggregator", "row_order") if key in own)])

    @property
    def label(self) -> str:
        """The method with every searched option fixed but lr and ``own``, so that all search as little."""
        name, given = parse_method(self.method)
        fixed = {
            key: field.default
            for key, field in methods.get(name).options().items()
            if field.metadata.get("search") is not None and key not in ("lr", self.own)
        }
        every = ",".join(f"{key}={value}" for key, value in {**fixed, **given}.items())
        return f"{name}:{every}" if every else name


BASELINES = ("fedavg", "scaffold")
BOTH = BASELINES
UNKNOWN = "number not recovered"

ROWS = (
    Row(
        "fednova",
        "quantity",
        "above FedAvg on CIFAR-10, VGG-11, 16 clients, Dirichlet 0.1, 2 epochs: 66.3 against 60.7 % (from memory)",
    ),
    Row(
        "feddyn",
        "labels",
        f"fewer rounds than FedAvg and SCAFFOLD to the same accuracy on CIFAR-10/100, 100 clients, 10 % a round, "
        f"Dirichlet 0.3; {UNKNOWN}",
        own="alpha",
        beats=BOTH,
    ),
    Row(
        "fedsam",
        "labels",
        f"above FedAvg on skewed CIFAR-10/100; {UNKNOWN} (FedSWA's paper has it below FedAvg under strong skew)",
        own="rho",
    ),
    Row(
        "fedavg-m",
        "labels",
        f"above FedAvg (and needs no bound on heterogeneity) on CIFAR-10, ResNet-18, Dirichlet; {UNKNOWN}",
        own="beta",
    ),
    Row(
        "scaffold-m",
        "labels",
        f"above SCAFFOLD when few take part, on CIFAR-10, ResNet-18, Dirichlet; {UNKNOWN}",
        own="beta",
        beats=("scaffold",),
    ),
    Row(
        "fedlex",
        "two-classes",
        f"faster and better than FedAvg on MNIST, two classes a client, 10 clients, 20 % a round; {UNKNOWN}",
    ),
    Row(
        "fedetf",
        "labels",
        f"above FedAvg on CIFAR-10/100 and Tiny-ImageNet, ResNet-20, 20 clients, Dirichlet 0.1; {UNKNOWN}",
    ),
    Row(
        "ccvr",
        "labels",
        f"above FedAvg on CIFAR-10/100 and CINIC-10; {UNKNOWN}",
        own="calibration_lr",
        score="final",
    ),
    Row(
        "fedld",
        "dirichlet-0.5",
        f"above FedAvg on Retina and COVID-FL images, 5 clients, all of them a round; {UNKNOWN}",
        own="lam",
    ),
    Row(
        "feddisco",
        "dirichlet-0.5",
        f"above FedAvg on HAM10000, CIFAR-10/100, CINIC-10, Fashion-MNIST, 10 clients, Dirichlet 0.5; {UNKNOWN}",
        own="a",
    ),
    Row(
        "ida",
        "three-classes",
        f"above FedAvg on CIFAR-10, Fashion-MNIST, HAM10000, 10 clients of 3 classes; {UNKNOWN}",
    ),
    Row(
        "fedimpro:cut=2",
        "labels",
        f"above FedAvg on CIFAR-10, ResNet-18, 5 of 10 clients a round, Dirichlet 0.1; {UNKNOWN}",
        own="weight",
    ),
    Row(
        "ggeur",
        "logistic",
        f"above FedAvg of a head on frozen CLIP features of CIFAR-10/100 and Tiny-ImageNet, Dirichlet 0.1 to 0.5; "
        f"{UNKNOWN} (here the features are the pixels)",
        own="target",
    ),
    Row(
        "fedcog:images=64,generate_steps=20",
        "dirichlet-0.5",
        f"above FedAvg on CIFAR-10 and Fashion-MNIST, 10 clients, Dirichlet 0.1 and 0.5; {UNKNOWN}",
        own="disagree",
    ),
    Row(
        "fedloge",
        "long-tail",
        f"above FedAvg on CIFAR-10/100-LT, 40 clients, Dirichlet 0.5, most common class 50 to 100 times the rarest; "
        f"{UNKNOWN}",
        own="sparsity",
    ),
    Row(
        "fedswa",
        "labels",
        f"above FedAvg and FedSAM on CIFAR-10/100 and Tiny-ImageNet, 100 clients, Dirichlet 0.1; {UNKNOWN}",
        own="server_lr",
    ),
    Row(
        "fedmoswa",
        "labels",
        f"above FedAvg and SCAFFOLD on CIFAR-10/100 and Tiny-ImageNet, 100 clients, Dirichlet 0.1; {UNKNOWN}",
        own="server_lr",
        beats=BOTH,
    ),
    Row(
        "fald:burn_in=10",
        "logistic",
        "a proof of convergence to the posterior; calibration on Fashion-MNIST with logistic regression; "
        f"{UNKNOWN}",
        own="temperature",
        score="ece",
        missing="the claim is a proof",
    ),
    Row(
        "fedce",
        "occupations",
        "contributions correlate at 93.5 and 96.3 % with leave-one-out on prostate and retina images, where Dice is "
        "higher than FedAvg's",
        missing="no segmentation; leave-one-out runs are not made",
    ),
    Row(
        "fedavg:row_order=curriculum:global:linear:0.8:0.2",
        "labels",
        f"easy rows first is above rows at random, the more so the more labels are skewed, on CIFAR-10; {UNKNOWN}",
    ),
    Row(
        "fedavg:aggregator=upgrad",
        "labels",
        "no update of the mean hurts a client to first order (a property, tested); no claim for federated accuracy",
        missing="no number is claimed",
    ),
    Row(
        "fedavg:aggregator=median",
        "labels",
        "robust to few bad clients; no claim of accuracy under label skew without them",
        missing="no number is claimed",
    ),
    Row(
        "fedavg-m-vr",
        "labels",
        f"converges faster than FedAvg-M in theory; {UNKNOWN}",
        own="beta",
        missing="the claim is a rate",
    ),
    Row(
        "scaffold-m-vr",
        "labels",
        f"converges faster than SCAFFOLD-M in theory; {UNKNOWN}",
        own="beta",
        missing="the claim is a rate",
        beats=("scaffold",),
    ),
)  # fmt: skip
