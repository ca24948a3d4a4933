"""The figures of a report. Each function returns a matplotlib `Figure` of its own; nothing is shown or global.

What is compared are groups of runs: a method's over transfer tasks and seeds, or single runs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from gsda_fast.results.tables import printable


class Style(NamedTuple):
    """How a group is drawn in every plot of a page."""

    colour: str
    dashes: str = "-"


Curve = tuple[np.ndarray, np.ndarray]
"""Steps (n,), increasing, and values (n,) of one run, NaN where not finite."""

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness; then again, with other dashes.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
# Apart from the groups' colours, so that a level is not taken for a run.
LEVEL_STYLES = {
    "domain": ("S_dom", Style("#111111")),
    "group": ("ΣS_grp", Style("#7b3294", "--")),
    "class": ("ΣS_cls", Style("#a6611a", ":")),
}
_WARMUP_COLOUR = "#e8e8e8"
MOST_BARS = 40
"""Columns of a bar chart at most: of more, the twenty highest and the twenty lowest."""
_MOST_NAMES = 100


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """Return a colour and dashes for each label."""
    each = [Style(colour, dashes) for dashes in _DASHES for colour in _COLOURS]
    return {label: each[index % len(each)] for index, label in enumerate(labels)}


def curves(
    groups: Mapping[str, Sequence[Curve]], title: str, unit: str, of: Mapping[str, Style], warmup: int = 0
) -> Figure | None:
    """Draw a line for each group, the mean of its runs, within a band of one standard deviation.

    Args:
        groups: one curve for each run of a group. of: the styles. warmup: steps to shade.

    Returns:
        None if no run measured anything.
    """
    measured = {
        label: found for label, runs in groups.items() if (found := [run for run in runs if np.isfinite(run[1]).any()])
    }
    if not measured:
        return None
    with _axes_of((5.0, 3.1 + 0.15 * -(-len(measured) // 3)), title) as (figure, axes):
        few = max(len(steps) for runs in measured.values() for steps, _ in runs) <= 30
        legend: dict[str, Any] = {
            label: _band(axes, runs, of[label], "o" if few else "") for label, runs in measured.items()
        }
        if warmup > 0:
            legend["warm-up"] = axes.axvspan(0, warmup, color=_WARMUP_COLOUR, zorder=0, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        _grid(axes, "y")
        _legend(figure, legend)
    return figure


def _band(axes: Axes, runs: Sequence[Curve], style: Style, marker: str) -> Line2D:
    # Runs that are still under way have measured fewer steps; a step counts with the runs that reached it.
    table = pd.concat([pd.Series(values, steps) for steps, values in runs], axis=1).sort_index()
    mean, spread = table.mean(axis=1), table.std(axis=1).fillna(0.0)
    if len(runs) > 1:
        kept = mean.notna()
        mean, spread = mean[kept], spread[kept]
        axes.fill_between(mean.index, mean - spread, mean + spread, color=style.colour, alpha=0.15, linewidth=0)
    (line,) = axes.plot(
        mean.index, mean, style.dashes, color=style.colour, marker=marker, markersize=3.0, linewidth=1.4
    )
    return line


def bars(
    means: pd.DataFrame,
    title: str,
    unit: str,
    of: Mapping[str, Style],
    *,
    spreads: pd.DataFrame | None = None,
    marks: pd.DataFrame | None = None,
    marked: str = "",
    missing: str = "",
) -> Figure:
    """Draw a group of horizontal bars for each column, with the spread as thin lines.

    Args:
        means: groups (rows) by columns; NaN where nothing was measured. of: the styles.
        spreads: of the same shape, or none. marks: what the figures are to be compared with, by a line across the bar.
        marked: what the marks are. missing: what stands in the place of a bar without a figure.
    """
    shown = _highest_and_lowest(means)
    if len(shown) < means.shape[1]:
        title += f" (the {MOST_BARS // 2} highest and lowest of {means.shape[1]})"
    columns = [_name(means.columns[place]) for place in shown]
    thickness = 0.82 / len(means)
    # With many groups the bars stay readable when the figure grows with them.
    with _axes_of((5.0, 1.5 + len(columns) * (0.14 + 0.115 * len(means))), title) as (figure, axes):
        legend: dict[str, Any] = {}
        for index, (label, row) in enumerate(zip(means.index, means.to_numpy()[:, shown])):
            positions = np.arange(len(columns)) + (index - (len(means) - 1) / 2) * thickness
            error = None if spreads is None else np.nan_to_num(spreads.to_numpy()[index, shown])
            legend[label] = _barh(axes, positions, np.nan_to_num(row), thickness * 0.9, error, of[label])
            for position, value in zip(positions, row):
                text, tint = (missing, "#777777") if np.isnan(value) else (f"{value:.0f}", "#222222")
                # Bars are as thick as their text is high up to three groups; beyond that, numbers would overlap.
                if missing and (np.isnan(value) or len(means) <= 3):
                    axes.text(np.nan_to_num(value) + 1, position, text, va="center", fontsize=7, color=tint)
            if marks is not None and label in marks.index:
                for position, value in zip(positions, marks.loc[label].to_numpy()[shown]):
                    _mark(axes, value, position, thickness)
        axes.set_yticks(range(len(columns)), columns, fontsize=8)
        axes.set_ylim(len(columns) - 0.4, -0.6)
        axes.set_xlabel(unit)
        _grid(axes, "x")
        _legend(figure, (legend if len(means) > 1 else {}) | _legend_of_marks(marks, marked))
    return figure


def _highest_and_lowest(means: pd.DataFrame) -> list[int]:
    """Return the places of the columns to show, in order."""
    if means.shape[1] <= MOST_BARS:
        return list(range(means.shape[1]))
    by_mean = np.argsort(-means.mean().to_numpy(), kind="stable")  # without a figure last
    known = by_mean[: int(means.notna().any().sum())]
    return sorted({*known[: MOST_BARS // 2].tolist(), *known[-MOST_BARS // 2 :].tolist()})


def ranking(
    cells: pd.DataFrame,
    title: str,
    unit: str,
    of: Mapping[str, Style],
    *,
    marked: str = "",
    limit: float = 100.0,
    decimals: int = 1,
) -> Figure:
    """Draw a horizontal bar for each group, the spread as a thin line, and both in figures beside it.

    Args:
        cells: by group, `mean` and `spread`, NaN where there is none, and `mark`, to compare with, if any.
        title, unit: what is shown. of: the styles. marked: what the marks are.
        limit: end of the axis, the same in all figures that belong together. decimals: of the figures.
    """
    with _axes_of((4.6, 1.1 + 0.26 * len(cells)), title) as (figure, axes):
        for position, (label, cell) in enumerate(cells.iterrows()):
            text = "-"
            if not np.isnan(cell["mean"]):
                error = np.nan_to_num(cell["spread"])
                _barh(axes, [position], [cell["mean"]], 0.72, [error], of[str(label)])
                spread = "" if np.isnan(cell["spread"]) else f" ± {cell['spread']:.{decimals}f}"
                text = f"{cell['mean']:.{decimals}f}{spread}"
            _mark(axes, cell.get("mark", np.nan), position, 0.72)
            # In a column, where it is not taken for the figure of a mark.
            beside = axes.get_yaxis_transform()
            axes.text(1.02, position, text, transform=beside, va="center", fontsize=8, color="#222222")
        axes.set_yticks(range(len(cells)), [_name(label) for label in cells.index])
        axes.set_ylim(len(cells) - 0.4, -0.6)
        axes.set_xlim(min(0.0, cells["mean"].min()), 1.02 * limit)
        axes.set_xlabel(unit)
        _grid(axes, "x")
        _legend(figure, _legend_of_marks(cells.get("mark"), marked))
    return figure


def _barh(axes: Axes, positions: Any, widths: Any, thickness: float, error: Any, style: Style) -> Any:
    hatch = {"-": None, "--": "///", ":": "...", "-.": "xxx"}[style.dashes]
    return axes.barh(
        positions, widths, thickness, xerr=error, color=style.colour, hatch=hatch, edgecolor="white", linewidth=0,
        error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
    )  # fmt: skip


def _mark(axes: Axes, value: float, position: float, thickness: float) -> None:
    if not np.isnan(value):
        ends = [position - thickness / 2, position + thickness / 2]
        # White at its sides, so that it is seen on a black bar too.
        axes.plot([value, value], ends, "w-", linewidth=4)
        axes.plot([value, value], ends, "k-", linewidth=1.8)


def _legend_of_marks(marks: pd.DataFrame | pd.Series | None, marked: str) -> dict[str, Any]:
    if marks is None or not marks.notna().to_numpy().any():
        return {}
    return {marked: Line2D([], [], color="k", marker="|", linestyle="", markersize=8, markeredgewidth=1.8)}


def confusion_matrix(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Draw each true class (row) in percent of its samples, by predicted class (column).

    Args:
        confusion: (r, r) counts, rows the true class.
        classes: (r,) names, shown up to a hundred.
        title: above the figure.
    """
    counts = confusion.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * confusion, counts, out=np.full(confusion.shape, np.nan), where=counts > 0)
    r = len(classes)
    side = 4.6 if r <= 15 else min(1.8 + 0.2 * r, 14.0) if r <= _MOST_NAMES else 8.0
    with _axes_of((side, side), title) as (figure, axes):
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        if r <= _MOST_NAMES:
            names = [_name(label) for label in classes]
            axes.set_xticks(range(r), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
            axes.set_yticks(range(r), names, fontsize=8)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true, percent of each row")
        axes.spines[:].set_visible(False)
        if r <= 15:
            for i, j in np.argwhere(percent >= 0.5):
                colour = "white" if percent[i, j] > 55 else "#222222"
                axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
    return figure


def tsne(
    features: tuple[np.ndarray, np.ndarray],
    labels: tuple[np.ndarray, np.ndarray],
    *,
    classes: Sequence[str],
    title: str,
    points: int = 400,
    seed: int = 0,
) -> Figure | None:
    """Draw both domains in two dimensions (t-SNE), coloured by class and marked by domain.

    Args:
        features: (n_s, D) of the source and (n_t, D) of the target.
        labels: (n_s,) and (n_t,), -1 where unknown (drawn grey).
        classes: (r,) names.
        title: above the figure.
        points: at most so many of each domain, drawn at random; the time grows with their number.
        seed: of the draw and of the embedding.

    Returns:
        None where there is nothing to embed: fewer than four samples, features that are all equal, or, of a model that
        diverged, not finite.
    """
    chosen = [_subsample(len(of_domain), points, seed) for of_domain in features]
    together = np.concatenate([of_domain[rows] for of_domain, rows in zip(features, chosen)])
    if len(together) < 4 or not np.isfinite(together).all() or np.ptp(together, axis=0).max() == 0:
        return None
    embedded = np.split(embed(together, seed), [len(chosen[0])])
    palette = class_colours(len(classes))
    with _axes_of((5.0, 5.4), title) as (figure, axes):
        for positions, of_domain, rows, marker, size in zip(embedded, labels, chosen, "ox", (9, 13)):
            x, y = positions.T
            axes.scatter(x, y, s=size, c=palette[of_domain[rows]], marker=marker, linewidths=0.8, alpha=0.7)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#bbbbbb")

        def handle(colour: Any, marker: str) -> Line2D:
            return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5)

        legend = {"source": handle("#555555", "o"), "target": handle("#555555", "x")}
        # With more classes than a legend can hold the colours still show whether neighbours share a class.
        if len(classes) <= 20:
            legend |= {name: handle(colour, "s") for name, colour in zip(classes, palette)}
        _legend(figure, legend, ncols=6, handletextpad=0.1)
    return figure


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """Place (n, D) features at (n, 2) positions by t-SNE, the same for the same seed."""
    perplexity = min(30.0, (len(features) - 1) / 3)
    # Threads meet in each iteration, and on a busy machine they wait there for most of the time.
    with threadpool_limits(1):
        # The leading principal components carry the neighbourhoods and make the search for them cheap.
        reduced = PCA(min(50, *features.shape), svd_solver="full").fit_transform(features)
        # Half of the usual 1000 iterations: the clusters hardly move after that, and it takes half the time.
        return TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(reduced)


def _subsample(count: int, points: int, seed: int) -> np.ndarray:
    if count <= points:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, points, replace=False))


def class_colours(num_classes: int) -> np.ndarray:
    """Return (r + 1, 4) colours; the last, which the label -1 picks, is the grey of an unknown class."""
    if num_classes <= 20:
        colours = mpl.colormaps["tab10" if num_classes <= 10 else "tab20"](np.arange(num_classes))
    else:
        colours = mpl.colormaps["turbo"](np.linspace(0.03, 0.97, num_classes))
    return np.concatenate([colours, [[0.6, 0.6, 0.6, 1.0]]])


def sweep(lines: Mapping[str, pd.DataFrame], parameter: str, unit: str, title: str) -> Figure:
    """Draw a figure over the values of one setting, a line for each combination of the others, with the spreads.

    Args:
        lines: `mean` and `spread` by value of the setting, by the combination's name. parameter: the setting.
        unit: of the figure. title: above it.
    """
    values = list(dict.fromkeys(value for line in lines.values() for value in line.index))
    with _axes_of((5.0, 3.4), title) as (figure, axes):
        legend = {}
        for index, ((label, line), style) in enumerate(zip(lines.items(), styles(list(lines)).values())):
            known = line.dropna(subset="mean")
            # Side by side, or the spreads of several lines would hide each other.
            shift = 0.06 * (index - (len(lines) - 1) / 2)
            places = [values.index(value) + shift for value in known.index]
            legend[label] = axes.errorbar(
                places, known["mean"], yerr=known["spread"].fillna(0.0), label=label, color=style.colour,
                linestyle=style.dashes, marker="o", markersize=4, linewidth=1.4, capsize=2,
            )  # fmt: skip
        # Values are evenly spaced: a sweep's are usually multiples of each other, and 0 has no place on a log scale.
        axes.set_xticks(range(len(values)), [_name(value) for value in values])
        axes.set_xlabel(_name(parameter))
        axes.set_ylabel(unit)
        _grid(axes, "y")
        _legend(figure, {label: handle for label, handle in legend.items() if label})
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=160)
    return written.getvalue()


def _name(text: object) -> str:
    return printable(text).replace("->", " → ")


def _grid(axes: Axes, along: Any) -> None:
    axes.grid(axis=along, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Figure, handles: Mapping[str, Any], ncols: int = 3, **options: Any) -> None:
    if handles:
        options |= {"loc": "outside lower center", "ncols": ncols, "frameon": False, "fontsize": 8}
        figure.legend(list(handles.values()), [_name(label) for label in handles], **options)


@contextmanager
def _axes_of(size: tuple[float, float], title: str) -> Iterator[tuple[Figure, Axes]]:
    """Make a figure of that size in inches and its axes, in the style of all plots."""
    # A name with two dollar signs is no mathematics.
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_title(_name(title), fontsize=10, wrap=True)
        yield figure, axes
