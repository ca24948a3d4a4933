import io
import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_info, threadpool_limits

from gsda_fast.results import plots
from gsda_fast.results.plots import ClassAccuracies, Curves

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


def lines(figure: Figure) -> dict[str, Any]:
    return {str(line.get_label()): line for line in figure.axes[0].get_lines()}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_series_leaves_out_unmeasured_and_keeps_nan() -> None:
    steps, values = Curves("gsda", RECORDS).series("classification")
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_array_equal(values, [2.0, math.nan, 1.0])


def test_metric_curves_draws_each_run_that_measured_it() -> None:
    runs = [
        Curves("a", RECORDS, warmup=25, colour="#111111"),
        Curves("b", RECORDS[:1], warmup=25, colour="#222222"),
        Curves("c", [], warmup=25),
    ]
    figure = plots.metric_curves(runs, "classification", "Loss", "nats")
    assert figure is not None
    drawn = lines(figure)
    assert set(drawn) == {"a", "b"}
    np.testing.assert_array_equal(drawn["a"].get_xydata(), [[10, 2], [20, math.nan], [30, 1]])
    assert (drawn["a"].get_color(), drawn["b"].get_color()) == ("#111111", "#222222")
    (shaded,) = figure.axes[0].patches
    assert (shaded.get_x(), shaded.get_width()) == (0, 25)
    assert figure.axes[0].get_title() == "Loss"
    assert plots.metric_curves(runs, "entropy", "Entropy", "nats") is None


def test_no_common_warmup_is_not_shaded() -> None:
    for warmups in ((0, 0), (10, 20)):
        runs = [Curves(str(index), RECORDS, warmup) for index, warmup in enumerate(warmups)]
        figure = plots.metric_curves(runs, "classification", "Loss", "nats")
        assert figure is not None
        assert not figure.axes[0].patches


def test_gradient_norms_and_mismatch() -> None:
    figure = plots.gradient_norms(Curves("gsda", RECORDS))
    assert figure is not None
    drawn = lines(figure)
    np.testing.assert_array_equal(drawn["S_dom"].get_xydata(), [[30, 2], [40, 2], [50, 0]])
    np.testing.assert_array_equal(drawn["ΣS_grp"].get_xydata(), [[40, 1], [50, 0]])
    np.testing.assert_array_equal(drawn["ΣS_cls"].get_xydata(), [[40, 3], [50, 0]])
    assert plots.gradient_norms(Curves("source-only", RECORDS[:2])) is None
    mismatch = plots.relative_mismatch([Curves("gsda", RECORDS), Curves("source-only", RECORDS[:2])])
    assert mismatch is not None
    assert set(lines(mismatch)) == {"gsda"}
    assert plots.relative_mismatch([Curves("source-only", RECORDS[:2])]) is None


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


def test_per_class_bars() -> None:
    runs = [ClassAccuracies("a", [50.0, None], "#111111"), ClassAccuracies("b", [25.0, None], "#222222")]
    figure = plots.per_class_bars(runs, ["cat", "dog"])
    widths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]  # type: ignore[attr-defined]
    assert widths == [[50.0, 0.0], [25.0, 0.0]]
    assert texts(figure) == ["50", "absent", "25", "absent"]


def clusters(n: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 2
    return generator.normal(size=(n, 8)) + 20 * labels[:, None] + shift, labels


def test_tsne_marks_domains_and_classes() -> None:
    source, source_labels = clusters(40, 0.0)
    target, target_labels = clusters(30, 1.0)
    target_labels[0] = -1
    figure = plots.tsne(
        source, source_labels, target, target_labels, classes=["cat", "dog"], title="title", points=20, seed=0
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
    assert plots.tsne(features, labels, features, labels, classes=["0", "1"], title="") is None


@pytest.mark.parametrize("num_classes", [1, 10, 12, 31, 65])
def test_class_colours_are_distinct_and_end_with_grey(num_classes: int) -> None:
    colours = plots.class_colours(num_classes)
    assert colours.shape == (num_classes + 1, 4)
    assert len(np.unique(colours[:-1], axis=0)) == num_classes
    assert len(set(colours[-1][:3])) == 1


def test_png_leaves_no_global_state() -> None:
    before = dict(mpl.rcParams)
    figure = plots.metric_curves([Curves("a", RECORDS)], "classification", "Loss", "nats")
    assert figure is not None
    image = Image.open(io.BytesIO(plots.png(figure)))
    assert image.format == "PNG"
    assert image.size == (800, 512)
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
