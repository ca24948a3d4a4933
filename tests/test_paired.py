"""Paired differences over the runs of suites."""

import math
from pathlib import Path

import pandas as pd
import pytest
from fabricated_runs import fabricated_run

from benchmarks import paired
from benchmarks.paired import difference, main, page, read_runs


def runs(**last: list[float]) -> pd.DataFrame:
    rows = [
        {"method": method, "task": f"a->{i % 2}", "seed": i // 2, "last": value, "label_free": value, "best": value + 1}
        for method, values in last.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(revision="0123456789abcdef")


def test_a_difference_is_that_of_the_pairs() -> None:
    found = difference(runs(first=[10.0, 20.0, 33.0], second=[9.0, 18.0, 30.0]), "first", "second")
    assert found["mean"] == pytest.approx(2.0)
    assert found["standard_error"] == pytest.approx(1 / math.sqrt(3))
    # t of 2 degrees of freedom at 97.5 %: 4.3027.
    assert found["high"] == pytest.approx(2 + 4.302652729911275 / math.sqrt(3))
    assert (found["pairs"], found["higher"]) == (3, 3)


def test_a_run_without_its_pair_takes_no_part() -> None:
    found = difference(runs(first=[10.0, 20.0, 90.0], second=[9.0, 18.0]), "first", "second")
    assert (found["mean"], found["pairs"]) == (pytest.approx(1.5), 2)


@pytest.mark.parametrize("other", ["nosuch", "second"])
def test_too_few_pairs_are_an_error(other: str) -> None:
    with pytest.raises(ValueError, match=rf"first - {other}: found [01] pairs; expected two or more"):
        difference(runs(first=[1.0, 2.0], second=[3.0]), "first", other)


def test_the_page_says_what_is_resolved() -> None:
    table = runs(first=[10.0, 20.0, 30.0, 40.0], second=[9.0, 19.1, 29.0, 39.0], third=[12.0, 17.0, 33.0, 38.0])
    text = page(table, [("first", "second"), ("first", "third")], "Title", "command")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| yes " in rows["first - second"]
    assert "| no " in rows["first - third"]
    assert "revision 0123456789ab." in text


@pytest.mark.parametrize(
    ("method", "added", "name"),
    [
        ("gsda", {}, "gsda"),
        ("gsda", {"mcc": 1.0}, "gsda+mcc"),
        ("mcc", {"mcc": 1.0}, "mcc"),
        ("mcc", {"bsp": 1.0}, "mcc+bsp"),
    ],
)
def test_a_method_is_named_with_the_terms_that_are_not_its_own(
    method: str, added: dict[str, float], name: str, tmp_path: Path
) -> None:
    run = fabricated_run(tmp_path, method)
    run.write_config({**run.read_config(), "adaptation": {"add": added}})
    assert list(read_runs([tmp_path])["method"]) == [name]


def test_of_a_run_that_occurs_twice_the_one_named_last_counts(tmp_path: Path) -> None:
    """A table of earlier runs is read as a folder of them is; it may lack the mean over classes."""
    first, again = tmp_path / "first.csv", tmp_path / "again.csv"
    runs(gsda=[10.0, 20.0], dann=[1.0, 2.0]).to_csv(first, index=False)
    runs(dann=[5.0]).to_csv(again, index=False)
    found = read_runs([first, again])
    assert dict(zip(zip(found["method"], found["task"]), found["last"])) == {
        ("gsda", "a->0"): 10.0,
        ("gsda", "a->1"): 20.0,
        ("dann", "a->0"): 5.0,
        ("dann", "a->1"): 2.0,
    }
    text = page(found, [], "Title", "command")
    assert "revision 0123456789ab." in text
    assert "mean per class" not in text
    assert "over seeds" not in text, "one seed has no spread"


def test_the_command_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "read_runs", lambda folders: runs(gsda=[1.0, 2.0, 4.0], mcc=[1.0, 3.0, 3.0]))
    arguments = ["a", "b", "--differences", "gsda - mcc", "--title", "Title", "--output", str(tmp_path / "found")]
    assert main(arguments) == 0
    assert 'python -m benchmarks.paired a b --differences "gsda - mcc"' in (tmp_path / "found.md").read_text()
    assert len(pd.read_csv(tmp_path / "found.csv")) == 6
