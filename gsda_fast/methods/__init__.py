"""Adaptation methods by name. A new method is a new file here and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gsda_fast.methods import gsda
from gsda_fast.methods.base import AdaptationSettings, Method, MethodSettings, TargetSamples, TaskFacts
from gsda_fast.methods.gsda import DIGITS_DISCRIMINATOR, FEATURES_DISCRIMINATOR, GSDA, AdversarialSettings, GSDASettings
from gsda_fast.methods.source_only import SourceOnly
from gsda_fast.methods.step import Outputs, Player, Step, Update
from gsda_fast.methods.terms import TERMS
from gsda_fast.model import AdaptationModel

__all__ = [
    "ALIASES",
    "METHODS",
    "TERMS",
    "AdaptationSettings",
    "Entry",
    "Method",
    "MethodSettings",
    "Outputs",
    "Player",
    "Step",
    "TaskFacts",
    "Update",
    "build_method",
]

Overrides = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Settings by task ("*": every task), table and name: `{"visda": {"method": {"beta": 10.0}}}`."""


@dataclass(frozen=True)
class Entry:
    """A method of the table.

    Attributes:
        method: its class. settings: its own, with their defaults.
        target_samples: which target samples train: none, all, or those with a confident pseudo-label.
        presets: of the method's own tables, "method" and "adaptation", by task: what every recipe starts from.
        recipe: what `--recipe paper` changes in any table, by task.
        variant: keyword arguments of the class, which make an ablation of it.
    """

    method: type[Method]
    settings: MethodSettings = field(default_factory=MethodSettings)
    target_samples: TargetSamples = "all"
    presets: Overrides = field(default_factory=dict)
    recipe: Overrides = field(default_factory=dict)
    variant: Mapping[str, Any] = field(default_factory=dict)


def _ablation(*levels: str) -> Entry:
    variant = {"levels": levels, "synchronize": False}
    return Entry(GSDA, GSDASettings(), "confident", gsda.PRESETS, variant=variant)


def _entropy_weight(weight: float) -> dict[str, dict[str, Any]]:
    return {"adaptation": {"add": {"entropy": weight}}}


METHODS: dict[str, Entry] = {
    "source-only": Entry(SourceOnly, target_samples="none"),
    "entropy": Entry(
        SourceOnly,
        target_samples="confident",
        presets={
            "*": _entropy_weight(0.02),
            **{task: _entropy_weight(tables["method"]["alpha"]) for task, tables in gsda.PRESETS.items()},
        },
    ),
    "dann": Entry(
        GSDA,
        AdversarialSettings(),
        presets={**DIGITS_DISCRIMINATOR, **FEATURES_DISCRIMINATOR},
        variant={"levels": ("domain",), "minimize_entropy": False, "synchronize": False},
    ),
    "glb": _ablation("domain"),
    "glb-cls": _ablation("domain", "class"),
    "glb-cls-grp": _ablation("domain", "group", "class"),
    "gsda": Entry(GSDA, GSDASettings(), "confident", gsda.PRESETS),
}

ALIASES = {"domain": "glb", "class": "glb-cls", "group": "glb-cls-grp"}
"""Earlier names of the ablations."""


def build_method(
    name: str,
    model: AdaptationModel,
    settings: MethodSettings,
    task: TaskFacts,
    adaptation: AdaptationSettings | None = None,
) -> Method:
    """Build the method `name` over `model`.

    Args:
        settings: resolved, see `Method.resolve`. task: facts of the data. adaptation: what is added to any method.
    """
    entry = METHODS[name]
    return entry.method(model, settings, task, adaptation, **entry.variant)
