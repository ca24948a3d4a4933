"""`python -m gsda_fast.report RUN [RUN ...]`: one page of plots and tables for a run, or for several side by side."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gsda_fast.commands import parse_command_line, run_command
from gsda_fast.errors import UsageError
from gsda_fast.results.page import write_page
from gsda_fast.results.run_folder import RunFolder


@dataclass(frozen=True)
class ReportOptions:
    """Draws one self-contained HTML page about one run, or about several for comparison."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of the runs, finished or interrupted."""

    output: Path | None = None
    """Folder for the page: the run's own for one run, `report` beside the runs for several."""

    points: int = 1000
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


def main() -> None:
    options = parse_command_line(lambda: tyro.cli(ReportOptions, prog="python -m gsda_fast.report"))
    runs = [RunFolder.existing(path) for path in options.runs]
    print(f"report: {write_page(runs, options.folder, points=options.points)}")


if __name__ == "__main__":
    run_command(main)
