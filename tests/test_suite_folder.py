import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fabricated_runs import STEPS, WARMUP, fabricated_run
from table_cells import Cell, Difference, cells, lines, means, squeezed

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.report import suite_layout
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.results.suite_folder import (
    Layout,
    SuiteFolder,
    paired_sweep_tables,
    paired_tables,
    read_settings,
    score_tables,
    setting_score_tables,
    suite_tables,
)
from gsda_fast.results.tables import ResultTable, sweep_tables

MF, OF = ("mnist", "fonts"), ("optdigits", "fonts")
DIGITS = replace(suite_layout(BENCHMARKS["digits"]), methods=("source-only", "group", "gsda"), transfer_tasks=(MF, OF))


def results(*runs: RunFolder) -> list[RunResult]:
    found = [run.read_result() for run in runs]
    return [result for result in found if result is not None]


# ------------------------------------------------------------------------------------------------------- the folder


def test_runs_of_a_suite_are_the_folders_that_hold_one(tmp_path: Path) -> None:
    runs = [fabricated_run(tmp_path, method, finished=method == "gsda") for method in ("source-only", "gsda")]
    (tmp_path / "notes").mkdir()
    (tmp_path / "table.md").write_text("")
    suite = SuiteFolder.find(tmp_path)
    assert suite is not None
    assert [run.path for run in suite.runs] == sorted(run.path for run in runs)
    assert [result.method for result in suite.results()] == ["gsda"]
    assert suite.variants == {}


def test_a_folder_without_runs_is_no_suite(tmp_path: Path) -> None:
    (tmp_path / "alpha=0.1").mkdir()
    (tmp_path / "file").write_text("")
    assert SuiteFolder.find(tmp_path) is None
    assert SuiteFolder.find(tmp_path / "file") is None
    assert SuiteFolder.find(tmp_path / "missing") is None


def test_settings_of_a_sweep_are_ordered_as_numbers(tmp_path: Path) -> None:
    names = ["alpha=0.02,beta=1", "alpha=0.1,beta=1", "alpha=0.1,beta=10", "alpha=2,beta=1", "alpha=10,beta=1"]
    for name in reversed(names):
        fabricated_run(tmp_path / name, "gsda")
    suite = SuiteFolder.find(tmp_path)
    assert suite is not None
    assert list(suite.variants) == names
    assert suite.runs == []


def test_settings_by_name() -> None:
    assert read_settings("alpha=0.1,beta=1") == {"alpha": "0.1", "beta": "1"}


def test_a_layout_keeps_what_there_are_results_of() -> None:
    layout = suite_layout(BENCHMARKS["office31"])
    assert layout.transfer_tasks == BENCHMARKS["office31"].transfer_tasks
    assert layout.short_names["amazon"] == "A"
    assert layout.metric == "accuracy"
    assert suite_layout(BENCHMARKS["visda"]).metric == "mean_per_class"


def test_only_measured_methods_and_transfer_tasks_in_the_layouts_order(tmp_path: Path) -> None:
    runs = [fabricated_run(tmp_path, method, pair=OF) for method in ("gsda", "source-only")]
    only = DIGITS.only(results(*runs))
    assert (only.methods, only.transfer_tasks) == (("source-only", "gsda"), (OF,))


# ------------------------------------------------------------------------------------------------------- the tables


def test_tables_by_hand_under_each_choice(tmp_path: Path) -> None:
    runs = [
        fabricated_run(tmp_path, "gsda", pair=pair, seed=seed, accuracy=accuracy)
        for pair, accuracies in ((MF, (70.0, 74.0)), (OF, (60.0, 60.0)))
        for seed, accuracy in enumerate(accuracies)
    ]
    layout = replace(DIGITS, methods=("gsda",))
    last, label_free, best = suite_tables(results(*runs), layout)
    assert last.columns == ("M->F", "O->F", "avg")
    # Averages of the seeds: 65 and 67.
    assert cells(last, "gsda") == [
        Cell(72.0, pytest.approx(8**0.5), 2),
        Cell(60.0, 0.0, 2),
        Cell(66.0, pytest.approx(2**0.5), 2),
    ]
    assert means(label_free, "gsda") == [71.0, 59.0, 65.0]
    assert means(best, "gsda") == [74.0, 62.0, 68.0]
    assert [table.choice for table in (last, label_free, best)] == ["last", "label_free", "best"]
    assert "upper bound" in best.title


def test_files_of_the_tables(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path)
    run = fabricated_run(tmp_path, "gsda", task="office31", pair=("amazon", "webcam"), accuracy=90.0)
    made = suite_tables(
        results(run), replace(suite_layout(BENCHMARKS["office31"]), transfer_tasks=(("amazon", "webcam"),))
    )
    suite.write_tables("table", made)
    markdown = squeezed(suite.table_path("table", "md").read_text())
    assert "| gsda | 90.0 |" in markdown
    assert "| paper: GSDA, Table 2 | 95.7 |" in markdown
    assert "| difference | -5.7 |" in markdown
    with suite.table_path("table", "csv").open() as file:
        rows = [line for line in csv.DictReader(file) if line["method"] == "gsda" and line["choice"] == "last"]
    assert [(line["kind"], float(line["mean"])) for line in rows] == [
        ("ours", 90.0),
        ("paper", 95.7),
        ("difference", pytest.approx(-5.7)),
    ]
    stored = json.loads(suite.table_path("table", "json").read_text())
    assert [table["choice"] for table in stored] == ["last", "label_free", "best"]


def test_visda_has_a_table_by_class_of_each_transfer_task(tmp_path: Path) -> None:
    per_class = [float(value) for value in range(70, 82)]
    runs = [
        fabricated_run(
            tmp_path, "gsda", task="visda", pair=("train", "validation"), seed=seed, accuracy=80.0 + seed,
            mean_per_class=75.5, per_class=per_class,
        )
        for seed in range(2)
    ]  # fmt: skip
    last, label_free, _ = suite_tables(results(*runs), suite_layout(BENCHMARKS["visda"]))
    ours = dict(zip(last.columns, cells(last, "gsda")))
    assert ours["aeroplane"] == Cell(70.0, 0.0, 2)
    assert ours["truck"] == Cell(81.0, 0.0, 2)
    assert ours["mean per class"] == Cell(75.5, 0.0, 2)
    assert ours["overall"] == Cell(80.5, pytest.approx(0.5**0.5), 2)
    assert label_free.columns == ("mean per class", "overall")


# ------------------------------------------------------------------------------------------------------ differences


def paired_suite(folder: Path) -> list[RunFolder]:
    """gsda - group: accuracy +2 and +4 on M->F, -1 on O->F; mismatch -0.4 wherever both were measured."""
    accuracies = {
        ("group", MF): (70.0, 70.0),
        ("gsda", MF): (72.0, 74.0),
        ("group", OF): (60.0,),
        ("gsda", OF): (59.0,),
    }
    mismatch = {"group": 0.6, "gsda": 0.2}
    return [
        fabricated_run(folder, method, pair=pair, seed=seed, accuracy=accuracy, mismatch=mismatch[method])
        for (method, pair), values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_paired_tables_by_hand(tmp_path: Path) -> None:
    accuracy, mismatch = paired_tables(paired_suite(tmp_path), DIGITS)
    assert accuracy.columns == mismatch.columns == ("M->F", "O->F", "all")
    assert "in points" in accuracy.quantity
    # +2, +4, -1: mean 5/3, squared deviations 1/9 + 49/9 + 64/9 = 38/3, over 2, over 3.
    assert cells(accuracy, "gsda") == [
        Difference(3.0, pytest.approx(1.0), 2, 2),
        Difference(-1.0, None, 1, 0),
        Difference(pytest.approx(5 / 3), pytest.approx((38 / 18) ** 0.5), 3, 2),
    ]
    assert means(mismatch, "gsda") == [pytest.approx(-0.4)] * 3
    assert cells(mismatch, "gsda")[-1].higher == 0
    assert mismatch.decimals == 3


def test_unfinished_runs_make_no_pair(tmp_path: Path) -> None:
    runs = [*paired_suite(tmp_path), fabricated_run(tmp_path, "group", pair=OF, seed=1)]
    runs.append(fabricated_run(tmp_path, "gsda", pair=OF, seed=1, finished=False))
    accuracy, _ = paired_tables(runs, DIGITS)
    assert [cell.pairs for cell in cells(accuracy, "gsda")] == [2, 1, 3]


def test_mismatch_is_that_of_the_last_half_after_warm_up(tmp_path: Path) -> None:
    assert (STEPS, WARMUP) == (40, 20)
    runs = paired_suite(tmp_path)
    changed = next(run for run in runs if run.read_result().method == "gsda")  # type: ignore[union-attr]
    # Steps up to 30 do not count; step 50 joins step 40, with 0.2: mean 0.5.
    changed.append_metrics(
        50, {f"gradient_norm_{level}": 1.0 for level in ("domain", "group", "class")} | {"synchronization": 0.8}
    )
    _, mismatch = paired_tables(runs, DIGITS)
    assert means(mismatch, "gsda")[0] == pytest.approx(((0.5 - 0.6) + (0.2 - 0.6)) / 2)


def test_methods_without_the_levels_have_no_mismatch(tmp_path: Path) -> None:
    runs = [fabricated_run(tmp_path, method) for method in ("source-only", "domain")]
    layout = replace(DIGITS, methods=("source-only", "domain"))
    assert [table.decimals for table in paired_tables(runs, layout)] == [1]


def test_visdas_differences_are_of_the_mean_per_class(tmp_path: Path) -> None:
    runs = [
        fabricated_run(tmp_path, method, task="visda", pair=("train", "validation"), accuracy=80.0, mean_per_class=mean)
        for method, mean in (("group", 70.0), ("gsda", 73.0))
    ]
    layout = replace(suite_layout(BENCHMARKS["visda"]), methods=("group", "gsda"))
    table = paired_tables(runs, layout)[0]
    assert means(table, "gsda")[-1] == 3.0
    assert "mean accuracy per class" in table.quantity


def test_files_of_the_differences(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path)
    suite.write_tables("paired", paired_tables(paired_suite(tmp_path), DIGITS))
    assert "| gsda - group | +3.0 ± 1.0 (2) | -1.0 (1) | +1.7 ± 1.5 (3) | 2 of 3 |" in squeezed(
        suite.table_path("paired", "md").read_text()
    )
    with suite.table_path("paired", "csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 3
    assert len(json.loads(suite.table_path("paired", "json").read_text())) == 2


# ------------------------------------------------------------------------------------------------------------ sweep


def sweep(folder: Path) -> tuple[dict[str, list[RunResult]], Layout]:
    """alpha 0.1 gives 70 and 60 on average 65; alpha 1 has finished one transfer task of two."""
    variants = {
        "alpha=0.1": results(
            fabricated_run(folder / "alpha=0.1", "gsda", pair=MF, accuracy=70.0),
            fabricated_run(folder / "alpha=0.1", "gsda", pair=OF, accuracy=60.0),
            fabricated_run(folder / "alpha=0.1", "dann", pair=MF, accuracy=50.0),
        ),
        "alpha=1": results(fabricated_run(folder / "alpha=1", "gsda", pair=MF, accuracy=80.0)),
    }
    return variants, replace(DIGITS, methods=("dann", "gsda"))


def made_of(variants: dict[str, list[RunResult]], layout: Layout) -> list[ResultTable]:
    return sweep_tables(variants, **layout.table)


def test_sweep_tables_by_hand(tmp_path: Path) -> None:
    made = made_of(*sweep(tmp_path))
    assert [(table.subject, table.choice) for table in made] == [
        (method, choice) for method in ("dann", "gsda") for choice in ("last", "label_free", "best")
    ]
    dann, gsda = made[0], made[3]
    assert means(gsda, "alpha=0.1") == [70.0, 60.0, 65.0]
    assert means(gsda, "alpha=1") == [80.0, None, None]
    assert means(dann, "alpha=0.1") == [50.0, None, None]
    assert [len(table.rows) for table in (gsda, dann)] == [2, 1]
    assert tuple(gsda.texts.columns) == ("setting", "M->F", "O->F", "avg")
    assert gsda.title == "digits gsda: overall accuracy, last step"


def test_a_sweep_tells_how_its_images_were_tested_what_holds_for_all_of_it(tmp_path: Path) -> None:
    variants, layout = sweep(tmp_path)
    for ten, notes in (
        (("alpha=0.1", "alpha=1"), ("ten-crop test",)),
        (("alpha=0.1",), ()),
        ((), ("centre-crop test",)),
    ):
        tested = {
            name: [replace(result, task="office31", test_crops=10 if name in ten else 1) for result in of]
            for name, of in variants.items()
        }
        assert [table.notes for table in made_of(tested, layout) if table.subject == "gsda"] == [notes] * 3


def test_paired_differences_between_settings_by_hand(tmp_path: Path) -> None:
    (table,) = paired_sweep_tables(*sweep(tmp_path))  # dann has one setting alone
    assert table.title == "digits gsda: paired differences of overall accuracy after the last step, in points"
    assert tuple(table.texts.columns) == ("difference", "M->F", "O->F", "all", "higher in")
    assert lines(table) == [("alpha=1 - alpha=0.1", "+10.0 (1)", "-", "+10.0 (1)", "1 of 1")]
    # A setting such as warmup is no part of what two runs have in common.
    assert "share" not in table.caption


def test_files_of_a_sweep(tmp_path: Path) -> None:
    suite = SuiteFolder(tmp_path)
    suite.write_tables("sweep", made_of(*sweep(tmp_path)))
    assert "| alpha=0.1 | 70.0 | 60.0 | 65.0 |" in squeezed(suite.table_path("sweep", "md").read_text())
    assert suite.table_path("sweep", "csv").is_file()
    assert len(json.loads(suite.table_path("sweep", "json").read_text())) == 6


# ----------------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_final_predictions(tmp_path: Path) -> None:
    """Three runs whose certainty rises with their accuracy: every score ranks them as the accuracy does."""
    runs = []
    for seed, (accuracy, certain) in enumerate(((60.0, 0.4), (70.0, 0.6), (80.0, 0.9))):
        runs.append(fabricated_run(tmp_path, "gsda", seed=seed, accuracy=accuracy, features=True))
        labels = np.arange(40) % 10
        runs[-1].write_predictions(labels, np.eye(10)[labels] * certain + (1 - certain) / 10)
    (table,) = score_tables([*runs, fabricated_run(tmp_path, "gsda", seed=9, finished=False)], DIGITS)
    found = {row[0]: dict(zip(of["column"], of["value"])) for row, of in table.rows}
    assert {name: values["rank correlation"] for name, values in found.items()} == {
        "mutual_information": 1, "entropy": 1, "nuclear_norm": 1, "softmax_correlation": 1,
        "soft_neighbourhood_density": -1,  # clusters as dense, in a smaller space
    }  # fmt: skip
    assert found["mutual_information"]["mean gain"] == -1.0
    assert table.runs == 3


def test_runs_without_labels_or_predictions_have_no_scores(tmp_path: Path) -> None:
    assert score_tables([fabricated_run(tmp_path, "gsda", accuracy=None)], DIGITS) == []
    (table,) = score_tables([fabricated_run(tmp_path, "dann")], DIGITS)
    assert "-" in lines(table)[0]


def with_predictions(folder: Path, method: str, certain: float, seed: int = 0, accuracy: float | None = 70.0) -> None:
    run = fabricated_run(folder, method, seed=seed, accuracy=accuracy)
    labels = np.arange(40) % 10
    run.write_predictions(labels, np.eye(10)[labels] * certain + (1 - certain) / 10)


def test_settings_are_compared_by_their_scores_over_the_runs_that_all_of_them_have(tmp_path: Path) -> None:
    with_predictions(tmp_path / "beta=0", "gsda", certain=0.5, accuracy=80.0)
    with_predictions(tmp_path / "beta=1", "gsda", certain=1.0, accuracy=60.0)
    with_predictions(tmp_path / "beta=1", "gsda", certain=0.1, seed=1)  # one setting alone has it
    with_predictions(tmp_path / "beta=1", "dann", certain=1.0)  # one setting alone
    variants = {name: suite.runs for name, suite in SuiteFolder(tmp_path).variants.items()}
    (table,) = setting_score_tables(variants, replace(DIGITS, methods=("dann", "gsda")))
    assert table.title == "digits gsda: label-free scores after the last step"
    found = {line[0]: dict(zip(table.texts.columns[1:], line[1:])) for line in lines(table)}
    assert found["beta=1"]["mutual information"] == "2.303 *"  # log 10
    assert found["beta=1"]["entropy"] == "0.000 *"  # the smaller one
    assert found["beta=0"]["entropy"] not in ("0.000", "-")
    assert [found[name]["overall accuracy"] for name in ("beta=0", "beta=1")] == ["80.0", "60.0"]
    assert table.runs == 1
    assert tuple(table.narrower[0].columns) == (
        "setting",
        "mutual information",
        "softmax correlation",
        "overall accuracy",
    )


def test_methods_are_compared_by_their_scores_without_a_label(tmp_path: Path) -> None:
    for method, certain in (("dann", 0.9), ("mcc", 0.5)):
        with_predictions(tmp_path, method, certain, accuracy=None)
    runs, layout = SuiteFolder(tmp_path).runs, replace(DIGITS, methods=("dann", "mcc", "gsda"))
    (table,) = score_tables(runs, layout)
    assert [line[0] for line in lines(table)] == ["dann", "mcc"]
    assert lines(table)[0][1].endswith(" *")
    assert "overall accuracy" not in table.columns
    assert "accuracy" not in table.caption
    assert score_tables(runs[:1], layout) == []
