import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fabricated_runs import fabricated_run
from html_page import Page
from PIL import Image

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.errors import UsageError
from gsda_fast.report import suite_layout
from gsda_fast.results.suite_folder import Layout, SuiteFolder, sweep_tables
from gsda_fast.results.suite_page import sweep_plots, write_suite_page

MF, OF = ("mnist", "fonts"), ("optdigits", "fonts")
LAYOUT = suite_layout(BENCHMARKS["digits"])
OWN = replace(suite_layout(BENCHMARKS["folder"]), transfer_tasks=(("real/photos", "my sketches"),))


def written(folder: Path, layout: Layout = LAYOUT) -> Page:
    path = write_suite_page(SuiteFolder(folder), layout, points=20, samples=40)
    assert path == folder / "report.html"
    return Page(path)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """source-only and gsda on two transfer tasks with two seeds, of which one run has not finished."""
    folder = tmp_path_factory.mktemp("suite")
    for method, accuracy in (("source-only", 60.0), ("gsda", 80.0)):
        for pair in (MF, OF):
            for seed in range(2):
                finished = (method, pair, seed) != ("gsda", OF, 1)
                shown = pair == MF and seed == 0
                fabricated_run(
                    folder, method, pair=pair, seed=seed, accuracy=accuracy + seed, finished=finished, features=shown
                )
    return folder, written(folder)


def test_the_page_shows_what_the_suite_measured(suite: tuple[Path, Page]) -> None:
    _, page = suite
    assert page.open == []
    assert set(page.images) == {
        # Of each transfer task: a bar chart, and accuracy over the steps.
        "Accuracy of each method: M->F",
        "Accuracy of each method: O->F",
        "Accuracy of each method: average over the transfer tasks",
        "Accuracy over the steps: M->F",
        "Accuracy over the steps: O->F",
        # Alignment over training: S_dom, sum S_grp and sum S_cls, L_syn, the domains' distance.
        "Gradient magnitudes of gsda",
        "Synchronization loss over the steps",
        "Relative mismatch of the gradient magnitudes over the steps",
        "Adversarial loss: domain over the steps",
        "Proxy A-distance of each method",
        "Proxy A-distance of each method and transfer task",
        "Confusion matrix of source-only",
        "Features of source-only",
        "Confusion matrix of gsda",
        "Features of gsda",
    }


def test_the_tables_are_on_the_page(suite: tuple[Path, Page]) -> None:
    _, page = suite
    assert "digits: 2 methods, 2 transfer tasks, 2 seeds" in page.text
    assert "method M → F O → F avg source-only 60.5 ± 0.7 60.5 ± 0.7 60.5 ± 0.7" in page.text
    assert "gsda 80.5 ± 0.7 80.0 (1) 80.0 (1)" in page.text
    for choice in ("last step", "label-free choice (mutual information)", "best on target labels (upper bound)"):
        assert f"digits: overall accuracy, {choice}" in page.text
    assert "gsda - source-only +20.0 ± 0.0 (2) +20.0 (1) +20.0 ± 0.0 (3) 3 of 3" in page.text
    assert "1 of 8 runs have not finished" in page.text
    assert "In detail: M → F, seed 0" in page.text


def test_the_page_needs_no_other_file(suite: tuple[Path, Page]) -> None:
    folder, page = suite
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"url\(|@import", (folder / "report.html").read_text(encoding="utf-8"))
    assert page.scripts == 0
    for picture in page.images.values():
        Image.open(BytesIO(picture)).verify()
    # What is on the page is kept as files too.
    kept = {file.read_bytes() for file in folder.rglob("*.png")}
    assert set(page.images.values()) == kept


def test_plots_of_the_suite_are_named_for_what_they_show(suite: tuple[Path, Page]) -> None:
    folder, _ = suite
    names = {file.stem for file in folder.glob("*.png")}
    assert {"accuracy_M-F", "accuracy_O-F", "accuracy_avg", "curves_M-F", "gradient_norms_gsda"} <= names
    assert {"synchronization", "relative_mismatch", "adversarial_domain", "proxy_a_distance"} <= names


def test_one_run_is_a_suite_too(tmp_path: Path) -> None:
    fabricated_run(tmp_path, "dann", features=True)
    page = written(tmp_path)
    assert "1 method, 1 transfer task, 1 seed" in page.text
    assert "Paired differences" not in page.text
    # The only method is shown in detail, whichever it is.
    assert "Confusion matrix of dann" in page.images
    assert "Proxy A-distance of each method" in page.images
    assert "Proxy A-distance of each method and transfer task" not in page.images
    assert not any("average" in name for name in page.images)


def test_distance_of_the_domains_before_and_after_adaptation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features far apart at the end of warm-up and mixed at the end: a mark near 2, a bar near 0."""
    from gsda_fast.results import suite_plots

    seen: list[suite_plots.Bars] = []
    method_bars = suite_plots.method_bars

    def spy(rows, *arguments, **options):  # type: ignore[no-untyped-def]
        seen.extend(rows)
        return method_bars(rows, *arguments, **options)

    monkeypatch.setattr(suite_plots, "method_bars", spy)
    for seed in range(2):
        fabricated_run(tmp_path, "gsda", seed=seed, features=True)
    written(tmp_path)
    (distance,) = (row for row in seen if row.cells[0].mean is not None and row.cells[0].mean < 2.1)
    assert distance.label == "gsda"
    assert distance.cells[0].seeds == 2
    assert distance.cells[0].mean == pytest.approx(0, abs=0.6)
    assert distance.marks == [2.0]


def test_visdas_page_has_both_averages_and_the_classes(tmp_path: Path) -> None:
    for method in ("source-only", "gsda"):
        fabricated_run(tmp_path, method, task="visda", pair=("train", "validation"), accuracy=80.0)
    page = written(tmp_path, suite_layout(BENCHMARKS["visda"]))
    assert {
        "Accuracy of each method: train->val mean per class",
        "Accuracy of each method: train->val overall",
        "Accuracy of each method: train->val accuracy of each class",
    } <= set(page.images)
    assert not any(name.endswith("aeroplane") for name in page.images)
    for expected in ("aeroplane", "mean per class overall", "paper: GSDA, Table 4", "difference", "82.5"):
        assert expected in page.text
    assert {"mean_per_class", "overall", "classes"} == {
        file.stem.removeprefix("accuracy_train-val_") for file in tmp_path.glob("accuracy_*.png")
    }


def test_the_papers_figures_are_marked(tmp_path: Path) -> None:
    pictures = {}
    for method in ("gsda", "entropy"):  # the paper has no row of the latter
        folder = tmp_path / method
        fabricated_run(folder, method, task="office31", pair=("amazon", "webcam"), accuracy=80.0)
        layout = replace(suite_layout(BENCHMARKS["office31"]), methods=(method,))
        page = written(folder, layout)
        pictures[method] = np.asarray(Image.open(BytesIO(page.images["Accuracy of each method: A->W"])).convert("L"))
        assert ("paper: GSDA, Table 2" in page.text) == (method == "gsda")
    assert pictures["gsda"].shape == pictures["entropy"].shape
    assert (pictures["gsda"] != pictures["entropy"]).sum() > 100


def test_folders_of_ones_own_without_labels(tmp_path: Path) -> None:
    fabricated_run(tmp_path, "gsda", task="folder", pair=("real/photos", "my sketches"), accuracy=None)
    page = written(tmp_path, OWN)
    assert "real/photos → my sketches" in page.text
    assert not any(name.startswith("Accuracy") for name in page.images)
    assert "Gradient magnitudes of gsda" in page.images


def test_names_of_folders_become_names_of_files(tmp_path: Path) -> None:
    fabricated_run(tmp_path, "gsda", task="folder", pair=("real/photos", "my sketches"))
    written(tmp_path, OWN)
    assert (tmp_path / "curves_real_photos-my_sketches.png").is_file()
    assert (tmp_path / "accuracy_real_photos-my_sketches.png").is_file()


def test_nothing_has_finished(tmp_path: Path) -> None:
    fabricated_run(tmp_path, "gsda", finished=False)
    fabricated_run(tmp_path / "alpha=1", "gsda", finished=False)
    with pytest.raises(UsageError, match="found 2 runs, none finished"):
        written(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    fabricated_run(tmp_path, "source-only")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UsageError, match=r"report: found .*report.html"):
        written(tmp_path)


# ------------------------------------------------------------------------------------------------------------ sweep


def make_sweep(folder: Path) -> None:
    """alpha by beta, accuracy 10 alpha + beta above 60, with two seeds that differ by 2."""
    for alpha in (1, 2):
        for beta in (0, 5):
            for seed in range(2):
                accuracy = 60.0 + 10 * alpha + beta + 2 * seed
                fabricated_run(folder / f"alpha={alpha},beta={beta}", "gsda", seed=seed, accuracy=accuracy)


def test_sweep_plots_by_hand(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    variants = {name: variant.results() for name, variant in SuiteFolder(tmp_path).variants.items()}
    layout = replace(LAYOUT, methods=("gsda",), transfer_tasks=(MF,))
    ((method, figure),) = sweep_plots(sweep_tables(variants, layout)).items()
    assert method == "gsda"
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("alpha", "overall accuracy, percent")
    assert axes.get_title() == "digits, gsda, M → F"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    drawn = {container.get_label(): container.lines[0].get_ydata().tolist() for container in axes.containers}  # type: ignore[attr-defined]
    assert drawn == {"beta 0": [71.0, 81.0], "beta 5": [76.0, 86.0]}


def test_a_sweep_of_three_options_has_a_plot_for_each_value_of_the_third(tmp_path: Path) -> None:
    for alpha in (1, 2):
        for beta in (0, 5):
            for groups in (3, 6):
                accuracy = 60.0 + 10 * alpha + beta + groups
                fabricated_run(tmp_path / f"alpha={alpha},beta={beta},groups={groups}", "gsda", accuracy=accuracy)
    variants = {name: variant.results() for name, variant in SuiteFolder(tmp_path).variants.items()}
    layout = replace(LAYOUT, methods=("gsda",), transfer_tasks=(MF,))
    figures = sweep_plots(sweep_tables(variants, layout))
    assert list(figures) == ["gsda groups 3", "gsda groups 6"]
    for groups, figure in zip((3, 6), figures.values()):
        (axes,) = figure.axes
        assert axes.get_title() == f"digits, gsda, M → F, groups {groups}"
        drawn = {container.get_label(): container.lines[0].get_ydata().tolist() for container in axes.containers}  # type: ignore[attr-defined]
        assert drawn == {"beta 0": [70.0 + groups, 80.0 + groups], "beta 5": [75.0 + groups, 85.0 + groups]}
    scales = {figure.axes[0].get_ylim() for figure in figures.values()}
    assert len(scales) == 1
    ((low, high),) = scales
    assert low < 73
    assert high > 91
    # Neighbouring settings differ now in one option and now in another.
    page = written(tmp_path)
    assert "Paired differences" not in page.text
    assert (tmp_path / "sweep_gsda_groups_6.png").is_file()


def test_the_page_of_one_option_has_paired_differences(tmp_path: Path) -> None:
    for weights, accuracy in (("none", 60.0), ("pada", 70.0)):
        fabricated_run(tmp_path / f"class-weights={weights}", "gsda", accuracy=accuracy)
    page = written(tmp_path)
    assert "class-weights=pada - class-weights=none +10.0 (1) +10.0 (1) 1 of 1" in page.text
    # The settings differ by what was swept, as they should.
    assert "do not share their settings" not in page.text


def test_the_page_shows_the_settings_and_where_they_differ(tmp_path: Path) -> None:
    for method in ("dann", "gsda"):
        fabricated_run(tmp_path, method)
    page = written(tmp_path)
    assert "run.steps 40 run.warmup 20" in page.text
    assert "run.method dann; gsda" in page.text
    assert "do not share their settings" not in page.text
    run = fabricated_run(tmp_path, "gsda", seed=1)
    run.write_config({**run.read_config(), "run": {**run.read_config()["run"], "steps": 50}})
    run.write_environment("another device")
    page = written(tmp_path)
    assert "do not share their settings" in page.text
    assert "are not of one protocol: run.steps is 40 or 50." in page.text
    assert "device -; another device" in page.text


def test_what_depends_on_the_target_may_differ_between_transfer_tasks(tmp_path: Path) -> None:
    def trained(target: str, seed: int, refresh_every: int, workers: int) -> None:
        run = fabricated_run(tmp_path, "gsda", pair=("mnist", target), seed=seed)
        config = run.read_config()
        data = {**config["data"], "workers": workers}
        run.write_config({**config, "data": data, "pseudo_labels": {"refresh_every": refresh_every}})

    trained("fonts", seed=0, refresh_every=79, workers=0)
    trained("optdigits", seed=0, refresh_every=23, workers=4)
    assert "do not share their settings" not in written(tmp_path).text
    trained("fonts", seed=1, refresh_every=80, workers=0)
    assert "are not of one protocol: pseudo_labels.refresh_every is 79 or 80 or 23." in written(tmp_path).text


def test_page_of_a_sweep(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    fabricated_run(tmp_path / "alpha=3,beta=0", "gsda", finished=False)
    page = written(tmp_path)
    assert "digits: sweep over alpha, beta" in page.text
    assert "1 of 9 runs have not finished" in page.text
    assert "alpha=2,beta=5 86.0 ± 1.4" in page.text
    assert "alpha=3" not in page.text
    assert list(page.images) == ["Accuracy of gsda over the settings"]


def test_a_sweep_beside_other_runs_is_on_the_same_page(tmp_path: Path) -> None:
    make_sweep(tmp_path)
    fabricated_run(tmp_path, "source-only", accuracy=40.0)
    page = written(tmp_path)
    assert "digits: 1 method, 1 transfer task, 1 seed; digits: sweep over alpha, beta" in page.text
    assert "suite of 9 runs" in page.text
    assert {"Accuracy of gsda over the settings", "Accuracy of each method: M->F"} <= set(page.images)
