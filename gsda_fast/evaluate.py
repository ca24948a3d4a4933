"""`python -m gsda_fast.evaluate RUN`: the accuracy of a run's checkpoint on the target domain."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from gsda_fast.commands import parse_command_line, run_command
from gsda_fast.config import config_from_dict
from gsda_fast.data.batches import Crops
from gsda_fast.errors import UsageError
from gsda_fast.results.metrics import EvaluationFigures, evaluation_figures
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.assemble import build_trainer, resolve
from gsda_fast.training.checkpoint import CheckpointFolder, DamagedCheckpoint


@dataclass(frozen=True)
class EvaluateSettings:
    """What to evaluate."""

    run: tyro.conf.Positional[Path]
    """Folder of a finished or interrupted run."""
    checkpoint: int | None = None
    """Step of the checkpoint; the newest one if not given."""
    test_crops: Crops | None = None
    """Crops of each image over which to average; as many as in the run if not given."""


def evaluate(settings: EvaluateSettings) -> tuple[int, EvaluationFigures, tuple[str, ...]]:
    """Scores the target with a checkpoint of a run.

    Returns:
        The checkpoint's step, the figures, and the names of the classes.

    Raises:
        UsageError: no run, no such checkpoint, or a damaged one.
    """
    folder = RunFolder.existing(settings.run)
    checkpoints = CheckpointFolder(folder.checkpoints)
    steps = checkpoints.steps()
    if not steps:
        raise UsageError(str(settings.run), found="no checkpoint", expected="a run that was scored at least once")
    step = steps[-1] if settings.checkpoint is None else settings.checkpoint
    if step not in steps:
        raise UsageError("--checkpoint", found=str(step), expected=f"one of {', '.join(map(str, steps))}")
    try:
        state = checkpoints.load(step)
    except DamagedCheckpoint as error:
        raise UsageError("--checkpoint", found=str(error), expected="an undamaged file") from error
    stored = config_from_dict(folder.read_config(), str(folder.config_path))
    crops = settings.test_crops or stored.data.test_crops
    config, source, target = resolve(replace(stored, data=replace(stored.data, test_crops=crops)))
    trainer = build_trainer(config, source, target)
    trainer.load_state_dict(state)
    probabilities = trainer.predict("target", trainer.test_crops)
    figures = evaluation_figures(torch.from_numpy(target.labels), probabilities)
    trainer.loader.close()
    return step, figures, target.classes


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def main() -> None:
    settings = parse_command_line(
        lambda: tyro.cli(EvaluateSettings, args=sys.argv[1:], prog="python -m gsda_fast.evaluate")
    )
    step, figures, classes = evaluate(settings)
    crops = settings.test_crops or RunFolder(settings.run).setting("test_crops")
    console = Console()
    told = f"{settings.run}, after step {step}{', ten-crop test' if crops == 10 else ''}"
    console.print(told, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("target")
    table.add_column("accuracy", justify="right")
    table.add_row("overall", _figure(figures.accuracy))
    table.add_row("mean per class", _figure(figures.mean_per_class), end_section=True)
    for name, accuracy in zip(classes, figures.per_class):
        table.add_row(name, _figure(accuracy))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
