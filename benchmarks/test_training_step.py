"""The whole training step on random images: methods x precision, eager and compiled, and what a checkpoint adds.

    python -m pytest benchmarks/test_training_step.py [--device cuda] [--task visda] [--batch-size 36]

A round is one step, both domains of `batch_size` images each, ended by waiting for the device. Time to first step
(compilation, choice of algorithms, first allocations) is in `extra_info`.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gsda_fast.config import parse_config
from gsda_fast.training.assemble import build_trainer, resolve
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.figures import peak_memory
from gsda_fast.training.trainer import Trainer

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
_NEVER = str(10**6)


class Step:
    """A trainer past its warm-up, of which one step is taken at a time."""

    def __init__(self, config: pytest.Config, *options: str) -> None:
        arguments = [config.getoption("--task"), "--synthetic", "--weights", "none", "--warmup", "0", "--steps", _NEVER]
        arguments += ["--batch-size", str(config.getoption("--batch-size")), "--refresh-every", _NEVER]
        arguments += ["--device", config.getoption("--device"), "--threads", str(torch.get_num_threads())]
        self.trainer: Trainer = build_trainer(*resolve(parse_config([*arguments, *options], "benchmark")))
        self.trainer.method.train()
        self._batches = self.trainer.loader.train(self.trainer.plan, range(10**6))
        self._number = 0
        started = time.perf_counter()
        self()
        self.first = time.perf_counter() - started

    def __call__(self) -> None:
        self.trainer._train_step(self._number, next(self._batches))
        self._number += 1
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)

    def measure(self, benchmark: BenchmarkFixture, config: pytest.Config) -> None:
        benchmark.pedantic(self, rounds=config.getoption("--steps"), warmup_rounds=3)
        images = 2 * config.getoption("--batch-size")
        benchmark.extra_info |= {
            "images_per_second": images / benchmark.stats["median"],
            "seconds_to_first_step": self.first,
            "peak_memory_gib": peak_memory(self.trainer.device) / 2**30,
        }


@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"], ids=["eager", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["source-only", "dann", "gsda"])
def test_step(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, method: str, precision: str, compiled: str
) -> None:
    device = pytestconfig.getoption("--device")
    if precision not in PRECISIONS[device]:
        pytest.skip(f"{precision} is emulated on a {device}")
    torch._dynamo.reset()
    benchmark.group = f"{pytestconfig.getoption('--task')} {precision}"
    Step(pytestconfig, "--method", method, "--precision", precision, compiled).measure(benchmark, pytestconfig)


def test_saving_a_checkpoint(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """What the trainer stands still for at each scoring of the target."""
    step = Step(pytestconfig, "--no-compile")
    checkpoints = CheckpointFolder(tmp_path)
    benchmark.group = "checkpoint"
    benchmark.pedantic(lambda: checkpoints.save(0, step.trainer.state_dict()), rounds=5, warmup_rounds=1)
