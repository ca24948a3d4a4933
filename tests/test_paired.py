import csv
import io
import json
import math

import pytest

from gsda_fast.results.paired import ALL, Difference, contrasts, paired_table, to_csv, to_json
from gsda_fast.results.tables import RunKey, to_markdown

MO, FO = ("mnist", "optdigits"), ("fonts", "optdigits")
SHORT = {"mnist": "M", "fonts": "F", "optdigits": "O"}

# gsda - group: +1, +2, +6 on M->O, -1 and +3 on F->O, whose third seed gsda has not finished.
VALUES: dict[RunKey, float | None] = {
    **{("group", MO, seed): 70.0 for seed in range(3)},
    **{("gsda", MO, seed): value for seed, value in enumerate((71.0, 72.0, 76.0))},
    **{("group", FO, seed): 60.0 for seed in range(3)},
    **{("gsda", FO, seed): value for seed, value in enumerate((59.0, 63.0, None))},
}


def test_difference_by_hand() -> None:
    # Mean 3, squared deviations 4 + 1 + 9 = 14, over 2; standard error sqrt(7 / 3).
    assert Difference.of([1.0, 2.0, 6.0]) == Difference(3.0, pytest.approx(math.sqrt(7 / 3)), pairs=3, higher=3)
    assert Difference.of([-1.0, 3.0]) == Difference(1.0, pytest.approx(2.0), pairs=2, higher=1)
    assert Difference.of([-2.0]) == Difference(-2.0, None, pairs=1, higher=0)
    assert Difference.of([]) == Difference(None, None, pairs=0, higher=0)


def test_equal_runs_are_not_higher() -> None:
    assert Difference.of([0.0, 0.0]) == Difference(0.0, 0.0, pairs=2, higher=0)


def test_paired_table_by_hand() -> None:
    table = paired_table("digits", "accuracy", VALUES, ("group", "gsda"), short_names=SHORT)
    assert table.columns == ("M->O", "F->O", ALL)
    (row,) = table.rows
    assert (row.method, row.minus) == ("gsda", "group")
    # All pairs: 1, 2, 6, -1, 3: mean 2.2, squared deviations 26.8 over 4, standard error sqrt(6.7 / 5).
    assert row.cells == (
        Difference(3.0, pytest.approx(math.sqrt(7 / 3)), 3, 3),
        Difference(1.0, pytest.approx(2.0), 2, 1),
        Difference(pytest.approx(2.2), pytest.approx(math.sqrt(6.7 / 5)), 5, 4),
    )


def test_pairing_takes_the_noise_of_seeds_out() -> None:
    """What pairs are for: seeds that differ by 20 points and a method that adds 1 to each."""
    values: dict[RunKey, float | None] = {
        (method, MO, seed): 50.0 + 20 * seed + (method == "gsda") for method in ("group", "gsda") for seed in range(3)
    }
    (row,) = paired_table("digits", "accuracy", values, ("group", "gsda")).rows
    assert row.cells[-1] == Difference(1.0, 0.0, 3, 3)


def test_text_shows_mean_error_and_pairs() -> None:
    table = paired_table("digits", "accuracy", VALUES, ("group", "gsda"), short_names=SHORT)
    assert table.header == ("difference", "M->O", "F->O", "all", "higher in")
    assert table.lines == [("gsda - group", "+3.0 ± 1.5 (3)", "+1.0 ± 2.0 (2)", "+2.2 ± 1.2 (5)", "4 of 5")]
    precise = paired_table("digits", "mismatch", VALUES, ("group", "gsda"), decimals=3)
    assert precise.lines[0][1] == "+3.000 ± 1.528 (3)"
    single = paired_table("digits", "accuracy", {("a", MO, 0): 1.0, ("b", MO, 0): 3.0}, ("a", "b"))
    assert single.lines == [("b - a", "+2.0 (1)", "+2.0 (1)", "1 of 1")]


def test_contrasts_end_with_everything_against_nothing() -> None:
    assert contrasts(("source-only", "domain", "gsda")) == [
        ("gsda", "domain"),
        ("domain", "source-only"),
        ("gsda", "source-only"),
    ]
    assert contrasts(("group", "gsda")) == [("gsda", "group")]
    assert contrasts(("gsda",)) == contrasts(()) == []


def test_method_that_never_measured_the_figure_takes_no_part() -> None:
    values = {("source-only", MO, 0): None, **VALUES}
    table = paired_table("digits", "mismatch", values, ("source-only", "group", "gsda"))
    assert [(row.method, row.minus) for row in table.rows] == [("gsda", "group")]


def test_methods_that_share_no_seed_have_no_difference() -> None:
    values: dict[RunKey, float | None] = {("group", MO, 0): 70.0, ("gsda", MO, 1): 71.0}
    table = paired_table("digits", "accuracy", values, ("group", "gsda"))
    assert table.rows[0].cells == (Difference(None, None, 0, 0),) * 2
    assert table.lines == [("gsda - group", "-", "-", "0 of 0")]


def test_markdown() -> None:
    table = paired_table("digits", "accuracy, in points", VALUES, ("group", "gsda"), short_names=SHORT)
    text = to_markdown([table])
    assert text.startswith(
        "**digits: paired differences of accuracy, in points**\n\n| difference | M->O | F->O | all |"
    )
    assert "| gsda - group | +3.0 ± 1.5 (3) | +1.0 ± 2.0 (2) | +2.2 ± 1.2 (5) | 4 of 5 |" in text
    assert "mean ± standard error (pairs)" in text


def test_csv_and_json_have_full_precision() -> None:
    table = paired_table("digits", "accuracy", VALUES, ("group", "gsda"), short_names=SHORT)
    lines = list(csv.DictReader(io.StringIO(to_csv([table, table]))))
    assert len(lines) == 2 * 3
    assert lines[0] == {
        "task": "digits", "quantity": "accuracy", "method": "gsda", "minus": "group", "column": "M->O",
        "mean": "3.0", "standard_error": repr(math.sqrt(7) / math.sqrt(3)), "pairs": "3", "higher": "3",
    }  # fmt: skip
    (stored,) = json.loads(to_json([table]))
    assert stored["columns"] == ["M->O", "F->O", "all"]
    assert stored["rows"][0]["cells"][1] == {"mean": 1.0, "standard_error": 2.0, "pairs": 2, "higher": 1}
