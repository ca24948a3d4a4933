"""`python -m gsda_fast.train TASK [options]`: train a method on a transfer task, into a run folder."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from gsda_fast.commands import plain_console, run_command, told_by_first_process
from gsda_fast.config import Config, parse_config
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.verify import progress_bars, require_readable
from gsda_fast.errors import Stopped, TrainingError, UsageError
from gsda_fast.model import fetch_weights
from gsda_fast.results.metrics import evaluation_figures
from gsda_fast.results.run_folder import FREE_TO_CHANGE, RunFolder, RunResult, flat_settings
from gsda_fast.training.assemble import build_trainer, choose_device, resolve, with_choices
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.distributed import Ranks, join
from gsda_fast.training.resume import Start, find_start, run_identity, versions
from gsda_fast.training.saver import Saver, reason
from gsda_fast.training.stopping import StopRequest
from gsda_fast.training.trainer import Report, Trainer

FEATURE_SAMPLES = 2000
"""Samples of each domain whose features are kept for plots."""

_BEFORE_PROFILE = 5
"""Steps before a trace: compilation, the choice of algorithms and the first allocations belong to no trace."""


def train(config: Config, console: Console) -> RunResult:
    """Trains as `config` says, or goes on with an interrupted run, and returns what `result.json` holds.

    Under torchrun every process calls this, all of them return the result, and the first one writes and speaks.

    Raises:
        UsageError: settings, data or a folder that do not fit; nothing has been written then.
        TrainingError: numbers that are not finite, a process that was lost, or a disk that cannot be written.
        Stopped: SIGTERM or SIGINT asked for it (in the main thread); the same call goes on.
    """
    with join(choose_device(config), config.distributed.timeout) as ranks, StopRequest().listening() as stop:
        own_console = console if ranks.first else Console(quiet=True)
        resolved, source, target = ranks.together(lambda: resolve(config, ranks.world_size))
        folder = RunFolder(resolved.run.output or "")
        try:
            return _train(resolved, source, target, folder, own_console, ranks, stop)
        except Stopped as stopped:
            if stopped.args:
                raise
            raise _stopped("stopped before a step was taken", ranks) from None
        finally:
            folder.release()


def _train(
    config: Config,
    source: ImageDomain,
    target: ImageDomain,
    folder: RunFolder,
    console: Console,
    ranks: Ranks,
    stop: StopRequest,
) -> RunResult:
    identity = run_identity(config, source, target, ranks.world_size)
    trainer = _set_up(config, source, target, folder, identity, console, ranks, stop)
    if isinstance(trainer, RunResult):
        told = f"{folder.path}: finished already, {_accuracy_line(trainer)}; remove the folder to run it again"
        console.print(told, soft_wrap=True)
        return trainer
    console.print(
        f"{config.task} {source.name} -> {target.name}, {config.run.method}: {len(source)} + {len(target)} images"
    )
    console.print(_processes_line(config, trainer), soft_wrap=True)
    constants, seconds = {"identity": identity, "versions": versions()}, config.run.checkpoint_seconds
    saver = Saver(folder, CheckpointFolder(folder.checkpoints), trainer, constants, console, seconds)

    if trainer.step == config.run.warmup == 0:
        saver.also(_features(folder, "warmup", trainer, source, target))

    def on_scored() -> None:
        if trainer.step == config.run.warmup:
            saver.also(_features(folder, "warmup", trainer, source, target))
        saver.save_if_due()

    with (
        _board(folder, trainer) as board,
        _progress(console, trainer) as show,
        _profile(config, folder, trainer, console),
    ):
        for report in trainer.run(on_scored):
            if ranks.first:
                saver.append(report)
                board(report)
            show(report)

    if not trainer.finished:
        trainer.loader.close()
        unsaved = saver.save()
        if unsaved:
            raise TrainingError(
                f"stopped after step {trainer.step}, but {unsaved}; the same command goes on from there"
            )
        left = f"stopped after step {trainer.step} of {config.run.steps}, saved in {folder.path}"
        raise _stopped(left, ranks)
    final = _features(folder, "final", trainer, source, target)
    result = _result(config, trainer, source, target)
    ranks.from_first(lambda: _finish(folder, [*saver.due, final], target, trainer, result))
    trainer.loader.close()
    console.print(f"{folder.path}: {_accuracy_line(result)} in {result.seconds:.0f} s", soft_wrap=True)
    return result


def _set_up(
    config: Config,
    source: ImageDomain,
    target: ImageDomain,
    folder: RunFolder,
    identity: dict[str, Any],
    console: Console,
    ranks: Ranks,
    stop: StopRequest,
) -> Trainer | RunResult:
    """The trainer at the step where the run begins or goes on, its folder brought there; the result of a finished run.

    Nothing is written before everything has been checked.
    """
    choose = partial(with_choices, source=source, target=target, world_size=ranks.world_size)
    finished = ranks.from_first(lambda: _earlier_result(folder, config, choose))
    if finished is not None:
        return finished
    # Read by one process and handed to the others, which may not see its disk.
    start = ranks.from_first(lambda: find_start(config, folder, identity))
    for line in start.warnings:
        console.print(f"warning: {line}; passed over", style="yellow", soft_wrap=True)

    if config.data.verify and not config.data.synthetic:
        with progress_bars(console) as progress:
            workers = config.data.workers
            ranks.from_first(
                stop.interruptible(
                    lambda: require_readable(config.task, source, target, workers=workers, progress=progress)
                )
            )

    ranks.one_after_another(lambda: fetch_weights(config.model))

    def build() -> Trainer:
        return build_trainer(config, source, target, ranks, stop)

    # Several ranks talk to each other while they build: none of them must leave.
    trainer = ranks.together(build if ranks.several else stop.interruptible(build))
    told = ranks.together(lambda: start.load_into(trainer))
    finished = ranks.from_first(lambda: _prepare(folder, config, choose))
    if finished is not None:
        return finished
    ranks.from_first(lambda: _begin(config, folder, start, trainer))
    for line in told:
        console.print(line, soft_wrap=True)
    return trainer


def _stopped(told: str, ranks: Ranks) -> Stopped:
    stopped = Stopped(f"{told}; the same command goes on from there")
    stopped.told = not ranks.first
    return stopped


def _processes_line(config: Config, trainer: Trainer) -> str:
    """What the number of processes makes of batch size and learning rate."""
    count, batch = trainer.ranks.world_size, config.run.batch_size
    rate = max(group["initial_lr"] for each in trainer.optimizers.values() for group in each.param_groups)
    scaled = "scaled by their number" if config.distributed.scale_learning_rate else "not scaled by their number"
    return (
        f"{count} process{'es' if count > 1 else ''} on {config.run.device}, {count * batch} + {count * batch} images "
        f"a step, learning rate {rate:g} ({scaled}), {config.precision.precision}, "
        f"{'compiled' if config.precision.compile == 'on' else 'not compiled'}"
    )


@contextmanager
def _board(folder: RunFolder, trainer: Trainer) -> Iterator[Callable[[Report], None]]:
    """TensorBoard's files, on the rank that writes. They are for looking at: a full disk ends them, not the run."""
    if not trainer.ranks.first:
        yield lambda report: None
        return
    board: SummaryWriter | None = None
    with contextlib.suppress(OSError):
        board = SummaryWriter(str(folder.tensorboard), purge_step=trainer.step)

    def add(report: Report) -> None:
        nonlocal board
        if board is None:
            return
        try:
            for name, value in {**report.values, "peak_memory": report.peak_memory}.items():
                if value is not None:
                    board.add_scalar(name, value, report.step)
        except OSError:
            board = None

    try:
        yield add
    finally:
        if board is not None:
            with contextlib.suppress(OSError):
                board.close()


@contextmanager
def _profile(config: Config, folder: RunFolder, trainer: Trainer, console: Console) -> Iterator[None]:
    """Traces `--profile` steps of the first rank, after some that warm up; fewer where the run ends before."""
    if not config.run.profile or not trainer.ranks.first:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    left = trainer.schedule.steps - trainer.step
    wait = max(0, min(_BEFORE_PROFILE, left - 1 - config.run.profile))

    def written(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(folder.trace_path))
        console.print(f"trace of the steps up to {trainer.step}: {folder.trace_path}", soft_wrap=True)

    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=wait, warmup=1, active=config.run.profile, repeat=1),
        on_trace_ready=written,
        acc_events=True,
    ) as trainer.profiler:
        yield


def _earlier_result(folder: RunFolder, config: Config, choose: Callable[[Config], Config]) -> RunResult | None:
    """The result of the same run, if it has finished already; if not, and there is a folder, it is held from now on.

    Raises:
        UsageError: the folder holds a run with other settings, or another process writes into it.
    """
    result = None if config.run.resume == "never" else _result_of_same_settings(folder, config, choose)
    if result is None and folder.path.is_dir():
        folder.hold()
    return result


def _prepare(folder: RunFolder, config: Config, choose: Callable[[Config], Config]) -> RunResult | None:
    """Makes the folder and holds it. The result, if another process has made the folder and finished the run since."""
    folder.prepare()
    return _earlier_result(folder, config, choose)


def _result_of_same_settings(folder: RunFolder, config: Config, choose: Callable[[Config], Config]) -> RunResult | None:
    if not folder.config_path.is_file():
        return folder.read_result()
    stored, asked = flat_settings(folder.read_config()), flat_settings(config.to_dict())
    # A setting that the file lacks is younger than the run, which had its default. No file of a run lacks the task.
    added = [name for name in asked if name not in stored and name != "task"]
    default = flat_settings(choose(config.with_defaults(added)).to_dict())
    changed = folder.changed_settings(config.to_dict(), {name: default[name] for name in added})
    differing = {name: pair for name, pair in changed.items() if name not in FREE_TO_CHANGE}
    if set(differing.get("run.resume", ())) <= {"auto", "never"}:
        differing.pop("run.resume", None)
    if differing:
        told = ", ".join(
            f"{name} = {old} there and {new if name in asked else 'unknown'} here"
            for name, (old, new) in differing.items()
        )
        raise UsageError(
            "--output",
            found=f"{folder.path} with other settings ({told})",
            expected="a new folder, or one of a run with the same settings",
            remedy="give another --output, or --resume never to start the folder afresh",
        )
    return folder.read_result()


def _begin(config: Config, folder: RunFolder, start: Start, trainer: Trainer) -> None:
    """Brings the folder to where the trainer is.

    Raises:
        TrainingError: it cannot be written.
    """
    with _written(folder):
        if config.run.resume == "never" and folder.begun:
            CheckpointFolder(folder.checkpoints).clear()
            folder.clear()
        CheckpointFolder(folder.checkpoints).tidy(start.own_step)
        folder.truncate_metrics(trainer.step)
        folder.write_config(config.to_dict())
        folder.write_environment(_device_name(trainer.device))


def _finish(
    folder: RunFolder, due: list[Callable[[], None]], target: ImageDomain, trainer: Trainer, result: RunResult
) -> None:
    """Writes the last files, `result.json` at the very end.

    Raises:
        TrainingError: they cannot be written.
    """
    assert trainer.probabilities is not None
    with _written(folder):
        for write in due:
            write()
        folder.sync_metrics()
        folder.write_predictions(target.labels, trainer.probabilities.numpy())
        folder.write_result(result)


@contextmanager
def _written(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{error.filename or folder.path} cannot be written ({reason(error)}); free some space, then the same "
            "command goes on from the last checkpoint"
        ) from error


def _features(
    folder: RunFolder, moment: Literal["warmup", "final"], trainer: Trainer, source: ImageDomain, target: ImageDomain
) -> Callable[[], None]:
    """Computes the features of some samples, on all ranks; the call that writes them, for the first."""
    chosen = [_spread(len(domain), FEATURE_SAMPLES) for domain in (source, target)]
    features = trainer.features("source", chosen[0]), trainer.features("target", chosen[1])
    labels = source.labels[chosen[0]], target.labels[chosen[1]]
    return lambda: folder.write_features(moment, *features, source_labels=labels[0], target_labels=labels[1])


def _spread(count: int, at_most: int) -> np.ndarray:
    """At most `at_most` numbers below `count`, evenly spread: files are sorted by class, so all classes take part."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


def _result(config: Config, trainer: Trainer, source: ImageDomain, target: ImageDomain) -> RunResult:
    if trainer.probabilities is None:
        trainer.probabilities = trainer.predict("target", trainer.test_crops)
    figures = evaluation_figures(torch.from_numpy(target.labels), trainer.probabilities)
    return RunResult(
        task=config.task,
        source=source.name,
        target=target.name,
        method=config.run.method,
        seed=config.run.seed,
        steps=trainer.step,
        accuracy=trainer.history.accuracy,
        mean_per_class=trainer.history.mean_per_class,
        per_class=figures.per_class,
        classes=target.classes,
        images_per_second=trainer.images_seen / trainer.training_seconds if trainer.training_seconds else None,
        seconds=trainer.seconds,
        test_crops=trainer.test_crops,
    )


@contextmanager
def _progress(console: Console, trainer: Trainer) -> Iterator[Callable[[Report], None]]:
    """A console line for each report, and below them a progress bar where there is a terminal."""
    done = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]} images/s"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*done, *times, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=trainer.schedule.steps, completed=trainer.step, rate="-")

        def show(report: Report) -> None:
            progress.update(bar, completed=report.step, rate=f"{report.values['images_per_second']:.0f}")
            console.print(_report_line(report), highlight=False, soft_wrap=True)

        yield show


def _report_line(report: Report) -> str:
    shown = ("classification", "entropy", "adversarial_domain", "synchronization", "images_per_second", "accuracy")
    names = {"adversarial_domain": "domain", "images_per_second": "images/s"}
    parts = [f"step {report.step:>6}"]
    for name in shown:
        value = report.values.get(name)
        if value is not None:
            parts.append(f"{names.get(name, name)} {value:.4g}" if name != "accuracy" else f"accuracy {value:.2f} %")
    shares = {name: report.values.get(f"{name}_share") for name in ("matrix", "bandwidth")}
    parts += [f"{name} {share:.0%} of its peak" for name, share in shares.items() if share is not None]
    parts += [f"data wait {report.values['data_wait']:.0%}", f"memory {report.peak_memory / 2**30:.2f} GiB"]
    return "  ".join(parts)


def _accuracy_line(result: RunResult) -> str:
    accuracy = result.accuracy
    if accuracy.last is None:
        return "no accuracy (the target has no labels)"
    # A model that diverged before its first scoring has no mutual information to choose by.
    label_free = "none" if accuracy.label_free is None else f"{accuracy.label_free:.2f} %"
    return (
        f"accuracy {accuracy.last:.2f} % after the last step, {label_free} chosen without labels, "
        f"{accuracy.best:.2f} % at best on the target (an upper bound)"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    with told_by_first_process():
        config = parse_config(sys.argv[1:], "python -m gsda_fast.train")
    train(config, plain_console())


if __name__ == "__main__":
    run_command(main)
