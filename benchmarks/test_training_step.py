"""The whole training step beside a source-only step of the same network on the same two-domain batch.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_training_step.py --benchmark-json=RESULTS.json

Random images, ResNet-50 from random weights, VisDA's 12 classes in 4 groups, 36 images of each domain. `source-only`
trains on all 72 images here, as if they were labelled, so that it does the same work outside of the adversarial head.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gsda_fast.methods import Method, StepInputs, build_method
from gsda_fast.methods.gsda import AdversarialSettings
from gsda_fast.model import ModelSettings, build_model
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.optim import OptimizerSettings, build_optimizers
from gsda_fast.training.update import Updater

NUM_CLASSES, BATCH = 12, 36
VISITS = 2
CONTENDERS = {"source-only": "auto", "dann": "auto", "gsda": "auto", "gsda, reference loop": "reference"}


@cache
def trained(contender: str, device: str) -> tuple[Method, Updater]:
    torch.manual_seed(0)
    settings = AdversarialSettings(alpha=0.2, beta=10.0, groups=4, backend=CONTENDERS[contender])
    model = build_model(ModelSettings(weights="none"), NUM_CLASSES)
    method = build_method(contender.partition(",")[0], model, settings, NUM_CLASSES, seed=0).to(device).train()
    players = method.players()
    return method, Updater(players, build_optimizers(players, OptimizerSettings()), Ranks(), torch.device(device))


@cache
def images(device: str) -> torch.Tensor:
    pixels = torch.randn(2 * BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return pixels.to(device, memory_format=torch.channels_last)


@pytest.mark.parametrize("visit", range(VISITS))
@pytest.mark.parametrize("contender", CONTENDERS)
def test_training_step(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, contender: str, visit: int) -> None:
    device = pytestconfig.getoption("--device")
    method, updater = trained(contender, device)
    labelled = 2 * BATCH if contender == "source-only" else BATCH
    inputs = StepInputs(
        source_images=images(device)[:labelled],
        source_labels=(torch.arange(labelled) % NUM_CLASSES).to(device),
        target_images=images(device)[BATCH:],
        warming_up=False,
        adversarial_ramp=torch.full((), 0.5, device=device),
    )

    def step() -> None:
        updater.step(visit, method.moves(inputs))
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"training step, visit {visit}"
    benchmark.pedantic(step, rounds=1, warmup_rounds=0 if visit else 1)
    benchmark.extra_info["images_per_second"] = 2 * BATCH / benchmark.stats["median"]
