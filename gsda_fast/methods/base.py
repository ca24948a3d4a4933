"""The seam between training and a method: players, updates of a step, and what a method learns of the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from gsda_fast.data.batches import Batch
from gsda_fast.methods.division import Division
from gsda_fast.methods.objective import classification_loss, target_class_weights
from gsda_fast.methods.step import Outputs, Player, Step, Update
from gsda_fast.methods.terms import TERMS
from gsda_fast.model import AdaptationModel, ModelOutput

TargetSamples = Literal["none", "all", "confident"]

Network = Callable[[Tensor], ModelOutput]

ENCODER = ("encoder", "classifier")
"""The players that every method has, and that most of them move together."""


@dataclass(frozen=True)
class MethodSettings:
    """Base of every method's own settings. A method without any has this one."""

    @property
    def size_option(self) -> str | None:
        """The option by which what the method trains beside the network becomes smaller; None where there is none."""
        return "--hidden-dim" if hasattr(self, "hidden_dim") else None


@dataclass(frozen=True)
class AdaptationSettings:
    """What can be added to every method."""

    add: Mapping[str, float] = field(default_factory=dict)
    """Terms added to the encoder's objective, beside those that the method has; a weight of 0 drops one of these."""
    class_weights: Literal["none", "pada"] = "none"
    """Weigh source samples by how much of their class the target seems to hold, for partial adaptation."""
    batchnorm: Literal["auto", "joint", "apart"] = "auto"
    """Pass both domains through the network together or one after the other, which BatchNorm tells apart; auto: as the
    method does by default."""


@dataclass(frozen=True)
class TaskFacts:
    """What a method knows of the data before training.

    Attributes:
        num_classes: r. num_source, num_target: samples. seed: of the run.
    """

    num_classes: int
    num_source: int = 0
    num_target: int = 0
    seed: int = 0


class Scores(Protocol):
    """The target (and the source) as the network sees them at an evaluation; the same on every rank, on the CPU."""

    probabilities: Tensor
    """(n_t, r) float32, of the whole target."""
    source_labels: Tensor
    """(n_s,) int64"""

    def features(self, domain: Literal["source", "target"]) -> Tensor:
        """Return (n, D) float32 of a whole domain; computed by all ranks when it is asked for."""


class Method(nn.Module):
    """Base of all methods: one adaptation method is one file beside this one and a line in `METHODS`.

    A method holds its modules and says what to minimize. It knows no loop over steps, no device, no rank and no file.
    A subclass writes `updates`, and what else differs from the defaults.

    Args:
        model: encoder and classifier. settings: the method's own. task: facts of the data.
        adaptation: terms to add, class weights, BatchNorm.

    Attributes:
        model: the network that is evaluated, predicted with and exported.
        settings: the method's own; a subclass annotates its type.
        source_class_weights: (r,) float32, what a source sample of each class counts for: ones until the target has
            been evaluated. None, and no part of the state, unless the settings ask for it.
    """

    target_views: ClassVar[int] = 1
    """Independent augmentations of each target image in a batch: `target_images`, and the `further_views`."""
    strong_view: ClassVar[bool] = False
    """Change the colours of the last view."""
    fits: ClassVar[bool] = False
    """Whether the method is fitted once, on features, in place of steps: adaptation is then a single step."""
    needs_warmup: ClassVar[bool] = False
    """Whether the method starts from a network that has been trained on the source."""
    batchnorm: ClassVar[Literal["joint", "apart"]] = "joint"
    """How the domains pass the network by default."""
    refuses: ClassVar[tuple[str, ...]] = ()
    """Options of `AdaptationSettings` that make no sense here: "add", "class_weights"."""

    settings: Any
    source_class_weights: Tensor | None

    def __init__(
        self,
        model: AdaptationModel,
        settings: MethodSettings | None = None,
        task: TaskFacts | None = None,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        super().__init__()
        adaptation = adaptation or AdaptationSettings()
        self.model, self.settings = model, settings
        self.added = dict(adaptation.add)
        self._apart = (self.batchnorm if adaptation.batchnorm == "auto" else adaptation.batchnorm) == "apart"
        weights = torch.ones(task.num_classes) if task is not None and adaptation.class_weights == "pada" else None
        self.register_buffer("source_class_weights", weights)

    @classmethod
    def resolve(cls, settings: Any, num_classes: int, device: str) -> Any:
        """Return the settings with every automatic choice made for that many classes, on "cpu" or "cuda".

        Raises:
            UsageError: a choice that cannot be had here.
        """
        return settings

    @classmethod
    def portable(cls, settings: Any) -> Any:
        """Return the settings without choices that belong to the machine of a run, for evaluation on another one."""
        return settings

    @classmethod
    def classifier(cls, settings: Any, feature_dim: int, num_classes: int) -> nn.Module:
        """Build the head: (N, D) features to the (N, r) logits that predict."""
        return nn.Linear(feature_dim, num_classes)

    @property
    def trained(self) -> AdaptationModel:
        """The network that learns: `model`, but for a teacher's student."""
        return self.model

    def players(self) -> dict[str, Player]:
        """Return what moves, by name; each player gets an optimizer."""
        trained = self.trained
        return {"encoder": Player((trained.backbone, trained.bottleneck)), "classifier": Player((trained.classifier,))}

    def costs_of_parts(self) -> Sequence[float]:
        """Return what each part costs of those that ranks can divide among them; empty where there are none."""
        return ()

    def divide(self, division: Division) -> None:
        """Keep this rank's share of the parts alone; before optimizers are built.

        Args:
            division: by `costs_of_parts`.
        """
        raise NotImplementedError

    def compile_parts(self, mode: str | None = None) -> None:
        """Compile what runs in every training step; a method with more modules compiles those as well.

        Args:
            mode: of `torch.compile`.
        """
        # Every step has the same shapes, and a graph for any shape is a slower one.
        self.trained.compile(dynamic=False, mode=mode)

    def start(self) -> Iterable[str]:
        """Prepare the first adaptation step; called once before it, and again by a run that resumes there.

        Returns:
            Names of players that forget their momentum.
        """
        return ()

    def on_evaluation(self, scores: Scores) -> None:
        """Renew what depends on the whole target, as buffers, so that checkpoints hold it. Overriders call this one.

        Args:
            scores: of the evaluation that has just been made.
        """
        if self.source_class_weights is not None:
            self.source_class_weights.copy_(target_class_weights(scores.probabilities))

    def source_updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        """Yield the updates of a step on the source alone: warm-up, and the method source-only."""
        features, logits = self.trained(batch.source_images)
        loss = self.classification(logits, batch, step)
        yield Update(ENCODER, loss, {"classification": loss.detach()}, images=len(features))

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        """Yield the updates of an adaptation step, in order.

        Each is carried out before the next is asked for: backward pass, mean over ranks, optimizer. Code after the last
        `yield` runs after the last optimizer step, and not in a step that fp16's scaling skipped.
        """
        raise NotImplementedError

    def outputs(self, batch: Batch, network: Network | None = None) -> Outputs:
        """Run the trained network, or `network` in its place, on both domains, together or apart."""
        network = network or self.trained
        num_source = len(batch.source_images)
        if self._apart:
            source, target = network(batch.source_images), network(batch.target_images)
            features, logits = (torch.cat(pair) for pair in zip(source, target))
        else:
            features, logits = network(torch.cat([batch.source_images, batch.target_images]))
        return Outputs(features, logits, num_source)

    def classification(self, source_logits: Tensor, batch: Batch, step: Step) -> Tensor:
        """Return the source's cross-entropy, 0-d, weighted by class where the settings ask for it."""
        return classification_loss(source_logits, batch.source_labels, self.source_weight(batch), step.mean)

    def source_weight(self, batch: Batch) -> Tensor | None:
        """Return what each source sample counts for, (B,); None where all count equally."""
        return None if self.source_class_weights is None else self.source_class_weights[batch.source_labels]

    def sample_weight(self, batch: Batch) -> Tensor | None:
        """Return the same for both domains' rows, (N,), source first; target rows count 1."""
        weight = self.source_weight(batch)
        return None if weight is None else torch.cat([weight, weight.new_ones(len(batch.target_images))])

    def encoder_update(
        self,
        outputs: Outputs,
        batch: Batch,
        step: Step,
        loss: Tensor | float = 0.0,
        terms: Mapping[str, Tensor] | None = None,
        players: tuple[str, ...] = ENCODER,
        classification: Tensor | None = None,
    ) -> Update:
        """Build the encoder's update: the source's cross-entropy, plus `loss`, plus the terms that were added.

        Args:
            outputs: of this batch. loss: the method's own part, weighted. terms: its parts by name, for the log.
            players: who moves. classification: what stands for the source's cross-entropy, where it is not that of
                `outputs`.
        """
        if classification is None:
            classification = self.classification(outputs.source_logits, batch, step)
        total, named = classification + loss, {"classification": classification}
        for name, weight in self.added.items():
            value = TERMS[name](outputs, batch.source_labels, step)
            total = total + weight * value
            named[name] = value
        named = {**(terms or {}), **named}
        logged = {name: value.detach() for name, value in named.items()}
        return Update(players, total, logged, images=len(outputs.features))
