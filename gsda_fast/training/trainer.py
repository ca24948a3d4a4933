"""The training loop: steps between two evaluations of the target, the evaluation, the checkpoint, and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gsda_fast.console import FilesDone
from gsda_fast.data.batches import Batch, Crops, Loader, Role
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.errors import Stopped
from gsda_fast.methods import Division, Method, Step
from gsda_fast.model import ModelOutput
from gsda_fast.results.metrics import AccuracyHistory, EvaluationMetrics, evaluation_metrics
from gsda_fast.training.distributed import Ranks, mean_of_buffers
from gsda_fast.training.generators import generator_states, set_generator_states
from gsda_fast.training.optim import OptimizerSettings, build_optimizers, set_learning_rate
from gsda_fast.training.pseudo_labels import confident_labels
from gsda_fast.training.rooflines import Floors, peak_memory
from gsda_fast.training.schedules import Schedule
from gsda_fast.training.update import StepOutcome, Updater


@dataclass(frozen=True)
class Report:
    """What the trainer reports after some steps.

    Attributes:
        step: steps done. values: metrics by their names in metrics.jsonl, over all ranks.
        peak_memory: bytes, the most that any rank has needed so far, on its GPU or else of its host's memory.
        evaluation: of the target, where one was made after this step.
    """

    step: int
    values: dict[str, float | None]
    peak_memory: float
    evaluation: EvaluationMetrics | None = None


class Trainer:
    """Owns all state that training changes.

    Args:
        method: what to minimize. loader, plan: images and their order. target: for its labels, which serve evaluation
            alone. schedule: what changes over the steps. optimizer: which, and its rates.
        confidence_threshold: of pseudo-labels; None: all target samples train, or none.
        device: where the method's modules and the batches are.
        log_every: steps between two reports.
        ranks: the processes of the run. Its calls are made by all of them, at the same steps: nearly every method of
            this class is one for all ranks together.
        scale_losses: for fp16.
        test_crops: crops of a target image over which the metrics average its probabilities. Nothing that trains
            depends on it: pseudo-labels and what the method learns come from the centre crop.
        stop: whether this process has been asked to stop, looked at in each step.
        cuda_graphs: whether compiled parts are replayed as CUDA graphs.
        floors: what the network costs at least here, for the rooflines; None where that is not known.

    Attributes:
        on_step: what is called after each step.
        pending: the metrics of the last step, which wait for those of the evaluation that follows.
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
        confidence_threshold: float | None,
        device: torch.device,
        log_every: int,
        ranks: Ranks | None = None,
        scale_losses: bool = False,
        test_crops: Crops = 1,
        stop: Callable[[], bool] = lambda: False,
        cuda_graphs: bool = False,
        floors: Floors | None = None,
    ) -> None:
        self.method, self.loader, self.plan, self.schedule = method, loader, plan, schedule
        self.target_labels, self.classes = torch.from_numpy(target.labels), target.classes
        self.confidence_threshold, self.device, self.log_every = confidence_threshold, device, log_every
        self.test_crops: Crops = test_crops
        self.on_step: list[Callable[[], None]] = []
        players = method.players()
        self._divided = {
            id(parameter): player.division
            for player in players.values()
            for module in player.modules
            for parameter in module.parameters()
            if player.division is not None
        }
        self.optimizers = build_optimizers(players, optimizer, method.trained.backbone)
        self.ranks, self.floors, self.cuda_graphs = ranks or Ranks(), floors, cuda_graphs
        self.updater = Updater(players, self.optimizers, self.ranks, device, scale_losses)
        self._stop = stop
        self.pending: dict[str, float | None] | None = None
        self.history = AccuracyHistory()
        self.step = 0
        self.probabilities: Tensor | None = None
        self.images_seen, self.training_seconds = 0, 0.0
        self._earlier_seconds, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run so far, that of interrupted attempts included."""
        return self._earlier_seconds + time.perf_counter() - self._started

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the target has been evaluated after the last one."""
        return self.step >= self.schedule.steps and self.pending is None

    def run(self, on_evaluation: Callable[[], None]) -> Iterator[Report]:
        """Train to the last step, yielding a report at each log step and each evaluation.

        It ends before, on all ranks after the same step, if one of them is asked to stop; see `finished`. Then, too,
        the state is whole: a run that goes on from it reports what it would have reported without the interruption.

        Args:
            on_evaluation: called after the report of each evaluation has been taken, with the plan renewed: the moment
                at which a checkpoint is due.
        """
        while not self.finished:
            if self.pending is None:
                steps = range(self.step, self.schedule.next_evaluation(self.step))
                for values in self._steps(steps):
                    if self.step == steps.stop:
                        self.pending = values
                    else:
                        yield self._report(values)
                if self.updater.stop:
                    return
            assert self.pending is not None
            try:
                evaluation = self._evaluate_target()
            except Stopped:
                return
            values, self.pending = self.pending, None
            values |= {"accuracy": evaluation.accuracy, "mean_per_class": evaluation.mean_per_class}
            values["mutual_information"] = evaluation.mutual_information
            others = {name: score for name, score in evaluation.scores.items() if name != "mutual_information"}
            values |= {f"score_{name}": score for name, score in others.items()}
            yield self._report(values, evaluation)
            on_evaluation()

    def _report(self, values: dict[str, float | None], evaluation: EvaluationMetrics | None = None) -> Report:
        return Report(self.step, values, self.ranks.max(peak_memory(self.device), self.device), evaluation)

    def _steps(self, steps: range) -> Iterator[dict[str, float | None]]:
        """Take the steps before an evaluation, unless a rank wants to stop; yield metrics at log steps and the last."""
        self.method.train()
        batches = self.loader.train(self.plan, steps, self.ranks.rank)
        clock = _Clock()
        for step in steps:
            if self._stop():
                self.updater.ask_to_stop()
            before = time.perf_counter()
            batch = next(batches)
            clock.waiting += time.perf_counter() - before
            outcome = self._train_step(step, batch)
            clock.images += len(batch.source_images) + len(batch.target_images)
            clock.computed += outcome.images
            self.step = step + 1
            for call in self.on_step:
                call()
            if self._is_logged(step):
                self.updater.require_finite()
                yield {**self._means({**outcome.terms, **outcome.metrics}), **self._rates(step, clock)}
                clock = _Clock()
            if self.updater.stop:
                self._note(clock)
                return

    def _means(self, named: dict[str, Tensor]) -> dict[str, float | None]:
        """Return means over the ranks, in one transfer to the host."""
        if not named:
            return {}
        values = self.ranks.mean(torch.stack([value.float() for value in named.values()])).tolist()
        return dict(zip(named, values))

    def _rates(self, step: int, clock: _Clock) -> dict[str, float | None]:
        seconds, images = self._note(clock)
        waited = self.ranks.mean(torch.tensor(clock.waiting / seconds, device=self.device))
        return {
            "learning_rate": max(g["lr"] for o in self.optimizers.values() for g in o.param_groups),
            "adversarial_ramp": self.schedule.adversarial_ramp(step),
            "images_per_second": images / seconds,
            "data_wait": float(waited),
            **({} if self.floors is None else self.floors.shares(clock.computed, seconds)),
        }

    def _note(self, clock: _Clock) -> tuple[float, int]:
        """Add what the clock has counted, on all ranks, to the run's sums."""
        seconds, images = clock.seconds(), clock.images * self.ranks.world_size
        self.images_seen += images
        self.training_seconds += seconds
        return seconds, images

    def _is_logged(self, step: int) -> bool:
        return (step + 1) % self.log_every == 0 or self.schedule.is_evaluated_after(step + 1)

    def _train_step(self, step: int, batch: Batch) -> StepOutcome:
        sizes = len(batch.source_images), len(batch.target_images)
        # The mean over ranks of local means is the global mean for equal parts alone.
        assert sizes == (self.plan.batch_size, self.plan.batch_size), f"a batch of {sizes}, {self.plan.batch_size} each"
        if self.cuda_graphs:
            # Without it, the discriminators' backward pass would end the step for the graphs, and their second forward
            # pass take over the memory of the features that the encoder's backward pass still needs.
            torch.compiler.cudagraph_mark_step_begin()
        set_learning_rate(self.optimizers, self.schedule.learning_rate_factor(step))
        ramp, progress = (
            torch.full((), value, device=self.device)
            for value in (self.schedule.adversarial_ramp(step), self.schedule.progress(step))
        )
        mean, gather, logged = self.ranks.mean, self.ranks.gather_rows, self._is_logged(step)
        known = Step(ramp, progress, mean, gather, self.updater.descent, logged)
        if self.schedule.warming_up(step):
            return self.updater.step(step, self.method.source_updates(batch, known))
        if step == self.schedule.warmup:
            for player in self.method.start():
                self.updater.forget(player)
        return self.updater.step(step, self.method.updates(batch, known))

    def _evaluate_target(self) -> EvaluationMetrics:
        """Evaluate the target, note its accuracy, and renew the choice of the target samples that train."""
        of_centre = self.predict("target", 1, stoppable=True)
        self.probabilities = of_centre
        if self.test_crops != 1:
            self.probabilities = self.predict("target", self.test_crops, stoppable=True)
        metrics = evaluation_metrics(self.target_labels, self.probabilities)
        self.history.add(self.step, metrics)
        self.method.on_evaluation(_Scores(self, of_centre))
        if self.confidence_threshold is not None:
            self.plan = self.plan.with_target(confident_labels(of_centre, self.confidence_threshold))
        return metrics

    def predict(
        self, domain: Role, crops: Crops = 1, *, stoppable: bool = False, progress: FilesDone | None = None
    ) -> Tensor:
        """Return (n, r) float32 class probabilities of a domain, means over the crops, in its order, on the CPU.

        Args:
            domain, crops: what is scored, and how. stoppable: leave where a rank has been asked to stop.
            progress: called after each batch with what this rank has scored.

        Raises:
            Stopped: a rank has been asked to stop, and this is `stoppable`.
        """

        def probabilities(output: ModelOutput) -> Tensor:
            return output.logits.float().softmax(1).unflatten(0, (-1, crops)).mean(1)

        return self._evaluate(domain, None, probabilities, crops, stoppable=stoppable, progress=progress)

    def features(self, domain: Role, index: np.ndarray) -> np.ndarray:
        """Return (len(index), D) float32 features of the samples `index` of a domain."""
        return self.all_features(domain, index).numpy()

    def all_features(self, domain: Role, index: np.ndarray | None = None) -> Tensor:
        """Return (n, D) float32 features of a domain, or of its samples `index`, on the CPU."""
        return self._evaluate(domain, index, lambda output: output.features.float())

    @torch.no_grad()
    def _evaluate(
        self,
        domain: Role,
        index: np.ndarray | None,
        of: Callable[[ModelOutput], Tensor],
        crops: Crops = 1,
        *,
        stoppable: bool = False,
        progress: FilesDone | None = None,
    ) -> Tensor:
        """Return rows for the samples `index`, or for all of a domain, each rank computing its share, on the CPU."""
        self.ranks.mean_buffers(self.method)
        self.method.eval()
        count = len(self.plan.source_labels) if domain == "source" else self.plan.num_target
        samples = np.arange(count) if index is None else index
        share = samples[self.ranks.shard(len(samples))]
        rows, done = [], 0
        for images, scored in self.loader.evaluate(domain, share, crops):
            if stoppable and self.ranks.max(self._stop(), self.device):
                raise Stopped
            # Not the compiled network: it would be compiled anew for the shapes of evaluation.
            rows.append(of(self.method.model.forward(images)))
            done += len(scored)
            if progress is not None:
                progress(domain, done, len(share))
        return self.ranks.gather(torch.cat(rows), len(samples)).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a crash; all else is a function of it and the configuration.

        All ranks call it and get the same: what belongs to each of them is in a list over the ranks. Buffers do,
        between two evaluations; as part of the method they are what an evaluation would make of them.

        Raises:
            TrainingError: a number was not finite in a step so far: such a state is none to resume from.
        """
        self.updater.require_finite()
        table = self.plan.target_table
        own = {"random": generator_states(self.device), "buffers": self._own_buffers()}
        of_ranks = self.ranks.gather_objects(own)
        return {
            "step": self.step,
            "classes": list(self.classes),
            "method": {**self.method_state(), **mean_of_buffers([each["buffers"] for each in of_ranks])},
            **self.updater.state_dict(),
            "target_table": None if table is None else torch.from_numpy(table),
            "pending": self.pending,
            "history": self.history.state_dict(),
            "ranks": of_ranks,
            "images_seen": self.images_seen,
            "training_seconds": self.training_seconds,
            "seconds": self.seconds,
        }

    def method_state(self) -> dict[str, Tensor]:
        """Return the method's state as the ranks have it together: of what is divided among them, the whole."""
        own = self._divisions()
        stored = self.method.state_dict()
        return {name: own[name].whole(value) if name in own else value for name, value in stored.items()}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """Load what `method_state` returned; of what is divided, this rank's share."""
        own = self._divisions()
        self.method.load_state_dict(
            {name: value[own[name].own] if name in own else value for name, value in state.items()}
        )

    def whole_numel(self, parameter: Tensor) -> int:
        """Return of how many numbers a parameter consists: of what is divided, those of all ranks together."""
        division = self._divided.get(id(parameter))
        return parameter.numel() if division is None else parameter[0].numel() * division.num_parts

    def _divisions(self) -> dict[str, Division]:
        """Return the divisions by the names of the parameters that are divided."""
        named = self.method.named_parameters()
        return {name: self._divided[id(each)] for name, each in named if id(each) in self._divided}

    def _own_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that differ between ranks, on the host."""
        if not self.ranks.several:
            return {}
        stored = self.method.state_dict()
        buffers = {name: buffer for name, buffer in self.method.named_buffers() if name in stored}
        return {name: buffer.cpu().clone() for name, buffer in buffers.items() if buffer.is_floating_point()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        As many ranks as there were go on with what was theirs; others evaluate only.
        """
        self.step = state["step"]
        self.updater.load_state_dict(state)
        if state["target_table"] is not None:
            self.plan = self.plan.with_target(state["target_table"].numpy())
        self.pending = state["pending"]
        self.history.load_state_dict(state["history"])
        if len(state["ranks"]) != self.ranks.world_size:
            self.load_method_state(state["method"])
        else:
            own = state["ranks"][self.ranks.rank]
            self.load_method_state({**state["method"], **own["buffers"]})
            set_generator_states(own["random"], self.device)
        self.images_seen, self.training_seconds = state["images_seen"], state["training_seconds"]
        self._earlier_seconds, self._started = state["seconds"], time.perf_counter()


class _Scores:
    """See `gsda_fast.methods.base.Scores`."""

    def __init__(self, trainer: Trainer, probabilities: Tensor) -> None:
        self.probabilities = probabilities
        self.source_labels = torch.from_numpy(trainer.plan.source_labels)
        self._trainer = trainer

    def features(self, domain: Role) -> Tensor:
        return self._trainer.all_features(domain)


class _Clock:
    """Seconds and images of this rank since the last report; `computed`: images that went through the network."""

    def __init__(self) -> None:
        self.start, self.waiting, self.images, self.computed = time.perf_counter(), 0.0, 0, 0

    def seconds(self) -> float:
        return time.perf_counter() - self.start
