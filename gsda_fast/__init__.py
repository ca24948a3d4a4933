"""Unsupervised domain adaptation with hierarchical gradient synchronization (GSDA, CVPR 2020)."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsda_fast import losses
    from gsda_fast.methods.discriminators import Discriminators
    from gsda_fast.methods.groups import ClassGroups
    from gsda_fast.methods.objective import discriminator_objective, encoder_objective, synchronization_loss

__all__ = [
    "ClassGroups",
    "Discriminators",
    "discriminator_objective",
    "encoder_objective",
    "losses",
    "synchronization_loss",
]

try:
    __version__ = version("gsda-fast")
except PackageNotFoundError:  # a checkout that was put on the path
    __version__ = "0+unknown"

_OBJECTIVE = "gsda_fast.methods.objective"
_DEFINED_IN = {
    "ClassGroups": "gsda_fast.methods.groups",
    "Discriminators": "gsda_fast.methods.discriminators",
    "discriminator_objective": _OBJECTIVE,
    "encoder_objective": _OBJECTIVE,
    "synchronization_loss": _OBJECTIVE,
}


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
