"""The metrics that the GSDA paper prints, and its rows and the differences to them in our tables."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd

from gsda_fast.results.tables import AVERAGE, MEAN_PER_CLASS, OVERALL, ResultTable

SOURCE = "Hu et al., CVPR 2020"

# Method -> the name of its row. Partial tasks have no counterpart in the paper, nor have the other methods.
_ROWS: Mapping[str, str] = {
    "source-only": "ResNet50", "tca": "TCA", "gfk": "GFK", "dan": "DAN", "rtn": "RTN", "jan": "JAN", "dann": "DANN",
    "adda": "ADDA", "mcd": "MCDDA", "mada": "MADA", "cdan-e": "CDAN", "symnets": "SymNets", "safn": "SAFN",
    "bsp-cdan": "BSP", "tpn": "TPN", "self-ensembling": "S-En", "gsda": "GSDA",
}  # fmt: skip
_ABLATION: Mapping[str, str] = {
    **{"domain": "Glb", "class": "Glb+Cls", "group": "Glb+Cls+Grp"},
    **{"glb": "Glb", "glb-cls": "Glb+Cls", "glb-cls-grp": "Glb+Cls+Grp"},
}
# The paper took most rows over from others. What a row's name does not say, by table ("*": in every one).
_CROPS = "tested on ten crops"
_SHALLOW = {"*": "on features and with a classifier that no source states"}
_REMARKS: Mapping[str, Mapping[str, str]] = {
    "TCA": _SHALLOW,
    "GFK": _SHALLOW,
    "MCDDA": {"office31": "tuned by GSDA's authors: its own paper has no such task"},
    "CDAN": {"*": f"CDAN+E, with entropy weights, {_CROPS}"},
    "SAFN": {"office31": f"SAFN+ENT, with the target's entropy, {_CROPS}", "office_home": _CROPS},
    "BSP": {"*": "BSP+CDAN+E"},
    "S-En": {"*": "tested on sixteen augmentations of each image"},
}
# Of the rows that the paper marks as made with a deeper network than ResNet-50.
_DEEPER = {"S-En": "ResNet-152"}
# The mean of VisDA's GSDA row is 82.5. Weighted by the numbers of validation images the row gives the 81.5 that is
# printed as its average, so that is most likely its overall accuracy; every other average is a mean.
_AVERAGE_IS_OVERALL = {("visda", "GSDA")}


@dataclass(frozen=True)
class PublishedRow:
    """One row of the paper.

    Attributes:
        name: as printed. table: the paper's number of the table.
        backbone: what it was measured with. remark: what the name does not say.
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
    remark: str = ""

    @property
    def mean(self) -> float:
        """The mean over the columns: the printed one, or where that is something else the one computed from them."""
        return statistics.fmean(self.values.values()) if self.average_is_overall else self.average

    @property
    def notes(self) -> list[str]:
        """What a reader of the row has to know."""
        notes = [f"paper: {SOURCE}, ResNet-50"]
        about = [remark for remark in (self.remark, self.backbone) if remark and remark != "ResNet-50"]
        if about:
            notes.append(f"{self.name}: {', '.join(about)}")
        if self.average_is_overall:
            notes.append(
                f"{self.name}'s printed average, {self.average:.1f}, is not the mean of its own row "
                f"({self.mean:.1f}) but most likely overall accuracy, and stands there"
            )
        return notes

    def value(self, column: str, columns: tuple[str, ...]) -> float:
        """Return what the paper has in a column of a table with these columns; NaN for nothing.

        An average over fewer transfer tasks than the paper's is set against the mean of its metrics for those.
        """
        if column == AVERAGE:
            shown = set(columns) - {AVERAGE}
            if shown == set(self.values):
                return self.mean
            return statistics.fmean(self.values[name] for name in shown) if shown < set(self.values) else math.nan
        if column == MEAN_PER_CLASS:
            return self.mean
        if column == OVERALL:
            return self.average if self.average_is_overall else math.nan
        return self.values.get(column, math.nan)


def published_row(task: str, method: str) -> PublishedRow | None:
    """Return the paper's row for one of our methods; None if it prints none."""
    table_name = task.replace("-", "_")
    if task == "office31" and method in _ABLATION:
        table_name = "office31_ablation"
    name = _ABLATION.get(method) or _ROWS.get(method)
    table = paper_tables().get(table_name)
    if table is None or name is None or name not in table["rows"]:
        return None
    remarks = _REMARKS.get(name, {})
    *columns, last = table["columns"]
    assert last == AVERAGE
    *values, average = table["rows"][name]
    return PublishedRow(
        name,
        table["paper_table"],
        _DEEPER.get(name, "ResNet-101") if name in table.get("deeper", ()) else "ResNet-50",
        dict(zip(columns, values, strict=True)),
        average,
        (table_name, name) in _AVERAGE_IS_OVERALL,
        remarks.get(table_name, remarks.get("*", "")),
    )


@lru_cache
def paper_tables() -> dict[str, dict]:
    """Return the tables of paper_tables.json by name: `paper_table`, `columns` and `rows`."""
    tables: dict[str, dict] = json.loads(Path(__file__).with_name("paper_tables.json").read_text())["tables"]
    return tables


def with_paper(table: ResultTable) -> ResultTable:
    """Return the table with, below each row that the paper has a counterpart of, that row and the difference.

    The columns must have the paper's names. A table of the mean per class over transfer tasks stays as it is, since
    the paper prints overall accuracies there.
    """
    rows: list[pd.DataFrame] = []
    notes: list[str] = []
    for (label, *_), cells in table.rows:
        rows.append(cells)
        published = published_row(table.task, label) if table.metric != "mean_per_class" else None
        if published is None:
            continue
        values = pd.Series([published.value(column, table.columns) for column in table.columns], cells.index)
        if values.isna().all():
            continue
        beside = cells.assign(spread=math.nan, seeds=0)
        where = f"{published.name}, Table {published.table}"
        rows.append(beside.assign(kind="paper", source=where, mean=values))
        rows.append(beside.assign(kind="difference", mean=cells["mean"] - values))
        notes += published.notes
    cells = pd.concat(rows, ignore_index=True)
    return dataclasses.replace(table, cells=cells, notes=(*table.notes, *dict.fromkeys(notes)))
