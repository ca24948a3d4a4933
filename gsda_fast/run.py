"""A run from its opening to its end: the folder, its lock, the same settings?, the checkpoint, the result."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from gsda_fast.assemble import build_trainer, resolve, with_choices
from gsda_fast.config import Config
from gsda_fast.console import progress_bars
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.verify import require_readable
from gsda_fast.errors import Stopped, TrainingError, UsageError
from gsda_fast.model import fetch_weights
from gsda_fast.results.metrics import evaluation_metrics
from gsda_fast.results.run_folder import FREE_TO_CHANGE, RunFolder, RunResult, flat_settings
from gsda_fast.resume import Start, find_start, run_identity, versions
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.stopping import StopRequest
from gsda_fast.training.trainer import Report, Trainer

FEATURE_SAMPLES = 2000
"""Samples of each domain whose features are kept for plots."""

_SHOWN = 5  # files named by a line

_MOST_FAILURES = 3
"""Failures to write a checkpoint, in a row, that end the run."""


class Run:
    """A run of one or more processes. All of them make the same calls; the first one writes and speaks.

    Opening it writes nothing, and nothing is written before everything has been checked. What a resumed run does not
    make again is on the disk before the checkpoint that it resumes from, in an order that a kill cannot upset.

    Attributes:
        config: resolved. source, target: the domains. folder: the run's. ranks: the processes.
        console: silent on all ranks but the first.
        result: of a run that has finished already; None otherwise.
    """

    def __init__(
        self,
        config: Config,
        source: ImageDomain,
        target: ImageDomain,
        ranks: Ranks,
        stop: StopRequest,
        console: Console,
    ) -> None:
        self.config, self.source, self.target = config, source, target
        self.ranks, self.console = ranks, console
        self.folder = RunFolder(config.run.output or "")
        self.result: RunResult | None = None
        self._stop = stop
        self._identity = run_identity(config, source, target, ranks.world_size)
        self._checkpoints = CheckpointFolder(self.folder.checkpoints)
        self._start = Start()
        self._before_checkpoint: list[Callable[[], None]] = []
        self._unreadable: dict[str, str] = {}
        self._tried_at, self._failures, self._warned = time.monotonic(), 0, False

    @classmethod
    def open(cls, config: Config, ranks: Ranks, stop: StopRequest, console: Console) -> Run:
        """Open the run that `config` asks for: its data, its folder, and where it goes on.

        Raises:
            UsageError: settings, data or a folder that do not fit.
        """
        own_console = console if ranks.first else Console(quiet=True)
        # Digits are drawn when they are first used, and a large data set has many folders to list.
        with own_console.status("opening the data"):
            opened = ranks.on_all_ranks(lambda: resolve(config, ranks.world_size))
        run = cls(*opened, ranks, stop, own_console)
        try:
            run.result = ranks.on_rank_zero(run._earlier_result)
            if run.result is None:
                # Read by one process and handed to the others, which may not see its disk.
                run._start = ranks.on_rank_zero(lambda: find_start(run.config, run.folder, run._identity))
                for line in run._start.warnings:
                    run._warn(f"{line}; passed over")
        except BaseException:
            run.folder.release()
            raise
        run._say_if_finished()
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.release()
        if isinstance(error, Stopped) and not error.args:
            raise self._stopped("stopped before a step was taken") from None

    def build_trainer(self) -> Trainer | None:
        """Verify the files, fetch weights, assemble the trainer and load the checkpoint; then make the folder ready.

        Returns:
            None where another process has finished the same run in the meantime; `result` holds what it came to.

        Raises:
            UsageError: files that cannot be read, weights or a checkpoint that do not fit.
            TrainingError: the folder cannot be written. Stopped: before a step was taken.
        """
        config, ranks, stop = self.config, self.ranks, self._stop
        if config.data.verify and not config.data.synthetic:
            with progress_bars(self.console) as progress:
                verify = partial(require_readable, config.task, self.source, self.target)
                workers = config.data.workers
                ranks.on_rank_zero(stop.interruptible(lambda: verify(workers=workers, progress=progress)))
        ranks.once_per_machine(lambda: fetch_weights(config.model))

        def build() -> Trainer:
            return build_trainer(config, self.source, self.target, ranks, stop)

        # Several ranks talk to each other while they build: none of them must leave.
        trainer = ranks.on_all_ranks(build if ranks.several else stop.interruptible(build))
        lines = ranks.on_all_ranks(lambda: self._start.load_into(trainer))
        self._unreadable.update(self._start.unreadable)
        self.result = ranks.on_rank_zero(self._prepare)
        if self._say_if_finished():
            return None
        ranks.on_rank_zero(lambda: self._begin(trainer))
        self._trainer = trainer
        for line in lines:
            self.console.print(line, soft_wrap=True)
        pair = f"{self.source.name} -> {self.target.name}, {config.run.method}"
        self.console.print(f"{config.task} {pair}: {len(self.source)} + {len(self.target)} images")
        self.console.print(_processes_line(config, trainer), soft_wrap=True)
        self.console.print(_sizes_line(config, trainer), soft_wrap=True)
        if trainer.step == config.run.warmup == 0:
            self._before_checkpoint.append(self._features("warmup"))
        return trainer

    def append(self, report: Report) -> None:
        """Add a line of metrics. One that cannot be written waits for the next, at most until the next checkpoint."""
        if not self.ranks.first:
            return
        try:
            self.folder.append_metrics(report.step, report.values)
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warn(f"{self.folder.metrics_path}: {_reason(error)}; trying again with the next line")
            self._warned = True

    def checkpoint_if_due(self) -> None:
        """Save a checkpoint if it is time to or the run is done; a failure is reported, and training goes on.

        Raises:
            TrainingError: a number was not finite; or the third failure in a row.
        """
        if self._trainer.step == self.config.run.warmup:
            self._before_checkpoint.append(self._features("warmup"))
        # One clock for all ranks.
        due_at = self._tried_at + self.config.run.checkpoint_seconds
        due = self.ranks.on_rank_zero(lambda: time.monotonic() >= due_at)
        problem = self._save() if due or self._trainer.finished else ""
        if problem:
            self._warn(f"step {self._trainer.step}: {problem}; training goes on")

    def finish(self) -> RunResult:
        """Write the last files, `result.json` at the very end.

        Raises:
            Stopped: the run was asked to stop and is saved. TrainingError: it cannot be saved.
        """
        trainer = self._trainer
        if not trainer.finished:
            trainer.loader.close()
            problem = self._save()
            if problem:
                raise TrainingError(
                    f"stopped after step {trainer.step}, but {problem}; the same command goes on from there"
                )
            done = f"stopped after step {trainer.step} of {trainer.schedule.steps}"
            raise self._stopped(f"{done}, saved in {self.folder.path}")
        final = self._features("final")
        result = self._result()
        if self._unreadable:
            self._warn(_unreadable_line(self._unreadable))
        self.ranks.on_rank_zero(lambda: self._write_last([*self._before_checkpoint, final], result))
        trainer.loader.close()
        self.console.print(f"{self.folder.path}: {_accuracy_line(result)} in {result.seconds:.0f} s", soft_wrap=True)
        return result

    def _earlier_result(self) -> RunResult | None:
        """Return the result of the same run, if it has finished; if not, hold its folder, if there is one, from now on.

        Raises:
            UsageError: the folder holds a run with other settings, or another process writes into it.
        """
        result = None if self.config.run.resume == "never" else self._result_of_same_settings()
        if result is None and self.folder.path.is_dir():
            self.folder.hold()
        return result

    def _prepare(self) -> RunResult | None:
        self.folder.prepare()
        return self._earlier_result()

    def _say_if_finished(self) -> bool:
        if self.result is None:
            return False
        line = f"{self.folder.path}: finished already, {_accuracy_line(self.result)}; remove the folder to run it again"
        self.console.print(line, soft_wrap=True)
        return True

    def _result_of_same_settings(self) -> RunResult | None:
        config = self.config
        if not self.folder.config_path.is_file():
            return self.folder.read_result()
        stored, asked = flat_settings(self.folder.read_config()), flat_settings(config.to_dict())
        # A setting that the file lacks is younger than the run, which had its default, or what was done before it.
        # No file of a run lacks the task.
        added = [name for name in asked if name not in stored and name.count(".") == 1]
        defaults = config.with_defaults(added)
        default = flat_settings(with_choices(defaults, self.source, self.target, self.ranks.world_size).to_dict())
        changed = self.folder.changed_settings(config.to_dict(), {name: default[name] for name in added})
        differing = {name: pair for name, pair in changed.items() if name not in FREE_TO_CHANGE}
        if set(differing.get("run.resume", ())) <= {"auto", "never"}:
            differing.pop("run.resume", None)
        if "data.data_root" in differing and self._has_same_images():
            del differing["data.data_root"]
        if differing:
            names = ", ".join(
                f"{name} = {old} there and {new if name in asked else 'unknown'} here"
                for name, (old, new) in differing.items()
            )
            raise UsageError(
                "--output",
                found=f"{self.folder.path} with other settings ({names})",
                expected="a new folder, or one of a run with the same settings",
                remedy="give another --output, or --resume never to start the folder afresh",
            )
        return self.folder.read_result()

    def _has_same_images(self) -> bool:
        """Return whether the newest checkpoint is of the same images: data may lie at another place for every job."""
        state, _ = self._checkpoints.load_newest()
        domains = ("--source", "--target")
        return state is not None and all(state["identity"].get(each) == self._identity[each] for each in domains)

    def _begin(self, trainer: Trainer) -> None:
        """Bring the folder to where the trainer is."""
        with self._writing():
            if self.config.run.resume == "never" and self.folder.begun:
                self._checkpoints.clear()
                self.folder.clear()
            self._checkpoints.tidy(self._start.own_step)
            self.folder.truncate_metrics(trainer.step)
            self.folder.write_config(self.config.to_dict())
            self.folder.write_environment(_device_name(trainer.device))

    def _save(self) -> str:
        """Save the trainer's state, on all ranks. Return what went wrong, "" if nothing did."""
        trainer = self._trainer
        state = {**trainer.state_dict(), "identity": self._identity, "versions": versions()}
        state["unreadable_files"] = self._note_unreadable()
        problem = self.ranks.on_rank_zero(lambda: self._write_checkpoint(trainer.step, state))
        self._tried_at = time.monotonic()
        if not problem:
            self._failures = 0
            self._before_checkpoint.clear()
            return ""
        self._failures += 1
        if self._failures == _MOST_FAILURES:
            error = TrainingError(
                f"step {trainer.step}: {problem}, for the third time in a row; free some space, "
                "then the same command goes on from there"
            )
            error.reported_elsewhere = not self.ranks.first
            raise error
        return problem

    def _write_checkpoint(self, step: int, state: dict[str, Any]) -> str:
        try:
            for write in self._before_checkpoint:
                write()
            self.folder.sync_metrics()
            self._checkpoints.save(step, state)
        except OSError as error:
            steps = self._checkpoints.steps()
            kept = f"the checkpoint of step {steps[-1]} stays the last one" if steps else "there is none before it"
            return f"no checkpoint could be written to {self._checkpoints.path} ({_reason(error)}), {kept}"
        return ""

    def _write_last(self, writes: list[Callable[[], None]], result: RunResult) -> None:
        assert self._trainer.probabilities is not None
        with self._writing():
            for write in writes:
                write()
            self.folder.sync_metrics()
            self.folder.write_predictions(self.target.labels, self._trainer.probabilities.numpy())
            self.folder.write_result(result)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{error.filename or self.folder.path} cannot be written ({_reason(error)}); free some space, then the "
                "same command goes on from the last checkpoint"
            ) from error

    def _features(self, moment: Literal["warmup", "final"]) -> Callable[[], None]:
        """Compute the features of some samples, on all ranks. Return the call that writes them, for the first."""
        trainer, domains = self._trainer, (self.source, self.target)
        source, target = (_spread(len(domain), FEATURE_SAMPLES) for domain in domains)
        features = trainer.features("source", source), trainer.features("target", target)
        labels = {"source_labels": self.source.labels[source], "target_labels": self.target.labels[target]}
        return lambda: self.folder.write_features(moment, *features, **labels)

    def _result(self) -> RunResult:
        trainer, run = self._trainer, self.config.run
        if trainer.probabilities is None:
            trainer.probabilities = trainer.predict("target", trainer.test_crops)
        evaluation = evaluation_metrics(torch.from_numpy(self.target.labels), trainer.probabilities)
        unreadable = self._note_unreadable()
        return RunResult(
            task=self.config.task,
            source=self.source.name,
            target=self.target.name,
            method=run.method,
            seed=run.seed,
            steps=trainer.step,
            accuracy=trainer.history.accuracy,
            mean_per_class=trainer.history.mean_per_class,
            label_free_by=trainer.history.label_free_by,
            per_class=evaluation.per_class,
            classes=self.target.classes,
            images_per_second=trainer.images_seen / trainer.training_seconds if trainer.training_seconds else None,
            seconds=trainer.seconds,
            test_crops=trainer.test_crops,
            unreadable_files=len(unreadable),
        )

    def _note_unreadable(self) -> dict[str, str]:
        """Gather what failed on any rank so far. Return what is wrong with each file, by its name below its domain."""
        here = {self._name_of(path): problem for path, problem in self._trainer.loader.failed}
        for of_rank in self.ranks.gather_objects(here):
            self._unreadable.update(of_rank)
        return dict(sorted(self._unreadable.items()))

    def _name_of(self, path: str) -> str:
        """Return the name of a file wherever the data lies: it may be at another place after an interruption."""
        for domain in (self.source, self.target):
            name = path.removeprefix(f"{domain.root}/")
            if name != path:
                return f"{domain.name}: {name}"
        return path

    def _stopped(self, what: str) -> Stopped:
        stopped = Stopped(f"{what}; the same command goes on from there")
        stopped.reported_elsewhere = not self.ranks.first
        return stopped

    def _warn(self, line: str) -> None:
        self.console.print(f"warning: {line}", style="yellow", soft_wrap=True)


def _spread(count: int, at_most: int) -> np.ndarray:
    """Return at most `at_most` numbers below `count`, evenly spread: files are sorted by class, so all classes take
    part.
    """
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


def _sizes_line(config: Config, trainer: Trainer) -> str:
    """Return how large the network and the method's own modules are, and a checkpoint with the optimizers' buffers.

    Of what is divided over processes the whole counts, as in a checkpoint; this process's share stands beside it.
    """
    method, whole_numel = trainer.method, trainer.whole_numel
    of_network = {id(each) for each in method.model.parameters()}
    network = sum(each.numel() for each in method.model.parameters())
    own = [each for each in method.parameters() if id(each) not in of_network]
    whole, share = (sum(count(each) * each.element_size() for each in own) for count in (whole_numel, Tensor.numel))
    buffers = 2 if config.optimizer.optimizer == "adam" else 1
    groups = [group for optimizer in trainer.optimizers.values() for group in optimizer.param_groups]
    stored = sum(each.numel() * each.element_size() for each in method.state_dict().values()) + whole - share
    stored += buffers * sum(whole_numel(each) * each.element_size() for group in groups for each in group["params"])
    divided = f", {share / 2**20:.1f} MiB of it in this process" if share < whole else ""
    # With many classes the discriminators are what fills memory and disk.
    smaller = config.method.size_option if sum(map(whole_numel, own)) > network else None
    return (
        f"network {network / 1e6:.2f} M parameters, "
        f"{config.run.method} {sum(map(whole_numel, own)) / 1e6:.2f} M beside it ({whole / 2**20:.1f} MiB{divided}); "
        f"a checkpoint takes about {stored / 2**20:.1f} MiB{f', less with a smaller {smaller}' if smaller else ''}"
    )


def _processes_line(config: Config, trainer: Trainer) -> str:
    """Return what the number of processes makes of batch size and learning rate."""
    count, batch = trainer.ranks.world_size, config.run.batch_size
    rate = max(group["initial_lr"] for each in trainer.optimizers.values() for group in each.param_groups)
    scaled = "scaled by their number" if config.distributed.scale_learning_rate else "not scaled by their number"
    return (
        f"{count} process{'es' if count > 1 else ''} on {config.run.device}, {count * batch} + {count * batch} images "
        f"a step, learning rate {rate:g} ({scaled}), {config.precision.precision}, "
        f"{'compiled' if config.precision.compile == 'on' else 'not compiled'}"
    )


def _accuracy_line(result: RunResult) -> str:
    accuracy = result.accuracy
    if accuracy.last is None:
        return "no accuracy (the target has no labels)"
    # A model that diverged before its first evaluation has no mutual information to choose by.
    label_free = "none" if accuracy.label_free is None else f"{accuracy.label_free:.2f} %"
    return (
        f"accuracy {accuracy.last:.2f} % after the last step, {label_free} chosen without labels, "
        f"{accuracy.best:.2f} % at best on the target (an upper bound)"
    )


def _unreadable_line(files: dict[str, str]) -> str:
    shown = "; ".join(f"{name} ({problem})" for name, problem in list(files.items())[:_SHOWN])
    more = f"; and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"{len(files)} files could not be read, and others took their places: {shown}{more}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _reason(error: OSError) -> str:
    """Return why a file could not be written, in a few words."""
    return error.strerror or str(error)
