"""`python -m gsda_fast.train TASK [options]`: train a method on a transfer task, into a run folder."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from gsda_fast.commands import run_command, told_by_first_process
from gsda_fast.config import Config, parse_config
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.verify import progress_bars, require_readable
from gsda_fast.errors import UsageError
from gsda_fast.model import fetch_weights
from gsda_fast.results.metrics import evaluation_figures
from gsda_fast.results.run_folder import RunFolder, RunResult
from gsda_fast.training.assemble import build_trainer, choose_device, resolve
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.distributed import Ranks, join
from gsda_fast.training.trainer import Report, Trainer

_FREE_TO_CHANGE = ("run.output", "run.resume", "data.verify")
"""Settings that have no influence on the figures of a run."""

FEATURE_SAMPLES = 2000
"""Samples of each domain whose features are kept for plots."""

_BEFORE_PROFILE = 5
"""Steps before a trace: compilation, the choice of algorithms and the first allocations belong to no trace."""


def train(config: Config, console: Console) -> RunResult:
    """Trains as `config` says, or goes on with an interrupted run, and returns what `result.json` holds.

    Under torchrun every process calls this, all of them return the result, and the first one writes and speaks.

    Raises:
        UsageError: settings, data or a folder that do not fit; nothing has been written then.
        TrainingError: numbers that are not finite, or a process that was lost.
    """
    with join(choose_device(config), config.distributed.timeout) as ranks:
        return _train(config, console if ranks.first else Console(quiet=True), ranks)


def _train(config: Config, console: Console, ranks: Ranks) -> RunResult:
    asked = config
    config, source, target = ranks.together(lambda: resolve(asked, ranks.world_size))
    folder = RunFolder(config.run.output or "")
    finished = ranks.from_first(lambda: _earlier_result(folder, config))
    if finished is not None:
        console.print(
            f"{folder.path}: finished already, {_accuracy_line(finished)}; remove the folder to run it again",
            soft_wrap=True,
        )
        return finished

    if config.data.verify and not config.data.synthetic:
        with progress_bars(console) as progress:
            ranks.from_first(
                lambda: require_readable(config.task, source, target, workers=config.data.workers, progress=progress)
            )
    ranks.one_after_another(lambda: fetch_weights(config.model))
    trainer = ranks.together(lambda: build_trainer(config, source, target, ranks))
    ranks.from_first(folder.prepare)
    checkpoints = CheckpointFolder(folder.checkpoints)
    _resume(config, folder, checkpoints, trainer, console)
    if ranks.first:
        folder.write_config(config.to_dict())
        folder.write_environment(_device_name(trainer.device))
    console.print(
        f"{config.task} {source.name} -> {target.name}, {config.run.method}: {len(source)} + {len(target)} images"
    )
    console.print(_processes_line(config, trainer), soft_wrap=True)

    if trainer.step == config.run.warmup == 0:
        _write_features(folder, "warmup", trainer, source, target)

    def on_scored() -> None:
        if trainer.step == config.run.warmup:
            _write_features(folder, "warmup", trainer, source, target)
        state = trainer.state_dict()
        if ranks.first:
            checkpoints.save(trainer.step, state)

    with _board(folder, trainer) as board, _progress(console, trainer) as show, _profile(config, folder, trainer):
        for report in trainer.run(on_scored):
            if board is not None:
                folder.append_metrics(report.step, report.values)
                for name, value in {**report.values, "peak_memory": report.peak_memory}.items():
                    if value is not None:
                        board.add_scalar(name, value, report.step)
            show(report)

    _write_features(folder, "final", trainer, source, target)
    result = _write_result(config, folder, trainer, source, target)
    trainer.loader.close()
    console.print(f"{folder.path}: {_accuracy_line(result)} in {result.seconds:.0f} s", soft_wrap=True)
    return result


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
def _board(folder: RunFolder, trainer: Trainer) -> Iterator[SummaryWriter | None]:
    """TensorBoard's files, on the rank that writes."""
    if not trainer.ranks.first:
        yield None
        return
    with SummaryWriter(str(folder.tensorboard), purge_step=trainer.step) as board:
        yield board


@contextmanager
def _profile(config: Config, folder: RunFolder, trainer: Trainer) -> Iterator[None]:
    """Traces `--profile` steps of the first rank, after some that warm up."""
    if not config.run.profile or not trainer.ranks.first:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=_BEFORE_PROFILE, warmup=1, active=config.run.profile, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(folder.trace_path)),
        acc_events=True,
    ) as trainer.profiler:
        yield


def _earlier_result(folder: RunFolder, config: Config) -> RunResult | None:
    """The result of the same run, if it has finished already.

    Raises:
        UsageError: the folder holds a run with other settings.
    """
    if config.run.resume == "never":
        return None
    changed = folder.changed_settings(config.to_dict()) if folder.config_path.is_file() else {}
    differing = {name: pair for name, pair in changed.items() if name not in _FREE_TO_CHANGE}
    if differing:
        told = ", ".join(f"{name} = {old} there and {new} here" for name, (old, new) in differing.items())
        raise UsageError(
            "--output",
            found=f"{folder.path} with other settings ({told})",
            expected="a new folder, or one of a run with the same settings",
            remedy="give another --output, or --resume never to start the folder afresh",
        )
    return folder.read_result()


def _resume(
    config: Config, folder: RunFolder, checkpoints: CheckpointFolder, trainer: Trainer, console: Console
) -> None:
    ranks = trainer.ranks
    if config.run.resume == "never":
        ranks.from_first(folder.clear)
        return
    # Read by one process and handed to the others, which may not see its disk.
    state, damage = ranks.from_first(checkpoints.load_newest)
    for line in damage:
        console.print(f"warning: {line}; going back to the one before it", style="yellow", soft_wrap=True)
    if state is not None:
        trainer.load_state_dict(state)
        console.print(f"resuming after step {trainer.step}")
    if ranks.first:
        folder.truncate_metrics(trainer.step)


def _write_features(
    folder: RunFolder, moment: Literal["warmup", "final"], trainer: Trainer, source: ImageDomain, target: ImageDomain
) -> None:
    chosen = [_spread(len(domain), FEATURE_SAMPLES) for domain in (source, target)]
    features = trainer.features("source", chosen[0]), trainer.features("target", chosen[1])
    if trainer.ranks.first:
        labels = source.labels[chosen[0]], target.labels[chosen[1]]
        folder.write_features(moment, *features, source_labels=labels[0], target_labels=labels[1])


def _spread(count: int, at_most: int) -> np.ndarray:
    """At most `at_most` numbers below `count`, evenly spread: files are sorted by class, so all classes take part."""
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))


def _write_result(
    config: Config, folder: RunFolder, trainer: Trainer, source: ImageDomain, target: ImageDomain
) -> RunResult:
    probabilities = trainer.probabilities if trainer.probabilities is not None else trainer.predict("target")
    result = RunResult(
        task=config.task,
        source=source.name,
        target=target.name,
        method=config.run.method,
        seed=config.run.seed,
        steps=trainer.step,
        accuracy=trainer.history.accuracy,
        mean_per_class=trainer.history.mean_per_class,
        per_class=evaluation_figures(torch.from_numpy(target.labels), probabilities).per_class,
        classes=target.classes,
        images_per_second=trainer.images_seen / trainer.training_seconds if trainer.training_seconds else None,
        seconds=trainer.seconds,
    )
    if trainer.ranks.first:
        folder.write_predictions(target.labels, probabilities.numpy())
        folder.write_result(result)
    return result


@contextmanager
def _progress(console: Console, trainer: Trainer) -> Iterator[Callable[[Report], None]]:
    """A console line for each report, and below them a progress bar where there is a terminal."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]} images/s"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
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
        return "no accuracy, since the target has no labels"
    return (
        f"accuracy {accuracy.last:.2f} % after the last step, {accuracy.label_free:.2f} % chosen without labels, "
        f"{accuracy.best:.2f} % at best on the target (an upper bound)"
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    with told_by_first_process():
        config = parse_config(sys.argv[1:], "python -m gsda_fast.train")
    train(config, Console())


if __name__ == "__main__":
    run_command(main)
