"""Hierarchical gradient synchronization (Hu et al., CVPR 2020) and its six ablations, as settings of the same code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gsda_fast.methods.base import Method, Move, StepInputs, TargetSamples
from gsda_fast.methods.discriminators import LEVELS, Discriminators
from gsda_fast.methods.groups import ClassGroups
from gsda_fast.methods.objective import (
    Objective,
    class_probabilities,
    discriminator_objective,
    encoder_objective,
    synchronization_loss,
    target_class_weights,
)
from gsda_fast.model import AdaptationModel
from gsda_kernels import AdversarialTerms


@dataclass(frozen=True)
class AdversarialSettings:
    """The adversarial part of the objective."""

    alpha: float = 0.02
    """Weight of the target's entropy (eq. 3)."""
    beta: float = 1.0
    """Weight of the synchronization loss (eqs. 15 and 16)."""
    groups: int = 6
    """Number of random groups of classes (b)."""
    adversarial_weight: float = 1.0
    """Weight of the adversarial part against the classification loss, for the encoder."""
    sync_ramp: bool = True
    """Multiply beta by the adversarial ramp, so that synchronization starts as gently as alignment does."""
    min_weight: float = 0.0
    """Leave out target samples from discriminators in which they weigh less than this; 0 is exact."""
    update: Literal["alternating", "reversal"] = "alternating"
    """Discriminators first and then the encoder through them (the paper), or both at once by gradient reversal."""
    class_weights: Literal["none", "pada"] = "none"
    """Weigh source samples by how much of their class the target seems to hold, for partial adaptation."""
    hidden_dim: int = 1024
    """Width of the discriminators' two hidden layers."""
    backend: str = "auto"
    """How the adversarial terms are computed: auto, or one of gsda_kernels.available_backends()."""


@dataclass(frozen=True)
class Ablation:
    """Which parts of the method take part."""

    levels: tuple[str, ...] = ()
    entropy: bool = False
    synchronize: bool = False
    target_samples: TargetSamples = "confident"


ABLATIONS = {
    "source-only": Ablation(target_samples="none"),
    "entropy": Ablation(entropy=True),
    "dann": Ablation(levels=("domain",), target_samples="all"),
    "domain": Ablation(levels=("domain",), entropy=True),
    "class": Ablation(levels=("domain", "class"), entropy=True),
    "group": Ablation(levels=("domain", "group", "class"), entropy=True),
    "gsda": Ablation(levels=("domain", "group", "class"), entropy=True, synchronize=True),
}


class GSDA(Method):
    """Adversarial alignment on up to three levels, with or without synchronized gradient magnitudes.

    Args:
        model: encoder and classifier. settings: weights and sizes. groups: the groups of classes.
        ablation: which parts take part; all of them by default.

    Attributes:
        source_class_weights: (r,) float32, what a source sample of each class counts for (`target_class_weights`): ones
            until the target has been scored. None, and no part of the state, unless the settings ask for it.
    """

    source_class_weights: Tensor | None

    def __init__(
        self,
        model: AdaptationModel,
        settings: AdversarialSettings,
        groups: ClassGroups,
        ablation: Ablation = ABLATIONS["gsda"],
    ) -> None:
        super().__init__(model)
        self.settings = settings
        self.ablation = ablation
        self.target_samples = ablation.target_samples
        self.register_buffer(
            "source_class_weights", torch.ones(groups.num_classes) if settings.class_weights == "pada" else None
        )
        self.discriminators = None
        if ablation.levels:
            self.discriminators = Discriminators(
                model.feature_dim,
                groups,
                settings.hidden_dim,
                ablation.levels,
                backend=settings.backend,
                min_weight=settings.min_weight,
            )

    def players(self) -> dict[str, nn.Module]:
        if self.discriminators is None:
            return super().players()
        return {**super().players(), "discriminators": self.discriminators}

    def compile_parts(self, mode: str | None = None) -> None:
        super().compile_parts(mode)
        if self.discriminators is not None:
            self.discriminators.compile(dynamic=False, mode=mode)

    def refresh(self, target_probabilities: Tensor) -> None:
        if self.source_class_weights is not None:
            self.source_class_weights.copy_(target_class_weights(target_probabilities))

    def moves(self, inputs: StepInputs) -> Iterator[Move]:
        alone = inputs.warming_up or self.target_samples == "none"
        images = inputs.source_images if alone else torch.cat([inputs.source_images, inputs.target_images])
        features, logits = self.model(images)
        if not alone and self.discriminators is not None:
            yield from self._adversarial_moves(self.discriminators, features, logits, inputs)
            return
        objective = encoder_objective(
            logits,
            inputs.source_labels,
            alpha=0.0 if alone else self._alpha,
            source_weight=self._source_weight(inputs),
            mean_over_ranks=inputs.mean_over_ranks,
        )
        yield Move(("encoder",), objective)

    def _adversarial_moves(
        self, discriminators: Discriminators, features: Tensor, logits: Tensor, inputs: StepInputs
    ) -> Iterator[Move]:
        num_source = len(inputs.source_labels)
        domain = (torch.arange(len(features), device=features.device) < num_source).to(torch.float32)
        probabilities = class_probabilities(logits, inputs.source_labels)
        groups = discriminators.groups if self.ablation.synchronize else None
        beta = self.settings.beta * (inputs.adversarial_ramp if self.settings.sync_ramp else 1.0)
        weight, mean_over_ranks = self.settings.adversarial_weight, inputs.mean_over_ranks
        source_weight, sample_weight = self._source_weight(inputs), None
        if source_weight is not None:
            sample_weight = torch.cat([source_weight, source_weight.new_ones(len(features) - num_source)])

        if self.settings.update == "reversal":
            # What reaches the encoder is weighed, what reaches the discriminators is not.
            weighed = features.detach() + weight * (features - features.detach())
            reversed_scale = -inputs.adversarial_ramp
            terms = discriminators(
                weighed,
                probabilities,
                domain,
                num_source,
                loss_feature_scale=reversed_scale,
                sample_weight=sample_weight,
            )
            adversarial = discriminator_objective(terms, groups, beta=beta, mean_over_ranks=mean_over_ranks)
            own = encoder_objective(
                logits,
                inputs.source_labels,
                alpha=self._alpha,
                source_weight=source_weight,
                mean_over_ranks=mean_over_ranks,
            )
            named = {**self._adversarial_terms(discriminators, terms, inputs), **own.terms}
            yield Move(("encoder", "discriminators"), Objective(own.total + adversarial.total, named))
            return

        terms = discriminators(features.detach(), probabilities, domain, num_source, sample_weight=sample_weight)
        adversarial = discriminator_objective(terms, groups, beta=beta, mean_over_ranks=mean_over_ranks)
        named = self._adversarial_terms(discriminators, terms, inputs)
        yield Move(("discriminators",), Objective(adversarial.total, named), provisional=True)
        objective = encoder_objective(
            logits,
            inputs.source_labels,
            discriminators(features, probabilities, domain, num_source, frozen=True, sample_weight=sample_weight),
            groups,
            alpha=self._alpha,
            beta=beta,
            adversarial_ramp=inputs.adversarial_ramp,
            adversarial_weight=weight,
            source_weight=source_weight,
            mean_over_ranks=mean_over_ranks,
        )
        # The discriminators' own move has logged the adversarial terms already, before they moved.
        own_terms = {name: objective.terms[name] for name in ("classification", "entropy") if name in objective.terms}
        yield Move(("encoder",), Objective(objective.total, own_terms))

    @property
    def _alpha(self) -> float:
        return self.settings.alpha if self.ablation.entropy else 0.0

    def _source_weight(self, inputs: StepInputs) -> Tensor | None:
        """(B,), None where all source samples count equally."""
        return None if self.source_class_weights is None else self.source_class_weights[inputs.source_labels]

    def _adversarial_terms(
        self, discriminators: Discriminators, terms: AdversarialTerms, inputs: StepInputs
    ) -> dict[str, Tensor]:
        named = {f"adversarial_{level}": x for level, x in discriminators.sum_per_level(terms.loss.detach()).items()}
        norms = terms.gradient_norm.detach()
        named |= {f"gradient_norm_{level}": x for level, x in discriminators.sum_per_level(norms).items()}
        if discriminators.levels == LEVELS:
            # Logged without synchronization as well, to show what it changes.
            named["synchronization"] = synchronization_loss(norms, discriminators.groups, inputs.mean_over_ranks)
        return named
