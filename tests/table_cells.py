"""What stands in a table, as plain values that a test can compare."""

import math
import re
from typing import Any, NamedTuple

from gsda_fast.results.tables import Table


class Cell(NamedTuple):
    mean: Any = None
    spread: Any = None
    seeds: int = 0


class Difference(NamedTuple):
    mean: Any
    standard_error: Any
    pairs: int
    higher: int


def cells(table: Table, *row: str) -> list[Any]:
    """The cells of the first row that begins with these values of `ROW`."""
    found = next(found for key, found in table.rows if key[: len(row)] == row)
    kind = Difference if "pairs" in found else Cell
    values = found[list(kind._fields)].to_dict("records")
    return [kind(**{name: None if math.isnan(value) else value for name, value in cell.items()}) for cell in values]


def means(table: Table, *row: str) -> list[float | None]:
    return [cell.mean for cell in cells(table, *row)]


def lines(table: Table) -> list[tuple[str, ...]]:
    """What a reader sees of each row."""
    return [tuple(line) for line in table.texts.to_numpy().tolist()]


def squeezed(markdown: str) -> str:
    """The text without the blanks that align its columns."""
    return re.sub(" {2,}", " ", markdown)
