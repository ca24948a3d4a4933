import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from html_page import Page

from gsda_fast.errors import UsageError
from gsda_fast.results.page import write_page
from gsda_fast.results.records import RunResult, Selection
from gsda_fast.results.run_folder import RunFolder

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
            values |= {"entropy": 0.5, "synchronization": 0.1, **adversarial, **norms}
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


SINGLE_PLOTS = {
    "accuracy", "mean_per_class", "mutual_information", "per_class", "confusion", "tsne_warmup", "tsne_final",
    "loss_classification", "loss_entropy", "loss_adversarial_domain", "loss_adversarial_group",
    "loss_adversarial_class", "loss_synchronization", "gradient_norms", "relative_mismatch",
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
    assert {file.stem for file in path.parent.glob("*.png")} == SINGLE_PLOTS - own - {"gradient_norms"}
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
