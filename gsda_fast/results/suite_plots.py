"""The figures of a suite's page: what is compared are methods, over transfer tasks and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gsda_fast.results.plots import LEVEL_STYLES, RUN_COLOURS, WARMUP_COLOUR, axes_of
from gsda_fast.results.tables import Cell

Curve = tuple[np.ndarray, np.ndarray]
"""Steps (n,) and values (n,) of one run."""


@dataclass(frozen=True)
class Bars:
    """One bar for each column: a method's figures.

    Attributes:
        label: the method. cells: one a column. colour: of the method in every plot.
        marks: what the figures are to be compared with, by a line across each bar; empty for nothing.
    """

    label: str
    cells: Sequence[Cell]
    colour: str
    marks: Sequence[float | None] = ()


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method."""
    return {method: RUN_COLOURS[index % len(RUN_COLOURS)] for index, method in enumerate(methods)}


def method_bars(
    rows: Sequence[Bars], title: str, unit: str, *, marked: str = "", limit: float = 100.0, decimals: int = 1
) -> Figure:
    """A horizontal bar for each method, the spread as a thin line, and both in figures beside it.

    Args:
        rows: with one cell each; a method without a figure keeps its place. title, unit: what is shown.
        marked: what the marks are. limit: end of the axis, the same in all figures that belong together.
        decimals: of the figures.
    """
    with axes_of((4.6, 1.1 + 0.26 * len(rows)), title) as (figure, axes):
        for position, row in enumerate(rows):
            (cell,) = row.cells
            text = "-"
            if cell.mean is not None:
                axes.barh(
                    position, cell.mean, 0.72, xerr=cell.spread or 0.0, color=row.colour, label=row.label,
                    error_kw={"elinewidth": 0.9, "ecolor": "#333333"},
                )  # fmt: skip
                spread = "" if cell.spread is None else f" ± {cell.spread:.{decimals}f}"
                text = f"{cell.mean:.{decimals}f}{spread}"
            if row.marks and row.marks[0] is not None:
                _mark(axes, row.marks[0], position, 0.72)
            # In a column, where it is not taken for the figure of a mark.
            axes.text(
                1.02, position, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#222222"
            )
        _legend_of_marks(figure, axes, rows, marked)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(min(0.0, *(cell.mean or 0.0 for row in rows for cell in row.cells)), 1.02 * limit)
        axes.set_xlabel(unit)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def bars(rows: Sequence[Bars], columns: Sequence[str], title: str, unit: str, *, marked: str = "") -> Figure:
    """A group of horizontal bars for each column, with the spread as thin lines.

    Args:
        rows: at least one; one bar each in every group. columns: the groups. title, unit: what is shown.
        marked: what the marks are.
    """
    thickness = 0.82 / len(rows)
    # With many groups the bars stay readable when the figure grows with them.
    with axes_of((5.0, 1.5 + len(columns) * (0.12 + 0.115 * len(rows))), title) as (figure, axes):
        for index, row in enumerate(rows):
            positions = np.arange(len(columns)) + (index - (len(rows) - 1) / 2) * thickness
            widths = [0.0 if cell.mean is None else cell.mean for cell in row.cells]
            spreads = [cell.spread or 0.0 for cell in row.cells]
            axes.barh(
                positions, widths, thickness * 0.9, xerr=spreads, color=row.colour, label=row.label,
                error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            )  # fmt: skip
            for position, value in zip(positions, row.marks):
                if value is not None:
                    _mark(axes, value, position, thickness)
        axes.set_yticks(range(len(columns)), [column.replace("->", " → ") for column in columns], fontsize=8)
        axes.set_ylim(len(columns) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        _legend_of_marks(figure, axes, rows, marked, methods=True)
    return figure


def _mark(axes: Axes, value: float, position: float, thickness: float) -> None:
    ends = [position - thickness / 2, position + thickness / 2]
    # White at its sides, so that it is seen on a black bar too.
    axes.plot([value, value], ends, "w-", linewidth=4)
    axes.plot([value, value], ends, "k-", linewidth=1.8)


def _legend_of_marks(figure: Figure, axes: Axes, rows: Sequence[Bars], marked: str, methods: bool = False) -> None:
    handles = axes.get_legend_handles_labels()[0] if methods else []
    if any(value is not None for row in rows for value in row.marks):
        handles += axes.plot([], [], "k|", markersize=8, markeredgewidth=1.8, label=marked)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def spread_curves(
    curves: Mapping[str, Sequence[Curve]], colours: Mapping[str, str], title: str, unit: str, warmup: int = 0
) -> Figure | None:
    """A line for each method, the mean of its runs, within a band of one standard deviation.

    Args:
        curves: one for each run of a method. colours: of the methods. warmup: steps to shade.

    Returns:
        None if no run measured anything.
    """
    measured = {method: found for method, runs in curves.items() if (found := [run for run in runs if len(run[0])])}
    if not measured:
        return None
    with axes_of((5.0, 3.6), title) as (figure, axes):
        for method, runs in measured.items():
            _band(axes, runs, colours[method], method)
        axes.set_ylabel(unit)
        _finish(axes, figure, warmup)
    return figure


def level_curves(levels: Mapping[str, Sequence[Curve]], title: str, warmup: int = 0) -> Figure | None:
    """Gradient magnitudes of the three levels of one method, means over its runs with bands.

    Args:
        levels: one curve for each run, by level ("domain", "group", "class"). warmup: steps to shade.

    Returns:
        None if no run measured anything.
    """
    measured = {level: found for level, runs in levels.items() if (found := [run for run in runs if len(run[0])])}
    if not measured:
        return None
    with axes_of((5.0, 3.6), title) as (figure, axes):
        for level, runs in measured.items():
            label, colour, style = LEVEL_STYLES[level]
            _band(axes, runs, colour, label, style)
        axes.set_ylabel("sum of ‖∂L/∂f‖")
        _finish(axes, figure, warmup)
    return figure


def _band(axes: Axes, runs: Sequence[Curve], colour: str, label: str, style: str = "-") -> None:
    # Runs that are still under way have measured fewer steps; a step counts with the runs that reached it.
    steps = np.unique(np.concatenate([run[0] for run in runs]))
    table = np.full((len(runs), len(steps)), np.nan)
    for row, (at, values) in zip(table, runs):
        row[np.searchsorted(steps, at)] = values
    known = np.isfinite(table)
    count = known.sum(axis=0)
    shown = count > 0
    filled = np.where(known, table, 0.0)
    mean = filled.sum(axis=0)[shown] / count[shown]
    squares = np.where(known[:, shown], (table[:, shown] - mean) ** 2, 0.0).sum(axis=0)
    spread = np.sqrt(squares / np.maximum(count[shown] - 1, 1))
    axes.plot(steps[shown], mean, style, color=colour, label=label, linewidth=1.5)
    if len(runs) > 1:
        axes.fill_between(steps[shown], mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: Axes, figure: Figure, warmup: int) -> None:
    if warmup > 0:
        axes.axvspan(0, warmup, color=WARMUP_COLOUR, zorder=0, linewidth=0, label="warm-up")
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def sweep(lines: Mapping[str, Mapping[str, Cell]], parameter: str, unit: str, title: str) -> Figure:
    """A figure over the values of one setting, a line for each combination of the others, with the spread over seeds.

    Args:
        lines: cells by value of the setting, by the combination's name. parameter: the setting. unit: of the figure.
        title: above the figure.
    """
    values = list(dict.fromkeys(value for line in lines.values() for value in line))
    with axes_of((5.0, 3.4), title) as (figure, axes):
        for index, (label, line) in enumerate(lines.items()):
            known = [
                (values.index(value), cell.mean, cell.spread or 0.0)
                for value, cell in line.items()
                if cell.mean is not None
            ]
            # Side by side, or the spreads of several lines would hide each other.
            shift = 0.06 * (index - (len(lines) - 1) / 2)
            axes.errorbar(
                [place + shift for place, _, _ in known],
                [mean for _, mean, _ in known],
                yerr=[spread for _, _, spread in known],
                color=RUN_COLOURS[index % len(RUN_COLOURS)],
                marker="o",
                markersize=4,
                linewidth=1.4,
                capsize=2,
                label=label,
            )
        # Values are evenly spaced: a sweep's are usually multiples of each other, and 0 has no place on a log scale.
        axes.set_xticks(range(len(values)), values)
        axes.set_xlabel(parameter)
        axes.set_ylabel(unit)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        if any(lines):
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
