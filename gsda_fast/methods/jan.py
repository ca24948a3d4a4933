"""Joint adaptation network (JAN: Long et al., ICML 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from gsda_fast.data.batches import Batch
from gsda_fast.losses import joint_mmd
from gsda_fast.methods.base import Method, MethodSettings
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Step, Update


@dataclass(frozen=True)
class JANSettings(MethodSettings):
    """Joint discrepancy of features and predictions."""

    trade_off: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the discrepancy against the classification loss."""
    ramp: bool = True
    """Multiply the weight by the adversarial ramp."""
    estimator: Literal["full", "biased", "linear"] = "full"
    """All pairs without bias (may be negative), all pairs and each row with itself, or neighbouring rows."""


RECIPE = on_images(
    method={"trade_off": 0.3},
    model={"bottleneck_norm": "batch", "bottleneck_activation": "relu", "bottleneck_dropout": 0.5},
    optimizer={"learning_rate": 0.003, "backbone_learning_rate": 0.0003, "weight_decay": 5e-4},
    run={"steps": 30_000},
)


class JAN(Method):
    """Minimize the joint discrepancy of features and class probabilities, which moves the classifier as well."""

    settings: JANSettings

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        source, target = (
            (step.gather(features), step.gather(logits).softmax(1))
            for features, logits in (
                (outputs.source_features, outputs.source_logits),
                (outputs.target_features, outputs.target_logits),
            )
        )
        discrepancy = joint_mmd(source, target, self.settings.estimator)
        weight = self.settings.trade_off * (step.ramp if self.settings.ramp else 1.0)
        yield self.encoder_update(outputs, batch, step, weight * discrepancy, {"discrepancy": discrepancy})
