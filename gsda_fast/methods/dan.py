"""Deep adaptation network (DAN: Long et al., ICML 2015)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from gsda_fast.data.batches import Batch
from gsda_fast.losses import mk_mmd
from gsda_fast.methods.base import Method, MethodSettings
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Step, Update


@dataclass(frozen=True)
class DANSettings(MethodSettings):
    """Discrepancy of each layer."""

    trade_off: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the discrepancies against the classification loss."""
    layers: Literal["features", "features-logits"] = "features-logits"
    """Where the domains are compared."""
    estimator: Literal["full", "biased", "linear"] = "full"
    """All pairs without bias (may be negative), all pairs and each row with itself, or neighbouring rows."""


RECIPE = on_images(
    model={"bottleneck_activation": "relu", "bottleneck_dropout": 0.5},
    optimizer={"learning_rate": 0.003, "backbone_learning_rate": 0.0003, "weight_decay": 5e-4},
    run={"steps": 20_000},
)


class DAN(Method):
    """Minimize the maximum mean discrepancies of both domains' features and logits."""

    settings: DANSettings

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        layers = {"features": (outputs.source_features, outputs.target_features)}
        if self.settings.layers == "features-logits":
            layers["logits"] = outputs.source_logits, outputs.target_logits
        terms = {
            f"discrepancy_{name}": mk_mmd(step.gather(source), step.gather(target), self.settings.estimator)
            for name, (source, target) in layers.items()
        }
        total = sum(terms.values())
        yield self.encoder_update(outputs, batch, step, self.settings.trade_off * total, terms)
