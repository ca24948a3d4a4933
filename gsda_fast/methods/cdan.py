"""Conditional adversarial domain adaptation (CDAN and CDAN+E: Long et al., NeurIPS 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from gsda_fast.data.batches import Batch
from gsda_fast.losses import domain_loss, entropy_weights, multilinear_map, randomised_map
from gsda_fast.methods.adversarial import DiscriminatorSettings, DomainAdversarial, DomainDiscriminators, Judgement
from gsda_fast.methods.base import AdaptationSettings, TaskFacts
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Step
from gsda_fast.model import AdaptationModel


@dataclass(frozen=True)
class CDANSettings(DiscriminatorSettings):
    """A discriminator of features and predictions together."""

    update: Literal["alternating", "reversal"] = "reversal"
    """Discriminator first and then the encoder through it, or both at once by gradient reversal."""
    entropy_weight: Literal["none", "official", "held"] = "none"
    """Weigh samples by 1 + exp(-entropy) of their prediction, over each domain's mean (E): with the gradient through
    the weights, reversed, as the authors' code has it, or as constants."""
    randomised: Annotated[int, Meta(ge=0)] = 0
    """Dimension of a random projection of the map; 0: the whole map, as large as features times classes."""


RECIPE = on_images(adaptation={"batchnorm": "apart"}, data={"test_crops": 10})
"""Everything else of the authors' settings is the common recipe's."""


class CDAN(DomainAdversarial):
    """One domain discriminator, which sees the outer product of features and predictions.

    Attributes:
        feature_projection, probability_projection: (D, d) and (r, d), drawn once, where the map is randomised.
    """

    settings: CDANSettings
    feature_projection: Tensor
    probability_projection: Tensor

    def __init__(
        self,
        model: AdaptationModel,
        settings: CDANSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        dim = settings.randomised or model.feature_dim * task.num_classes
        discriminator = DomainDiscriminators(dim, 1, settings.hidden_dim, settings.dropout)
        super().__init__(model, settings, task, adaptation, discriminator)
        if settings.randomised:
            self.register_buffer("feature_projection", torch.randn(model.feature_dim, dim))
            self.register_buffer("probability_projection", torch.randn(task.num_classes, dim))

    def judge(self, features: Tensor, logits: Tensor, batch: Batch, step: Step, frozen: bool) -> Judgement:
        num_source = len(batch.source_images)
        probabilities = logits.detach().softmax(1)
        if self.settings.randomised:
            projections = self.feature_projection, self.probability_projection
            seen = randomised_map(features, probabilities, *projections)
        else:
            seen = multilinear_map(features, probabilities)
        domain_logits = self.discriminators(seen, frozen=frozen)
        weights = self._weights(logits, num_source, batch, step)
        return Judgement(domain_loss(domain_logits.squeeze(1), num_source, weights), domain_logits)

    def _weights(self, logits: Tensor, num_source: int, batch: Batch, step: Step) -> Tensor | None:
        """Return (N,), of mean 1 in each domain of the batch of all ranks, times the weights of classes."""
        given = self.sample_weight(batch)
        if self.settings.entropy_weight == "none":
            return given
        held = self.settings.entropy_weight == "held"
        raw = entropy_weights(logits.detach() if held else logits, num_source, normalise="none")
        means = step.mean(torch.stack([raw[:num_source].mean(), raw[num_source:].mean()]))
        weights = torch.cat([raw[:num_source] / means[0], raw[num_source:] / means[1]])
        return weights if given is None else weights * given
