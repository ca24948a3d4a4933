"""The adversarial head alone: forward and backward of everything, and of the encoder's step.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_head.py --benchmark-json=benchmarks/results/head-cpu.json
    python -m benchmarks.summary benchmarks/results/head-cpu.json

Contenders take turns: every visit of a contender stands beside a visit of all others, so that a ratio taken visit by
visit does not depend on what else the machine was doing at the time.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import work
from benchmarks.contenders import BASELINE, INDEXING, REFERENCE, contenders, step
from benchmarks.shapes import SHAPES, HeadInputs, make_inputs

PLAYERS = {"both players": True, "encoder step": False}
VISITS = 5
# The loops take up to a minute a step at the large shapes.
LOOP_VISITS = {REFERENCE: 2, INDEXING: 1}
LOOP_SHAPES = {REFERENCE: ("visda", "office31", "office-home", "digits"), INDEXING: ("office-home",)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = contenders(metafunc.config.getoption("--device"))
    metafunc.parametrize(
        ("shape", "player", "visit", "contender"),
        [
            (shape, player, visit, contender)
            for shape in SHAPES
            for player in PLAYERS
            for visit in range(VISITS)
            for contender in names
            if visit < LOOP_VISITS.get(contender, VISITS) and shape in LOOP_SHAPES.get(contender, SHAPES)
            # Slices of frozen parameters have no backward: in the encoder's step both loops are one.
            if contender != INDEXING or PLAYERS[player]
        ],
    )


@lru_cache(maxsize=1)
def inputs_of(shape: str, device: str, dtype: str) -> HeadInputs:
    return make_inputs(SHAPES[shape], device=device, dtype=getattr(torch, dtype))


def test_head(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, shape: str, player: str, visit: int, contender: str
) -> None:
    device, dtype = pytestconfig.getoption("--device"), pytestconfig.getoption("--dtype")
    discriminators = PLAYERS[player]
    inputs = inputs_of(shape, device, dtype).requires_grad_(True, discriminators)
    run = contenders(device)[contender]
    if visit == 0:
        # No speed is worth reporting of a contender that computes something else.
        for found, expected in zip(step(run, inputs), step(contenders(device)[BASELINE], inputs)):
            assert torch.linalg.vector_norm(found - expected) <= 1e-2 * torch.linalg.vector_norm(expected)

    def timed() -> None:
        step(run, inputs)
        if device != "cpu":
            torch.cuda.synchronize()

    benchmark.group = f"{shape}, {player}"
    benchmark.extra_info.update(shape=shape, player=player, contender=contender, visit=visit)
    if visit == 0:
        item_size = getattr(torch, dtype).itemsize
        benchmark.extra_info.update(
            multiply_adds=work.counted_multiply_adds(contender, SHAPES[shape], discriminators),
            unit=SHAPES[shape].unit,
            bytes_that_must_move=work.needed_bytes(SHAPES[shape], discriminators, item_size),
            floor_seconds=work.floor_seconds(SHAPES[shape], discriminators, device, item_size),
            peak_memory=work.peak_memory(shape, contender, discriminators, device),
        )
    slow = contender in LOOP_VISITS and shape != "digits"
    many = 20 if shape == "digits" else 2
    # Warm at every visit, as the steps of a training are: whoever ran in between took the buffers that were kept.
    benchmark.pedantic(timed, rounds=1 if slow else many, warmup_rounds=0 if slow else 1)
