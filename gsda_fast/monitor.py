"""Looking at a run while it trains: console lines, a progress bar, TensorBoard, a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gsda_fast.console import duration
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.trainer import Report, Trainer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_SHORT = 60
"""Seconds: what takes less needs no announcement."""

_SETTLING = 5
"""Steps before a trace or a measurement: compilation, the choice of algorithms and the first allocations."""

_MEASURED = 10
"""Steps from whose time the rest of the run's is foretold."""


class TensorBoard:
    """TensorBoard's files, on the rank that writes. They are for looking at: a full disk ends them, not the run."""

    def __init__(self, folder: RunFolder, trainer: Trainer) -> None:
        self._board: SummaryWriter | None = None
        if trainer.ranks.first:
            from torch.utils.tensorboard import SummaryWriter

            with contextlib.suppress(OSError):
                self._board = SummaryWriter(str(folder.tensorboard), purge_step=trainer.step)

    def add(self, report: Report) -> None:
        """Add the report's metrics."""
        if self._board is None:
            return
        try:
            for name, value in {**report.values, "peak_memory": report.peak_memory}.items():
                if value is not None:
                    self._board.add_scalar(name, value, report.step)
        except OSError:
            self._board = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


class ProgressLines:
    """A console line for each report, and below them a progress bar where there is a terminal.

    Of a run that takes longer than `_SHORT` seconds a line says how long, after its first few steps and after the first
    few that adapt, which cost more than those of the warm-up.
    """

    def __init__(self, console: Console, trainer: Trainer) -> None:
        done = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]} images/s"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._console, self._trainer = console, trainer
        self._first, self._settled_at = trainer.step, 0.0
        self._progress = Progress(*done, *times, console=console, transient=True, disable=not console.is_terminal)
        self._bar = self._progress.add_task("", total=trainer.schedule.steps, completed=trainer.step, rate="-")

    def show(self, report: Report) -> None:
        """Print the report's line and move the bar."""
        self._progress.update(self._bar, completed=report.step, rate=f"{report.values['images_per_second']:.0f}")
        self._console.print(_report_line(report), highlight=False, soft_wrap=True)

    def _measure(self) -> None:
        schedule, step = self._trainer.schedule, self._trainer.step
        done = step - max(self._first, schedule.warmup if step > schedule.warmup else 0)
        if done not in (_SETTLING, _SETTLING + _MEASURED):
            return
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)  # a step has only been launched
        now = self._trainer.seconds
        if done == _SETTLING:
            self._settled_at = now
            return
        expected = (now - self._settled_at) / _MEASURED * (schedule.steps - step)
        if expected >= _SHORT:
            line = f"about {duration(expected)} to go at the rate of the first steps"
            self._console.print(line, highlight=False, soft_wrap=True)

    def __enter__(self) -> ProgressLines:
        self._progress.start()
        self._trainer.on_step.append(self._measure)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


@contextmanager
def profile(steps: int, folder: RunFolder, trainer: Trainer, console: Console) -> Iterator[None]:
    """Trace that many steps of the first rank, after some that warm up; fewer where the run ends before."""
    if not steps or not trainer.ranks.first:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    left = trainer.schedule.steps - trainer.step
    wait = max(0, min(_SETTLING, left - 1 - steps))

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(folder.trace_path))
        console.print(f"trace of the steps up to {trainer.step}: {folder.trace_path}", soft_wrap=True)

    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=wait, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        acc_events=True,
    ) as profiler:
        trainer.on_step.append(profiler.step)
        yield


def _report_line(report: Report) -> str:
    shown = ("classification", "entropy", "adversarial_domain", "synchronization", "images_per_second", "accuracy")
    names = {"adversarial_domain": "domain", "images_per_second": "images/s"}
    parts = [f"step {report.step:>6}"]
    for name in shown:
        value = report.values.get(name)
        if value is not None:
            parts.append(f"{names.get(name, name)} {value:.4g}" if name != "accuracy" else f"accuracy {value:.2f} %")
    shares = {name: report.values.get(key) for name, key in (("matrix", "mfu"), ("bandwidth", "mbu"))}
    parts += [f"{name} {share:.0%} of its peak" for name, share in shares.items() if share is not None]
    parts += [f"data wait {report.values['data_wait']:.0%}", f"memory {report.peak_memory / 2**30:.2f} GiB"]
    return "  ".join(parts)
