"""Images per second, and per second of CPU time, of every way to read a tree of 500x375 JPEG files.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_loaders.py --benchmark-json=benchmarks/results/loaders-cpu.json
    python -m benchmarks.loader_summary benchmarks/results/loaders-cpu.json

Contenders take turns, and stay open between their visits. A visit begins after some batches whose time is not taken, so
that what was prepared while the others ran is used up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.loader_contenders import CONTENDERS, WORKERS, batches, cpu_seconds, has_dali, package_versions

VISITS = 5
BATCHES = 16
NOT_TIMED = 5  # more than any contender prepares ahead


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Iterator[int]]]:
    root: Path = tmp_path_factory.mktemp("loaders")
    opened = {name: batches(name, root) for name in CONTENDERS if name != "DALI" or has_dali()}
    yield opened
    for generator in opened.values():
        generator.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("visit", range(VISITS))
def test_loaders(benchmark: BenchmarkFixture, running: dict[str, Iterator[int]], visit: int, contender: str) -> None:
    if contender not in running:
        pytest.skip("DALI is not installed")
    for _ in range(NOT_TIMED):
        next(running[contender])
    cpu, images = cpu_seconds(), 0

    def timed() -> None:
        nonlocal images
        for _ in range(BATCHES):
            images += next(running[contender])

    benchmark.pedantic(timed, rounds=1)
    benchmark.extra_info.update(
        contender=contender,
        visit=visit,
        workers=WORKERS,
        images=images,
        cpu_seconds=cpu_seconds() - cpu,
        versions=package_versions(),
    )
