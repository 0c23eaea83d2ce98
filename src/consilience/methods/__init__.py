"""All methods by name. Each is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from consilience.core.errors import ConfigError, nearest
from consilience.core.method import Method

_WHERE = {
    "local": ("local", "Local"),
    "centralised": ("centralised", "Centralised"),
    "fedavg": ("fedavg", "FedAvg"),
    "fedavgm": ("fedopt", "FedAvgM"),
    "fedprox": ("fedprox", "FedProx"),
    "fedadagrad": ("fedopt", "FedAdagrad"),
    "fedadam": ("fedopt", "FedAdam"),
    "fedyogi": ("fedopt", "FedYogi"),
    "fedopt": ("fedopt", "FedOpt"),
    "scaffold": ("scaffold", "Scaffold"),
    "moon": ("moon", "Moon"),
    "fednova": ("fednova", "FedNova"),
    "feddyn": ("feddyn", "FedDyn"),
    "fedsam": ("fedsam", "FedSAM"),
    "fedavg-m": ("fedavg_momentum", "FedAvgMomentum"),
    "fedavg-m-vr": ("fedavg_momentum", "FedAvgMomentumVR"),
    "scaffold-m": ("scaffold_momentum", "ScaffoldMomentum"),
    "scaffold-m-vr": ("scaffold_momentum", "ScaffoldMomentumVR"),
    "fedswa": ("fedswa", "FedSWA"),
    "fedmoswa": ("fedswa", "FedMoSWA"),
    "fedlex": ("fedlex", "FedLEx"),
    "fald": ("fald", "FALD"),
    "fedld": ("fedld", "FedLD"),
    "fedimpro": ("fedimpro", "FedImpro"),
    "ggeur": ("ggeur", "GGEUR"),
    "fedcog": ("fedcog", "FedCOG"),
    "fedetf": ("fedetf", "FedETF"),
    "ccvr": ("ccvr", "CCVR"),
    "fedloge": ("fedloge", "FedLoGe"),
    "curriculum": ("curriculum", "Curriculum"),
    "feddisco": ("feddisco", "FedDisco"),
    "ida": ("ida", "IDA"),
    "fedce": ("fedce", "FedCE"),
    "fedau": ("fedau", "FedAU"),
    "fedasync": ("fedasync", "FedAsync"),
    "fedbuff": ("fedbuff", "FedBuff"),
    "fedfix": ("fedfix", "FedFix"),
    "fedasmu": ("fedasmu", "FedASMU"),
    "fedcompass": ("fedcompass", "FedCompass"),
    "dpsgd": ("dpsgd", "DPSGD"),
    "finalmerge": ("finalmerge", "FinalMerge"),
    "vargossip": ("vargossip", "VarGossip"),
    "tracking": ("tracking", "Tracking"),
    "dproxsgt": ("dproxsgt", "DProxSGT"),
    "scool": ("scool", "SCooL"),
    "dadao": ("dadao", "DADAO"),
    "localgda": ("localgda", "LocalGDA"),
    "masha1": ("masha", "Masha1"),
    "masha2": ("masha", "Masha2"),
    "fedproto": ("fedproto", "FedProto"),
    "feddistill": ("feddistill", "FedDistill"),
    "lgfedavg": ("lgfedavg", "LGFedAvg"),
    "fedgh": ("fedgh", "FedGH"),
    "fedtgp": ("fedtgp", "FedTGP"),
    "fedsa": ("fedsa", "FedSA"),
    "heterofl": ("heterofl", "HeteroFL"),
    "fedrolex": ("fedrolex", "FedRolex"),
    "feddropout": ("feddropout", "FedDropout"),
    "inco": ("inco", "InCo"),
    "flexifed": ("flexifed", "FlexiFed"),
    "fedadp": ("fedadp", "FedADP"),
    "fml": ("fml", "FML"),
    "fedkd": ("fedkd", "FedKD"),
    "fedgen": ("fedgen", "FedGen"),
    "fedmd": ("fedmd", "FedMD"),
    "feddf": ("feddf", "FedDF"),
    "knfu": ("knfu", "KnFu"),
    "mhd": ("mhd", "MHD"),
    "fedper": ("fedper", "FedPer"),
    "fedrep": ("fedper", "FedRep"),
    "fedsim": ("fedper", "FedSim"),
    "fedalt": ("fedper", "FedAlt"),
    "ditto": ("ditto", "Ditto"),
    "pfedme": ("pfedme", "PFedMe"),
    "apfl": ("apfl", "APFL"),
    "perfedavg": ("perfedavg", "PerFedAvg"),
    "spectral": ("spectral", "Spectral"),
    "fedd2s": ("fedd2s", "FedD2S"),
    "pfedgate": ("pfedgate", "PFedGate"),
    "fedins": ("fedins", "FedIns"),
    "ifca": ("ifca", "IFCA"),
    "fedem": ("fedem", "FedEM"),
    "fedgmm": ("fedgmm", "FedGMM"),
    "fedrc": ("fedrc", "FedRC"),
    "cfl": ("cfl", "CFL"),
    "ahc": ("ahc", "AHC"),
    "frl": ("frl", "FRL"),
    "fal": ("fal", "FAL"),
    "cellm": ("cellm", "CELLM"),
    "sgc": ("sgc", "SGC"),
    "co2": ("co2", "CO2"),
    "onebyte": ("onebyte", "OneByte"),
}

NAMES = tuple(_WHERE)
"""Names of all methods."""

__all__ = ["NAMES", "every", "get", "make", "takers"]


def get(name: str) -> type[Method]:
    """The method class called ``name``. Raises ConfigError with the nearest right name."""
    if name not in _WHERE:
        raise ConfigError(f"unknown method '{name}'{nearest(name, _WHERE)}")
    module, attribute = _WHERE[name]
    found: type[Method] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return found


def make(name: str, values: Mapping[str, Any]) -> Method:
    """The method called ``name`` with these options (strings allowed). Raises ConfigError; of an option that others
    have, it says which."""
    values = {key.removeprefix("base."): value for key, value in values.items()}  # of the method that this one wraps
    cls = get(name).over(values)
    for key in values:
        if key not in cls.options():
            raise ConfigError(f"{name} has no option '{key}'{takers(key) or nearest(key, cls.options())}")
    return cls.make(dict(values))


def takers(option: str) -> str:
    """``"; fedprox and moon have it"``, or nothing where no method has an option of this name."""
    found = [name for name, cls in every().items() if option in cls.options()]
    if not found:
        return ""
    return f"; {', '.join(found)} {'has' if len(found) == 1 else 'have'} it"


def every() -> dict[str, type[Method]]:
    """All method classes by name."""
    return {name: get(name) for name in NAMES}


def __getattr__(attribute: str) -> Any:
    for name, (_, found) in _WHERE.items():
        if found == attribute:
            return get(name)
    raise AttributeError(f"module 'consilience.methods' has no attribute '{attribute}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *(attribute for _, attribute in _WHERE.values())])
