"""FixMatch (Sohn et al., NeurIPS 2020) with another domain as the samples without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from msgspec import Meta

from gsda_fast.data.batches import Batch
from gsda_fast.losses import confident_cross_entropy, confident_rows
from gsda_fast.methods.base import Method, MethodSettings
from gsda_fast.methods.step import Step, Update


@dataclass(frozen=True)
class FixMatchSettings(MethodSettings):
    """Confident predictions of a weakly augmented view are the labels of a strongly augmented one."""

    trade_off: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the target's part against the classification loss."""
    confidence: Annotated[float, Meta(ge=0, le=1)] = 0.9
    """Only predictions that are more probable than this are labels."""


# A network of digits is surer than one of images, and at 0.9 teaches itself one class.
_DIGITS = {"method": {"confidence": 0.99}}
PRESETS = {"digits": _DIGITS, "digits-partial": _DIGITS}


class FixMatch(Method):
    """Cross-entropy of the target's strong view against the confident decisions on its weak one."""

    target_views = 2
    strong_view = True

    settings: FixMatchSettings

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        with torch.no_grad():
            weak = self.trained(batch.target_images).logits
        outputs = self.outputs(replace(batch, target_images=batch.further_views[0]))
        unlabelled = confident_cross_entropy(outputs.target_logits, weak, self.settings.confidence)
        terms = {"unlabelled": unlabelled, "kept": confident_rows(weak, self.settings.confidence).mean()}
        update = self.encoder_update(outputs, batch, step, self.settings.trade_off * unlabelled, terms)
        yield update._replace(images=update.images + len(weak))
