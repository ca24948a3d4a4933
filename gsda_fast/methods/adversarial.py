"""What DANN's relatives share: discriminators of the domain, and the two ways of playing them against the encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from gsda_fast.data.batches import Batch
from gsda_fast.methods.base import ENCODER, AdaptationSettings, Method, MethodSettings, TaskFacts
from gsda_fast.methods.discriminators import domain_accuracy, stacked_linear
from gsda_fast.methods.step import Outputs, Player, Step, Update
from gsda_fast.model import AdaptationModel


@dataclass(frozen=True)
class DiscriminatorSettings(MethodSettings):
    """Domain discriminators against the encoder."""

    adversarial_weight: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the adversarial part against the classification loss, for the encoder."""
    update: Literal["alternating", "reversal"] = "alternating"
    """Discriminators first and then the encoder through them, or both at once by gradient reversal."""
    hidden_dim: Annotated[int, Meta(ge=1)] = 1024
    """Width of the discriminators' two hidden layers."""
    dropout: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Probability of dropout after each of them."""


class DomainDiscriminators(nn.Module):
    """K discriminators of the domain, ReLU networks D -> H -> H -> 1, as stacked parameters.

    For methods that need no gradient norms: plain PyTorch, in one product a layer.

    Args:
        feature_dim: D. num: K. hidden_dim: H. dropout: after each hidden layer.
    """

    def __init__(self, feature_dim: int, num: int = 1, hidden_dim: int = 1024, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.w1, self.b1 = stacked_linear(num, hidden_dim, feature_dim)
        self.w2, self.b2 = stacked_linear(num, hidden_dim, hidden_dim)
        self.w3, self.b3 = stacked_linear(num, 1, hidden_dim)

    def forward(self, features: Tensor, input_scale: Tensor | None = None, frozen: bool = False) -> Tensor:
        """Return the logits of the source domain, (N, K).

        Args:
            features: (N, D). input_scale: (N, K), factors on what each discriminator sees of each row; None: 1.
            frozen: hold the parameters, as the encoder's update does.
        """
        parameters = self.w1, self.b1, self.w2, self.b2, self.w3, self.b3
        w1, b1, w2, b2, w3, b3 = (each.detach() if frozen else each for each in parameters)
        hidden = F.linear(features, w1.flatten(0, 1)).unflatten(1, w1.shape[:2])
        if input_scale is not None:
            # Behind the first product, which is linear: no tensor of (N, K, D).
            hidden = hidden * input_scale[:, :, None]
        hidden = F.dropout(F.relu(hidden + b1), self.dropout, self.training).transpose(0, 1)
        hidden = F.dropout(F.relu(torch.baddbmm(b2[:, None], hidden, w2.mT)), self.dropout, self.training)
        return torch.baddbmm(b3[:, None], hidden, w3.mT).squeeze(2).T


class Judgement(NamedTuple):
    """What discriminators of the domain make of a batch.

    Attributes:
        loss: 0-d, which they minimize and the encoder maximizes. logits: (N, K), of the source domain.
        share: (N, K), what each of them counts for in a row's accuracy; None: all alike.
    """

    loss: Tensor
    logits: Tensor
    share: Tensor | None = None


def scale_gradient(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """Return the tensor with its gradient multiplied by `factor`; below 0 that is gradient reversal."""
    held = tensor.detach()
    return held + factor * (tensor - held)


class DomainAdversarial(Method):
    """Domain discriminators against the encoder; a subclass says what they see.

    Args:
        model, settings, task, adaptation: see `Method`. discriminators: of what `judge` gives them.
    """

    settings: DiscriminatorSettings

    def __init__(
        self,
        model: AdaptationModel,
        settings: DiscriminatorSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None,
        discriminators: DomainDiscriminators,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        self.discriminators = discriminators

    def players(self) -> dict[str, Player]:
        return {**super().players(), "discriminators": Player((self.discriminators,))}

    def compile_parts(self, mode: str | None = None) -> None:
        super().compile_parts(mode)
        self.discriminators.compile(dynamic=False, mode=mode)

    def judge(self, features: Tensor, logits: Tensor, batch: Batch, step: Step, frozen: bool) -> Judgement:
        """Return what the discriminators make of the batch.

        Args:
            features: (N, D) float32 or wider. logits: (N, r). Source rows first; they carry the encoder's gradient.
            frozen: hold the discriminators' parameters.
        """
        raise NotImplementedError

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        yield from self.played(self.outputs(batch), batch, step)

    def played(self, outputs: Outputs, batch: Batch, step: Step) -> Iterator[Update]:
        """Yield the updates of a step from what the network makes of its batch."""
        features, logits = torch.cat([outputs.source_features, outputs.target_features]), outputs.logits
        against = -self.settings.adversarial_weight * step.ramp
        if self.settings.update == "reversal":
            reversed_ = scale_gradient(features, against), scale_gradient(logits, against)
            judged = self.judge(*reversed_, batch, step, frozen=False)
            players = (*ENCODER, "discriminators")
            update = self.encoder_update(outputs, batch, step, judged.loss, {"adversarial": judged.loss}, players)
            yield update._replace(metrics=_accuracy(judged, outputs, step))
            return
        judged = self.judge(features.detach(), logits.detach(), batch, step, frozen=False)
        terms, metrics = {"adversarial": judged.loss.detach()}, _accuracy(judged, outputs, step)
        yield Update(("discriminators",), judged.loss, terms, metrics=metrics)
        judged = self.judge(features, logits, batch, step, frozen=True)
        yield self.encoder_update(outputs, batch, step, against * judged.loss)


def _accuracy(judged: Judgement, outputs: Outputs, step: Step) -> dict[str, Tensor]:
    """Return how often the discriminators name the domain, under their dropout, if the step is logged."""
    if not step.logged:
        return {}
    return {"domain_accuracy": domain_accuracy(judged.logits, outputs.domain, judged.share)}
