"""Adaptation methods by name. A new method is a new file here and an entry in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gsda_fast.errors import UsageError
from gsda_fast.methods.base import Method, Move, StepInputs
from gsda_fast.methods.groups import ClassGroups
from gsda_fast.methods.gsda import ABLATIONS, GSDA, AdversarialSettings
from gsda_fast.model import AdaptationModel

METHODS: dict[str, Callable[[AdaptationModel, AdversarialSettings, ClassGroups], Method]] = {
    name: partial(GSDA, ablation=ablation) for name, ablation in ABLATIONS.items()
}

__all__ = ["METHODS", "Method", "Move", "StepInputs", "build_method"]


def build_method(
    name: str, model: AdaptationModel, settings: AdversarialSettings, num_classes: int, seed: int
) -> Method:
    """The method `name` over `model`, with groups of classes drawn from `seed`.

    Raises:
        UsageError: an unknown method, or a number of groups that the classes cannot be divided into.
    """
    if name not in METHODS:
        raise UsageError("--method", found=name, expected=", ".join(METHODS))
    if not 1 <= settings.groups <= num_classes:
        raise UsageError("--groups", found=str(settings.groups), expected=f"1 to {num_classes}, the number of classes")
    return METHODS[name](model, settings, ClassGroups.random(num_classes, settings.groups, seed))
