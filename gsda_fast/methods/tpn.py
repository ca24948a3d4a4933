"""Transferrable prototypical networks (TPN: Pan et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor, nn

from gsda_fast.data.batches import Batch
from gsda_fast.losses import class_means, prototype_losses, prototype_pseudo_labels
from gsda_fast.methods.base import AdaptationSettings, Method, MethodSettings, TaskFacts
from gsda_fast.methods.step import Step, Update
from gsda_fast.model import AdaptationModel

MOMENTUM = 0.9
"""Of the running prototypes: ten batches in which a class occurs."""


@dataclass(frozen=True)
class TPNSettings(MethodSettings):
    """Prototypes of the classes in the source, in the target and in both."""

    confidence: Annotated[float, Meta(ge=0, le=1)] = 0.6
    """A target sample has the class of the nearest source prototype where that is more probable than this."""
    supervised_weight: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the source's cross-entropy, whose logits are squared distances: its gradient grows with them."""
    general_weight: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the distances between prototypes."""
    task_weight: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the divergences between predictions by different prototypes."""


# At their rates, far above those of images, whole weights drive the prototypes apart without end.
_WEIGHTS = {"method": {"supervised_weight": 0.1, "general_weight": 0.003, "task_weight": 0.0001}}
PRESETS = dict.fromkeys(("digits", "digits-partial", "features", "pictures-features"), _WEIGHTS)


class TPN(Method):
    """Align class means, and the predictions by distance to them, of source, target and both.

    The classifier is not trained: distances to running means of the source's classes are a linear layer of weights
    2 mu and bias -|mu|^2, which is written after each step.

    Attributes:
        prototypes: (r, D), running class means of the source. seen: (r,), 1 for classes that have occurred.
    """

    refuses = ("class_weights",)
    settings: TPNSettings
    prototypes: Tensor
    seen: Tensor

    def __init__(
        self,
        model: AdaptationModel,
        settings: TPNSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        self.num_classes = task.num_classes
        self.register_buffer("prototypes", torch.zeros(task.num_classes, model.feature_dim))
        self.register_buffer("seen", torch.zeros(task.num_classes))

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        source, target = step.gather(outputs.source_features), step.gather(outputs.target_features)
        labels = step.gather(batch.source_labels)
        pseudo_labels = prototype_pseudo_labels(source, labels, target, self.num_classes, self.settings.confidence)
        parts = prototype_losses(source, labels, target, pseudo_labels, self.num_classes)
        loss = self.settings.general_weight * parts.general + self.settings.task_weight * parts.task
        terms = {"general": parts.general, "task": parts.task, "kept": (pseudo_labels >= 0).float().mean()}
        supervised = self.settings.supervised_weight * parts.supervised
        yield self.encoder_update(outputs, batch, step, loss, terms, ("encoder",), supervised)
        self._renew(source.detach(), labels)

    @torch.no_grad()
    def _renew(self, source: Tensor, labels: Tensor) -> None:
        means = class_means(source, labels, self.num_classes).to(self.prototypes)
        occurs = (labels == torch.arange(self.num_classes, device=labels.device)[:, None]).any(1).to(self.seen)
        share = occurs * torch.where(self.seen > 0, 1 - MOMENTUM, 1.0)
        self.prototypes.lerp_(means, share[:, None])
        self.seen.copy_(torch.maximum(self.seen, occurs))
        linear = self.trained.classifier
        assert isinstance(linear, nn.Linear)
        known = self.seen > 0
        linear.weight.copy_(torch.where(known[:, None], 2 * self.prototypes, linear.weight))
        linear.bias.copy_(torch.where(known, -self.prototypes.square().sum(1), linear.bias))
