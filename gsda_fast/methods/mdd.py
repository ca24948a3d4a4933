"""Margin disparity discrepancy (MDD: Zhang et al., ICML 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import nn

from gsda_fast.data.batches import Batch
from gsda_fast.losses import margin_disparity
from gsda_fast.methods.adversarial import scale_gradient
from gsda_fast.methods.base import ENCODER, AdaptationSettings, Method, MethodSettings, TaskFacts
from gsda_fast.methods.heads import perceptron
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Player, Step, Update
from gsda_fast.model import AdaptationModel


@dataclass(frozen=True)
class MDDSettings(MethodSettings):
    """An adversarial classifier beside the one that predicts."""

    margin: Annotated[float, Meta(ge=0)] = 4.0
    """Exponential of the margin, the weight of agreement on the source against disagreement on the target."""
    reversal: Annotated[float, Meta(ge=0)] = 0.1
    """Factor on the gradient that reaches the encoder, reversed, times the adversarial ramp."""
    hidden_dim: Annotated[int, Meta(ge=1)] = 1024
    """Width of both classifiers' hidden layer."""


PRESETS = {task: {"method": {"hidden_dim": 64}} for task in ("digits", "digits-partial")}
_COMMON: dict[str, dict[str, Any]] = {
    "model": {
        "bottleneck_dim": 1024,
        "bottleneck_norm": "batch",
        "bottleneck_activation": "relu",
        "bottleneck_dropout": 0.5,
    },
    "optimizer": {"learning_rate": 0.004, "backbone_learning_rate": 0.0004, "weight_decay": 5e-4},
    "run": {"batch_size": 32},
}
RECIPE: dict[str, Any] = {**on_images(**_COMMON), "office-home": {**_COMMON, "method": {"margin": 3.0}}}


class MDD(Method):
    """The adversarial classifier agrees with the main one on the source and not on the target; the encoder undoes it.

    Attributes:
        adversary: the adversarial classifier; it takes no part in predictions.
    """

    settings: MDDSettings

    def __init__(
        self,
        model: AdaptationModel,
        settings: MDDSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        self.adversary = self.classifier(settings, model.feature_dim, task.num_classes)

    @classmethod
    def classifier(cls, settings: MDDSettings, feature_dim: int, num_classes: int) -> nn.Module:
        return perceptron([feature_dim, settings.hidden_dim, num_classes])

    def players(self) -> dict[str, Player]:
        return {**super().players(), "adversary": Player((self.adversary,))}

    def compile_parts(self, mode: str | None = None) -> None:
        super().compile_parts(mode)
        self.adversary.compile(dynamic=False, mode=mode)

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        n = outputs.num_source
        features = torch.cat([outputs.source_features, outputs.target_features])
        adversarial = self.adversary(scale_gradient(features, -self.settings.reversal * step.ramp))
        disparity = margin_disparity(
            outputs.source_logits, adversarial[:n], outputs.target_logits, adversarial[n:], self.settings.margin
        )
        players = (*ENCODER, "adversary")
        yield self.encoder_update(outputs, batch, step, disparity, {"disparity": disparity}, players)
