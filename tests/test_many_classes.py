"""The count of memory and pairs for many classes."""

from pathlib import Path

import pytest

from benchmarks import many_classes
from benchmarks.many_classes import WAYS, active_pairs, held_bytes, largest, main
from benchmarks.shapes import HeadShape


def test_bytes_are_parameters_momentum_copies_and_what_pairs_keep() -> None:
    shape = HeadShape(num_classes=2, num_groups=1, feature_dim=3, hidden_dim=5, num_source=1, num_target=2)
    # Three matrices' worth of numbers for each of four discriminators; nine pairs by the source's 3 and the target's 4.
    parameters, matrices = 4 * (3 * 5 + 5 * 5 + 3 * 5 + 1), 4 * (3 * 5 + 5 * 5)
    kept = (3 + 2 * 4) * (4 * 5 + 3) * 2
    assert held_bytes(shape) == 8 * parameters + 2 * matrices + kept
    assert held_bytes(shape, share=0.5) == 4 * parameters + matrices + kept
    assert held_bytes(shape, num_pairs=0) == 8 * parameters + 2 * matrices


def test_active_pairs_are_those_of_enough_weight() -> None:
    shape = HeadShape(num_classes=4, num_groups=2, num_source=3, num_target=5)
    assert active_pairs(shape, 0.0) == 3 * 3 + 5 * 7
    assert active_pairs(shape, 1.0) < 3 * 3 + 5 * 7
    assert active_pairs(shape, 0.5) >= 3 * 3 + 5  # the domain's weight is 1 for every sample


@pytest.mark.parametrize("way", [WAYS[0], WAYS[-1]])
def test_the_largest_number_fits_and_one_much_larger_does_not(way: many_classes.Way) -> None:
    memory = 1e9
    found = largest(way, memory)
    assert held_bytes(way.shape(found), way.share) < memory
    assert held_bytes(way.shape(round(1.03 * found) + 2), way.share) > memory


def test_the_command_writes_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--classes", "2", "6", "--output", str(tmp_path / "many.md")]) == 0
    lines = (tmp_path / "many.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == ["classes", "2", "6"]
    assert (tmp_path / "many.png").stat().st_size > 1000
    assert "GB alone" in capsys.readouterr().out
