import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunResult, Selection
from gsda_fast.results.tables import (
    Cell,
    ResultTable,
    Row,
    class_table,
    to_csv,
    to_json,
    to_markdown,
    to_terminal,
    transfer_table,
)

# accuracy after the last step: method -> transfer task -> seeds 0, 1, 2
ACCURACIES = {
    "source-only": {("a", "b"): (50.0, 52.0, 54.0), ("b", "a"): (70.0, 60.0, 80.0)},
    "gsda": {("a", "b"): (60.0, 60.0, 63.0), ("b", "a"): (90.0, 84.0, 87.0)},
}


def result(method: str, source: str, target: str, seed: int, accuracy: float | None, task: str = "digits") -> RunResult:
    shifted = None if accuracy is None else accuracy + 1
    return RunResult(
        task, source, target, method, seed, 10,
        accuracy=Selection(accuracy, best=shifted, label_free=None if accuracy is None else accuracy - 1),
        mean_per_class=Selection(None if accuracy is None else accuracy / 2),
        per_class=(), classes=(), images_per_second=1.0, seconds=1.0,
    )  # fmt: skip


def results() -> list[RunResult]:
    return [
        result(method, *pair, seed, accuracy)
        for method, pairs in ACCURACIES.items()
        for pair, seeds in pairs.items()
        for seed, accuracy in enumerate(seeds)
    ]


def row(table: ResultTable, label: str) -> Sequence[Cell]:
    return next(row.cells for row in table.rows if row.label == label)


def test_cells_by_hand() -> None:
    table = transfer_table(results())
    assert table.columns == ("a->b", "b->a", "avg")
    assert [row.label for row in table.rows] == ["source-only", "gsda"]
    # Averages of the seeds: 60, 56, 67 with mean 61 and squared deviations 1 + 25 + 36 = 62, over 2.
    assert row(table, "source-only") == (
        Cell(52.0, 2.0, 3),
        Cell(70.0, 10.0, 3),
        Cell(61.0, pytest.approx(31**0.5), 3),
    )
    # 75, 72, 75: mean 74, squared deviations 1 + 4 + 1, over 2.
    assert row(table, "gsda") == (
        Cell(61.0, pytest.approx(3**0.5), 3),
        Cell(87.0, 3.0, 3),
        Cell(74.0, pytest.approx(3**0.5), 3),
    )


def test_figure_and_choice() -> None:
    assert row(transfer_table(results(), choice="best"), "gsda")[0].mean == 62.0
    assert row(transfer_table(results(), choice="label_free"), "gsda")[0].mean == 60.0
    assert row(transfer_table(results(), figure="mean_per_class"), "gsda")[0].mean == 30.5
    assert "upper bound" in transfer_table(results(), choice="best").title
    assert "upper bound" not in transfer_table(results(), choice="label_free").title


def test_order_of_rows_and_columns() -> None:
    table = transfer_table(
        results(), methods=["gsda", "dann", "source-only"], transfer_tasks=[("b", "a"), ("a", "c"), ("a", "b")]
    )
    assert table.columns == ("b->a", "a->c", "a->b", "avg")
    assert [row.label for row in table.rows] == ["gsda", "dann", "source-only"]
    assert row(table, "dann") == (Cell(),) * 4
    assert row(table, "gsda")[1] == Cell()
    assert row(table, "gsda")[3] == Cell()  # no seed has all three transfer tasks


def test_incomplete_seed_has_no_average() -> None:
    table = transfer_table([run for run in results() if (run.method, run.source, run.seed) != ("gsda", "b", 2)])
    # Left are the seeds 0 and 1 with averages 75 and 72; a mean of column means would give (61 + 87) / 2 = 74.
    assert row(table, "gsda") == (
        Cell(61.0, pytest.approx(3**0.5), 3),
        Cell(87.0, pytest.approx(18**0.5), 2),
        Cell(73.5, pytest.approx(4.5**0.5), 2),
    )
    assert table.cell_text(row(table, "gsda")[1]) == "87.0 ± 4.2 (2)"
    assert "only n seeds" in table.caption
    assert "only n seeds" not in transfer_table(results()).caption


def test_one_seed_has_no_spread() -> None:
    table = transfer_table([result("gsda", "a", "b", 0, 61.25)])
    assert table.columns == ("a->b",)
    assert table.cell_text(row(table, "gsda")[0]) == "61.2"
    assert "one seed" in table.caption


def test_unlabelled_target_is_an_empty_cell() -> None:
    table = transfer_table([result("gsda", "a", "b", 0, None)])
    assert row(table, "gsda") == (Cell(),)
    assert table.cell_text(Cell()) == "-"


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="two of a->b, method gsda, seed 0"):
        transfer_table([result("gsda", "a", "b", 0, 1.0), result("gsda", "a", "b", 0, 2.0)])
    with pytest.raises(UsageError, match="the tasks digits, visda"):
        transfer_table([result("gsda", "a", "b", 0, 1.0), result("gsda", "a", "b", 1, 1.0, task="visda")])
    with pytest.raises(ValueError, match="expected at least one"):
        transfer_table([])


def test_markdown() -> None:
    table = transfer_table(results())
    assert to_markdown([table]) == (
        "**digits: overall accuracy, last step**\n\n"
        "| method | a->b | b->a | avg |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| source-only | 52.0 ± 2.0 | 70.0 ± 10.0 | 61.0 ± 5.6 |\n"
        "| gsda | 61.0 ± 1.7 | 87.0 ± 3.0 | 74.0 ± 1.7 |\n\n"
        f"{table.caption}\n"
    )


def test_csv_has_full_precision() -> None:
    lines = list(
        csv.DictReader(io.StringIO(to_csv([transfer_table(results()), transfer_table(results(), choice="best")])))
    )
    assert len(lines) == 2 * 2 * 3
    assert lines[2] == {
        "task": "digits", "figure": "accuracy", "choice": "last", "subject": "",
        "method": "source-only", "kind": "ours", "column": "avg", "mean": "61.0",
        "standard_deviation": repr(31**0.5), "seeds": "3",
    }  # fmt: skip


def test_json() -> None:
    stored = json.loads(to_json([transfer_table(results())]))
    assert stored[0]["rows"][1]["label"] == "gsda"
    assert stored[0]["rows"][1]["cells"][1] == {"mean": 87.0, "spread": 3.0, "seeds": 3}


def test_terminal() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(to_terminal(transfer_table(results())))
    text = console.export_text()
    for expected in ("source-only", "87.0 ± 3.0", "a->b", "overall accuracy, last step"):
        assert expected in text


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    console = Console(width=40, record=True)
    table = transfer_table(
        [result("class-weights=pada,alpha=0.02", *pair, 0, 50.0) for pair in (("a", "b"), ("b", "a"))]
    )
    console.print(to_terminal(table))
    text = console.export_text()
    assert "…" not in text
    cells = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert "".join(cells) == "class-weights=pada,alpha=0.02"


def test_published_row_needs_no_seed() -> None:
    table = transfer_table(results())
    published = Row("paper", tuple(Cell(value) for value in (55.0, 65.0, 60.0)))
    extended = ResultTable(table.task, table.figure, table.choice, table.columns, (*table.rows, published))
    assert to_markdown([extended]).splitlines()[6] == "| paper | 55.0 | 65.0 | 60.0 |"
    assert extended.caption == table.caption


def test_the_table_says_how_the_images_were_tested() -> None:
    of_centre = [replace(run, task="office31") for run in results()]
    of_ten = [replace(run, test_crops=10) for run in of_centre]
    for tested, note in ((of_centre, "; centre-crop test"), (of_ten, "; ten-crop test")):
        assert transfer_table(tested).caption.endswith(note)
        assert class_table(tested, ("a", "b")).caption.endswith(note)
    assert transfer_table([*of_ten[:3], *of_centre[3:]]).caption.endswith(
        "; ten-crop test for some of the runs, centre crop for the others"
    )
    # The digits are used whole.
    assert "crop" not in transfer_table(results()).caption


def test_short_names_of_domains() -> None:
    assert transfer_table(results(), short_names={"a": "X"}).columns == ("X->b", "b->X", "avg")


def with_classes(method: str, seed: int, per_class: tuple[float | None, ...], mean: float, overall: float) -> RunResult:
    return replace(
        result(method, "a", "b", seed, overall),
        mean_per_class=Selection(mean, mean + 1, mean - 1),
        per_class=per_class,
        classes=("cat", "dog"),
    )


def test_class_table_by_hand() -> None:
    runs = [
        with_classes("gsda", 0, (80.0, 60.0), 70.0, 75.0),
        with_classes("gsda", 1, (82.0, None), 82.0, 77.0),
        replace(with_classes("gsda", 0, (1.0, 1.0), 1.0, 1.0), target="c"),
    ]
    table = class_table(runs, ("a", "b"), short_names={"a": "A"})
    assert table.columns == ("cat", "dog", "mean per class", "overall")
    root2 = pytest.approx(2**0.5)
    expected = (Cell(81.0, root2, 2), Cell(60.0, None, 1), Cell(76.0, pytest.approx(72**0.5), 2), Cell(76.0, root2, 2))
    assert row(table, "gsda") == expected
    assert table.title == "digits A->b: accuracy of each class, their mean, and overall accuracy, last step"
    best = class_table(runs, ("a", "b"), choice="best")
    assert best.columns == ("mean per class", "overall")
    assert row(best, "gsda")[1].mean == 77.0


def test_class_table_of_different_classes() -> None:
    runs = [with_classes("gsda", 0, (1.0, 1.0), 1.0, 1.0), with_classes("gsda", 1, (1.0, 1.0), 1.0, 1.0)]
    with pytest.raises(UsageError, match="2 different lists of classes"):
        class_table([runs[0], replace(runs[1], classes=("dog", "cat"))], ("a", "b"))
    with pytest.raises(UsageError, match="two of a->b"):
        class_table([runs[0], runs[0]], ("a", "b"))
