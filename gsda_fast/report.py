"""`python -m gsda_fast.report RUN [RUN ...]`: one page of plots and tables for a run, for several, or for a suite."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gsda_fast.commands import UNSAID, parse_command_line, program, run_command
from gsda_fast.console import plain_console
from gsda_fast.data.benchmarks import Benchmark, find_benchmark
from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunFolder

if TYPE_CHECKING:
    from gsda_fast.results.suite_folder import Layout, SuiteFolder

_MOST_RUNS = 12
"""Runs that are compared one by one; more are grouped by their methods, as a suite's are."""


@dataclass(frozen=True)
class ReportOptions:
    """Draws one self-contained HTML page about one run, about several for comparison, or about a suite's folder."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")
    ]
    """Folders of the runs, finished or interrupted; or the one folder of a suite."""

    output: Annotated[Path | None, UNSAID] = None
    """Folder for the page: the run's own for one run, `report` beside the runs for several. A suite's page is always
    in its own folder."""

    points: int = 400
    """Samples of each domain in a t-SNE plot, at most. Fewer are faster."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("RUN", found="none", expected="the folder of at least one run")
        if self.points < 2:
            raise UsageError("--points", found=str(self.points), expected="at least 2")

    @property
    def folder(self) -> Path:
        """Where the page goes."""
        if self.output is not None:
            return self.output
        if len(self.runs) == 1:
            return self.runs[0]
        return Path(os.path.commonpath([run.resolve().parent for run in self.runs])) / "report"


def suite_layout(benchmark: Benchmark) -> Layout:
    """Return how the tables of a benchmark's suites are laid out.

    Every method and transfer task, in the paper's order.
    """
    # Here and below, so that --help need not wait for PyTorch and matplotlib.
    from gsda_fast.methods import METHODS
    from gsda_fast.results.suite_folder import Layout

    return Layout(
        benchmark.name,
        tuple(METHODS),
        benchmark.transfer_tasks,
        benchmark.short_names,
        benchmark.reported_by_class,
    )


def report_on_suite(suite: SuiteFolder, *, points: int = ReportOptions.points) -> Path:
    """Write the page about all runs in a suite's folder that have finished, and return its path.

    Raises:
        UsageError: no run has finished, runs of several tasks, or a folder that cannot be written.
    """
    from gsda_fast.results.page import write_suite_page

    results = [result for each in (suite, *suite.variants.values()) for result in each.results()]
    if not results:
        raise UsageError(str(suite.path), found="runs, none of which has finished", expected="finished runs")
    layout = suite_layout(find_benchmark(results[0].task))
    # What the runs have beside the benchmark's: the task `folder` has no transfer tasks of its own.
    methods = dict.fromkeys([*layout.methods, *(result.method for result in results)])
    pairs = dict.fromkeys([*layout.transfer_tasks, *(result.transfer_task for result in results)])
    layout = replace(layout, methods=tuple(methods), transfer_tasks=tuple(pairs))
    return write_suite_page(suite, layout, points=points)


def main() -> None:
    options = parse_command_line(lambda: tyro.cli(ReportOptions, prog=program("report")))
    from gsda_fast.results.page import write_page
    from gsda_fast.results.suite_folder import SuiteFolder

    suite = None
    if len(options.runs) == 1 and not RunFolder(options.runs[0]).begun:
        suite = SuiteFolder.find(options.runs[0])
        if suite is not None and options.output is not None:
            found = f"{options.output} for a suite"
            raise UsageError("--output", found=found, expected="none: its page is in its folder")
    elif len(options.runs) > _MOST_RUNS:
        suite = SuiteFolder(options.folder, [RunFolder.existing(path) for path in options.runs])
    with plain_console().status("drawing the page"):
        if suite is not None:
            page = report_on_suite(suite, points=options.points)
        else:
            runs = [RunFolder.existing(path) for path in options.runs]
            page = write_page(runs, options.folder, points=options.points)
    print(f"report: {page}")


if __name__ == "__main__":
    run_command(main)
