"""The whole training step on random images: methods x precision, eager and compiled; what a checkpoint adds; how a
command starts, and what a second process brings.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_training_step.py --benchmark-json=RESULTS.json \\
        [--device cuda] [--task visda] [--batch-size 36] [--steps 20]
    python -m benchmarks.training_summary RESULTS.json

A round is one step, both domains of `batch_size` images each, ended by waiting for the device. The first step
(compilation, choice of algorithms, first allocations) has its own figure. Methods whose ratio matters take turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import TASKS, parse_config
from gsda_fast.data.benchmarks import find_benchmark
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.rooflines import peak_memory
from gsda_fast.training.trainer import Trainer

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
METHODS = ("source-only", "dann", "gsda")
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
        assert benchmark.stats is not None
        images = 2 * config.getoption("--batch-size")
        benchmark.extra_info |= {
            "images_per_second": images / benchmark.stats["median"],
            "seconds_to_first_step": self.first,
            "peak_memory_gib": peak_memory(self.trainer.device) / 2**30,
        }


@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"], ids=["eager", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_step(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, method: str, precision: str, compiled: str
) -> None:
    device = pytestconfig.getoption("--device")
    if precision not in PRECISIONS[device]:
        pytest.skip(f"{precision} is emulated on a {device}")
    torch._dynamo.reset()
    benchmark.group = f"{pytestconfig.getoption('--task')} {precision}"
    benchmark.extra_info.update(method=method, precision=precision, compiled=compiled == "--compile")
    Step(pytestconfig, "--method", method, "--precision", precision, compiled).measure(benchmark, pytestconfig)


def test_methods_in_turns(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    """What a step costs beside the others, whatever else the machine does: each round has one step of every method."""
    steps = {method: Step(pytestconfig, "--method", method, "--no-compile") for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}

    def turn() -> None:
        for method, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[method].append(time.perf_counter() - started)

    benchmark.group = "methods in turns"
    benchmark.pedantic(turn, rounds=pytestconfig.getoption("--steps"), warmup_rounds=0)
    benchmark.extra_info["seconds"] = seconds


def test_saving_a_checkpoint(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """What the trainer stands still for at each scoring of the target, and the share of a run that this is."""
    step = Step(pytestconfig, "--no-compile")
    checkpoints = CheckpointFolder(tmp_path)
    benchmark.group = "checkpoint"
    benchmark.pedantic(lambda: checkpoints.save(0, step.trainer.state_dict()), rounds=5, warmup_rounds=1)
    started = time.perf_counter()
    for _ in range(3):
        step()
    seconds, every = (time.perf_counter() - started) / 3, steps_between_scorings(pytestconfig)
    assert benchmark.stats is not None
    saving = benchmark.stats["median"]
    benchmark.extra_info |= {
        "bytes": checkpoints.file(0).stat().st_size,
        "steps_between_scorings": every,
        "step_seconds": seconds,
        "share_of_time": saving / (saving + every * seconds),
    }


def steps_between_scorings(config: pytest.Config) -> int:
    """That of the preset with the published number of target images; scoring itself comes on top."""
    task = config.getoption("--task")
    benchmark = find_benchmark(task)
    images = benchmark.domain(str(benchmark.default_target)).expected_images
    assert images is not None
    return TASKS[task].pseudo_labels.refresh_every or -(-images // config.getoption("--batch-size"))


# ------------------------------------------------------------------------------------------------------ whole commands


def command(config: pytest.Config, output: Path, processes: int, batch_size: int, *options: str) -> list[str]:
    """Return a dry run under torchrun, of one thread a process where there is no GPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    task = [config.getoption("--task"), "--synthetic", "--weights", "none", "--warmup", "0", "--threads", "1"]
    sizes = ["--batch-size", str(batch_size), "--device", config.getoption("--device"), "--refresh-every", _NEVER]
    return [sys.executable, *launcher, "-m", "gsda_fast.train", *task, *sizes, *options, "--output", str(output)]


@pytest.mark.parametrize("batch", ["for each process", "in all"])
@pytest.mark.parametrize("processes", [1, 2])
def test_scaling(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, processes: int, batch: str, tmp_path: Path
) -> None:
    """Images a second over all processes, with equal batches for each process or in all."""
    if pytestconfig.getoption("--device") == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip(f"fewer than {processes} GPUs")
    size, steps = pytestconfig.getoption("--batch-size"), pytestconfig.getoption("--steps")
    own = size if batch == "for each process" else size // processes
    every = max(1, steps // 5)
    options = ("--steps", str(6 * every), "--log-every", str(every))
    run = command(pytestconfig, tmp_path / "run", processes, own, *options)
    benchmark.group = "scaling"
    benchmark.pedantic(lambda: subprocess.run(run, check=True, capture_output=True), rounds=1)
    # The first line has the first step in it.
    rates = [line["images_per_second"] for line in RunFolder(tmp_path / "run").read_metrics()[1:]]
    rate = statistics.median(rates)
    benchmark.extra_info.update(processes=processes, batch=batch, own_batch=own, images_per_second=rate)


@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"], ids=["eager", "compile"])
def test_time_to_first_step(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, compiled: str, tmp_path: Path
) -> None:
    """From the command to its first line of metrics: imports, the model, compilation, and one step."""
    size = pytestconfig.getoption("--batch-size")
    options = ("--steps", "2", "--log-every", "1", compiled)

    def start() -> None:
        process = subprocess.Popen(
            command(pytestconfig, tmp_path / "run", 1, size, *options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not RunFolder(tmp_path / "run").metrics_path.exists():
            assert process.poll() in (None, 0)
            time.sleep(0.01)
        ended.append(process)

    ended: list[subprocess.Popen[bytes]] = []
    benchmark.group = "time to first step"
    benchmark.extra_info.update(compiled=compiled == "--compile")
    benchmark.pedantic(start, rounds=1)
    assert ended[0].wait() == 0
