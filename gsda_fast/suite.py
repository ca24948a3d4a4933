"""`python -m gsda_fast.suite TASK`: transfer tasks x methods x seeds, a run folder each, and a table at the end."""

from __future__ import annotations

import signal
import sys

from gsda_fast.commands import run_command
from gsda_fast.console import plain_console
from gsda_fast.embed import with_features
from gsda_fast.suite_options import parse_settings


def main() -> None:
    # --help, and a mistake in these options, need not wait for PyTorch.
    parse_settings(sys.argv[1:])
    from gsda_fast.suite_runs import parse_suite, run_suite

    # A scheduler's wish to stop is Ctrl-C's: the runs save a checkpoint before they end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = plain_console()
    arguments = with_features(sys.argv[1:], console)
    settings, variants = parse_suite(arguments)
    if settings.slurm is None:
        run_suite(settings, variants, console)
        return
    from gsda_fast.slurm import submit

    jobs, logs = submit(settings, variants, arguments)
    console.print(f"submitted: {', '.join(job.job_id for job in jobs)}; their output is in {logs}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
