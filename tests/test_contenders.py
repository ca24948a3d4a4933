"""What the head's benchmark compares: contenders that compute the same, and the table made of their times."""

import pytest
import torch

from benchmarks.contenders import BASELINE, INDEXING, REFERENCE, contenders, step
from benchmarks.shapes import SHAPES, HeadShape, make_inputs
from benchmarks.summary import table
from benchmarks.work import counted_multiply_adds, needed_multiply_adds
from gsda_kernels import pairs

SHAPE = HeadShape(num_classes=4, num_groups=2, feature_dim=16, hidden_dim=32, num_source=5, num_target=4)


@pytest.mark.parametrize("discriminators", [True, False], ids=["both players", "encoder step"])
@pytest.mark.parametrize("name", [name for name in contenders("cpu") if name != REFERENCE])
def test_every_contender_computes_the_same(name: str, discriminators: bool) -> None:
    inputs = make_inputs(SHAPE).requires_grad_(True, discriminators)
    expected = step(contenders("cpu")[REFERENCE], inputs)
    found = step(contenders("cpu")[name], inputs)
    assert len(found) == (7 if discriminators else 1)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_work_of_each_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six units of every pair for autograd, fewer and of the active ones alone for the closed form (docs/method.md)."""
    monkeypatch.setattr(pairs, "_BATCHED_BELOW", 0)
    for name in (REFERENCE, INDEXING, BASELINE):
        assert counted_multiply_adds(name, SHAPE, True) / SHAPE.unit == pytest.approx(6, rel=0.1)
    for discriminators in (True, False):
        needed = needed_multiply_adds(SHAPE, discriminators)
        # torch counts the products of a vector and a matrix as well, a few parts in H.
        assert counted_multiply_adds("torch", SHAPE, discriminators) == pytest.approx(needed, rel=0.05)
        assert counted_multiply_adds("native", SHAPE, discriminators) == needed
    assert needed_multiply_adds(SHAPES["visda"], True) / SHAPES["visda"].unit == pytest.approx(1.88, abs=0.01)


def test_ratios_are_taken_visit_by_visit() -> None:
    facts = {"shape": "visda", "player": "both players", "multiply_adds": 4e9, "unit": 1e9, "peak_memory": 2e6}
    facts["floor_seconds"] = 0.001
    # The machine was ten times slower during the second visit.
    seconds = {BASELINE: (0.6, 6.0, 0.6), REFERENCE: (1.2, 12.0), INDEXING: (9.0,), "native": (0.1, 1.0, 0.1)}
    benchmarks = [
        {"extra_info": {**facts, "contender": name, "visit": visit}, "stats": {"median": value}}
        for name, values in seconds.items()
        for visit, value in enumerate(values)
    ]
    machine = {"device": "a CPU", "threads": 1, "torch": "2", "python_version": "3"}
    lines = table({"benchmarks": benchmarks, "machine_info": machine, "commit_info": {"id": "abc"}}).splitlines()
    assert lines[2].count("|") == lines[3].count("|") == lines[-1].count("|")
    assert lines[-1] == (
        "| visda | both players | native | 100.0 ms | 6.0x | 12.0x | 90.0x | 4.00 G | 4.00 | 2 MB | 1.0 ms |"
    )
