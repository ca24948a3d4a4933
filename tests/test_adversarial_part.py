"""The benchmark of the whole adversarial part: contenders do the same step, ratios are taken within visits."""

from pathlib import Path

import pytest
import torch

import gsda_kernels as gk
from benchmarks import adversarial_part
from benchmarks.adversarial_part import backward_then_sgd, contenders, fused, main, ratio, table, terms_of
from benchmarks.contenders import BASELINE
from benchmarks.shapes import HeadInputs, HeadShape, make_inputs

SMALL = HeadShape(num_classes=4, num_groups=2, feature_dim=16, hidden_dim=32, num_source=6, num_target=6)


def test_every_way_moves_the_parameters_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[HeadInputs] = []

    def remembered(shape: HeadShape) -> HeadInputs:
        kept.append(make_inputs(shape))
        return kept[-1]

    monkeypatch.setattr(adversarial_part, "make_inputs", remembered)
    monkeypatch.setattr(adversarial_part, "RATE", 0.1)
    terms = terms_of(gk, "torch")
    for way in (
        backward_then_sgd(SMALL, terms),
        backward_then_sgd(SMALL, terms, with_copy=True),
        fused(SMALL, terms, "torch"),
    ):
        way()
        way()
    first, *others = (inputs.disc for inputs in kept)
    for other in others:
        for found, expected in zip(other, first):
            torch.testing.assert_close(found, expected)
    assert not torch.equal(first.w2, make_inputs(SMALL).disc.w2)
    assert all(inputs.features.grad is not None for inputs in kept)


def test_contenders() -> None:
    assert {BASELINE, "torch, fused", "torch, backward then SGD"} <= contenders(SMALL).keys()
    assert {"native before, backward, copy, SGD"} <= contenders(SMALL, before=gk).keys()


def test_a_ratio_is_the_median_within_visits() -> None:
    """Whatever the machine was doing at a visit, it was doing to both."""
    assert ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0
    text = table({"visda": {BASELINE: [2.0, 20.0, 6.0], "native, fused": [1.0, 10.0, 2.0]}}, "a CPU")
    assert "| visda | native, fused | 2000 | 2.00 |  |  |" in text


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adversarial_part.SHAPES, "digits", SMALL)
    path = tmp_path / "part.md"
    assert main(["--shapes", "digits", "--visits", "1", "--leave-out", "native", "--output", str(path)]) == 0
    assert "| digits | torch, fused |" in path.read_text()
