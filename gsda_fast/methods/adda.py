"""Adversarial discriminative domain adaptation (ADDA: Tzeng et al., CVPR 2017)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from gsda_fast.data.batches import Batch
from gsda_fast.losses import domain_loss
from gsda_fast.methods.adversarial import DomainDiscriminators
from gsda_fast.methods.base import AdaptationSettings, Method, MethodSettings, TaskFacts
from gsda_fast.methods.discriminators import domain_accuracy
from gsda_fast.methods.gsda import SMALL_DISCRIMINATOR
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Player, Step, Update
from gsda_fast.model import AdaptationModel


@dataclass(frozen=True)
class ADDASettings(MethodSettings):
    """A target encoder that learns to look like the source's to a discriminator."""

    encoder_rate: Annotated[float, Meta(ge=0)] = 0.1
    """Factor on the encoder's learning rates in adaptation; larger ones let it run away."""
    objective: Literal["inverted", "reversal"] = "inverted"
    """What the encoder minimizes on target images: the discriminator's loss with labels inverted, as the paper has it,
    or minus the loss with its own labels, as some codes have it."""
    gate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """The encoder's loss counts while the discriminator tells at least this share of the batch apart; 0: always."""
    hidden_dim: Annotated[int, Meta(ge=1)] = 1024
    """Width of the discriminator's two hidden layers."""


# On digits and on features rates are up to fifty times those of images: at a hundredth features run to few classes.
PRESETS = {
    **on_images(run={"warmup": 3000}),
    "pictures": {"run": {"warmup": 500}},
    **{task: {"method": {**tables["method"], "encoder_rate": 0.001}} for task, tables in SMALL_DISCRIMINATOR.items()},
}
RECIPE = on_images(run={"batch_size": 64, "steps": 20_000})


class FrozenCopy(nn.Module):
    """A copy of an encoder that never learns: always in evaluation mode, its parameters without gradient.

    Args:
        model: whose backbone and bottleneck are copied.
    """

    def __init__(self, model: AdaptationModel) -> None:
        super().__init__()
        self.layers = nn.Sequential(copy.deepcopy(model.backbone), copy.deepcopy(model.bottleneck))
        self.layers.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenCopy:
        return self

    @torch.no_grad()
    def copy_from(self, model: AdaptationModel) -> None:
        """Take over parameters and buffers, in place."""
        for layer, module in zip(self.layers, (model.backbone, model.bottleneck)):
            layer.load_state_dict(module.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


class ADDA(Method):
    """After warm-up the encoder learns from target images alone; the source's is a frozen copy, the classifier rests.

    Its learning rates decide: a discriminator that wins makes the features run away, to one class.

    Attributes:
        source_encoder: of warm-up's end. discriminator: of features.
    """

    needs_warmup = True
    refuses = ("add", "class_weights")
    settings: ADDASettings

    def __init__(
        self,
        model: AdaptationModel,
        settings: ADDASettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        self.source_encoder = FrozenCopy(model)
        self.discriminator = DomainDiscriminators(model.feature_dim, 1, settings.hidden_dim)

    def players(self) -> dict[str, Player]:
        encoder = self.trained.backbone, self.trained.bottleneck
        return {
            **super().players(),
            # The encoder once more, at a rate and with a momentum of its own.
            "target_encoder": Player(encoder, lr_scale=self.settings.encoder_rate),
            "discriminator": Player((self.discriminator,)),
        }

    def compile_parts(self, mode: str | None = None) -> None:
        super().compile_parts(mode)
        self.source_encoder.compile(dynamic=False, mode=mode)
        self.discriminator.compile(dynamic=False, mode=mode)

    def start(self) -> Iterable[str]:
        self.source_encoder.copy_from(self.trained)
        return ()

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        device, dtype = batch.source_images.device.type, self.trained.autocast_dtype
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            source = self.source_encoder(batch.source_images)
        target, _ = self.trained(batch.target_images)
        source, target = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (source, target))

        logits = self.discriminator(torch.cat([source, target.detach()]))
        loss = domain_loss(logits, len(source))
        told_apart = domain_accuracy(logits, torch.arange(len(logits), device=logits.device) < len(source))
        metrics = {"domain_accuracy": told_apart} if step.logged else {}
        terms = {"adversarial": loss.detach()}
        yield Update(("discriminator",), loss, terms, images=len(source), metrics=metrics)
        logits = self.discriminator(target, frozen=True)
        # Inverted: all target rows in the source's place.
        mapping = domain_loss(logits, len(target)) if self.settings.objective == "inverted" else -domain_loss(logits, 0)
        terms = {"mapping": mapping.detach()}
        if self.settings.gate:
            mapping = mapping * (step.mean(told_apart) >= self.settings.gate)
        yield Update(("target_encoder",), mapping, terms, images=len(target))
