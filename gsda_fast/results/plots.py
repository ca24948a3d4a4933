"""The figures of a report. Each function returns a matplotlib `Figure` of its own; nothing is shown or global."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from gsda_fast.results import alignment

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Apart from the runs' colours, so that a level is not taken for a run.
LEVEL_STYLES = {
    "domain": ("S_dom", "#111111", "-"),
    "group": ("ΣS_grp", "#7b3294", "--"),
    "class": ("ΣS_cls", "#a6611a", ":"),
}
WARMUP_COLOUR = "#e8e8e8"


@dataclass(frozen=True)
class Curves:
    """What was measured during one run.

    Attributes:
        label: the run's name in legends.
        records: the lines of `metrics.jsonl`.
        warmup: number of source-only steps at the beginning.
        colour: of the run in every plot.
    """

    label: str
    records: Sequence[Mapping[str, Any]]
    warmup: int = 0
    colour: str = RUN_COLOURS[0]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, (n,) int64, and values, (n,) float64, of one figure where it was measured; NaN where not finite."""
        measured = [(record["step"], record[name]) for record in self.records if name in record]
        steps = np.array([step for step, _ in measured], dtype=np.int64)
        return steps, np.array([value for _, value in measured], dtype=np.float64)


def metric_curves(runs: Sequence[Curves], name: str, title: str, unit: str) -> Figure | None:
    """One figure of `metrics.jsonl` over the steps, a line for each run, warm-up shaded; None if no run has it."""
    return _curves([(run, *run.series(name)) for run in runs], title, unit)


def relative_mismatch(runs: Sequence[Curves]) -> Figure | None:
    """`alignment.relative_mismatch` of each run; None if no run measured all three levels."""
    measured = [(run, *alignment.relative_mismatch(run.records)) for run in runs]
    return _curves(measured, "Relative mismatch of the gradient magnitudes", alignment.MISMATCH_FORMULA)


def gradient_norms(run: Curves) -> Figure | None:
    """Gradient magnitudes of the three levels, each summed over its discriminators; None if the run has none."""
    series = {level: run.series(f"gradient_norm_{level}") for level in LEVEL_STYLES}
    measured = {level: pair for level, pair in series.items() if len(pair[0])}
    if not measured:
        return None
    with axes_of((5.0, 3.2), f"Gradient magnitudes: {run.label}") as (figure, axes):
        for level, (steps, values) in measured.items():
            label, colour, style = LEVEL_STYLES[level]
            axes.plot(steps, values, style, color=colour, label=label, linewidth=1.6)
        axes.set_ylabel("sum of ‖∂L/∂f‖")
        _finish_steps(axes, [run])
    return figure


def _curves(series: Sequence[tuple[Curves, np.ndarray, np.ndarray]], title: str, unit: str) -> Figure | None:
    if not any(len(steps) for _, steps, _ in series):
        return None
    # A legend of many runs goes below the axes, and needs a line for every two of them.
    with axes_of((5.0, 3.2 + 0.1 * len(series) * (len(series) > 3)), title) as (figure, axes):
        marker = "o" if max(len(steps) for _, steps, _ in series) <= 30 else ""
        for run, steps, values in series:
            if not len(steps):
                continue
            axes.plot(steps, values, color=run.colour, marker=marker, markersize=3.5, label=run.label, linewidth=1.4)
        axes.set_ylabel(unit)
        drawn = [run for run, steps, _ in series if len(steps)]
        _finish_steps(axes, drawn, legend_below=len(drawn) > 3)
    return figure


def _finish_steps(axes: Axes, runs: Sequence[Curves], legend_below: bool = False) -> None:
    warmups = {run.warmup for run in runs}
    # Runs with different warm-ups have no common one to shade.
    if len(warmups) == 1 and (warmup := warmups.pop()) > 0:
        axes.axvspan(0, warmup, color=WARMUP_COLOUR, zorder=0, linewidth=0, label="warm-up")
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if legend_below:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    else:
        axes.legend(facecolor="white", edgecolor="none", framealpha=0.8, fontsize=8)


def confusion_matrix(confusion: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """Each true class (row) in percent of its samples, by predicted class (column).

    Args:
        confusion: (r, r) counts, rows the true class.
        classes: (r,) names.
        title: above the figure.
    """
    counts = confusion.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * confusion, counts, out=np.full(confusion.shape, np.nan), where=counts > 0)
    r = len(classes)
    side = 4.6 if r <= 15 else min(1.8 + 0.2 * r, 14.0)
    with axes_of((side, side), title) as (figure, axes):
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        axes.set_xticks(range(r), classes, rotation=90 if max(map(len, classes)) > 2 else 0, fontsize=8)
        axes.set_yticks(range(r), classes, fontsize=8)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true, percent of each row")
        axes.spines[:].set_visible(False)
        if r <= 15:
            for i, j in np.argwhere(percent >= 0.5):
                colour = "white" if percent[i, j] > 55 else "#222222"
                axes.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=7.5)
    return figure


@dataclass(frozen=True)
class ClassAccuracies:
    """Accuracies of one run after its last step.

    Attributes:
        label: the run's name in the legend.
        accuracies: (r,) percent; None for a class that is absent from the target.
        colour: of the run in every plot.
    """

    label: str
    accuracies: Sequence[float | None]
    colour: str = RUN_COLOURS[0]


def per_class_bars(runs: Sequence[ClassAccuracies], classes: Sequence[str]) -> Figure:
    """Accuracy of each class, a bar for each run; a class that is absent from the target says so.

    Args:
        runs: at least one.
        classes: (r,) names.
    """
    thickness = 0.8 / len(runs)
    height = 1.2 + len(classes) * (0.16 + 0.12 * len(runs))
    with axes_of((5.0, height), "Accuracy per class") as (figure, axes):
        for index, run in enumerate(runs):
            positions = np.arange(len(classes)) + (index - (len(runs) - 1) / 2) * thickness
            widths = [0.0 if accuracy is None else accuracy for accuracy in run.accuracies]
            axes.barh(positions, widths, thickness * 0.92, color=run.colour, label=run.label)
            for position, accuracy in zip(positions, run.accuracies):
                text, tint = ("absent", "#777777") if accuracy is None else (f"{accuracy:.0f}", "#222222")
                # Bars are as thick as their text is high up to three runs; beyond that, numbers would overlap.
                if accuracy is None or len(runs) <= 3:
                    axes.text((accuracy or 0) + 1, position, text, va="center", fontsize=7, color=tint)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("percent")
        if len(runs) > 1:
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def tsne(
    source: np.ndarray,
    source_labels: np.ndarray,
    target: np.ndarray,
    target_labels: np.ndarray,
    *,
    classes: Sequence[str],
    title: str,
    points: int = 1000,
    seed: int = 0,
) -> Figure | None:
    """Both domains in two dimensions (t-SNE), coloured by class and marked by domain.

    None where there is nothing to embed: fewer than four samples, features that are all equal, or, of a model that
    diverged, not finite.

    Args:
        source, target: (n_s, D) and (n_t, D) features.
        source_labels, target_labels: (n_s,) and (n_t,), -1 where unknown (drawn grey).
        classes: (r,) names.
        title: above the figure.
        points: at most so many of each domain, drawn at random; the time grows with their number.
        seed: of the draw and of the embedding.
    """
    chosen = [_subsample(len(features), points, seed) for features in (source, target)]
    source, target = source[chosen[0]], target[chosen[1]]
    labels = [source_labels[chosen[0]], target_labels[chosen[1]]]
    features = np.concatenate([source, target])
    if len(features) < 4 or not np.isfinite(features).all() or np.ptp(features, axis=0).max() == 0:
        return None
    embedded = embed(features, seed)
    palette = class_colours(len(classes))
    with axes_of((5.0, 5.4), title) as (figure, axes):
        for positions, of_domain, marker, size in (
            (embedded[: len(source)], labels[0], "o", 9),
            (embedded[len(source) :], labels[1], "x", 13),
        ):
            axes.scatter(
                positions[:, 0], positions[:, 1], s=size, c=palette[of_domain], marker=marker, linewidths=0.8, alpha=0.7
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#bbbbbb")
        handles = [
            Line2D([], [], color="#555555", marker=marker, linestyle="", markersize=5, label=label)
            for marker, label in (("o", "source"), ("x", "target"))
        ]
        # With more classes than a legend can hold the colours still show whether neighbours share a class.
        if len(classes) <= 20:
            handles += [
                Line2D([], [], color=palette[index], marker="s", linestyle="", markersize=5, label=name)
                for index, name in enumerate(classes)
            ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8, handletextpad=0.1
        )
    return figure


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """(n, D) features to (n, 2) positions by t-SNE, the same for the same seed."""
    perplexity = min(30.0, (len(features) - 1) / 3)
    # Threads meet in each iteration, and on a busy machine they wait there for most of the time.
    with threadpool_limits(1):
        # The leading principal components carry the neighbourhoods and make the search for them cheap.
        reduced = PCA(min(50, *features.shape), svd_solver="full").fit_transform(features)
        # Half of the usual 1000 iterations: the clusters hardly move after that, and it takes half the time.
        return TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(reduced)


def class_colours(num_classes: int) -> np.ndarray:
    """(r + 1, 4) colours; the last, which the label -1 picks, is the grey of an unknown class."""
    if num_classes <= 10:
        colours = mpl.colormaps["tab10"](np.arange(num_classes))
    elif num_classes <= 20:
        colours = mpl.colormaps["tab20"](np.arange(num_classes))
    else:
        colours = mpl.colormaps["turbo"](np.linspace(0.03, 0.97, num_classes))
    return np.concatenate([colours, [[0.6, 0.6, 0.6, 1.0]]])


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=160)
    return written.getvalue()


def _subsample(count: int, points: int, seed: int) -> np.ndarray:
    if count <= points:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, points, replace=False))


@contextmanager
def axes_of(size: tuple[float, float], title: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure of that size in inches and its axes, in the style of all plots; `->` in the title becomes an arrow."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title.replace("->", " → "), fontsize=10)
        yield figure, axes
