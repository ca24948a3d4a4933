"""The benchmark of divided discriminators: its table, and steps of a head as small as the digits'."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.divided_step import table


def test_a_ratio_is_that_within_visits() -> None:
    times = {"all-reduced": [1.0, 4.0, 9.0], "divided": [0.5, 1.0, 3.0]}
    page = table({"visda": (times, {"all-reduced": 89_000_000, "divided": 910_000})}, "a machine")
    assert "| visda | all-reduced | 4000 | 1.00 | 89.00 |" in page
    assert "| visda | divided | 1000 | 3.00 | 0.91 |" in page


@pytest.mark.slow
def test_two_processes_take_steps_of_both_kinds(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--shapes", "digits", "--visits", "1", "--output", str(tmp_path / "page.md")]
    subprocess.run(
        [*launch, "-m", "benchmarks.divided_step", *options], check=True, cwd=Path(__file__).parents[1], timeout=600
    )
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| digits")]
    moved = {row.split(" | ")[1]: float(row.split(" | ")[-1].rstrip(" |")) for row in rows}
    assert 0 < moved["divided"] < moved["all-reduced"]
