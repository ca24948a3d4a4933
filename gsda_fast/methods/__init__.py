"""Adaptation methods by name. A new method is a new file here and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gsda_fast.methods import (
    adda,
    cdan,
    dan,
    fitted,
    fixmatch,
    gsda,
    jan,
    mada,
    mcd,
    mdd,
    rtn,
    sdat,
    self_ensembling,
    symnets,
    tpn,
)
from gsda_fast.methods.adversarial import DiscriminatorSettings
from gsda_fast.methods.base import AdaptationSettings, Method, MethodSettings, TargetSamples, TaskFacts
from gsda_fast.methods.division import Division
from gsda_fast.methods.gsda import GSDA, SMALL_DISCRIMINATOR, AdversarialSettings, GSDASettings
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.source_only import SourceOnly
from gsda_fast.methods.step import Descent, Outputs, Player, Step, Update
from gsda_fast.methods.terms import TERMS
from gsda_fast.model import AdaptationModel

__all__ = [
    "ALIASES",
    "METHODS",
    "TERMS",
    "AdaptationSettings",
    "Descent",
    "Division",
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


def _added(**weights: float) -> dict[str, dict[str, Any]]:
    return {"adaptation": {"add": weights}}


_DANN: dict[str, Any] = {"levels": ("domain",), "minimize_entropy": False, "synchronize": False}
_CDAN_E = cdan.CDANSettings(entropy_weight="official")
_BSP = {task: {**tables, **_added(bsp=1e-4)} for task, tables in {"*": {}, **SMALL_DISCRIMINATOR}.items()}


def _on_digits(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return weights for digits, whose learning rate is fifty times the authors'.

    Theirs would drive the features away.
    """
    return {"digits": tables, "digits-partial": tables}


def _on_features(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return settings for frozen features; docs/methods.md says by what they were chosen."""
    return {"features": tables, "pictures-features": tables}


def _feature_norm(add: Mapping[str, Mapping[str, float]]) -> Overrides:
    """Return the authors' settings of the feature norms, with the terms of each task ("*": all others)."""
    tables = on_images(
        model={
            "bottleneck_dim": 1000,
            "bottleneck_norm": "batch",
            "bottleneck_activation": "relu",
            "bottleneck_dropout": 0.5,
        },
        run={"batch_size": 32},
        optimizer={
            "learning_rate": 1e-3,
            "backbone_learning_rate": 1e-3,
            "backbone_momentum": False,
            "decay": "constant",
            "weight_decay": 5e-4,
        },
    )
    return {
        task: {**each, "adaptation": {"add": add.get(task, add["*"]), "batchnorm": "apart"}}
        for task, each in tables.items()
    }


METHODS: dict[str, Entry] = {
    "source-only": Entry(SourceOnly, target_samples="none"),
    "entropy": Entry(
        SourceOnly,
        target_samples="confident",
        presets={
            "*": _added(entropy=0.02),
            **{task: _added(entropy=tables["method"]["alpha"]) for task, tables in gsda.PRESETS.items()},
        },
    ),
    "dann": Entry(
        GSDA,
        AdversarialSettings(),
        presets={
            **SMALL_DISCRIMINATOR,
            **_on_features({"method": {**SMALL_DISCRIMINATOR["features"]["method"], "adversarial_weight": 0.3}}),
        },
        variant=_DANN,
    ),
    "glb": _ablation("domain"),
    "glb-cls": _ablation("domain", "class"),
    "glb-cls-grp": _ablation("domain", "group", "class"),
    "gsda": Entry(GSDA, GSDASettings(), "confident", gsda.PRESETS),
    "dan": Entry(dan.DAN, dan.DANSettings(), recipe=dan.RECIPE),
    "jan": Entry(jan.JAN, jan.JANSettings(), recipe=jan.RECIPE),
    "rtn": Entry(rtn.RTN, rtn.RTNSettings(), recipe=rtn.RECIPE),
    "mada": Entry(mada.MADA, DiscriminatorSettings(), presets=SMALL_DISCRIMINATOR, recipe=mada.RECIPE),
    "adda": Entry(adda.ADDA, adda.ADDASettings(), presets=adda.PRESETS, recipe=adda.RECIPE),
    "mcd": Entry(mcd.MCD, mcd.MCDSettings(), presets=mcd.PRESETS, recipe=mcd.RECIPE),
    "cdan": Entry(cdan.CDAN, cdan.CDANSettings(), presets=SMALL_DISCRIMINATOR, recipe=cdan.RECIPE),
    "cdan-e": Entry(cdan.CDAN, _CDAN_E, presets=SMALL_DISCRIMINATOR, recipe=cdan.RECIPE),
    "symnets": Entry(
        symnets.SymNets,
        symnets.SymNetsSettings(),
        presets=_on_features({"method": {"predicts": "mean"}}),
        recipe=symnets.RECIPE,
    ),
    "hafn": Entry(
        SourceOnly,
        presets={"*": _added(hafn=0.05), "visda": _added(hafn=0.01), **_on_digits(_added(hafn=2e-5))},
        recipe=_feature_norm({"*": {"hafn": 0.05}, "visda": {"hafn": 0.01}}),
    ),
    # The authors' step of 0.3 at a weight of 0.01 on VisDA is a step of 1 at 0.003.
    "safn": Entry(
        SourceOnly,
        presets={
            "*": _added(safn=0.05),
            "visda": _added(safn=0.003),
            **_on_digits(_added(safn=1e-5)),
            **_on_features(_added(safn=4e-4)),
        },
        recipe=_feature_norm(
            {"*": {"safn": 0.05}, "visda": {"safn": 0.003}, "office31": {"safn": 0.05, "entropy": 0.1}}
        ),
    ),
    "bsp-dann": Entry(GSDA, AdversarialSettings(), presets=_BSP, variant=_DANN),
    "bsp-cdan": Entry(cdan.CDAN, _CDAN_E, presets=_BSP, recipe=on_images(data={"test_crops": 10})),
    "tpn": Entry(tpn.TPN, tpn.TPNSettings(), presets=tpn.PRESETS),
    "self-ensembling": Entry(
        self_ensembling.SelfEnsembling,
        self_ensembling.SelfEnsemblingSettings(),
        presets=self_ensembling.PRESETS,
        recipe=self_ensembling.RECIPE,
    ),
    "tca": Entry(fitted.TransferComponents, fitted.TCASettings(), "none", fitted.TCA_PRESETS),
    "gfk": Entry(fitted.GeodesicFlow, fitted.GFKSettings(), "none"),
    "mcc": Entry(SourceOnly, presets={"*": _added(mcc=1.0)}),
    "mdd": Entry(mdd.MDD, mdd.MDDSettings(), presets=mdd.PRESETS, recipe=mdd.RECIPE),
    "fixmatch": Entry(fixmatch.FixMatch, fixmatch.FixMatchSettings(), presets=fixmatch.PRESETS),
    "cdan-mcc-sdat": Entry(
        sdat.SDAT,
        sdat.SDATSettings(),
        presets={task: {**tables, **_added(mcc=1.0)} for task, tables in {"*": {}, **SMALL_DISCRIMINATOR}.items()},
        recipe=sdat.RECIPE,
    ),
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
