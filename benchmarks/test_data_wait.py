r"""The share of a training step that is spent waiting for data, by the trainer's own clock, with every loader.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_data_wait.py \
        --benchmark-json=benchmarks/results/data-wait-cpu.json
    python -m benchmarks.loader_summary benchmarks/results/data-wait-cpu.json

With `--device cuda`: ResNet-50 in bf16, 36 images of each domain. On a CPU: ResNet-18 in fp32, 8 of each; there the
threads that decode take the cores that the step computes on, so the share says little about a GPU, whose host waits
with idle cores. The waiting is the host's. Where a GPU has steps queued up, it is an upper bound of the GPU's.

Files are those of the loader benchmark, 500x375 JPEG, in the page cache. Contenders take turns, and each turn begins
with some steps whose time is not taken, so that what was prepared while the others ran is used up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.loader_contenders import has_dali, image_tree, package_versions, packed_tree
from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config
from gsda_fast.training.trainer import Report

VISITS = 3
CONTENDERS = {
    "DALI": ("--loader", "dali"),
    "torch loader": ("--loader", "torch"),
    "pack": ("--loader", "torch"),
    "cache on device": ("--loader", "torch", "--cache-on-device"),
}
STEPS = {"cpu": 4, "cuda": 40}  # of a visit; as many go before it
NETWORK = {
    "cpu": ("--backbone", "resnet18", "--precision", "fp32", "--batch-size", "8"),
    "cuda": ("--backbone", "resnet50", "--precision", "bf16", "--batch-size", "36"),
}
_NEVER = str(10**6)


def reports(contender: str, device: str, root: Path) -> Iterator[Report]:
    """Train on and on; a report every `STEPS` steps."""
    tree = packed_tree(root) if contender == "pack" else image_tree(root)
    arguments = ["folder", "--source", "images", "--target", "images", "--data-root", str(tree), "--weights", "none"]
    arguments += ["--steps", _NEVER, "--refresh-every", _NEVER, "--warmup", "0", "--log-every", str(STEPS[device])]
    arguments += ["--device", device, *NETWORK[device], *CONTENDERS[contender]]
    return build_trainer(*resolve(parse_config(arguments, "benchmark"))).run(lambda: None)


@pytest.fixture(scope="module")
def running(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Iterator[Report]]:
    root, device = tmp_path_factory.mktemp("loaders"), pytestconfig.getoption("--device")
    return {name: reports(name, device, root) for name in CONTENDERS if name != "DALI" or has_dali()}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("visit", range(VISITS))
def test_data_wait(
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
    running: dict[str, Iterator[Report]],
    visit: int,
    contender: str,
) -> None:
    if contender not in running:
        pytest.skip("DALI is not installed")
    next(running[contender])
    report = benchmark.pedantic(next, args=(running[contender],), rounds=1)
    device = pytestconfig.getoption("--device")
    benchmark.extra_info.update(
        contender=contender,
        visit=visit,
        steps=STEPS[device],
        network=" ".join(NETWORK[device]),
        data_wait=report.values["data_wait"],
        images_per_second=report.values["images_per_second"],
        versions=package_versions(),
    )
