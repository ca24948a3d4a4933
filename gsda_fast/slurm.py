"""A suite as jobs of Slurm. Each of them is the suite's command, and takes runs that no other job holds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gsda_fast.config import Config
from gsda_fast.console import plain_console
from gsda_fast.errors import UsageError
from gsda_fast.suite_options import SuiteSettings
from gsda_fast.suite_runs import parse_suite, run_suite, runs_of

_MOST_REQUEUES = 100
"""Of one job at its time limit: an end for one that gets nowhere, far behind that of one whose runs go on."""


class SuiteJob:
    """What a job runs, as submitit calls it.

    Args:
        arguments: of the suite's command. command: the whole command line, for environment.json.
    """

    def __init__(self, arguments: Sequence[str], command: Sequence[str]) -> None:
        self.arguments, self.command = list(arguments), list(command)

    def __call__(self) -> None:
        sys.orig_argv = self.command
        settings, variants = parse_suite(self.arguments)
        run_suite(settings, variants, plain_console())

    def checkpoint(self) -> Any:
        """Return the job that submitit queues again when Slurm ends this one: the same, since runs go on."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(
    settings: SuiteSettings,
    variants: Mapping[str, Mapping[str, Config]],
    arguments: Sequence[str],
    cluster: Literal["slurm", "local"] = "slurm",
) -> tuple[list[Any], Path]:
    """Submit the suite as an array of `settings.gpus` jobs with a GPU each.

    Args:
        settings, variants: parsed from `arguments`. cluster: local: processes of this machine, for trying it.

    Returns:
        The jobs, as submitit has them, and the folder of their output.

    Raises:
        UsageError: runs that cannot be; submitit is not installed, or this machine has no Slurm.
    """
    runs_of(settings, variants)  # a mistake is told here, and not by each job
    try:
        import submitit
    except ImportError as error:
        raise UsageError(
            "--slurm", found=f"no submitit ({error})", expected="the extra: pip install 'gsda-fast[slurm]'"
        ) from error
    logs = settings.folder / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster, slurm_max_num_timeout=_MOST_REQUEUES)
    except RuntimeError as error:
        raise UsageError("--slurm", found=str(error), expected="a machine that submits jobs to Slurm") from error
    executor.update_parameters(
        name=f"gsda-{settings.task}",
        timeout_min=60 * settings.hours,
        gpus_per_node=1,
        cpus_per_task=settings.cpus,
        slurm_partition=settings.slurm,
    )
    with executor.batch():
        jobs = [executor.submit(SuiteJob(arguments, sys.orig_argv)) for _ in range(settings.gpus)]
    return jobs, logs
