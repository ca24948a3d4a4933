"""Paired differences between methods: runs of one transfer task and seed share warm-up, samples and groups."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from gsda_fast.results.tables import RunKey, transfer_task_name

ALL = "all"


@dataclass(frozen=True)
class Difference:
    """The differences of some pairs of runs.

    Attributes:
        mean: None without a pair. standard_error: of the mean; None with fewer than two pairs.
        pairs: their number. higher: in how many of them the first method's figure is the higher one.
    """

    mean: float | None
    standard_error: float | None
    pairs: int
    higher: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Difference:
        count = len(differences)
        return cls(
            mean=statistics.fmean(differences) if count else None,
            standard_error=statistics.stdev(differences) / math.sqrt(count) if count > 1 else None,
            pairs=count,
            higher=sum(difference > 0 for difference in differences),
        )


@dataclass(frozen=True)
class PairedRow:
    """`method` minus `minus`, for each column."""

    method: str
    minus: str
    cells: tuple[Difference, ...]


@dataclass(frozen=True)
class PairedTable:
    """Paired differences of one figure, for pairs of methods (rows) and transfer tasks (columns), then over all pairs.

    Attributes:
        quantity: what was subtracted, with its unit. decimals: to be shown.
        shared: what the two runs of a pair have in common besides transfer task and seed.
    """

    task: str
    quantity: str
    columns: tuple[str, ...]
    rows: tuple[PairedRow, ...]
    decimals: int = 1
    shared: str = "warm-up, samples and groups"

    @property
    def title(self) -> str:
        return f"{self.task}: paired differences of {self.quantity}"

    @property
    def caption(self) -> str:
        which = f", which share {self.shared}" if self.shared else ""
        return (
            f"mean ± standard error (pairs); a pair: two runs of one transfer task and seed{which}; "
            f"{ALL}: over the pairs of all transfer tasks"
        )

    @property
    def header(self) -> tuple[str, ...]:
        return ("difference", *self.columns, "higher in")

    @property
    def lines(self) -> list[tuple[str, ...]]:
        return [
            (
                f"{row.method} - {row.minus}",
                *map(self._text, row.cells),
                f"{row.cells[-1].higher} of {row.cells[-1].pairs}",
            )
            for row in self.rows
        ]

    def _text(self, cell: Difference) -> str:
        if cell.mean is None:
            return "-"
        spread = "" if cell.standard_error is None else f" ± {cell.standard_error:.{self.decimals}f}"
        return f"{cell.mean:+.{self.decimals}f}{spread} ({cell.pairs})"


def contrasts(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Each method minus the one before it, what each part adds, and the last minus the first, what all of them add."""
    steps = [(method, before) for before, method in itertools.pairwise(methods)]
    return [*reversed(steps), (methods[-1], methods[0])] if len(methods) > 2 else steps


def paired_table(
    task: str,
    quantity: str,
    values: Mapping[RunKey, float | None],
    methods: Sequence[str],
    *,
    short_names: Mapping[str, str] | None = None,
    decimals: int = 1,
) -> PairedTable:
    """The paired differences of one figure.

    Args:
        task, quantity, decimals: see `PairedTable`.
        values: the figure by method, transfer task and seed; None or no entry where it is not known.
        methods: in the order of `contrasts`; methods without any value are left out.
        short_names: of the domains, for the columns.
    """
    known = {key: value for key, value in values.items() if value is not None}
    measured = [method for method in methods if any(key[0] == method for key in known)]
    transfer_tasks = list(dict.fromkeys(key[1] for key in values))
    seeds = list(dict.fromkeys(key[2] for key in values))
    rows = []
    for method, minus in contrasts(measured):
        by_task = [
            [
                known[method, transfer_task, seed] - known[minus, transfer_task, seed]
                for seed in seeds
                if (method, transfer_task, seed) in known and (minus, transfer_task, seed) in known
            ]
            for transfer_task in transfer_tasks
        ]
        everything = [difference for differences in by_task for difference in differences]
        rows.append(PairedRow(method, minus, (*map(Difference.of, by_task), Difference.of(everything))))
    columns = (*(transfer_task_name(*pair, short_names) for pair in transfer_tasks), ALL)
    return PairedTable(task, quantity, columns, tuple(rows), decimals)


def to_csv(tables: Sequence[PairedTable]) -> str:
    """One line a cell, at full precision, under the names of the first line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "quantity", "method", "minus", "column", "mean", "standard_error", "pairs", "higher"])
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                about = [table.task, table.quantity, row.method, row.minus, column]
                writer.writerow([*about, cell.mean, cell.standard_error, cell.pairs, cell.higher])
    return text.getvalue()


def to_json(tables: Sequence[PairedTable]) -> str:
    """A list with the fields of each table."""
    return json.dumps([asdict(table) for table in tables], indent=2, ensure_ascii=False) + "\n"
