"""Hierarchical gradient synchronization (Hu et al., CVPR 2020), its ablations and DANN, as one class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from msgspec import Meta
from torch import Tensor

import gsda_kernels
from gsda_fast.data.batches import Batch
from gsda_fast.errors import UsageError
from gsda_fast.methods.base import ENCODER, AdaptationSettings, Method, MethodSettings, TaskFacts
from gsda_fast.methods.discriminators import LEVELS, Discriminators
from gsda_fast.methods.division import AdversarialRows, Division
from gsda_fast.methods.groups import ClassGroups
from gsda_fast.methods.objective import (
    Objective,
    class_probabilities,
    discriminator_objective,
    entropy,
    synchronization_loss,
)
from gsda_fast.methods.step import Outputs, Player, Step, Update
from gsda_fast.model import AdaptationModel
from gsda_kernels import AdversarialTerms


@dataclass(frozen=True)
class AdversarialSettings(MethodSettings):
    """Discriminators against the encoder."""

    adversarial_weight: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the adversarial part against the classification loss, for the encoder."""
    update: Literal["alternating", "reversal"] = "alternating"
    """Discriminators first and then the encoder through them (the paper), or both at once by gradient reversal."""
    hidden_dim: Annotated[int, Meta(ge=1)] = 1024
    """Width of the discriminators' two hidden layers."""
    min_weight: Annotated[float, Meta(ge=0)] = 0.0
    """Leave out target samples from discriminators in which they weigh less than this; 0 is exact."""
    backend: str = "auto"
    """How the adversarial terms are computed: auto, or one of gsda_kernels.available_backends()."""


@dataclass(frozen=True)
class GSDASettings(AdversarialSettings):
    """Hierarchical alignment with synchronized gradients."""

    alpha: Annotated[float, Meta(ge=0)] = 0.02
    """Weight of the target's entropy (eq. 3)."""
    beta: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the synchronization loss (eqs. 15 and 16)."""
    groups: Annotated[int, Meta(ge=0)] = 0
    """Number of random groups of classes (b); 0: about five classes in each."""
    sync_ramp: bool = True
    """Multiply beta by the adversarial ramp, so that synchronization starts as gently as alignment does."""


def _paper(alpha: float, beta: float, groups: int) -> dict[str, dict[str, Any]]:
    return {"method": {"alpha": alpha, "beta": beta, "groups": groups}}


SMALL_DISCRIMINATOR = {
    task: {"method": {"hidden_dim": width}}
    for task, width in {"digits": 32, "digits-partial": 32, "features": 256, "pictures-features": 256}.items()
}
"""A discriminator as small as the digits; on embeddings, where it is most of a step, as wide as the bottleneck."""

_DIGITS = {"method": {"alpha": 0.1, "beta": 1.0, "groups": 3, "hidden_dim": 32}}
PRESETS = {
    "digits": _DIGITS,
    "digits-partial": _DIGITS,
    "pictures": {"method": {"alpha": 0.1, "beta": 1.0, "groups": 3}},
    "pictures-features": {"method": {"alpha": 0.1, "beta": 1.0, "groups": 3, "hidden_dim": 256}},
    "features": {"method": {"alpha": 0.1, "beta": 1.0, "hidden_dim": 256}},
    "visda": _paper(0.2, 10.0, 4),
    "office31": _paper(0.02, 1.0, 6),
    "office31-partial": _paper(0.2, 10.0, 6),
    "office-home": _paper(0.02, 1.0, 13),
}
"""By task: of the paper's own tasks the paper's, of the others those under which the README's results were obtained."""


class GSDA(Method):
    """Adversarial alignment on up to three levels, with or without synchronized gradient magnitudes.

    Args:
        model, settings, task, adaptation: see `Method`; the settings of a class without synchronization can do without
            alpha, beta and groups.
        levels: which of "domain", "group", "class" have discriminators.
        minimize_entropy: add alpha times the target's entropy (eq. 5). synchronize: add beta times L_syn.
    """

    settings: AdversarialSettings

    def __init__(
        self,
        model: AdaptationModel,
        settings: AdversarialSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
        *,
        levels: Sequence[str] = LEVELS,
        minimize_entropy: bool = True,
        synchronize: bool = True,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        full = settings if isinstance(settings, GSDASettings) else GSDASettings(groups=1)
        self.alpha = full.alpha if minimize_entropy else 0.0
        self.beta, self.sync_ramp = full.beta, full.sync_ramp
        self.synchronize = synchronize
        self.division: Division | None = None
        self.discriminators = Discriminators(
            model.feature_dim,
            ClassGroups.random(task.num_classes, full.groups, task.seed),
            settings.hidden_dim,
            levels,
            backend=settings.backend,
            min_weight=settings.min_weight,
        )

    @classmethod
    def resolve(cls, settings: AdversarialSettings, num_classes: int, device: str) -> AdversarialSettings:
        try:
            resolved = replace(settings, backend=gsda_kernels.resolve_backend(settings.backend, device))
        except ValueError as error:
            found = settings.backend
            raise UsageError("--backend", found=found, expected=f"one that can run here ({error})") from error
        if not isinstance(resolved, GSDASettings):
            return resolved
        groups = resolved.groups or max(1, round(num_classes / 5))
        if groups > num_classes:
            expected = f"1 to {num_classes}, the number of classes"
            raise UsageError("--groups", found=str(groups), expected=expected)
        return replace(resolved, groups=groups)

    @classmethod
    def portable(cls, settings: AdversarialSettings) -> AdversarialSettings:
        return replace(settings, backend="auto")

    def players(self) -> dict[str, Player]:
        return {**super().players(), "discriminators": Player((self.discriminators,), division=self.division)}

    def costs_of_parts(self) -> Sequence[float]:
        return self.discriminators.expected_pairs()

    def divide(self, division: Division) -> None:
        self.division = division
        self.discriminators.keep(division.own)

    def compile_parts(self, mode: str | None = None) -> None:
        super().compile_parts(mode)
        self.discriminators.compile(dynamic=False, mode=mode)

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        rows = self._rows(outputs, batch)
        weight = self.settings.adversarial_weight
        groups = self.discriminators.groups if self.synchronize else None
        beta = self.beta * (step.ramp if self.sync_ramp else 1.0)
        # Of divided discriminators the terms are those of all ranks as they are.
        mean = step.mean if self.division is None else None

        def of_discriminators(own: AdversarialTerms) -> Objective:
            terms = self._all_terms(own)
            objective = discriminator_objective(terms, groups, beta=beta, mean_over_ranks=mean)
            return replace(objective, terms=self._adversarial_terms(terms, objective, mean))

        metrics = self._domain_accuracy(rows) if step.logged else {}
        if self.settings.update == "reversal":
            # What reaches the encoder is weighed, what reaches the discriminators is not.
            held = rows.features.detach()
            weighed = rows._replace(features=held + weight * (rows.features - held))
            adversarial = of_discriminators(self.discriminators(*weighed, loss_feature_scale=-step.ramp))
            own, named = self._entropy(outputs)
            named = {**adversarial.terms, **named}
            players = (*ENCODER, "discriminators")
            update = self.encoder_update(outputs, batch, step, own + adversarial.total, named, players)
            yield update._replace(metrics=metrics)
            return

        constant = rows._replace(features=rows.features.detach())
        found_inf, descent = None, step.descent("discriminators")
        if descent is None:
            adversarial = of_discriminators(self.discriminators(*constant))
        else:
            adversarial, found_inf = self.discriminators.descend_(*constant, of_discriminators, descent)
        yield Update(("discriminators",), adversarial.total, adversarial.terms, found_inf=found_inf, metrics=metrics)
        terms = self._all_terms(self.discriminators(*rows, frozen=True))
        against = -step.ramp * terms.loss.sum()
        if groups is not None:
            against = against + beta * synchronization_loss(terms.gradient_norm, groups, mean)
        own, named = self._entropy(outputs)
        # The discriminators' own update has logged the adversarial terms, before they moved.
        yield self.encoder_update(outputs, batch, step, own + weight * against, named)

    def _rows(self, outputs: Outputs, batch: Batch) -> AdversarialRows:
        """What the discriminators of this rank see."""
        probabilities = class_probabilities(outputs.logits, batch.source_labels)
        weight = self.sample_weight(batch)
        rows = AdversarialRows(outputs.features, probabilities, outputs.domain, outputs.num_source, weight)
        return rows if self.division is None else self.division.everyone(rows)

    def _all_terms(self, own: AdversarialTerms) -> AdversarialTerms:
        return own if self.division is None else self.division.terms(own)

    def _domain_accuracy(self, rows: AdversarialRows) -> dict[str, Tensor]:
        """Return it as the discriminators' update sees it; the kernels that compute their losses give no logits."""
        accuracy = self.discriminators.domain_accuracy(rows.features.detach(), rows.domain)
        if self.division is not None:
            accuracy = self.division.of_owner(accuracy, rows.features)
        return {} if accuracy is None else {"domain_accuracy": accuracy}

    def _entropy(self, outputs: Outputs) -> tuple[Tensor | float, dict[str, Tensor]]:
        if not self.alpha:
            return 0.0, {}
        value = entropy(outputs.target_logits)
        return self.alpha * value, {"entropy": value}

    def _adversarial_terms(
        self, terms: AdversarialTerms, objective: Objective, mean: Callable[[Tensor], Tensor] | None
    ) -> dict[str, Tensor]:
        per_level, norms = self.discriminators.sum_per_level, terms.gradient_norm.detach()
        named = {f"adversarial_{level}": value for level, value in per_level(terms.loss.detach()).items()}
        named |= {f"gradient_norm_{level}": value for level, value in per_level(norms).items()}
        if self.discriminators.levels == LEVELS:
            # Logged without synchronization as well, to show what it changes.
            known = objective.terms.get("synchronization")
            named["synchronization"] = (
                synchronization_loss(norms, self.discriminators.groups, mean) if known is None else known
            )
        return named
