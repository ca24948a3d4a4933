"""Tables of transfer tasks by methods: mean and spread over seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.table import Table

from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunResult

Figure = Literal["accuracy", "mean_per_class"]
Choice = Literal["last", "label_free", "best"]

AVERAGE = "avg"
FIGURE_NAMES: Mapping[Figure, str] = {"accuracy": "overall accuracy", "mean_per_class": "mean accuracy per class"}
CHOICE_NAMES: Mapping[Choice, str] = {
    "last": "last step",
    "label_free": "label-free choice (mutual information)",
    "best": "best on target labels (upper bound)",
}


@dataclass(frozen=True)
class Cell:
    """One figure of a table, in percent.

    Attributes:
        mean: over the seeds; None where no run has finished.
        spread: sample standard deviation over the seeds; None with fewer than two.
        seeds: number of seeds; 0 for a figure taken from a publication.
    """

    mean: float | None = None
    spread: float | None = None
    seeds: int = 0

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """The cell of one figure for each seed."""
        return cls(
            mean=statistics.fmean(values) if values else None,
            spread=statistics.stdev(values) if len(values) > 1 else None,
            seeds=len(values),
        )


@dataclass(frozen=True)
class Row:
    """A line of a table: a label and a cell for each column."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ResultTable:
    """One figure under one choice, for transfer tasks (columns) and methods (rows).

    Rows know nothing of runs: a published row is one more `Row`, of cells without seeds and under the same columns,
    added with `dataclasses.replace(table, rows=(*table.rows, row))`.
    """

    task: str
    figure: Figure
    choice: Choice
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.task}: {FIGURE_NAMES[self.figure]}, {CHOICE_NAMES[self.choice]}"

    @property
    def seeds(self) -> int:
        """The largest number of seeds of a cell."""
        return max((cell.seeds for row in self.rows for cell in row.cells), default=0)

    @property
    def caption(self) -> str:
        if self.seeds < 2:
            return "percent; one seed, so no spread is known"
        parts = [f"percent, mean ± sample standard deviation over {self.seeds} seeds"]
        if AVERAGE in self.columns:
            parts.append(f"{AVERAGE}: of the averages of each seed over the transfer tasks")
        if any(0 < cell.seeds < self.seeds for row in self.rows for cell in row.cells):
            parts.append("(n): only n seeds have finished")
        return "; ".join(parts)

    def cell_text(self, cell: Cell) -> str:
        """The cell for a reader: `76.8 ± 1.2`, and the number of seeds where it is not the table's."""
        if cell.mean is None:
            return "-"
        text = f"{cell.mean:.1f}"
        if cell.spread is not None:
            text += f" ± {cell.spread:.1f}"
        return f"{text} ({cell.seeds})" if 0 < cell.seeds < self.seeds else text


def transfer_task_name(source: str, target: str) -> str:
    """`mnist->fonts`, as the column of a transfer task is called."""
    return f"{source}->{target}"


def transfer_table(
    results: Sequence[RunResult],
    *,
    figure: Figure = "accuracy",
    choice: Choice = "last",
    methods: Sequence[str] = (),
    transfer_tasks: Sequence[tuple[str, str]] = (),
) -> ResultTable:
    """The table of the results of one task.

    The average over the transfer tasks is taken for each seed first; its mean and spread are those of the seeds'
    averages. A seed that lacks one of the transfer tasks has no average. A single transfer task has no such column.

    Args:
        results: of finished runs, in any order.
        figure, choice: what to show.
        methods: the rows, in order; those of the results in order of appearance if empty.
        transfer_tasks: (source, target) of the columns, in order; those of the results if empty.

    Raises:
        UsageError: results of several tasks, or two of one transfer task, method and seed.
        ValueError: no result.
    """
    tasks = list(dict.fromkeys(result.task for result in results))
    if not tasks:
        raise ValueError("results: found none; expected at least one")
    if len(tasks) > 1:
        raise UsageError("runs", found=f"the tasks {', '.join(tasks)}", expected="runs of one task")
    values: dict[tuple[str, tuple[str, str], int], float | None] = {}
    for result in results:
        key = (result.method, (result.source, result.target), result.seed)
        if key in values:
            raise UsageError(
                "runs",
                found=f"two of {transfer_task_name(*key[1])}, method {result.method}, seed {result.seed}",
                expected="one of each transfer task, method and seed",
            )
        values[key] = getattr(getattr(result, figure), choice)
    methods = methods or list(dict.fromkeys(result.method for result in results))
    transfer_tasks = transfer_tasks or list(dict.fromkeys((result.source, result.target) for result in results))
    seeds = sorted({result.seed for result in results})

    rows = []
    for method in methods:
        by_seed = [[values.get((method, pair, seed)) for pair in transfer_tasks] for seed in seeds]
        cells = [Cell.of(_known(column)) for column in zip(*by_seed)]
        if len(transfer_tasks) > 1:
            cells.append(Cell.of([statistics.fmean(_known(row)) for row in by_seed if None not in row]))
        rows.append(Row(method, tuple(cells)))
    columns = [transfer_task_name(*pair) for pair in transfer_tasks]
    if len(columns) > 1:
        columns.append(AVERAGE)
    return ResultTable(tasks[0], figure, choice, tuple(columns), tuple(rows))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def to_terminal(table: ResultTable) -> Table:
    """For rich's `print`."""
    drawn = Table(title=table.title, caption=table.caption)
    drawn.add_column("method")
    for column in table.columns:
        drawn.add_column(column, justify="right")
    for row in table.rows:
        drawn.add_row(row.label, *map(table.cell_text, row.cells))
    return drawn


def to_markdown(tables: Sequence[ResultTable]) -> str:
    """Each table with its title above and its caption below."""
    parts = []
    for table in tables:
        lines = [
            ["method", *table.columns],
            ["---", *["---:"] * len(table.columns)],
            *([row.label, *map(table.cell_text, row.cells)] for row in table.rows),
        ]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{table.title}**\n\n{body}\n\n{table.caption}\n")
    return "\n".join(parts)


def to_csv(tables: Sequence[ResultTable]) -> str:
    """One line a cell, at full precision, under the names of the first line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "figure", "choice", "method", "transfer_task", "mean", "standard_deviation", "seeds"])
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                writer.writerow(
                    [table.task, table.figure, table.choice, row.label, column, cell.mean, cell.spread, cell.seeds]
                )
    return text.getvalue()


def to_json(tables: Sequence[ResultTable]) -> str:
    """A list with the fields of each table."""
    return json.dumps([asdict(table) for table in tables], indent=2, ensure_ascii=False) + "\n"
