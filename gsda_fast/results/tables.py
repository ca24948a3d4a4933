"""Tables of transfer tasks by methods: mean and spread over seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from rich.table import Table

from gsda_fast.data.benchmarks import find_benchmark
from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunResult

Figure = Literal["accuracy", "mean_per_class", "per_class"]
Choice = Literal["last", "label_free", "best"]
Kind = Literal["ours", "paper", "difference"]

AVERAGE = "avg"
MEAN_PER_CLASS, OVERALL = "mean per class", "overall"
FIGURE_NAMES: Mapping[Figure, str] = {
    "accuracy": "overall accuracy",
    "mean_per_class": "mean accuracy per class",
    "per_class": "accuracy of each class, their mean, and overall accuracy",
}
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
    """A line of a table: a label and a cell for each column.

    Attributes:
        label: the method. cells: one for each column.
        kind: measured here, published, or the first minus the second.
        source: where a published row stands.
    """

    label: str
    cells: tuple[Cell, ...]
    kind: Kind = "ours"
    source: str = ""

    @property
    def heading(self) -> str:
        """What stands before the cells."""
        return {"ours": self.label, "paper": f"paper: {self.source}", "difference": "difference"}[self.kind]


class PrintedTable(Protocol):
    """What can be shown to a reader."""

    @property
    def title(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def header(self) -> tuple[str, ...]:
        """The heading of each column, that of the rows' headings first."""

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The texts of each row, its heading first."""


@dataclass(frozen=True)
class ResultTable:
    """One figure under one choice, for methods (rows) and transfer tasks or classes (columns).

    Attributes:
        subject: what the whole table is about, besides the task: a transfer task whose classes are the columns, or a
            method whose settings are the rows.
        notes: added to the caption. rows_are: heading of the first column.
    """

    task: str
    figure: Figure
    choice: Choice
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    subject: str = ""
    notes: tuple[str, ...] = ()
    rows_are: str = "method"

    @property
    def title(self) -> str:
        where = f"{self.task} {self.subject}".strip()
        return f"{where}: {FIGURE_NAMES[self.figure]}, {CHOICE_NAMES[self.choice]}"

    @property
    def header(self) -> tuple[str, ...]:
        return (self.rows_are, *self.columns)

    @property
    def lines(self) -> list[tuple[str, ...]]:
        return [(row.heading, *(self.cell_text(cell, row.kind) for cell in row.cells)) for row in self.rows]

    @property
    def seeds(self) -> int:
        """The largest number of seeds of a cell."""
        return max((cell.seeds for row in self.rows for cell in row.cells), default=0)

    @property
    def caption(self) -> str:
        if self.seeds < 2:
            return "; ".join(["percent; one seed, so no spread is known", *self.notes])
        parts = [f"percent, mean ± sample standard deviation over {self.seeds} seeds"]
        if AVERAGE in self.columns:
            parts.append(f"{AVERAGE}: of the averages of each seed over the transfer tasks")
        if any(0 < cell.seeds < self.seeds for row in self.rows for cell in row.cells):
            parts.append("(n): only n seeds have finished")
        return "; ".join([*parts, *self.notes])

    def cell_text(self, cell: Cell, kind: Kind = "ours") -> str:
        """The cell for a reader: `76.8 ± 1.2`, and the number of seeds where it is not the table's."""
        if cell.mean is None:
            return "-"
        text = f"{cell.mean:+.1f}" if kind == "difference" else f"{cell.mean:.1f}"
        if cell.spread is not None:
            text += f" ± {cell.spread:.1f}"
        return f"{text} ({cell.seeds})" if 0 < cell.seeds < self.seeds else text


def transfer_task_name(source: str, target: str, short_names: Mapping[str, str] | None = None) -> str:
    """`mnist->fonts`, or `M->F` with the short names of the domains, as the column of a transfer task is called."""
    short = short_names or {}
    return f"{short.get(source, source)}->{short.get(target, target)}"


def transfer_table(
    results: Sequence[RunResult],
    *,
    figure: Figure = "accuracy",
    choice: Choice = "last",
    methods: Sequence[str] = (),
    transfer_tasks: Sequence[tuple[str, str]] = (),
    short_names: Mapping[str, str] | None = None,
) -> ResultTable:
    """The table of the results of one task.

    The average over the transfer tasks is taken for each seed first; its mean and spread are those of the seeds'
    averages. A seed that lacks one of the transfer tasks has no average. A single transfer task has no such column.

    Args:
        results: of finished runs, in any order.
        figure, choice: what to show; the figures of a run, not of its classes.
        methods: the rows, in order; those of the results in order of appearance if empty.
        transfer_tasks: (source, target) of the columns, in order; those of the results if empty.
        short_names: of the domains, for the columns.

    Raises:
        UsageError: results of several tasks, or two of one transfer task, method and seed.
        ValueError: no result.
    """
    task = _only_task(results)
    values = {key: getattr(getattr(result, figure), choice) for key, result in results_by_run(results).items()}
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
    columns = [transfer_task_name(*pair, short_names) for pair in transfer_tasks]
    if len(columns) > 1:
        columns.append(AVERAGE)
    return ResultTable(task, figure, choice, tuple(columns), tuple(rows), notes=test_notes(results))


def class_table(
    results: Sequence[RunResult],
    transfer_task: tuple[str, str],
    *,
    choice: Choice = "last",
    methods: Sequence[str] = (),
    short_names: Mapping[str, str] | None = None,
) -> ResultTable:
    """The table of one transfer task by classes, with both averages: mean per class and overall.

    The accuracy of each class is known after the last step alone; under another choice both averages stand alone.

    Args:
        results: of finished runs; those of other transfer tasks are left out.
        transfer_task: (source, target).
        choice, methods, short_names: as in `transfer_table`.

    Raises:
        UsageError: as in `transfer_table`, or results with different classes.
        ValueError: no result.
    """
    results = [result for result in results if (result.source, result.target) == transfer_task]
    task = _only_task(results)
    results_by_run(results)
    spaces = {result.classes for result in results}
    if len(spaces) > 1:
        raise UsageError("runs", found=f"{len(spaces)} different lists of classes", expected="runs with equal classes")
    classes = spaces.pop() if choice == "last" else ()
    rows = []
    for method in methods or list(dict.fromkeys(result.method for result in results)):
        runs = [result for result in results if result.method == method]
        cells = [Cell.of(_known(run.per_class[label] for run in runs)) for label in range(len(classes))]
        cells.append(Cell.of(_known(getattr(run.mean_per_class, choice) for run in runs)))
        cells.append(Cell.of(_known(getattr(run.accuracy, choice) for run in runs)))
        rows.append(Row(method, tuple(cells)))
    name = transfer_task_name(*transfer_task, short_names)
    columns = (*classes, MEAN_PER_CLASS, OVERALL)
    notes = test_notes(results)
    return ResultTable(task, "per_class", choice, columns, tuple(rows), subject=name, notes=notes)


RunKey = tuple[str, tuple[str, str], int]
"""Method, (source, target) and seed."""


def results_by_run(results: Iterable[RunResult]) -> dict[RunKey, RunResult]:
    """The results by method, transfer task and seed.

    Raises:
        UsageError: two of one method, transfer task and seed.
    """
    found: dict[RunKey, RunResult] = {}
    for result in results:
        key = (result.method, (result.source, result.target), result.seed)
        if key in found:
            raise UsageError(
                "runs",
                found=f"two of {transfer_task_name(*key[1])}, method {result.method}, seed {result.seed}",
                expected="one of each transfer task, method and seed",
            )
        found[key] = result
    return found


def _only_task(results: Sequence[RunResult]) -> str:
    tasks = list(dict.fromkeys(result.task for result in results))
    if not tasks:
        raise ValueError("results: found none; expected at least one")
    if len(tasks) > 1:
        raise UsageError("runs", found=f"the tasks {', '.join(tasks)}", expected="runs of one task")
    return tasks[0]


def test_notes(results: Sequence[RunResult]) -> tuple[str, ...]:
    """How the images of the runs, all of one task, were tested: on which crops, if they are cropped at all."""
    recipe = find_benchmark(_only_task(results)).recipe
    if recipe.crop == recipe.resize:
        return ()
    crops = {result.test_crops for result in results}
    if len(crops) > 1:
        return ("ten-crop test for some of the runs, centre crop for the others",)
    return ("ten-crop test",) if crops == {10} else ("centre-crop test",)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def to_terminal(table: PrintedTable) -> Table:
    """For rich's `print`."""
    drawn = Table(title=table.title, caption=table.caption)
    first, *others = table.header
    # Where the terminal is too narrow, texts break; rich would end them with an ellipsis.
    drawn.add_column(first, overflow="fold")
    for column in others:
        drawn.add_column(column, justify="right", overflow="fold")
    for line in table.lines:
        drawn.add_row(*line)
    return drawn


def to_markdown(tables: Sequence[PrintedTable]) -> str:
    """Each table with its title above and its caption below."""
    parts = []
    for table in tables:
        lines = [table.header, ("---", *["---:"] * (len(table.header) - 1)), *table.lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{table.title}**\n\n{body}\n\n{table.caption}\n")
    return "\n".join(parts)


def to_csv(tables: Sequence[ResultTable]) -> str:
    """One line a cell, at full precision, under the names of the first line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["task", "figure", "choice", "subject", "method", "kind", "column", "mean", "standard_deviation", "seeds"]
    )
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                about = [table.task, table.figure, table.choice, table.subject, row.label, row.kind, column]
                writer.writerow([*about, cell.mean, cell.spread, cell.seeds])
    return text.getvalue()


def to_json(tables: Sequence[ResultTable]) -> str:
    """A list with the fields of each table."""
    return json.dumps([asdict(table) for table in tables], indent=2, ensure_ascii=False) + "\n"
