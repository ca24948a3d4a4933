"""What a run puts on the disk on its way: checkpoints, and before each of them what must be there by then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from gsda_fast.errors import TrainingError
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.trainer import Report, Trainer

_MOST_FAILURES = 3
"""Failures to write a checkpoint, in a row, that end the run."""


class Saver:
    """Saves what a resumed run does not make again, in an order that a kill cannot upset, and bears with a full disk.

    Args:
        constants: what each checkpoint holds beside the trainer's state.
        seconds: least time from one checkpoint to the next, or from the start to the first.

    Attributes:
        due: calls that write files which have to be there before the next checkpoint.
    """

    def __init__(
        self,
        folder: RunFolder,
        checkpoints: CheckpointFolder,
        trainer: Trainer,
        constants: dict[str, Any],
        console: Console,
        seconds: float = 0,
    ) -> None:
        self._folder, self._checkpoints, self._trainer = folder, checkpoints, trainer
        self._constants, self._console = constants, console
        self._seconds, self._tried_at = seconds, time.monotonic()
        self.due: list[Callable[[], None]] = []
        self._failures, self._warned = 0, False

    def also(self, write: Callable[[], None]) -> None:
        """Lets `write` come before the next checkpoint, on the first rank."""
        self.due.append(write)

    def append(self, report: Report) -> None:
        """Adds a line of metrics. One that cannot be written waits for the next, at most until the next checkpoint."""
        try:
            self._folder.append_metrics(report.step, report.values)
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warn(f"{self._folder.metrics_path}: {reason(error)}; trying again with the next line")
            self._warned = True

    def save(self) -> str:
        """Saves the trainer's state; on all ranks. Returns what went wrong, empty if nothing did.

        Raises:
            TrainingError: for the third time in a row.
        """
        step, state = self._trainer.step, {**self._trainer.state_dict(), **self._constants}
        problem = self._trainer.ranks.from_first(lambda: self._write(step, state))
        self._tried_at = time.monotonic()
        if not problem:
            self._failures = 0
            self.due.clear()
            return ""
        self._failures += 1
        if self._failures == _MOST_FAILURES:
            error = TrainingError(
                f"step {step}: {problem}, for the third time in a row; free some space, "
                "then the same command goes on from there"
            )
            error.told = not self._trainer.ranks.first
            raise error
        return problem

    def save_if_due(self) -> None:
        """Saves, if it is time to or the run is done; a failure is told and borne with.

        Raises:
            TrainingError: see `save`.
        """
        # One clock for all ranks.
        due = self._trainer.ranks.from_first(lambda: time.monotonic() >= self._tried_at + self._seconds)
        problem = self.save() if due or self._trainer.finished else ""
        if problem:
            self._warn(f"step {self._trainer.step}: {problem}; training goes on")

    def _write(self, step: int, state: dict[str, Any]) -> str:
        try:
            for write in self.due:
                write()
            self._folder.sync_metrics()
            self._checkpoints.save(step, state)
        except OSError as error:
            steps = self._checkpoints.steps()
            kept = f"the checkpoint of step {steps[-1]} stays the last one" if steps else "there is none before it"
            return f"no checkpoint could be written to {self._checkpoints.path} ({reason(error)}), {kept}"
        return ""

    def _warn(self, line: str) -> None:
        self._console.print(f"warning: {line}", style="yellow", soft_wrap=True)


def reason(error: OSError) -> str:
    """Why a file could not be written, in a few words."""
    return error.strerror or str(error)
