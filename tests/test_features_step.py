"""What a step spends outside the kernels: kernels are told apart from the rest, and everything is as it was after."""

import itertools
from pathlib import Path

import pytest

from benchmarks import features_step
from benchmarks.features_step import BATCHES, CASES, Visit, main, table, timed_kernels
from benchmarks.shapes import HeadShape
from gsda_kernels import backends

SMALL = HeadShape(num_classes=4, num_groups=2, feature_dim=16, hidden_dim=32, num_source=6, num_target=6)


def test_only_a_backends_work_is_timed() -> None:
    original, name = backends.get, backends.resolve_backend("auto", "cpu")
    ticks = itertools.count()
    with timed_kernels(lambda: next(ticks)) as kernels:
        timed = backends.get(name)
        assert timed is kernels
        assert backends.get("torch") is original("torch")
        assert timed.unsupported == original(name).unsupported
        with pytest.raises(TypeError):
            timed.forward()
        # From one tick of the clock to the next, also where the call fails.
        assert kernels.seconds == 1
    assert backends.get is original


def test_shares_are_those_of_a_visit() -> None:
    """Whatever the machine was doing at a visit, it was doing to the whole step."""
    visits = [Visit(0.02, 0.015, 0.005), Visit(0.2, 0.15, 0.05), Visit(0.04, 0.03, 0.01)]
    lines = table({("r 11", 36): visits}, "a CPU", "the command").splitlines()
    assert lines[-1] == "| r 11 | 36 + 36 | 40.0 | 10.0 | 25.0% | 10.0 | 25.0% |"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_step, "CASES", dict.fromkeys(CASES, SMALL))
    monkeypatch.setattr(features_step, "DIM", 12)
    monkeypatch.setattr(features_step, "ROWS", 300)
    path = tmp_path / "step.md"
    assert main(["--visits", "1", "--steps", "1", "--output", str(path)]) == 0
    page = path.read_text()
    assert all(f"| {name} | {size} + {size} |" in page for name in CASES for size in BATCHES)
