import io
import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_info, threadpool_limits

from gsda_fast.results import plots
from gsda_fast.results.alignment import series
from gsda_fast.results.plots import Curve, Style

RECORDS: list[dict[str, Any]] = [
    {"step": 10, "classification": 2.0},
    {"step": 20, "classification": None, "accuracy": 50.0},
    {"step": 30, "classification": 1.0, "synchronization": 0.5, "gradient_norm_domain": 2.0},
    {
        "step": 40,
        "synchronization": 0.5,
        "gradient_norm_domain": 2.0,
        "gradient_norm_group": 1.0,
        "gradient_norm_class": 3.0,
    },
    {
        "step": 50,
        "synchronization": 0.0,
        "gradient_norm_domain": 0.0,
        "gradient_norm_group": 0.0,
        "gradient_norm_class": 0.0,
    },
]


NAN = math.nan
STYLES = {"source-only": Style("#111111"), "gsda": Style("#222222")}


def axes_of(figure: Figure | None) -> Axes:
    assert figure is not None
    return figure.axes[0]


def legend_of(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def marks_of(axes: Axes) -> list[float]:
    """Where the black lines across the bars stand."""
    lines = [np.asarray(line.get_xdata(), dtype=float) for line in axes.get_lines() if line.get_color() == "k"]
    return [float(xs[0]) for xs in lines if len(xs)]


def table(**rows: list[float]) -> pd.DataFrame:
    frame = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
    return frame.rename(index=lambda name: name.replace("_", "-"))


def cells(**rows: tuple[float, ...]) -> pd.DataFrame:
    return table(**{name: list(row) for name, row in rows.items()}).set_axis(["mean", "spread", "mark"], axis=1)


def test_series_leaves_out_unmeasured_and_keeps_nan() -> None:
    steps, values = series(RECORDS, "classification")
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(values, [2.0, math.nan, 1.0])


def test_groups_have_styles_of_their_own() -> None:
    styles = plots.styles([str(number) for number in range(28)])
    assert len(set(styles.values())) == 28
    assert {style.dashes for style in list(styles.values())[:7]} == {"-"}


def test_confusion_matrix_is_in_percent_of_the_true_class() -> None:
    figure = plots.confusion_matrix(np.array([[3, 1, 0], [0, 0, 0], [0, 1, 4]]), ["cat", "dog", "owl"], "title")
    shown = figure.axes[0].images[0].get_array()
    assert shown is not None
    np.testing.assert_array_equal(np.ma.getdata(shown)[[0, 2]], [[75, 25, 0], [0, 20, 80]])
    assert texts(figure) == ["75", "25", "20", "80"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog", "owl"]


def test_confusion_matrix_of_many_classes_has_no_numbers() -> None:
    figure = plots.confusion_matrix(np.eye(65, dtype=np.int64), [f"class {index}" for index in range(65)], "title")
    assert texts(figure) == []


def test_confusion_matrix_of_a_thousand_classes_is_an_image() -> None:
    figure = plots.confusion_matrix(np.eye(1000, dtype=np.int64), [f"class {index}" for index in range(1000)], "title")
    assert len(figure.axes[0].get_yticklabels()) < 20  # numbers of classes
    assert max(figure.get_size_inches()) <= 14


def test_bars_of_each_class() -> None:
    means = table(a=[50.0, math.nan], b=[25.0, math.nan]).set_axis(["cat", "dog"], axis=1)
    figure = plots.bars(means, "title", "percent", plots.styles(["a", "b"]), missing="absent")
    widths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]  # type: ignore[attr-defined]
    assert widths == [[50.0, 0.0], [25.0, 0.0]]
    assert texts(figure) == ["50", "absent", "25", "absent"]


def test_of_many_columns_the_highest_and_the_lowest_are_shown() -> None:
    values = [float((17 * place) % 345) for place in range(345)]
    values[3] = math.nan
    means = table(gsda=values).set_axis([f"class {place}" for place in range(345)], axis=1)
    figure = plots.bars(means, "Accuracy", "percent", STYLES)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ranked = sorted((value, f"class {place}") for place, value in enumerate(values) if place != 3)
    assert set(shown) == {name for _, name in [*ranked[:20], *ranked[-20:]]}
    assert "20 highest and lowest of 345" in figure.axes[0].get_title()
    assert figure.get_size_inches()[1] < 15


def clusters(n: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 2
    return generator.normal(size=(n, 8)) + 20 * labels[:, None] + shift, labels


def test_tsne_marks_domains_and_classes() -> None:
    source, source_labels = clusters(40, 0.0)
    target, target_labels = clusters(30, 1.0)
    target_labels[0] = -1
    figure = plots.tsne(
        (source, target), (source_labels, target_labels), classes=["cat", "dog"], title="title", points=20, seed=0
    )
    assert figure is not None
    of_source, of_target = figure.axes[0].collections
    assert (len(of_source.get_offsets()), len(of_target.get_offsets())) == (20, 20)
    palette = {tuple(colour) for colour in plots.class_colours(2)[:2, :3]}
    assert {tuple(colour) for colour in np.asarray(of_source.get_facecolor())[:, :3]} == palette
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["source", "target", "cat", "dog"]


def test_embedding_is_repeatable_and_keeps_clusters_apart() -> None:
    features, labels = clusters(40, 0.0)
    first, second = plots.embed(features, seed=1), plots.embed(features, seed=1)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (40, 2)
    distance = np.linalg.norm(first[:, None] - first[None], axis=-1) + np.where(np.eye(40), np.inf, 0)
    assert (labels[distance.argmin(axis=1)] == labels).all()


@pytest.mark.parametrize("broken", ["not finite", "all equal", "too few"])
def test_tsne_of_nothing_to_embed(broken: str) -> None:
    features, labels = clusters(10, 0.0)
    if broken == "not finite":
        features[3, 2] = np.nan
    elif broken == "all equal":
        features[:] = 1.0
    else:
        features, labels = features[:1], labels[:1]
    assert plots.tsne((features, features), (labels, labels), classes=["0", "1"], title="") is None


@pytest.mark.parametrize("num_classes", [1, 10, 12, 31, 65])
def test_class_colours_are_distinct_and_end_with_grey(num_classes: int) -> None:
    colours = plots.class_colours(num_classes)
    assert colours.shape == (num_classes + 1, 4)
    assert len(np.unique(colours[:-1], axis=0)) == num_classes
    assert len(set(colours[-1][:3])) == 1


def test_png_leaves_no_global_state() -> None:
    before = dict(mpl.rcParams)
    figure = plots.curves({"gsda": [series(RECORDS, "classification")]}, "Loss", "nats", STYLES)
    assert figure is not None
    image = Image.open(io.BytesIO(plots.png(figure)))
    assert image.format == "PNG"
    assert image.size == (800, 520)
    assert dict(mpl.rcParams) == before
    assert plots.png(figure) == plots.png(figure)


def test_an_embedding_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several would wait for each other in each iteration, on a busy machine for most of the time."""
    seen = []

    def spy(self: TSNE, features: np.ndarray) -> np.ndarray:
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return features[:, :2]

    monkeypatch.setattr(TSNE, "fit_transform", spy)
    with threadpool_limits(2):
        plots.embed(np.random.default_rng(0).normal(size=(20, 4)), 0)
    assert set(seen) == {1}


# ------------------------------------------------------------------------------------------------------------- bars


def test_bars_of_the_methods_with_figures_and_marks() -> None:
    rows = cells(source_only=(60.04, NAN, 68.4), entropy=(NAN, NAN, NAN), gsda=(90.06, 1.5, 95.7))
    figure = plots.ranking(rows, "A->W", "percent", STYLES, marked="paper")
    axes = axes_of(figure)
    assert axes.get_title() == "A → W"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["source-only", "entropy", "gsda"]
    assert [(bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches] == [
        (60.04, 0),
        (90.06, 2),
    ]
    assert [text.get_text() for text in axes.texts] == ["60.0", "-", "90.1 ± 1.5"]
    # The figures stand beside the axes, in the rows of their bars.
    assert [text.get_position()[1] for text in axes.texts] == [0, 1, 2]
    figure.canvas.draw()
    assert all(text.get_window_extent().x0 > axes.get_window_extent().x1 for text in axes.texts)
    assert marks_of(axes) == [68.4, 95.7]
    assert legend_of(figure) == ["paper"]
    assert axes.get_xlim() == (0, pytest.approx(102))


def test_methods_stand_in_the_order_of_the_tables() -> None:
    axes = axes_of(plots.ranking(cells(source_only=(1.0, NAN, NAN), gsda=(1.0, NAN, NAN)), "", "", STYLES))
    low, high = axes.get_ylim()
    assert low > high


def test_nothing_marked_needs_no_legend() -> None:
    figure = plots.ranking(cells(gsda=(1.234, NAN, NAN)), "", "", STYLES, marked="paper", limit=2.0, decimals=2)
    assert legend_of(figure) == []
    assert [text.get_text() for text in axes_of(figure).texts] == ["1.23"]


def test_groups_of_bars_by_hand() -> None:
    columns = ["A->W", "D->W"]
    means = table(source_only=[50.0, NAN], gsda=[70.0, 80.0]).set_axis(columns, axis=1)
    spreads, marks = table(source_only=[NAN, NAN], gsda=[2.0, 1.0]), table(source_only=[55.0, NAN])
    figure = plots.bars(means, "title", "percent", STYLES, spreads=spreads, marks=marks, marked="paper")
    axes = axes_of(figure)
    assert [[bar.get_width() for bar in container] for container in axes.containers if len(container) == 2] == [
        [50.0, 0.0],
        [70.0, 80.0],
    ]
    first, second = (bar.get_y() + bar.get_height() / 2 for bar in (axes.patches[0], axes.patches[2]))
    assert first < 0 < second  # beside each other, around the group's place
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A → W", "D → W"]
    assert marks_of(axes) == [55.0]
    assert legend_of(figure) == ["source-only", "gsda", "paper"]


# ----------------------------------------------------------------------------------------------------------- curves


def curve(*values: float, start: int = 10) -> Curve:
    return start + 10 * np.arange(len(values)), np.array(values)


def test_a_line_is_the_mean_of_the_runs_and_the_band_their_deviation() -> None:
    curves = {"source-only": [curve(1.0, 2.0)], "gsda": [curve(10.0, 20.0), curve(14.0, 26.0)], "dann": []}
    figure = plots.curves(curves, "title", "percent", STYLES, warmup=5)
    axes = axes_of(figure)
    lines = {line.get_color(): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["#111111"], [[10, 1], [20, 2]])
    np.testing.assert_array_equal(lines["#222222"], [[10, 12], [20, 23]])
    assert set(lines) == {"#111111", "#222222"}
    (band,) = axes.collections  # of gsda: one run has none
    heights = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices.tolist()}
    # Deviations of 2 and 3 from the mean, over n - 1.
    assert {(10, round(12 + 8**0.5, 6)), (10, round(12 - 8**0.5, 6)), (20, round(23 + 18**0.5, 6))} <= heights
    assert legend_of(figure) == ["source-only", "gsda", "warm-up"]
    assert axes.get_xlim()[0] == 0


def test_a_step_counts_with_the_runs_that_reached_it() -> None:
    axes = axes_of(plots.curves({"gsda": [curve(10.0, 20.0, 30.0), curve(20.0)]}, "", "", STYLES))
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[10, 15], [20, 20], [30, 30]])


def test_figures_that_are_not_finite_leave_a_step_out() -> None:
    axes = axes_of(plots.curves({"gsda": [curve(1.0, float("nan"), 3.0), curve(3.0, float("nan"))]}, "", "", STYLES))
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[10, 2], [30, 3]])


def test_a_single_run_has_gaps_and_no_band() -> None:
    axes = axes_of(plots.curves({"gsda": [curve(1.0, NAN, 3.0)]}, "", "", STYLES))
    np.testing.assert_array_equal(axes.get_lines()[0].get_xydata(), [[10, 1], [20, NAN], [30, 3]])
    assert not axes.collections
    assert not axes.patches  # no warm-up to shade


def test_nothing_measured_is_no_figure() -> None:
    nothing = (np.array([], dtype=np.int64), np.array([]))
    assert plots.curves({"gsda": [nothing], "dann": []}, "", "", STYLES) is None


# ------------------------------------------------------------------------------------------------------------ sweep


def settings(values: dict[str, tuple[float, float]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(values, orient="index", columns=["mean", "spread"])


def test_a_sweep_has_a_line_for_each_combination() -> None:
    lines = {
        "beta 0": settings({"0.02": (60.0, 1.0), "0.1": (62.0, 2.0)}),
        "beta 1": settings({"0.02": (61.0, NAN), "0.5": (65.0, NAN), "0.1": (NAN, NAN)}),
    }
    figure = plots.sweep(lines, "alpha", "percent", "title")
    axes = axes_of(figure)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.02", "0.1", "0.5"]
    assert axes.get_xlabel() == "alpha"
    drawn = [np.asarray(container.lines[0].get_xydata()) for container in axes.containers]  # type: ignore[attr-defined]
    assert [line[:, 1].tolist() for line in drawn] == [[60.0, 62.0], [61.0, 65.0]]
    # Evenly spaced, and shifted a little so that neither spread hides the other.
    assert [line[:, 0].round().tolist() for line in drawn] == [[0, 1], [0, 2]]
    assert drawn[0][0, 0] < drawn[1][0, 0]
    assert legend_of(figure) == ["beta 0", "beta 1"]


def test_a_sweep_of_one_setting_needs_no_legend() -> None:
    assert legend_of(plots.sweep({"": settings({"1": (60.0, NAN)})}, "groups", "percent", "title")) == []


# ------------------------------------------------------------------------------------------------------------ names


def test_names_are_no_mathematics_and_have_no_control_characters() -> None:
    """Two dollar signs would make a formula of what is between them, and an error of what is none."""
    names = ["$\\frac{$", "_hidden_", "a\x1bb"]
    features, labels = clusters(12, 0.0)
    groups = {name: [curve(1.0, 2.0)] for name in names}
    styles = plots.styles(names)
    wide = pd.DataFrame(np.ones((3, 3)), index=names, columns=names)
    drawn = [
        plots.confusion_matrix(np.eye(3, dtype=np.int64), names, names[0]),
        plots.tsne((features, features), (labels, labels), classes=names, title=names[0]),
        plots.curves(groups, names[0], names[0], styles),
        plots.bars(wide, names[0], "", styles),
        plots.ranking(wide.set_axis(["mean", "spread", "mark"], axis=1), names[0], "", styles),
        plots.sweep({name: settings({name: (1.0, 1.0)}) for name in names}, names[0], "", names[0]),
    ]
    for figure in drawn:
        assert figure is not None
        plots.png(figure)
        shown = [text.get_text() for text in figure.findobj(Text)]
        assert names[0] in shown
        assert not any("\x1b" in text for text in shown)
    assert legend_of(drawn[1])[2:] == legend_of(drawn[2]) == [*names[:2], "a\\x1bb"]
