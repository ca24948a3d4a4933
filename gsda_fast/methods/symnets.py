"""Domain-symmetric networks (SymNets: Zhang et al., CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gsda_fast.data.batches import Batch
from gsda_fast.losses import symmetric_classifier_loss, symmetric_feature_loss
from gsda_fast.methods.base import ENCODER, Method, MethodSettings
from gsda_fast.methods.heads import TwinClassifier
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Step, Update


@dataclass(frozen=True)
class SymNetsSettings(MethodSettings):
    """A classifier of each domain."""

    predicts: Literal["target", "mean"] = "target"
    """The target's classifier predicts, as the paper has it, or the mean of both classifiers' probabilities."""


RECIPE = on_images(run={"batch_size": 128}, optimizer={"weight_decay": 1e-4})


class SymNets(Method):
    """A classifier for each domain, which tell the domains apart, and features that they cannot tell apart.

    Both losses are differentiated in one backward pass: the classifiers' through features that are held, the features'
    through classifiers that are held.
    """

    batchnorm = "apart"
    refuses = ("class_weights",)

    @classmethod
    def classifier(cls, settings: SymNetsSettings, feature_dim: int, num_classes: int) -> TwinClassifier:
        return TwinClassifier(feature_dim, num_classes, mean=settings.predicts == "mean")

    @property
    def _head(self) -> TwinClassifier:
        head = self.trained.classifier
        assert isinstance(head, TwinClassifier)
        return head

    def source_updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        features, _ = self.trained(batch.source_images)
        halves = self._head.both(_float32(features)).chunk(2, dim=1)
        first, second = (self.classification(each, batch, step) for each in halves)
        loss = first + second
        yield Update(ENCODER, loss, {"classification": loss.detach()}, images=len(features))

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        n, features = outputs.num_source, _float32(outputs.features)
        free, held = self._head.both(features.detach()), self._head.both(features, frozen=True)
        of_classifiers = symmetric_classifier_loss(free[:n], batch.source_labels, free[n:])
        of_features = symmetric_feature_loss(held[:n], batch.source_labels, held[n:], step.ramp)
        terms = {"features": of_features}
        yield self.encoder_update(outputs, batch, step, of_features, terms, classification=of_classifiers)


def _float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
