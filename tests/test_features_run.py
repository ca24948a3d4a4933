"""The benchmark of whole training on embeddings: contenders train towards the same objective."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gsda_kernels as gk
from benchmarks import features_run
from benchmarks.contenders import BASELINE
from benchmarks.features_run import (
    LOOP,
    OURS,
    baseline_method,
    config_of,
    discriminator,
    loop_terms,
    main,
    ours,
    plain_loop,
    table,
    with_baseline,
    write_domains,
)
from benchmarks.shapes import HeadShape, make_inputs
from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import Config
from gsda_fast.methods import METHODS

SMALL = HeadShape(num_classes=4, num_groups=2, feature_dim=16, hidden_dim=32, num_source=6, num_target=6)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_domains(tmp_path, SMALL.num_classes, rows=40, dim=64)
    small = {"bottleneck_dim": 16, "hidden_dim": 32, "batch_size": 8, "refresh_every": 3, "log_every": 1}
    return config_of(SMALL, tmp_path, steps=14, **small)


def test_ours_and_the_baseline_are_the_same_training(config: Config) -> None:
    told = ("adversarial_", "gradient_norm_", "synchronization", "classification", "entropy")
    losses = [
        [{name: value for name, value in each.values.items() if name.startswith(told)} for each in reports]
        for reports in (ours(config), with_baseline(config))
    ]
    assert len(losses[0]) == len(losses[1]) == 14
    assert len(losses[0][-1]) == 10
    for step, (own, other) in enumerate(zip(*losses)):
        assert own == pytest.approx(other, rel=1e-3, abs=1e-6), f"step {step + 1}"


def test_the_baseline_moves_the_discriminators_by_its_optimizer(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with baseline_method() as name:
        trainer = build_trainer(*resolve(config))
        assert name in METHODS
    assert name not in METHODS
    assert isinstance(trainer.optimizers["discriminators"], torch.optim.SGD)

    def fused(*_: object, **__: object) -> None:
        raise AssertionError("the fused update")

    monkeypatch.setattr("gsda_fast.methods.discriminators.adversarial_update_", fused)
    monkeypatch.setattr("gsda_fast.methods.discriminators.adversarial_terms", fused)
    with_baseline(config)
    with pytest.raises(AssertionError, match="the fused update"):
        ours(config)


def test_the_loop_has_the_terms_of_the_reference() -> None:
    inputs = make_inputs(SMALL)
    expected = gk.adversarial_terms(
        inputs.features, inputs.disc, inputs.sample_weight, inputs.domain, backend="reference"
    )
    modules = [discriminator(SMALL.feature_dim, SMALL.hidden_dim) for _ in range(SMALL.num_discriminators)]
    with torch.no_grad():
        for k, module in enumerate(modules):
            for parameter, stacked in zip(module.parameters(), inputs.disc, strict=True):
                parameter.copy_(stacked[k].reshape(parameter.shape))
    found = loop_terms(modules, inputs.features.requires_grad_(), inputs.sample_weight, inputs.domain.float())
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_the_loop_learns_what_ours_learns(config: Config) -> None:
    """Clusters far enough apart that either does far better than chance, a quarter."""
    config = replace(config, run=replace(config.run, steps=50, warmup=20))
    last = ours(config)[-1].evaluation
    assert last is not None
    assert last.accuracy is not None
    assert min(plain_loop(config), last.accuracy) > 60


def test_ratios_are_taken_within_rounds() -> None:
    """Whatever the machine was doing in a round, it was doing to all."""
    rounds = [{OURS: 1.0 * busy, BASELINE: 3.0 * busy, LOOP: 4.0 * busy} for busy in (1, 10, 2)]
    lines = table({"visda": rounds}, {"visda": 700}, "a CPU", "the command").splitlines()
    assert "| visda, r 12, K 17 | 700 | strong autograd baseline | 3 | 6.0 | 3.00 |" in lines


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features_run.SHAPES, "visda", SMALL)
    monkeypatch.setattr(features_run, "DIM", 12)
    monkeypatch.setattr(features_run, "ROWS", 60)
    path = tmp_path / "run.md"
    assert main(["--shapes", "visda", "--rounds", "1", "--steps", "3", "--output", str(path)]) == 0
    page = path.read_text()
    assert "--shapes visda --rounds 1 --steps 3" in page
    assert all(f"| visda, r 4, K 7 | 3 | {name} | 1 |" in page for name in (OURS, BASELINE, LOOP))
