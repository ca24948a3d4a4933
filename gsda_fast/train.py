"""`python -m gsda_fast.train TASK [options]`: train a method on a transfer task, into a run folder."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Console

from gsda_fast.commands import program, reported_by_first_process, run_command
from gsda_fast.console import plain_console
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.embed import with_features
from gsda_fast.results.run_folder import RunResult

if TYPE_CHECKING:
    from gsda_fast.config import Config


def train(config: Config, console: Console | None = None) -> RunResult:
    """Train as `config` says, or resume an interrupted run, and return what `result.json` holds.

    Under torchrun every process calls this, all of them return the result, and the first one writes and speaks.

    Args:
        config: see `gsda_fast.config.preset` and `parse_config`. console: where progress is shown; None: nowhere.

    Raises:
        UsageError: settings, data or a folder that do not fit; nothing has been written then.
        TrainingError: numbers that are not finite, a process that was lost, or a disk that cannot be written.
        Stopped: SIGTERM or SIGINT asked for it (in the main thread); the same call resumes.
    """
    # Here and below, so that --help need not wait for PyTorch.
    from gsda_fast.assemble import choose_device
    from gsda_fast.monitor import ProgressLines, TensorBoard, profile
    from gsda_fast.run import Run
    from gsda_fast.training.distributed import join
    from gsda_fast.training.stopping import StopRequest

    with (
        join(choose_device(config), config.distributed.timeout) as ranks,
        StopRequest().listening() as stop,
        Run.open(config, ranks, stop, console or Console(quiet=True)) as run,
    ):
        trainer = None if run.result is not None else run.build_trainer()
        if trainer is None:
            assert run.result is not None
            return run.result
        with (
            TensorBoard(run.folder, trainer) as board,
            ProgressLines(run.console, trainer) as lines,
            profile(run.config.run.profile, run.folder, trainer, run.console),
        ):
            for report in trainer.run(on_evaluation=run.checkpoint_if_due):
                run.append(report)
                board.add(report)
                lines.show(report)
        return run.finish()


class _CallableModule(ModuleType):
    """`gsda_fast.train` is this module for an import statement and the function for whoever calls it."""

    def __call__(self, config: Config, console: Console | None = None) -> RunResult:
        return train(config, console)


sys.modules[__name__].__class__ = _CallableModule


def _print_usage(own: str) -> None:
    print(f"usage: {own} TASK [options]\n       {own} --config FILE [options]\n\nTASK: {', '.join(BENCHMARKS)}")
    print(f"\n{own} TASK --help lists the options and the defaults of that task.")


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        _print_usage(program("train"))
        return
    from gsda_fast.config import parse_config

    with reported_by_first_process():
        arguments = with_features(sys.argv[1:], plain_console())
        config = parse_config(arguments, program("train"))
    train(config, plain_console())


if __name__ == "__main__":
    run_command(main)
