"""Maximum classifier discrepancy (MCD: Saito et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from gsda_fast.data.batches import Batch
from gsda_fast.losses import classifier_discrepancy, uniform_class_prior
from gsda_fast.methods.base import ENCODER, Method, MethodSettings
from gsda_fast.methods.heads import TwoClassifiers
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Step, Update


@dataclass(frozen=True)
class MCDSettings(MethodSettings):
    """Two classifiers that disagree where the target lies away from the source."""

    discrepancy_weight: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of the discrepancy, a mean over classes; 0: 1 up to twelve classes, a third of their number above."""
    encoder_updates: Annotated[int, Meta(ge=1)] = 4
    """Updates of the encoder in a step."""
    balance: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of equally many target samples of each class."""
    hidden_dim: Annotated[int, Meta(ge=1)] = 1000
    """Width of each classifier's hidden layers."""
    hidden_layers: Annotated[int, Meta(ge=0)] = 1
    """How many there are."""


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "visda": {"method": {"balance": 0.01}},
    **{task: {"method": {"hidden_dim": 64}} for task in ("digits", "digits-partial")},
}
RECIPE = on_images(
    method={"hidden_layers": 2},
    run={"batch_size": 32},
    optimizer={
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-3,
        "backbone_momentum": False,
        "decay": "constant",
        "weight_decay": 5e-4,
    },
)


class MCD(Method):
    """Classifiers ascend their discrepancy on the target and the encoder descends it, in updates of their own."""

    settings: MCDSettings

    @classmethod
    def resolve(cls, settings: MCDSettings, num_classes: int, device: str) -> MCDSettings:
        # A mean over classes fades as their number grows: the authors' weights on their tasks follow it.
        weight = settings.discrepancy_weight or (1.0 if num_classes <= 12 else num_classes / 3)
        return replace(settings, discrepancy_weight=weight)

    @classmethod
    def classifier(cls, settings: MCDSettings, feature_dim: int, num_classes: int) -> TwoClassifiers:
        return TwoClassifiers([feature_dim, *[settings.hidden_dim] * settings.hidden_layers, num_classes])

    def source_updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        features, _ = self.trained(batch.source_images)
        loss = self._of_source(self._both(features), batch, step)
        yield Update(ENCODER, loss, {"classification": loss.detach()}, images=len(features))

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        n, weight = len(batch.source_images), self.settings.discrepancy_weight
        outputs = self.outputs(batch)
        both = self._both(outputs.features)
        own, balance = self._own(both, n, batch, step)
        terms = {} if balance is None else {"balance": balance}
        yield self.encoder_update(outputs, batch, step, terms=terms, classification=own)

        with torch.no_grad():
            outputs = self.outputs(batch)
        both = self._both(outputs.features)
        own, _ = self._own(both, n, batch, step)
        discrepancy = classifier_discrepancy(*(each[n:] for each in both))
        terms = {"discrepancy": discrepancy.detach()}
        yield Update(("classifier",), own - weight * discrepancy, terms, images=len(outputs.features))

        for _ in range(self.settings.encoder_updates):
            outputs = self.outputs(batch)
            discrepancy = classifier_discrepancy(*(each[n:] for each in self._both(outputs.features)))
            yield Update(("encoder",), weight * discrepancy, {}, images=len(outputs.features))

    def _both(self, features: Tensor) -> tuple[Tensor, Tensor]:
        head = self.trained.classifier
        assert isinstance(head, TwoClassifiers)
        return head.both(features.to(torch.promote_types(features.dtype, torch.float32)))

    def _of_source(self, both: tuple[Tensor, Tensor], batch: Batch, step: Step) -> Tensor:
        n = len(batch.source_images)
        first, second = (self.classification(each[:n], batch, step) for each in both)
        return first + second

    def _own(
        self, both: tuple[Tensor, Tensor], num_source: int, batch: Batch, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        """Return what both classifiers minimize beside their discrepancy, and the balance in it."""
        own = self._of_source(both, batch, step)
        if not self.settings.balance:
            return own, None
        first, second = (uniform_class_prior(step.gather(each[num_source:])) for each in both)
        return own + self.settings.balance * (first + second), first + second
