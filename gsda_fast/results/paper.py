"""The figures that the GSDA paper prints, and its rows and the differences to them in our tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from gsda_fast.results.tables import AVERAGE, MEAN_PER_CLASS, OVERALL, Cell, ResultTable, Row

SOURCE = "Hu et al., CVPR 2020"

# Task -> method -> (table, row) in paper_tables.json. Partial tasks and the entropy row have no counterpart there.
_COMPARED = {"source-only": "ResNet50", "dann": "DANN", "gsda": "GSDA"}
_ABLATION = {"domain": "Glb", "class": "Glb+Cls", "group": "Glb+Cls+Grp"}
_ROWS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "office31": {
        **{method: ("office31", row) for method, row in _COMPARED.items()},
        **{method: ("office31_ablation", row) for method, row in _ABLATION.items()},
    },
    "office-home": {method: ("office_home", row) for method, row in _COMPARED.items()},
    "visda": {method: ("visda", row) for method, row in _COMPARED.items()},
}
# The mean of VisDA's GSDA row is 82.5. Weighted by the numbers of validation images the row gives the 81.5 that is
# printed as its average, so that is most likely its overall accuracy; every other average is a mean.
_AVERAGE_IS_OVERALL = {("visda", "GSDA")}


@dataclass(frozen=True)
class PublishedRow:
    """One row of the paper.

    Attributes:
        name: as printed. table: the paper's number of the table. backbone: what it was measured with.
        values: percent, by column (transfer task such as A->W, or class).
        average: percent, as printed.
        average_is_overall: whether that is no mean over the columns but overall accuracy.
    """

    name: str
    table: int
    backbone: str
    values: Mapping[str, float]
    average: float
    average_is_overall: bool = False

    @property
    def mean(self) -> float:
        """The mean over the columns: the printed one, or where that is something else the one computed from them."""
        return statistics.fmean(self.values.values()) if self.average_is_overall else self.average


def published_row(task: str, method: str) -> PublishedRow | None:
    """The paper's row for one of our methods; None if it prints none."""
    if method not in _ROWS.get(task, {}):
        return None
    table_name, name = _ROWS[task][method]
    table = paper_tables()[table_name]
    *columns, last = table["columns"]
    assert last == AVERAGE
    *values, average = table["rows"][name]
    return PublishedRow(
        name,
        table["paper_table"],
        "ResNet-50",
        dict(zip(columns, values, strict=True)),
        average,
        (table_name, name) in _AVERAGE_IS_OVERALL,
    )


@lru_cache
def paper_tables() -> dict[str, dict]:
    """The tables of paper_tables.json by name: `paper_table`, `columns` and `rows`."""
    tables: dict[str, dict] = json.loads(Path(__file__).with_name("paper_tables.json").read_text())["tables"]
    return tables


def with_paper(table: ResultTable) -> ResultTable:
    """The table with, below each of our rows that the paper has a counterpart of, that row and the difference.

    The columns must have the paper's names. An average over fewer transfer tasks than the paper's is set against the
    mean of the paper's figures for those. A table of the mean per class over transfer tasks stays as it is, since the
    paper prints overall accuracies there.
    """
    rows: list[Row] = []
    notes: list[str] = []
    for row in table.rows:
        rows.append(row)
        published = published_row(table.task, row.label) if table.figure != "mean_per_class" else None
        if published is None:
            continue
        values = [_value(published, column, table) for column in table.columns]
        if all(value is None for value in values):
            continue
        where = f"{published.name}, Table {published.table}"
        rows.append(Row(row.label, tuple(Cell(value) for value in values), "paper", where))
        differences = [
            Cell(None if cell.mean is None or value is None else cell.mean - value)
            for cell, value in zip(row.cells, values, strict=True)
        ]
        rows.append(Row(row.label, tuple(differences), "difference"))
        notes.append(f"paper: {SOURCE}, {published.backbone}")
        if published.average_is_overall:
            notes.append(
                f"{published.name}'s printed average, {published.average:.1f}, is not the mean of its own row "
                f"({published.mean:.1f}) but most likely overall accuracy, and stands there"
            )
    return replace(table, rows=tuple(rows), notes=(*table.notes, *dict.fromkeys(notes)))


def _value(row: PublishedRow, column: str, table: ResultTable) -> float | None:
    if column == AVERAGE:
        shown = [name for name in table.columns if name != AVERAGE]
        if set(shown) == set(row.values):
            return row.mean
        if set(shown) < set(row.values):
            return statistics.fmean(row.values[name] for name in shown)
        return None
    if column == MEAN_PER_CLASS:
        return row.mean
    if column == OVERALL:
        return row.average if row.average_is_overall else None
    return row.values.get(column)
