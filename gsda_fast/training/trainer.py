"""The training loop: steps between two scorings of the target, the scoring, the checkpoint, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsda_fast.data.batches import Batch, Loader, Role
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.methods import Method, StepInputs
from gsda_fast.results.metrics import AccuracyHistory, EvaluationFigures, evaluation_figures
from gsda_fast.training.optim import OptimizerSettings, build_optimizers, set_learning_rate
from gsda_fast.training.pseudo_labels import confident_labels
from gsda_fast.training.schedules import Schedule


@dataclass(frozen=True)
class Report:
    """What the trainer tells after some steps.

    Attributes:
        step: steps done. values: figures by their names in metrics.jsonl.
        figures: the evaluation of the target, where it was scored after this step.
    """

    step: int
    values: dict[str, float | None]
    figures: EvaluationFigures | None = None


class Trainer:
    """Owns all state that training changes.

    Args:
        method: what to minimize. loader, plan: images and their order. target: for its labels, which serve evaluation
            alone. schedule: what changes over the steps. optimizer: rates. confidence_threshold: of pseudo-labels.
        device: where the method's modules and the batches are.
        log_every: steps between two reports.
    """

    def __init__(
        self,
        method: Method,
        loader: Loader,
        plan: SamplingPlan,
        target: ImageDomain,
        schedule: Schedule,
        optimizer: OptimizerSettings,
        *,
        confidence_threshold: float,
        device: torch.device,
        log_every: int,
    ) -> None:
        self.method, self.loader, self.plan, self.schedule = method, loader, plan, schedule
        self.target_labels = torch.from_numpy(target.labels)
        self.confidence_threshold, self.device, self.log_every = confidence_threshold, device, log_every
        self.optimizers = build_optimizers(method.players(), optimizer)
        self.history = AccuracyHistory()
        self.step = 0
        self.probabilities: Tensor | None = None
        self.images_seen, self.training_seconds = 0, 0.0
        self._earlier_seconds, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run so far, that of interrupted attempts included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def run(self, on_scored: Callable[[], None]) -> Iterator[Report]:
        """Trains to the last step, yielding a report at each log step and each scoring.

        Args:
            on_scored: called after the report of each scoring has been taken, with the plan renewed: the moment at
                which a checkpoint is whole.
        """
        while self.step < self.schedule.steps:
            segment = range(self.step, self.schedule.segment_end(self.step))
            for terms, timing in self._steps(segment):
                if self.step == segment.stop:
                    figures = self._score_target()
                    values = {"accuracy": figures.accuracy, "mean_per_class": figures.mean_per_class}
                    values["mutual_information"] = figures.mutual_information
                    yield Report(self.step, {**_numbers(terms), **timing, **values}, figures)
                    on_scored()
                elif self.step % self.log_every == 0:
                    yield Report(self.step, {**_numbers(terms), **timing})

    def _steps(self, segment: range) -> Iterator[tuple[dict[str, Tensor], dict[str, float | None]]]:
        """The training steps of a segment: named terms (on the device) and rates after each."""
        self.method.train()
        batches = self.loader.train(self.plan, segment)
        clock = _Clock()
        for step in segment:
            before = time.perf_counter()
            batch = next(batches)
            clock.waiting += time.perf_counter() - before
            terms = self._train_step(step, batch)
            clock.images += len(batch.source_images) + len(batch.target_images)
            self.step = step + 1
            at_report = self.step == segment.stop or self.step % self.log_every == 0
            if at_report:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds = clock.seconds()
                self.images_seen += clock.images
                self.training_seconds += seconds
                rates: dict[str, float | None] = {
                    "learning_rate": max(g["lr"] for o in self.optimizers.values() for g in o.param_groups),
                    "adversarial_ramp": self.schedule.adversarial_ramp(step),
                    "images_per_second": clock.images / seconds,
                    "data_wait": clock.waiting / seconds,
                }
                yield terms, rates
                clock = _Clock()

    def _train_step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        set_learning_rate(self.optimizers, self.schedule.learning_rate_factor(step))
        inputs = StepInputs(
            source_images=batch.source_images,
            source_labels=batch.source_labels,
            target_images=batch.target_images,
            warming_up=self.schedule.warming_up(step),
            adversarial_ramp=torch.full((), self.schedule.adversarial_ramp(step), device=self.device),
        )
        terms: dict[str, Tensor] = {}
        for move in self.method.moves(inputs):
            for player in move.players:
                self.optimizers[player].zero_grad(set_to_none=True)
            move.objective.total.backward()
            for player in move.players:
                self.optimizers[player].step()
            terms.update(move.objective.terms)
        return terms

    def _score_target(self) -> EvaluationFigures:
        """Scores the target, notes the figures, and renews the choice of the target samples that train."""
        self.probabilities = self.predict("target")
        figures = evaluation_figures(self.target_labels, self.probabilities)
        self.history.add(self.step, figures)
        if self.method.target_samples == "confident":
            self.plan = self.plan.with_target(confident_labels(self.probabilities, self.confidence_threshold))
        return figures

    @torch.no_grad()
    def predict(self, domain: Role) -> Tensor:
        """(n, r) float32 class probabilities of a domain, in its order, on the CPU."""
        self.method.eval()
        parts = [
            self.method.model(images).logits.float().softmax(1).cpu() for images, _ in self.loader.evaluate(domain)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def features(self, domain: Role, index: np.ndarray) -> np.ndarray:
        """(len(index), D) float32 features of the samples `index` of a domain."""
        self.method.eval()
        batches = self.loader.evaluate(domain, index)
        return np.concatenate([self.method.model(images).features.float().cpu().numpy() for images, _ in batches])

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a crash; all else is a function of it and the configuration."""
        table = self.plan.target_table
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "target_table": None if table is None else torch.from_numpy(table),
            "history": self.history.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "images_seen": self.images_seen,
            "training_seconds": self.training_seconds,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.method.load_state_dict(state["method"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if state["target_table"] is not None:
            self.plan = self.plan.with_target(state["target_table"].numpy())
        self.history.load_state_dict(state["history"])
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all([each.cpu() for each in state["random_cuda"]])
        self.images_seen, self.training_seconds = state["images_seen"], state["training_seconds"]
        self._earlier_seconds, self._started = state["seconds"], time.perf_counter()


class _Clock:
    """Seconds and images since the last report."""

    def __init__(self) -> None:
        self.start, self.waiting, self.images = time.perf_counter(), 0.0, 0

    def seconds(self) -> float:
        return time.perf_counter() - self.start


def _numbers(terms: dict[str, Tensor]) -> dict[str, float | None]:
    """One transfer to the host for all terms."""
    values = torch.stack([term.float() for term in terms.values()]).tolist()
    return dict(zip(terms, values))
