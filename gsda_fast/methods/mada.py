"""Multi-adversarial domain adaptation (MADA: Pei et al., AAAI 2018)."""

from __future__ import annotations

from torch import Tensor

from gsda_fast.data.batches import Batch
from gsda_fast.losses import domain_loss
from gsda_fast.methods.adversarial import DiscriminatorSettings, DomainAdversarial, DomainDiscriminators, Judgement
from gsda_fast.methods.base import AdaptationSettings, TaskFacts
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Step
from gsda_fast.model import AdaptationModel

RECIPE = on_images(method={"adversarial_weight": 0.3, "update": "reversal"}, run={"batch_size": 64, "steps": 10_000})
"""The authors' weight is that of each of the K losses, which add up."""


class MADA(DomainAdversarial):
    """A domain discriminator for each class, which sees the features times the probability of the class.

    The probabilities are predictions, for source rows as well, and constants. GSDA weighs the losses by them instead.
    The sum over classes makes the adversarial part grow with their number.
    """

    def __init__(
        self,
        model: AdaptationModel,
        settings: DiscriminatorSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        sizes = model.feature_dim, task.num_classes, settings.hidden_dim
        super().__init__(model, settings, task, adaptation, DomainDiscriminators(*sizes, settings.dropout))

    def judge(self, features: Tensor, logits: Tensor, batch: Batch, step: Step, frozen: bool) -> Judgement:
        probabilities = logits.detach().softmax(1)
        domain_logits = self.discriminators(features, probabilities, frozen)
        loss = domain_loss(domain_logits, len(batch.source_images), self.sample_weight(batch))
        return Judgement(loss, domain_logits, probabilities)
