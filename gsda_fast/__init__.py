"""Unsupervised domain adaptation with hierarchical gradient synchronization (GSDA, CVPR 2020)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gsda_fast.version import VERSION

if TYPE_CHECKING:
    from gsda_fast import losses
    from gsda_fast.api import Adapted, adapt
    from gsda_fast.config import Config, configure
    from gsda_fast.methods.discriminators import Discriminators
    from gsda_fast.methods.groups import ClassGroups
    from gsda_fast.methods.objective import discriminator_objective, encoder_objective, synchronization_loss
    from gsda_fast.train import train
    from gsda_fast.trained import TrainedModel, load_trained

__all__ = [
    "Adapted",
    "ClassGroups",
    "Config",
    "Discriminators",
    "TrainedModel",
    "adapt",
    "configure",
    "discriminator_objective",
    "encoder_objective",
    "load_trained",
    "losses",
    "synchronization_loss",
    "train",
]

__version__ = VERSION

_OBJECTIVE = "gsda_fast.methods.objective"
_DEFINED_IN = {
    "Adapted": "gsda_fast.api",
    "ClassGroups": "gsda_fast.methods.groups",
    "Config": "gsda_fast.config",
    "Discriminators": "gsda_fast.methods.discriminators",
    "TrainedModel": "gsda_fast.trained",
    "adapt": "gsda_fast.api",
    "configure": "gsda_fast.config",
    "discriminator_objective": _OBJECTIVE,
    "encoder_objective": _OBJECTIVE,
    "load_trained": "gsda_fast.trained",
    "synchronization_loss": _OBJECTIVE,
}
"""All public names but those of modules. `train` is one: of the command, and it can be called."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command must not wait for what it does not need."""
    if name in _DEFINED_IN:
        value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
