"""Differences between methods, from suites' folders and from the tables of earlier ones."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.paired import difference, main, read_runs


def table(path: Path, *rows: tuple[str, str, int, float]) -> Path:
    columns = ["method", "task", "seed", "last"]
    runs = pd.DataFrame(rows, columns=columns).assign(label_free=50.0, best=60.0, revision="0" * 40)
    runs.to_csv(path, index=False)
    return path


def test_the_runs_named_last_count(tmp_path: Path) -> None:
    first = table(tmp_path / "first.csv", ("dann", "a->b", 0, 40.0), ("gsda", "a->b", 0, 50.0))
    again = table(tmp_path / "again.csv", ("dann", "a->b", 0, 45.0))
    assert list(read_runs([first, again])["last"]) == [45.0, 50.0]
    assert list(read_runs([again, first])["last"]) == [40.0, 50.0]


def test_a_difference_is_that_of_pairs(tmp_path: Path) -> None:
    """A run without its pair does not count."""
    rows = [("dann", "a->b", 0, 40.0), ("dann", "a->b", 1, 42.0), ("dann", "b->a", 0, 90.0)]
    runs = read_runs([table(tmp_path / "runs.csv", *rows, ("gsda", "a->b", 0, 41.0), ("gsda", "a->b", 1, 45.0))])
    found = difference(runs, "gsda", "dann")
    assert (found["pairs"], found["higher"], found["mean"], found["standard_error"]) == (2, 2, 2.0, 1.0)
    with pytest.raises(ValueError, match="mcc - dann: found 0 pairs"):
        difference(runs, "mcc", "dann")


def test_the_page_holds_averages_and_differences(tmp_path: Path) -> None:
    rows = [(method, "a->b", seed, last + seed) for method, last in (("dann", 40.0), ("gsda", 50.0)) for seed in (0, 1)]
    runs = table(tmp_path / "runs.csv", *rows)
    arguments = [str(runs), "--differences", "gsda - dann", "--title", "Both", "--output", str(tmp_path / "page")]
    assert main(arguments) == 0
    page = (tmp_path / "page.md").read_text()
    assert "+10.00 \u00b1 0.00" in page
    assert "2 of 2" in page
    assert "mean per class" not in page
    assert len(pd.read_csv(tmp_path / "page.csv")) == 4
