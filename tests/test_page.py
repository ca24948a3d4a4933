import json
import math
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fabricated_runs import fabricated_run
from html_page import Page
from PIL import Image

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.errors import UsageError
from gsda_fast.report import suite_layout
from gsda_fast.results import page as page_module
from gsda_fast.results import plots
from gsda_fast.results.page import sweep_plots, write_page, write_suite_page
from gsda_fast.results.records import RunResult, Selection
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.results.suite_folder import Layout, SuiteFolder
from gsda_fast.results.tables import sweep_tables

CLASSES = ("cat", "<script>dog</script>", "owl")


def make_run(
    folder: Path,
    method: str,
    *,
    seed: int = 0,
    target: str = "fonts",
    finished: bool = True,
    accuracy: float = 71.24,
    plotted: bool = True,
) -> RunFolder:
    """A run as training leaves it; if not `plotted`, without what most plots show, since drawing takes time."""
    run = RunFolder(folder / f"{method}-{target}-{seed}")
    run.prepare()
    config = {"task": "digits", "method": method, "seed": seed, "steps": 40, "warmup": 20}
    run.write_config(config | {"data": {"source": "mnist", "target": target}})
    run.write_environment("a device & more")
    for step in range(10, 50 if finished else 40, 10) if plotted else ():
        adversarial = {f"adversarial_{level}": 0.7 for level in ("domain", "group", "class")}
        norms = {f"gradient_norm_{level}": 1.0 / step for level in ("domain", "group", "class")}
        values = {
            "classification": 1 / step,
            "accuracy": 60.0 - step,
            "mean_per_class": 50.0,
            "mutual_information": 1.0,
        }
        if method == "gsda":
            values |= {"entropy": 0.5, "synchronization": 0.1, "domain_accuracy": 0.75, **adversarial, **norms}
        run.append_metrics(step, values)
    generator = np.random.default_rng(seed)
    labels = np.arange(12) % 3
    domains = {"source_labels": labels, "target_labels": labels}
    if plotted:
        run.write_features("warmup", generator.normal(size=(12, 4)), generator.normal(size=(12, 4)), **domains)
    if finished and plotted:
        run.write_features("final", generator.normal(size=(12, 4)), generator.normal(size=(12, 4)), **domains)
    if finished:
        run.write_predictions(labels, np.eye(3)[labels])
        run.write_result(
            RunResult(
                task="digits", source="mnist", target=target, method=method, seed=seed, steps=40,
                accuracy=Selection(accuracy, 81.26, 75.25), mean_per_class=Selection(61.0, 62.0, 63.0),
                per_class=(60.0, None, 70.0), classes=CLASSES, images_per_second=1234.4, seconds=3725.0,
            )
        )  # fmt: skip
    return run


TERMS = (
    "classification", "entropy", "synchronization", "adversarial_domain", "adversarial_group", "adversarial_class",
)  # fmt: skip
SINGLE_PLOTS = {
    "accuracy", "mean_per_class", "mutual_information", "per_class", "confusion", "tsne_warmup", "tsne_final",
    "gradient_norms", "relative_mismatch", "domain_accuracy", *(f"loss_{term}" for term in TERMS),
}  # fmt: skip


def test_single_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gsda")
    path = write_page([run], run.path)
    assert path == run.report_path
    page = Page(path)
    assert page.open == []
    for expected in (
        "digits: mnist → fonts", "71.2", "81.3", "75.2", "61.0", "63.0", "62.0", "1234", "1 h 2 min", "a device & more",
        "best (upper bound)", "data.source mnist",
    ):  # fmt: skip
        assert expected in page.text
    assert "has not finished" not in page.text
    assert "Means over seeds" not in page.text
    assert {file.stem for file in run.path.glob("*.png")} == SINGLE_PLOTS
    saved = sorted(file.read_bytes() for file in run.path.glob("*.png"))
    assert sorted(page.images.values()) == saved
    run.clear()
    assert [file.name for file in run.path.iterdir()] == ["checkpoints"]


def test_a_methods_own_terms_are_drawn_and_removed_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gsda", plotted=False)
    run.append_metrics(10, {"wasserstein/critic": 1.0, "learning_rate": 0.1, "gradient_norm_critic": 2.0})
    page = Page(write_page([run], run.path))
    assert {"Loss: wasserstein/critic over the steps", "Gradient magnitudes of gsda"} <= set(page.images)
    assert not any("learning" in name for name in page.images)
    assert (run.path / "loss_wasserstein_critic.png").is_file()
    run.clear()
    assert [file.name for file in run.path.iterdir()] == ["checkpoints"]


def test_names_from_data_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ("$x$ & $y$", "bell\x07", "<b>")
    run = make_run(tmp_path, "gsda", plotted=False)
    result = run.read_result()
    assert result is not None
    run.write_result(replace(result, classes=names, target="tar\x1bget"))
    text = Page(write_page([run], run.path)).text
    assert "mnist → tar\\x1bget" in text
    assert "\x1b" not in text


def test_plots_of_their_own_are_those_of_the_first_and_last_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "gsda", seed=seed, plotted=False) for seed in range(7)]
    page = Page(write_page(runs, tmp_path / "page"))
    shown = [name for name in page.images if name.startswith("Confusion")]
    assert shown == [f"Confusion matrix of gsda, seed {seed}" for seed in (0, 1, 5, 6)]


def test_of_a_long_run_some_records_and_all_evaluations_are_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gsda", plotted=False)
    lines = [
        {"step": step, "entropy": 1.0} | ({"accuracy": 1.0} if step % 1001 == 0 else {}) for step in range(1, 5002)
    ]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = page_module._Run(run, 10, None).records
    assert len(records) < 2010
    assert [each["step"] for each in records if "accuracy" in each] == [1001, 2002, 3003, 4004]
    assert records[-1]["step"] == 5001


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gsda", plotted=False)
    run.write_config({"task": "<script>alert(1)</script>", "list": ["a", "b"]})
    text = write_page([run], run.path).read_text(encoding="utf-8")
    page = Page(run.report_path)
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"url\(|@import", text)
    assert page.scripts == 0
    assert "<script>alert(1)</script>" in page.text


def test_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, "source-only", plotted=False)
    first = write_page([run], run.path).read_bytes()
    assert write_page([run], run.path).read_bytes() == first


def test_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "source-only", accuracy=50.04), make_run(tmp_path, "gsda")]
    path = write_page(runs, tmp_path / "page")
    assert path == tmp_path / "page" / "report.html"
    page = Page(path)
    assert page.text.index("50.0") < page.text.index("71.2")
    features = [name for name in page.images if name.startswith("Features")]
    assert features == [
        "Features of source-only, before adaptation",
        "Features of source-only, after the last step",
        "Features of gsda, before adaptation",
        "Features of gsda, after the last step",
    ]
    own = {"confusion", "tsne_warmup", "tsne_final"}
    assert {file.stem for file in runs[0].path.glob("*.png")} == own
    assert {file.stem for file in runs[1].path.glob("*.png")} == own | {"gradient_norms"}
    compared = SINGLE_PLOTS - own - {"gradient_norms"}
    assert {file.stem for file in path.parent.glob("*.png")} == compared | {"proxy_a_distance"}
    # The settings in which runs differ stand out.
    rows = re.findall(r'<tr class="differs"><th scope="row">([^<]*)</th>', path.read_text(encoding="utf-8"))
    assert "method" in rows
    assert "steps" not in rows


def test_the_page_says_how_the_images_were_tested(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, method, plotted=False) for method in ("source-only", "gsda")]
    assert "crop" not in Page(write_page(runs, tmp_path / "page")).text  # digits are used whole
    for crops, told in (
        ((1, 1), "centre-crop test"),
        ((10, 10), "ten-crop test"),
        ((1, 10), "source-only: centre-crop test; gsda: ten-crop test"),
    ):
        for run, count in zip(runs, crops):
            result = run.read_result()
            assert result is not None
            run.write_result(replace(result, task="office31", test_crops=count))
        text = Page(write_page(runs, tmp_path / "page")).text
        assert f"1 h 2 min {told} last step" in text


def test_several_seeds_have_a_table_of_means(tmp_path: Path) -> None:
    accuracies = (60.0, 64.0)
    runs = [make_run(tmp_path, "gsda", seed=seed, accuracy=accuracies[seed], plotted=False) for seed in (0, 1)]
    page = Page(write_page(runs, tmp_path / "page"))
    assert "Means over seeds" in page.text
    assert "62.0 ± 2.8" in page.text
    assert "gsda, seed 1" in page.text


def test_runs_without_distinct_names_are_called_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "gsda", plotted=False) for name in ("one", "two")]
    runs[1].path.rename(tmp_path / "other")
    runs[1] = RunFolder(tmp_path / "other")
    page = Page(write_page(runs, tmp_path / "page"))
    assert "Confusion matrix of gsda-fonts-0" in page.images
    assert "Confusion matrix of other" in page.images


def test_interrupted_run_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gsda", finished=False)
    page = Page(write_page([run], run.path))
    assert "gsda has not finished. Its records end at step 30 of 40" in page.text
    assert "30.0 - 50.0" in page.text  # overall accuracy: the last evaluation, no choice, the best so far
    assert "Features of gsda, before adaptation" in page.images
    assert not any("Confusion" in name for name in page.images)


def test_run_that_has_barely_begun(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "begun")
    run.prepare()
    run.write_config({"steps": 5})
    page = Page(write_page([run], run.path))
    assert "begun has not finished. Its records end at step 0 of 5" in page.text
    assert page.images == {}


def test_diverged_run_and_unlabelled_target(tmp_path: Path) -> None:
    run = make_run(tmp_path, "gsda")
    result = run.read_result()
    assert result is not None
    run.append_metrics(50, {"classification": float("nan"), "accuracy": float("nan")})
    nothing = np.full((12, 4), np.nan)
    labels = np.full(12, -1)
    run.write_features("final", nothing, nothing, source_labels=labels, target_labels=labels)
    run.write_predictions(labels, np.full((12, 3), np.nan))
    unlabelled = RunResult.from_json(
        vars(result) | {"accuracy": {}, "mean_per_class": {}, "per_class": [None] * 3, "images_per_second": None}
    )
    run.write_result(unlabelled)
    page = Page(write_page([run], run.path))
    assert "- - - - - - 40 -" in page.text
    assert "Features of gsda, before adaptation" in page.images
    assert "Features of gsda, after the last step" not in page.images
    assert not any("Confusion" in name or "each class" in name for name in page.images)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    run = make_run(tmp_path, "source-only", plotted=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"report: found .*file"):
        write_page([run], tmp_path / "file")


# ------------------------------------------------------------------------------------------------------------ suite

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
                shown = seed == 0
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
        "M->F: overall accuracy over the steps",
        "O->F: overall accuracy over the steps",
        # Alignment over training: S_dom, sum S_grp and sum S_cls, L_syn, the domains' distance.
        "Gradient magnitudes of gsda",
        "Relative mismatch of the gradient magnitudes over the steps",
        # Every term that a method has measured.
        "Loss: classification over the steps",
        "Loss: synchronization over the steps",
        "Loss: adversarial domain over the steps",
        "Proxy A-distance of each method",
        "Proxy A-distance of each method and transfer task",
        "Confusion matrix of source-only",
        "Features of source-only, after the last step",
        "Confusion matrix of gsda",
        "Features of gsda, after the last step",
    }


def test_the_tables_are_on_the_page(suite: tuple[Path, Page]) -> None:
    _, page = suite
    assert "digits: 2 methods, 2 transfer tasks, 2 seeds" in page.text
    assert "method M → F O → F avg source-only 60.5 ± 0.7 60.5 ± 0.7 60.5 ± 0.7" in page.text
    assert "gsda 80.5 ± 0.7 80.0 (1) 80.0 (1)" in page.text
    for choice in ("last step", "label-free choice (mutual information)", "best on target labels (upper bound)"):
        assert f"digits: overall accuracy, {choice}" in page.text
    assert "evaluations chosen without labels, against the last step" in page.text
    assert "mutual information 0 0 7 -1.00 0.00 3.00" in page.text
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
    assert {"loss_synchronization", "relative_mismatch", "loss_adversarial_domain", "proxy_a_distance"} <= names


def test_one_run_is_a_suite_too(tmp_path: Path) -> None:
    fabricated_run(tmp_path, "dann", features=True)
    page = written(tmp_path)
    assert "1 method, M → F, 1 seed" in page.text
    assert "Paired differences" not in page.text
    # The only method is shown in detail, whichever it is.
    assert "Confusion matrix of dann" in page.images
    assert "Proxy A-distance of each method" in page.images
    assert "Proxy A-distance of each method and transfer task" not in page.images
    assert not any("average" in name for name in page.images)


def test_distance_of_the_domains_before_and_after_adaptation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features far apart at the end of warm-up and mixed at the end: a mark near 2, a bar near 0."""
    seen: list[pd.DataFrame] = []
    ranking = plots.ranking

    def spy(cells: pd.DataFrame, *arguments: Any, **options: Any) -> Any:
        seen.append(cells)
        return ranking(cells, *arguments, **options)

    monkeypatch.setattr(plots, "ranking", spy)
    for seed in range(2):
        fabricated_run(tmp_path, "gsda", seed=seed, features=True)
    written(tmp_path)
    assert list(seen[-1].index) == ["gsda"]
    distance = seen[-1].loc["gsda"]
    assert distance["mean"] == pytest.approx(0, abs=0.6)
    assert distance["mark"] == 2.0
    assert not math.isnan(distance["spread"])


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
    assert not any("ccuracy" in name for name in page.images)
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


def test_a_suites_folder_that_cannot_be_written(tmp_path: Path) -> None:
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
    ((method, figure),) = sweep_plots(sweep_tables(variants, **layout.table)).items()
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
    figures = sweep_plots(sweep_tables(variants, **layout.table))
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


def test_what_is_a_methods_own_may_differ_between_methods(tmp_path: Path) -> None:
    def trained(method: str, seed: int, own: dict[str, float]) -> None:
        run = fabricated_run(tmp_path, method, seed=seed)
        run.write_config({**run.read_config(), "method": own})

    trained("gsda", 0, {"beta": 1.0})
    trained("adda", 0, {"encoder_rate": 0.001})
    trained("dann", 0, {})
    assert "do not share their settings" not in written(tmp_path).text
    trained("gsda", 1, {"beta": 2.0})
    assert "are not of one protocol: method.beta is 1.0 or 2.0." in written(tmp_path).text


def test_a_method_may_be_a_term_and_two_runs_of_it_may_not_differ_in_terms(tmp_path: Path) -> None:
    def trained(method: str, seed: int, **terms: float) -> None:
        run = fabricated_run(tmp_path, method, seed=seed)
        run.write_config({**run.read_config(), "adaptation": {"add": terms}})

    trained("mcc", 0, mcc=1.0)
    trained("dann", 0)
    assert "do not share their settings" not in written(tmp_path).text
    trained("dann", 1, mcc=1.0)
    assert "are not of one protocol: adaptation.add.mcc is - or 1.0." in written(tmp_path).text


def test_without_labels_the_page_shows_what_there_is(tmp_path: Path) -> None:
    for method in ("dann", "mcc"):
        run = fabricated_run(tmp_path, method, accuracy=None, features=True)
        run.append_metrics(50, {"mutual_information": 1.5})
    page = written(tmp_path)
    assert "digits: label-free scores after the last step" in page.text
    assert "Accuracy on the target domain" not in page.text
    assert not any("overall accuracy" in name or "Accuracy of each method" in name for name in page.images)
    assert "M->F: mutual information of the predictions over the steps" in page.images


def test_a_sweep_without_labels_shows_its_scores_alone(tmp_path: Path) -> None:
    for alpha in ("0.1", "1"):
        fabricated_run(tmp_path / f"alpha={alpha}", "gsda", accuracy=None, features=True)
    page = written(tmp_path)
    assert "digits gsda: label-free scores after the last step" in page.text
    assert "Accuracy on the target domain" not in page.text
    assert page.images == {}


def test_transfer_tasks_with_reported_classes_have_averages_before_the_classes(tmp_path: Path) -> None:
    layout = suite_layout(BENCHMARKS["pictures"])
    for pair in (("photo", "icon"), ("icon", "photo")):
        for method in ("dann", "gsda"):
            fabricated_run(tmp_path, method, task="pictures", pair=pair, accuracy=80.0)
    page = written(tmp_path, layout)
    first, *_ = re.findall(r"pictures[^:]*: (?:overall|mean|accuracy of)[^,]*, last step", page.text)
    assert first == "pictures: mean accuracy per class, last step"
    assert "pictures: overall accuracy, last step" in page.text
    assert "Accuracy of each method: average over the transfer tasks" in page.images
    assert "Accuracy of each method: P->I mean per class" not in page.images


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
    assert "digits: 1 method, M → F, 1 seed; digits: sweep over alpha, beta" in page.text
    assert "suite of 9 runs" in page.text
    assert {"Accuracy of gsda over the settings", "Accuracy of each method: M->F"} <= set(page.images)


def test_a_table_of_many_methods_can_be_read(tmp_path: Path) -> None:
    """Twenty-four methods, each with the paper's row below it where it has one, against both baselines."""
    names = ("source-only", "dann", "jan", "gsda", *(f"method {number}" for number in range(20)))
    for place, name in enumerate(names):
        fabricated_run(tmp_path, name, task="office31", pair=("amazon", "webcam"), accuracy=50.0 + place)
    layout = replace(suite_layout(BENCHMARKS["office31"]), methods=names)
    page = written(tmp_path, layout)
    assert "jan 52.0 paper: JAN, Table 2 85.4 difference -33.4 gsda 53.0 paper: GSDA, Table 2 95.7" in page.text
    assert "method 19 - source-only +23.0 (1)" in page.text
    assert "method 19 - dann +22.0 (1)" in page.text
    assert "method 19 - method 18" not in page.text
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    # The highest of ours stands out, and not the paper's, which is higher.
    assert text.count("<b>73.0</b>") == 1
    assert "<b>95.7</b>" not in text


def test_of_many_runs_few_distances_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two methods, two transfer tasks and two seeds: all, those of one seed, those of one transfer task of it."""
    pairs = (("mnist", "fonts"), ("fonts", "mnist"))
    groups = {
        method: [
            page_module._Run(run, 40, run.read_result(), "")
            for pair in pairs
            for seed in (0, 1)
            for run in [fabricated_run(tmp_path, method, pair=pair, seed=seed, features=True)]
        ]
        for method in ("dann", "gsda")
    }
    calls: list[int] = []
    monkeypatch.setattr(page_module.alignment, "proxy_a_distance", lambda *_: calls.append(1) or 1.0)
    found = []
    for most in (8, 4, 2):
        calls.clear()
        monkeypatch.setattr(page_module, "_MOST_MEASURED", most)
        section = page_module._Section("Alignment")
        page_module._add_distances(section, page_module._Groups(SuiteFolder(tmp_path), groups))
        found.append((len(calls), len(section.panels), section.panels[0].alternative))
    everywhere = "Proxy A-distance of each method"
    # Before adaptation and after it; with one transfer task there is no plot by transfer task.
    assert found == [(16, 2, everywhere), (8, 2, everywhere), (4, 1, f"{everywhere}, mnist → fonts")]
