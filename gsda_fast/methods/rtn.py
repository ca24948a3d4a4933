"""Residual transfer network (RTN: Long et al., NeurIPS 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta
from torch import Tensor, nn

from gsda_fast.data.batches import Batch
from gsda_fast.losses import entropy, fused_mmd
from gsda_fast.methods.base import ENCODER, AdaptationSettings, Method, MethodSettings, TaskFacts
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Player, Step, Update
from gsda_fast.model import AdaptationModel


@dataclass(frozen=True)
class RTNSettings(MethodSettings):
    """A residual between the classifiers of the domains, entropy, and the discrepancy of fused layers."""

    trade_off: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the discrepancy against the classification loss."""
    entropy_weight: Annotated[float, Meta(ge=0)] = 0.1
    """Weight of the target's entropy, times the adversarial ramp."""
    estimator: Literal["full", "biased", "linear"] = "full"
    """All pairs without bias (may be negative), all pairs and each row with itself, or neighbouring rows."""


RECIPE = on_images(
    model={"bottleneck_dim": 128, "bottleneck_activation": "relu"}, run={"batch_size": 64, "steps": 20_000}
)


class RTN(Method):
    """Minimize the discrepancy of features fused with logits; source logits are the target's plus a residual of them.

    Attributes:
        residual: (N, r) to (N, r), of the source's logits, in training alone: the classifier that predicts is the
            target's. Nearly zero at first, and not quite: two layers of zeros would never move.
    """

    settings: RTNSettings

    def __init__(
        self,
        model: AdaptationModel,
        settings: RTNSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        layers = [nn.Linear(task.num_classes, task.num_classes) for _ in range(2)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.residual = nn.Sequential(layers[0], nn.ReLU(), layers[1])

    def players(self) -> dict[str, Player]:
        return {**super().players(), "residual": Player((self.residual,))}

    def compile_parts(self, mode: str | None = None) -> None:
        super().compile_parts(mode)
        self.residual.compile(dynamic=False, mode=mode)

    def source_updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        _, logits = self.trained(batch.source_images)
        loss = self._of_source(logits, batch, step)
        terms = {"classification": loss.detach()}
        yield Update((*ENCODER, "residual"), loss, terms, images=len(logits))

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        discrepancy = fused_mmd(
            (step.gather(outputs.source_features), step.gather(outputs.source_logits)),
            (step.gather(outputs.target_features), step.gather(outputs.target_logits)),
            self.settings.estimator,
        )
        target_entropy = entropy(outputs.target_logits)
        loss = self.settings.trade_off * discrepancy + self.settings.entropy_weight * step.ramp * target_entropy
        terms = {"discrepancy": discrepancy, "entropy": target_entropy}
        supervised = self._of_source(outputs.source_logits, batch, step)
        yield self.encoder_update(outputs, batch, step, loss, terms, (*ENCODER, "residual"), supervised)

    def _of_source(self, logits: Tensor, batch: Batch, step: Step) -> Tensor:
        return self.classification(logits + self.residual(logits), batch, step)
