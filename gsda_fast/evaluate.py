"""`python -m gsda_fast.evaluate RUN`: the accuracy of a run's checkpoint on the target domain."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from gsda_fast.commands import UNSAID, parse_command_line, program, run_command
from gsda_fast.console import FilesDone, plain_console, progress_bars
from gsda_fast.data.benchmarks import Crops
from gsda_fast.data.domains import ImageDomain
from gsda_fast.errors import UsageError, UsageWarning
from gsda_fast.options import EvaluationOptions
from gsda_fast.results.run_folder import RunFolder

if TYPE_CHECKING:
    from gsda_fast.results.metrics import EvaluationMetrics


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(EvaluationOptions):
    """Print the accuracy of a run's checkpoint on its target, over all samples, by class, and the mean of these."""

    test_crops: Annotated[Crops | None, UNSAID] = None
    """Crops of each image over which to average; as many as in the run if not given."""
    data_root: Annotated[Path | None, UNSAID] = None
    """Folder of the data set or of a pack; that of the run if not given."""


def evaluate(
    settings: EvaluateSettings, progress: FilesDone | None = None
) -> tuple[int, EvaluationMetrics, tuple[str, ...]]:
    """Score the target with a checkpoint of a run.

    Args:
        settings: which checkpoint, and how. progress: called after each batch.

    Returns:
        The checkpoint's step, the metrics, and the names of the classes.

    Raises:
        UsageError: no run, no such checkpoint, a damaged one, or data with other classes than the run's.

    Warns:
        FileWarning: of each file that cannot be read. UsageWarning: how many they are.
    """
    # Here, so that --help need not wait for PyTorch.
    import torch

    from gsda_fast.assemble import build_trainer, resolve
    from gsda_fast.data.substitutes import MEAN_COLOUR
    from gsda_fast.results.metrics import evaluation_metrics
    from gsda_fast.trained import for_evaluation, load_parameters, read_checkpoint, read_settings

    folder = RunFolder.existing(settings.run)
    step, state = read_checkpoint(folder, settings.checkpoint)
    config = for_evaluation(read_settings(folder), settings.device)
    root, crops = settings.data_root or config.data.data_root, settings.test_crops or config.data.test_crops
    config, source, target = resolve(replace(config, data=replace(config.data, data_root=root, test_crops=crops)))
    _require_classes(source, state["classes"], folder)
    trainer = build_trainer(config, source, target)
    load_parameters(trainer.method, state["method"], f"{folder.path}, step {step}")
    probabilities = trainer.predict("target", trainer.test_crops, progress=progress)
    metrics = evaluation_metrics(torch.from_numpy(target.labels), probabilities)
    if trainer.loader.failed:
        # Each of them was named when it failed.
        count = f"{len(trainer.loader.failed)} of {len(target)} files could not be read"
        warnings.warn(f"{count}; each was evaluated as {MEAN_COLOUR}", UsageWarning, stacklevel=2)
    trainer.loader.close()
    return step, metrics, target.classes


def _require_classes(source: ImageDomain, of_run: list[str], folder: RunFolder) -> None:
    """Require that labels mean what the network has learnt.

    As many classes under other names would give wrong metrics.
    """
    from gsda_fast.resume import first_difference

    classes = list(source.classes)
    if classes != of_run:
        found, expected = first_difference(classes, of_run)
        raise UsageError(
            "classes",
            found=f"{found} in {source.root}",
            expected=f"{expected}, as in {folder.path}",
            remedy="give the data of the run as --data-root",
        )


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def main() -> None:
    settings = parse_command_line(lambda: tyro.cli(EvaluateSettings, args=sys.argv[1:], prog=program("evaluate")))
    console = plain_console()
    with progress_bars(console) as progress:
        step, metrics, classes = evaluate(settings, progress)
    crops = settings.test_crops or RunFolder(settings.run).setting("test_crops")
    message = f"{settings.run}, after step {step}{', ten-crop test' if crops == 10 else ''}"
    console.print(message, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("target")
    table.add_column("accuracy", justify="right")
    table.add_row("overall", _metric(metrics.accuracy))
    table.add_row("mean per class", _metric(metrics.mean_per_class), end_section=True)
    for name, accuracy in zip(classes, metrics.per_class):
        table.add_row(name, _metric(accuracy))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
