import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gsda_fast.results.plots import RUN_COLOURS
from gsda_fast.results.suite_plots import Bars, bars, level_curves, method_bars, method_colours, spread_curves, sweep
from gsda_fast.results.tables import Cell

COLOURS = {"source-only": "#111111", "gsda": "#222222"}


def axes_of(figure: Figure | None) -> Axes:
    assert figure is not None
    return figure.axes[0]


def legend_of(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def marks_of(axes: Axes) -> list[float]:
    """Where the black lines across the bars stand."""
    lines = [np.asarray(line.get_xdata(), dtype=float) for line in axes.get_lines() if line.get_color() == "k"]
    return [float(xs[0]) for xs in lines if len(xs)]


def test_methods_have_colours_of_their_own() -> None:
    colours = method_colours(["a", "b", "c"])
    assert list(colours.values()) == list(RUN_COLOURS[:3])
    assert len(method_colours([str(number) for number in range(9)])) == 9


# ------------------------------------------------------------------------------------------------------------- bars


def test_bars_of_the_methods_with_figures_and_marks() -> None:
    figure = method_bars(
        [
            Bars("source-only", [Cell(60.04, None, 1)], "#111111", [68.4]),
            Bars("entropy", [Cell()], "#333333"),
            Bars("gsda", [Cell(90.06, 1.5, 3)], "#222222", [95.7]),
        ],
        "A->W",
        "percent",
        marked="paper",
    )
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
    axes = axes_of(method_bars([Bars(name, [Cell(1.0)], "#111111") for name in ("first", "last")], "", ""))
    low, high = axes.get_ylim()
    assert low > high


def test_nothing_marked_needs_no_legend() -> None:
    figure = method_bars([Bars("gsda", [Cell(1.234, None, 1)], "#222222")], "", "", limit=2.0, decimals=2)
    assert legend_of(figure) == []
    assert [text.get_text() for text in axes_of(figure).texts] == ["1.23"]


def test_groups_of_bars_by_hand() -> None:
    figure = bars(
        [
            Bars("source-only", [Cell(50.0, None, 1), Cell()], "#111111", [55.0, None]),
            Bars("gsda", [Cell(70.0, 2.0, 3), Cell(80.0, 1.0, 3)], "#222222"),
        ],
        ["A->W", "D->W"],
        "title",
        "percent",
        marked="paper",
    )
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


def curve(*values: float, start: int = 10) -> tuple[np.ndarray, np.ndarray]:
    return start + 10 * np.arange(len(values)), np.array(values)


def test_a_line_is_the_mean_of_the_runs_and_the_band_their_deviation() -> None:
    curves = {"source-only": [curve(1.0, 2.0)], "gsda": [curve(10.0, 20.0), curve(14.0, 26.0)], "dann": []}
    figure = spread_curves(curves, COLOURS, "title", "percent", warmup=5)
    axes = axes_of(figure)
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["source-only"], [[10, 1], [20, 2]])
    np.testing.assert_array_equal(lines["gsda"], [[10, 12], [20, 23]])
    assert set(lines) == {"source-only", "gsda"}
    (band,) = axes.collections  # of gsda: one run has none
    heights = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices.tolist()}
    # Deviations of 2 and 3 from the mean, over n - 1.
    assert {(10, round(12 + 8**0.5, 6)), (10, round(12 - 8**0.5, 6)), (20, round(23 + 18**0.5, 6))} <= heights
    assert legend_of(figure) == ["source-only", "gsda", "warm-up"]
    assert axes.get_xlim()[0] == 0


def test_a_step_counts_with_the_runs_that_reached_it() -> None:
    axes = axes_of(spread_curves({"gsda": [curve(10.0, 20.0, 30.0), curve(20.0)]}, COLOURS, "", ""))
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[10, 15], [20, 20], [30, 30]])


def test_figures_that_are_not_finite_leave_a_step_out() -> None:
    axes = axes_of(spread_curves({"gsda": [curve(1.0, float("nan"), 3.0), curve(3.0, float("nan"))]}, COLOURS, "", ""))
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[10, 2], [30, 3]])


def test_levels_are_told_apart() -> None:
    figure = level_curves({"domain": [curve(1.0)], "group": [curve(2.0)], "class": [curve(3.0)]}, "title")
    lines = axes_of(figure).get_lines()
    assert [line.get_label() for line in lines] == ["S_dom", "ΣS_grp", "ΣS_cls"]
    assert [np.asarray(line.get_ydata()).tolist() for line in lines] == [[1.0], [2.0], [3.0]]
    assert len({line.get_linestyle() for line in lines}) == len({line.get_color() for line in lines}) == 3


def test_nothing_measured_is_no_figure() -> None:
    nothing = (np.array([], dtype=np.int64), np.array([]))
    assert spread_curves({"gsda": [nothing], "dann": []}, COLOURS, "", "") is None
    assert level_curves({"domain": [nothing], "group": [], "class": []}, "") is None


# ------------------------------------------------------------------------------------------------------------ sweep


def test_a_sweep_has_a_line_for_each_combination() -> None:
    lines = {
        "beta 0": {"0.02": Cell(60.0, 1.0, 3), "0.1": Cell(62.0, 2.0, 3)},
        "beta 1": {"0.02": Cell(61.0, None, 1), "0.5": Cell(65.0, None, 1), "0.1": Cell()},
    }
    figure = sweep(lines, "alpha", "percent", "title")
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
    assert legend_of(sweep({"": {"1": Cell(60.0), "2": Cell(61.0)}}, "groups", "percent", "title")) == []
