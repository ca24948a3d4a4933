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
from gsda_fast.model import ModelOutput
from gsda_fast.results.metrics import AccuracyHistory, EvaluationFigures, evaluation_figures
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.figures import Floors, peak_memory
from gsda_fast.training.optim import OptimizerSettings, build_optimizers, set_learning_rate
from gsda_fast.training.pseudo_labels import confident_labels
from gsda_fast.training.schedules import Schedule
from gsda_fast.training.update import Updater


@dataclass(frozen=True)
class Report:
    """What the trainer tells after some steps.

    Attributes:
        step: steps done. values: figures by their names in metrics.jsonl, over all ranks.
        peak_memory: bytes, the most that any rank has needed so far, on its GPU or else of its host's memory.
        figures: the evaluation of the target, where it was scored after this step.
    """

    step: int
    values: dict[str, float | None]
    peak_memory: float
    figures: EvaluationFigures | None = None


class Trainer:
    """Owns all state that training changes.

    Args:
        method: what to minimize. loader, plan: images and their order. target: for its labels, which serve evaluation
            alone. schedule: what changes over the steps. optimizer: which, and its rates.
        confidence_threshold: of pseudo-labels.
        device: where the method's modules and the batches are.
        log_every: steps between two reports.
        ranks: the processes of the run. Its calls are made by all of them, at the same steps: nearly every method of
            this class is one for all ranks together.
        scale_losses: for fp16.
        cuda_graphs: whether compiled parts are replayed as CUDA graphs.
        floors: what the network costs at least here, for figures; None where that is not known.

    Attributes:
        profiler: told of each step, if there is one.
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
        ranks: Ranks | None = None,
        scale_losses: bool = False,
        cuda_graphs: bool = False,
        floors: Floors | None = None,
    ) -> None:
        self.method, self.loader, self.plan, self.schedule = method, loader, plan, schedule
        self.target_labels, self.classes = torch.from_numpy(target.labels), target.classes
        self.confidence_threshold, self.device, self.log_every = confidence_threshold, device, log_every
        self.optimizers = build_optimizers(method.players(), optimizer)
        self.ranks, self.floors, self.cuda_graphs = ranks or Ranks(), floors, cuda_graphs
        self.updater = Updater(method.players(), self.optimizers, self.ranks, device, scale_losses)
        self.profiler: torch.profiler.profile | None = None
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
            for values in self._steps(segment):
                memory = self.ranks.max(peak_memory(self.device), self.device)
                if self.step < segment.stop:
                    yield Report(self.step, values, memory)
                    continue
                figures = self._score_target()
                values |= {"accuracy": figures.accuracy, "mean_per_class": figures.mean_per_class}
                values["mutual_information"] = figures.mutual_information
                yield Report(self.step, values, memory, figures)
                on_scored()

    def _steps(self, segment: range) -> Iterator[dict[str, float | None]]:
        """The training steps of a segment; figures at log steps and after the last one."""
        self.method.train()
        batches = self.loader.train(self.plan, segment, self.ranks.rank)
        clock = _Clock()
        for step in segment:
            before = time.perf_counter()
            batch = next(batches)
            clock.waiting += time.perf_counter() - before
            terms = self._train_step(step, batch)
            clock.images += len(batch.source_images) + len(batch.target_images)
            clock.computed += len(batch.source_images) * (1 if self._source_alone(step) else 2)
            self.step = step + 1
            if self.profiler is not None:
                self.profiler.step()
            if self.step == segment.stop or self.step % self.log_every == 0:
                self.updater.require_finite()
                yield {**self._mean_terms(terms), **self._rates(step, clock)}
                clock = _Clock()

    def _mean_terms(self, terms: dict[str, Tensor]) -> dict[str, float | None]:
        """Means over the ranks, in one transfer to the host."""
        values = self.ranks.mean(torch.stack([term.float() for term in terms.values()])).tolist()
        return dict(zip(terms, values))

    def _rates(self, step: int, clock: _Clock) -> dict[str, float | None]:
        seconds, images = clock.seconds(), clock.images * self.ranks.world_size
        self.images_seen += images
        self.training_seconds += seconds
        waited = self.ranks.mean(torch.tensor(clock.waiting / seconds, device=self.device))
        return {
            "learning_rate": max(g["lr"] for o in self.optimizers.values() for g in o.param_groups),
            "adversarial_ramp": self.schedule.adversarial_ramp(step),
            "images_per_second": images / seconds,
            "data_wait": float(waited),
            **({} if self.floors is None else self.floors.shares(clock.computed, seconds)),
        }

    def _source_alone(self, step: int) -> bool:
        return self.schedule.warming_up(step) or self.method.target_samples == "none"

    def _train_step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        sizes = len(batch.source_images), len(batch.target_images)
        # The mean over ranks of local means is the global mean for equal parts alone.
        assert sizes == (self.plan.batch_size, self.plan.batch_size), f"a batch of {sizes}, {self.plan.batch_size} each"
        if self.cuda_graphs:
            # Without it, the discriminators' backward pass would end the step for the graphs, and their second forward
            # pass take over the memory of the features that the encoder's backward pass still needs.
            torch.compiler.cudagraph_mark_step_begin()
        set_learning_rate(self.optimizers, self.schedule.learning_rate_factor(step))
        inputs = StepInputs(
            source_images=batch.source_images,
            source_labels=batch.source_labels,
            target_images=batch.target_images,
            warming_up=self.schedule.warming_up(step),
            adversarial_ramp=torch.full((), self.schedule.adversarial_ramp(step), device=self.device),
            mean_over_ranks=self.ranks.mean if self.ranks.several else None,
        )
        return self.updater.step(step, self.method.moves(inputs))

    def _score_target(self) -> EvaluationFigures:
        """Scores the target, notes the figures, and renews the choice of the target samples that train."""
        self.probabilities = self.predict("target")
        figures = evaluation_figures(self.target_labels, self.probabilities)
        self.history.add(self.step, figures)
        if self.method.target_samples == "confident":
            self.plan = self.plan.with_target(confident_labels(self.probabilities, self.confidence_threshold))
        return figures

    def predict(self, domain: Role) -> Tensor:
        """(n, r) float32 class probabilities of a domain, in its order, on the CPU."""
        return self._evaluate(domain, None, lambda output: output.logits.float().softmax(1))

    def features(self, domain: Role, index: np.ndarray) -> np.ndarray:
        """(len(index), D) float32 features of the samples `index` of a domain."""
        return self._evaluate(domain, index, lambda output: output.features.float()).numpy()

    @torch.no_grad()
    def _evaluate(self, domain: Role, index: np.ndarray | None, of: Callable[[ModelOutput], Tensor]) -> Tensor:
        """Rows for the samples `index`, or for all of a domain, each rank computing its share, on the CPU."""
        self.ranks.mean_buffers(self.method)
        self.method.eval()
        count = len(self.plan.source_labels) if domain == "source" else self.plan.num_target
        samples = np.arange(count) if index is None else index
        share = samples[self.ranks.shard(len(samples))]
        # Not the compiled network: it would be compiled anew for the shapes of evaluation.
        rows = [of(self.method.model.forward(images)) for images, _ in self.loader.evaluate(domain, share)]
        return self.ranks.gather(torch.cat(rows), len(samples)).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a crash; all else is a function of it and the configuration."""
        table = self.plan.target_table
        return {
            "step": self.step,
            "classes": list(self.classes),
            "method": self.method.state_dict(),
            **self.updater.state_dict(),
            "target_table": None if table is None else torch.from_numpy(table),
            "history": self.history.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "images_seen": self.images_seen,
            "training_seconds": self.training_seconds,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.method.load_state_dict(state["method"])
        self.updater.load_state_dict(state)
        if state["target_table"] is not None:
            self.plan = self.plan.with_target(state["target_table"].numpy())
        self.history.load_state_dict(state["history"])
        torch.set_rng_state(state["random"].cpu())
        # A checkpoint may be read on a machine without a GPU, or go on there.
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)
        self.images_seen, self.training_seconds = state["images_seen"], state["training_seconds"]
        self._earlier_seconds, self._started = state["seconds"], time.perf_counter()


class _Clock:
    """Seconds and images of this rank since the last report; `computed`: images that went through the network."""

    def __init__(self) -> None:
        self.start, self.waiting, self.images, self.computed = time.perf_counter(), 0.0, 0, 0

    def seconds(self) -> float:
        return time.perf_counter() - self.start
