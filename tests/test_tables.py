import csv
import io
import json
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console
from table_cells import Cell, Difference, cells, lines, means, squeezed

from gsda_fast.errors import UsageError
from gsda_fast.results.metrics import SCORES
from gsda_fast.results.records import RunResult, Selection
from gsda_fast.results.tables import (
    ALL,
    CHOICE_NAMES,
    PairedTable,
    Table,
    choices_side_by_side,
    class_table,
    contrasts,
    paired_table,
    printable,
    score_table,
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


def test_cells_by_hand() -> None:
    table = transfer_table(results())
    assert table.columns == ("a->b", "b->a", "avg")
    assert [label for (label, *_), _ in table.rows] == ["source-only", "gsda"]
    # Averages of the seeds: 60, 56, 67 with mean 61 and squared deviations 1 + 25 + 36 = 62, over 2.
    assert cells(table, "source-only") == [
        Cell(52.0, 2.0, 3),
        Cell(70.0, 10.0, 3),
        Cell(61.0, pytest.approx(31**0.5), 3),
    ]
    # 75, 72, 75: mean 74, squared deviations 1 + 4 + 1, over 2.
    assert cells(table, "gsda") == [
        Cell(61.0, pytest.approx(3**0.5), 3),
        Cell(87.0, 3.0, 3),
        Cell(74.0, pytest.approx(3**0.5), 3),
    ]


def test_figure_and_choice() -> None:
    assert means(transfer_table(results(), choice="best"), "gsda")[0] == 62.0
    assert means(transfer_table(results(), choice="label_free"), "gsda")[0] == 60.0
    assert means(transfer_table(results(), metric="mean_per_class"), "gsda")[0] == 30.5
    assert "upper bound" in transfer_table(results(), choice="best").title
    assert "upper bound" not in transfer_table(results(), choice="label_free").title


def test_order_of_rows_and_columns() -> None:
    table = transfer_table(
        results(), methods=["gsda", "dann", "source-only"], transfer_tasks=[("b", "a"), ("a", "c"), ("a", "b")]
    )
    assert table.columns == ("b->a", "a->c", "a->b", "avg")
    assert [label for (label, *_), _ in table.rows] == ["gsda", "dann", "source-only"]
    assert cells(table, "dann") == [Cell()] * 4
    assert cells(table, "gsda")[1] == Cell()
    assert cells(table, "gsda")[3] == Cell()  # no seed has all three transfer tasks


def test_incomplete_seed_has_no_average() -> None:
    table = transfer_table([run for run in results() if (run.method, run.source, run.seed) != ("gsda", "b", 2)])
    # Left are the seeds 0 and 1 with averages 75 and 72; a mean of column means would give (61 + 87) / 2 = 74.
    assert cells(table, "gsda") == [
        Cell(61.0, pytest.approx(3**0.5), 3),
        Cell(87.0, pytest.approx(18**0.5), 2),
        Cell(73.5, pytest.approx(4.5**0.5), 2),
    ]
    assert lines(table)[1][2] == "87.0 ± 4.2 (2)"
    assert "only n seeds" in table.caption
    assert "only n seeds" not in transfer_table(results()).caption


def test_one_seed_has_no_spread() -> None:
    table = transfer_table([result("gsda", "a", "b", 0, 61.25)])
    assert table.columns == ("a->b",)
    assert lines(table) == [("gsda", "61.2")]
    assert "one seed" in table.caption


def test_unlabelled_target_is_an_empty_cell() -> None:
    table = transfer_table([result("gsda", "a", "b", 0, None)])
    assert cells(table, "gsda") == [Cell()]
    assert lines(table) == [("gsda", "-")]


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="two of a->b, method gsda, seed 0"):
        transfer_table([result("gsda", "a", "b", 0, 1.0), result("gsda", "a", "b", 0, 2.0)])
    with pytest.raises(UsageError, match="the tasks digits, visda"):
        transfer_table([result("gsda", "a", "b", 0, 1.0), result("gsda", "a", "b", 1, 1.0, task="visda")])
    with pytest.raises(ValueError, match="expected at least one"):
        transfer_table([])


def test_markdown() -> None:
    table = transfer_table(results())
    assert squeezed(re.sub("-{3,}", "---", to_markdown([table]))) == (
        "**digits: overall accuracy, last step**\n\n"
        "| method | a->b | b->a | avg |\n"
        "|:---|---:|---:|---:|\n"
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
        "task": "digits", "metric": "accuracy", "choice": "last", "subject": "",
        "method": "source-only", "kind": "ours", "column": "avg", "mean": "61.0",
        "standard_deviation": repr(31**0.5), "seeds": "3",
    }  # fmt: skip


def test_json() -> None:
    stored = json.loads(to_json([transfer_table(results())]))
    assert stored[0]["rows"][1]["label"] == "gsda"
    assert stored[0]["rows"][1]["cells"][1] == {"mean": 87.0, "spread": 3.0, "seeds": 3}


def test_terminal() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(to_terminal(transfer_table(results()), console))
    text = console.export_text()
    for expected in ("source-only", "87.0 ± 3.0", "a->b", "overall accuracy, last step"):
        assert expected in text


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    console = Console(width=30, record=True)
    table = transfer_table(
        [result("class-weights=pada,alpha=0.02", *pair, 0, 50.0) for pair in (("a", "b"), ("b", "a"))]
    )
    console.print(to_terminal(table, console))
    text = console.export_text()
    assert "…" not in text
    _, _, *rows = text[text.index("method") :].splitlines()
    assert "".join(row[:22].strip() for row in rows[:2]) == "class-weights=pada,alpha=0.02"


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
    expected = [Cell(81.0, root2, 2), Cell(60.0, None, 1), Cell(76.0, pytest.approx(72**0.5), 2), Cell(76.0, root2, 2)]
    assert cells(table, "gsda") == expected
    assert table.title == "digits A->b: accuracy of each class, their mean, and overall accuracy, last step"
    best = class_table(runs, ("a", "b"), choice="best")
    assert best.columns == ("mean per class", "overall")
    assert means(best, "gsda")[1] == 77.0


def test_class_table_of_different_classes() -> None:
    runs = [with_classes("gsda", 0, (1.0, 1.0), 1.0, 1.0), with_classes("gsda", 1, (1.0, 1.0), 1.0, 1.0)]
    with pytest.raises(UsageError, match="2 different lists of classes"):
        class_table([runs[0], replace(runs[1], classes=("dog", "cat"))], ("a", "b"))
    with pytest.raises(UsageError, match="two of a->b"):
        class_table([runs[0], runs[0]], ("a", "b"))


# ------------------------------------------------------------------------------------------------------ differences

RunKey = tuple[str, tuple[str, str], int]
MO, FO = ("mnist", "optdigits"), ("fonts", "optdigits")
SHORT = {"mnist": "M", "fonts": "F", "optdigits": "O"}

# gsda - group: +1, +2, +6 on M->O, -1 and +3 on F->O, whose third seed gsda has not finished.
VALUES: dict[RunKey, float | None] = {
    **{("group", MO, seed): 70.0 for seed in range(3)},
    **{("gsda", MO, seed): value for seed, value in enumerate((71.0, 72.0, 76.0))},
    **{("group", FO, seed): 60.0 for seed in range(3)},
    **{("gsda", FO, seed): value for seed, value in enumerate((59.0, 63.0, None))},
}


def differences(
    values: dict[RunKey, float | None], methods: tuple[str, ...], quantity: str = "accuracy", decimals: int = 1
) -> PairedTable:
    lines = [(method, f"{SHORT[s]}->{SHORT[t]}", seed, value) for (method, (s, t), seed), value in values.items()]
    frame = pd.DataFrame(lines, columns=["method", "column", "seed", "value"]).astype({"value": float})
    return paired_table("digits", quantity, frame, methods, decimals=decimals)


def test_paired_table_by_hand() -> None:
    table = differences(VALUES, ("group", "gsda"), "accuracy")
    assert table.columns == ("M->O", "F->O", ALL)
    ((row, _),) = table.rows
    assert row == ("gsda", "group")
    # All pairs: 1, 2, 6, -1, 3: mean 2.2, squared deviations 26.8 over 4, standard error sqrt(6.7 / 5).
    assert cells(table, "gsda") == [
        Difference(3.0, pytest.approx(math.sqrt(7 / 3)), 3, 3),
        Difference(1.0, pytest.approx(2.0), 2, 1),
        Difference(pytest.approx(2.2), pytest.approx(math.sqrt(6.7 / 5)), 5, 4),
    ]


def test_pairing_takes_the_noise_of_seeds_out() -> None:
    """What pairs are for: seeds that differ by 20 points and a method that adds 1 to each."""
    values: dict[RunKey, float | None] = {
        (method, MO, seed): 50.0 + 20 * seed + (method == "gsda") for method in ("group", "gsda") for seed in range(3)
    }
    assert cells(differences(values, ("group", "gsda")), "gsda")[-1] == Difference(1.0, 0.0, 3, 3)


def test_text_shows_mean_error_and_pairs() -> None:
    table = differences(VALUES, ("group", "gsda"), "accuracy")
    assert tuple(table.texts.columns) == ("difference", "M->O", "F->O", "all", "higher in")
    assert lines(table) == [("gsda - group", "+3.0 ± 1.5 (3)", "+1.0 ± 2.0 (2)", "+2.2 ± 1.2 (5)", "4 of 5")]
    precise = differences(VALUES, ("group", "gsda"), "mismatch", decimals=3)
    assert lines(precise)[0][1] == "+3.000 ± 1.528 (3)"
    single = differences({("a", MO, 0): 1.0, ("b", MO, 0): 3.0}, ("a", "b"), "accuracy")
    assert lines(single) == [("b - a", "+2.0 (1)", "+2.0 (1)", "1 of 1")]


def test_equal_runs_are_not_higher() -> None:
    values: dict[RunKey, float | None] = {(method, MO, seed): 1.0 for method in "ab" for seed in (0, 1)}
    assert cells(differences(values, ("a", "b")), "b")[-1] == Difference(0.0, 0.0, pairs=2, higher=0)


def test_contrasts_end_with_everything_against_nothing() -> None:
    assert contrasts(("source-only", "domain", "gsda")) == [
        ("gsda", "domain"),
        ("domain", "source-only"),
        ("gsda", "source-only"),
    ]
    assert contrasts(("group", "gsda")) == [("gsda", "group")]
    assert contrasts(("gsda",)) == contrasts(()) == []


def test_other_methods_are_compared_with_the_baselines() -> None:
    assert contrasts(("source-only", "dann", "mcd")) == [
        ("dann", "source-only"), ("mcd", "source-only"), ("mcd", "dann"),
    ]  # fmt: skip
    # What an ablation among them adds follows, each pair once.
    assert contrasts(("source-only", "dann", "group", "gsda")) == [
        ("dann", "source-only"), ("group", "source-only"), ("gsda", "source-only"), ("group", "dann"), ("gsda", "dann"),
        ("gsda", "group"),
    ]  # fmt: skip
    assert contrasts(("dann", "gsda", "glb", "glb-cls"))[-3:] == [
        ("gsda", "glb-cls"),
        ("glb-cls", "glb"),
        ("gsda", "glb"),
    ]
    assert contrasts(("alpha=1", "alpha=2")) == [("alpha=2", "alpha=1")]


def test_method_that_never_measured_the_figure_takes_no_part() -> None:
    values = {("source-only", MO, 0): None, **VALUES}
    table = differences(values, ("source-only", "group", "gsda"), "mismatch")
    assert [row for row, _ in table.rows] == [("gsda", "group")]


def test_methods_that_share_no_seed_have_no_difference() -> None:
    values: dict[RunKey, float | None] = {("group", MO, 0): 70.0, ("gsda", MO, 1): 71.0}
    table = differences(values, ("group", "gsda"), "accuracy")
    assert cells(table, "gsda") == [Difference(None, None, 0, 0)] * 2
    assert lines(table) == [("gsda - group", "-", "-", "0 of 0")]


def test_markdown_of_differences() -> None:
    table = differences(VALUES, ("group", "gsda"), "accuracy, in points")
    text = squeezed(to_markdown([table]))
    assert text.startswith(
        "**digits: paired differences of accuracy, in points**\n\n| difference | M->O | F->O | all |"
    )
    assert "| gsda - group | +3.0 ± 1.5 (3) | +1.0 ± 2.0 (2) | +2.2 ± 1.2 (5) | 4 of 5 |" in text
    assert "mean ± standard error (pairs)" in text


def test_csv_and_json_of_differences_have_full_precision() -> None:
    table = differences(VALUES, ("group", "gsda"), "accuracy")
    lines = list(csv.DictReader(io.StringIO(to_csv([table, table]))))
    assert len(lines) == 2 * 3
    assert lines[0] == {
        "task": "digits", "quantity": "accuracy", "method": "gsda", "minus": "group", "column": "M->O",
        "mean": "3.0", "standard_error": repr(math.sqrt(7) / math.sqrt(3)), "pairs": "3", "higher": "3",
    }  # fmt: skip
    (stored,) = json.loads(to_json([table]))
    assert stored["columns"] == ["M->O", "F->O", "all"]
    assert stored["rows"][0]["cells"][1] == {"mean": 1.0, "standard_error": 2.0, "pairs": 2, "higher": 1}


# ----------------------------------------------------------------------------------------------------------- scores


def chosen_by(seed: int, last: float, by: dict[str, float], best: float = 90.0, target: str = "b") -> RunResult:
    return replace(
        result("gsda", "a", target, seed, last),
        accuracy=Selection(last, best, 1.0),
        label_free_by={score: {"accuracy": value, "mean_per_class": 0.0} for score, value in by.items()},
    )


def test_score_table_by_hand() -> None:
    runs = [
        chosen_by(0, 50.0, {"entropy": 53.0, "nuclear_norm": 50.0}),
        chosen_by(1, 60.0, {"entropy": 59.0, "nuclear_norm": 60.0}),
        chosen_by(2, 70.0, {"entropy": 74.0, "nuclear_norm": 71.0}),
        chosen_by(3, 10.0, {}, target="c"),
    ]
    # Low entropy is good: of a->b the ranks agree but for one exchange (Spearman 1/2), of a->c there is one run.
    unknown = pd.DataFrame({name: [math.nan] * 4 for name in SCORES})
    final = unknown.assign(entropy=[0.5, 0.6, 0.1, 0.2], nuclear_norm=[0.1, 0.2, 0.3, 0.0])
    table = score_table(runs, final, "accuracy")
    found = {row[0]: dict(zip(of["column"], of["value"])) for row, of in table.rows}
    assert list(found) == list(SCORES)
    # +3, -1, +4: mean 2, deviations 1, 9, 4 over 2 over 3.
    assert found["entropy"] == {
        "better": 2, "equal": 0, "worse": 1, "mean gain": 2.0, "standard error": pytest.approx((7 / 3) ** 0.5),
        "behind the best": pytest.approx((37 + 31 + 16) / 3), "rank correlation": pytest.approx(0.5),
    }  # fmt: skip
    assert [found["nuclear_norm"][name] for name in ("better", "equal", "worse", "rank correlation")] == [1, 2, 0, 1.0]
    assert math.isnan(found["softmax_correlation"]["mean gain"])
    # A run that kept no choices has that of the mutual information.
    assert found["mutual_information"]["worse"] == 4
    assert lines(table)[1] == ("entropy", "2", "0", "1", "+2.00", "1.53", "28.00", "+0.50")
    assert lines(table)[4] == ("softmax correlation", *("-",) * 7)
    assert "over 4 runs" in table.caption
    assert "| entropy | 2 | 0 | 1 |" in squeezed(to_markdown([table]))
    (stored,) = json.loads(to_json([table]))
    assert stored["rows"][4]["cells"][0] == {"value": None}


# ------------------------------------------------------------------------------------------------------------ names


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[31mred\n\u202eabc ü 字") == "a\\x1b[31mred\\n\\u202eabc ü 字"


def test_names_from_data_are_shown_as_they_are() -> None:
    names = ("=1+1", "[red]x", "a|b\n", "overall")
    run = replace(with_classes("gsda", 0, (1.0, 2.0, 3.0, 4.0), 70.0, 75.0), classes=names)
    table = class_table([run], ("a", "b"))
    assert lines(table) == [("gsda", "1.0", "2.0", "3.0", "4.0", "70.0", "75.0")]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(to_terminal(table, console))
    text = console.export_text()
    assert all(name in text for name in ("=1+1", "[red]x", "a|b\\n", "overall"))
    assert "| method | =1+1 | [red]x | a\\|b\\n | overall | mean per class | overall |" in squeezed(
        to_markdown([table])
    )
    columns = [line["column"] for line in csv.DictReader(io.StringIO(to_csv([table])))]
    assert columns == ["'=1+1", "[red]x", "a|b\\n", "overall", "mean per class", "overall"]


def test_what_a_spreadsheet_would_run_is_text() -> None:
    for first in "=+-@":
        table = transfer_table([result(f"{first}cmd", "a", "b", 0, -1.0)])
        (line,) = csv.DictReader(io.StringIO(to_csv([table])))
        assert line["method"] == f"'{first}cmd"
        assert line["mean"] == "-1.0"  # a number stays one


def on_a_terminal(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(to_terminal(table, console))
    return console.export_text()


def test_spreads_are_left_out_where_a_terminal_is_too_narrow() -> None:
    targets = [f"target {number}" for number in range(12)]
    table = transfer_table([result("gsda", "a", target, seed, 50.0 + seed) for target in targets for seed in (0, 1)])
    (row,) = (line for line in on_a_terminal(table, 180).splitlines() if "gsda" in line)
    assert row.split() == ["gsda", *["50.5"] * 13]
    assert "the files have more" in on_a_terminal(table, 180)
    (row,) = (line for line in on_a_terminal(table, 80).splitlines() if "gsda" in line)
    assert row.split("gsda")[1].strip() == "50.5 ± 0.7"
    for whole in (on_a_terminal(table, 250), squeezed(to_markdown([table]))):
        assert whole.count("50.5 ± 0.7") == 13
        assert "the files have more" not in whole


def test_a_narrow_terminal_shows_the_averages_of_a_table_by_class() -> None:
    runs = [with_classes("gsda", seed, (1.0, 2.0, 3.0, 4.0), 70.0, 75.0) for seed in (0, 1)]
    table = class_table([replace(run, classes=tuple("abcd")) for run in runs], ("a", "b"))
    (row,) = (line for line in on_a_terminal(table, 60).splitlines() if "gsda" in line)
    assert re.split(r"\s{2,}", row.strip()) == ["gsda", "70.0 ± 0.0", "75.0 ± 0.0"]
    assert "4.0 ± 0.0" in on_a_terminal(table, 150)


def test_a_narrow_terminal_shows_the_differences_over_all_pairs_with_their_errors() -> None:
    table = differences(VALUES, ("group", "gsda"))
    (row,) = (line for line in on_a_terminal(table, 50).splitlines() if "gsda" in line)
    assert re.split(r"\s{2,}", row.strip()) == ["gsda - group", "+2.2 ± 1.2 (5)", "4 of 5"]
    assert "M->O" in on_a_terminal(table, 120)


def test_the_choices_of_one_transfer_task_side_by_side() -> None:
    runs = [run for run in results() if run.source == "a"]
    table = choices_side_by_side([transfer_table(runs, choice=choice) for choice in CHOICE_NAMES])
    assert table.title == "digits a->b: overall accuracy"
    assert table.columns == tuple(CHOICE_NAMES.values())
    assert lines(table)[1] == ("gsda", "61.0 ± 1.7", "60.0 ± 1.7", "62.0 ± 1.7")
