"""A step of gsda on embeddings over several processes: discriminators divided among them, and all-reduced, in turns.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m benchmarks.divided_step --output RESULTS.md

The network is a linear layer of 1280 x 256 and a classifier, so that the step is the adversarial head's and what
processes tell each other. A visit is one step of each contender, the processes starting together; a ratio is the median
of those within visits, so that it does not depend on what else the machine was doing at the time. Bytes are those of
the tensors that the collectives make or reduce in one step, on one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.adversarial_part import ratio
from benchmarks.features_run import DIM, ROWS, config_of, machine, write_domains
from benchmarks.shapes import SHAPES, HeadShape
from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.training.distributed import Ranks, join

Found = tuple[dict[str, list[float]], dict[str, int]]
"""Seconds of every visit and bytes of a step, by contender."""

CONTENDERS = {"all-reduced": "off", "divided": "on"}
NEVER = 10**6
_BYTES: dict[str, Callable[..., int]] = {
    "all_gather": lambda parts, tensor, *_, **__: sum(part.nbytes for part in parts),
    "reduce_scatter": lambda total, parts, *_, **__: sum(part.nbytes for part in parts),
    "all_reduce": lambda tensor, *_, **__: tensor.nbytes,
}


def steps_of(shape: HeadShape, divide: str, folder: Path, ranks: Ranks) -> Callable[[], None]:
    """Return what takes the next step of a training run with that head."""
    config = config_of(
        shape, folder, NEVER, divide_discriminators=divide, hidden_dim=shape.hidden_dim,
        bottleneck_dim=shape.feature_dim, batch_size=shape.num_source // ranks.world_size, warmup=0,
        refresh_every=NEVER, log_every=NEVER, output=folder / "run",
    )  # fmt: skip
    trainer = build_trainer(*resolve(config, ranks.world_size), ranks)
    trainer.method.train()
    batches = enumerate(trainer.loader.train(trainer.plan, range(NEVER), ranks.rank))

    def step() -> None:
        trainer._train_step(*next(batches))

    return step


@contextmanager
def counted() -> Iterator[list[int]]:
    """Note the bytes of every collective."""
    seen: list[int] = []

    def counting(name: str) -> Any:
        original, size = getattr(torch.distributed, name), _BYTES[name]

        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(size(*arguments, **options))
            return original(*arguments, **options)

        return mock.patch.object(torch.distributed, name, call)

    with ExitStack() as stack:
        for name in _BYTES:
            stack.enter_context(counting(name))
        yield seen


def measured(
    shape: HeadShape, ranks: Ranks, folder: Path, visits: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return seconds of every visit and bytes of a step, by contender."""
    steps = {name: steps_of(shape, divide, folder, ranks) for name, divide in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    sizes = {}
    for name, step in steps.items():
        step()
        with counted() as seen:
            step()
        sizes[name] = sum(seen)
    for _ in range(visits):
        for name, step in steps.items():
            torch.distributed.barrier()
            start = time.perf_counter()
            step()
            torch.distributed.barrier()
            times[name].append(time.perf_counter() - start)
    return times, sizes


def table(found: dict[str, Found], made_on: str) -> str:
    """Return a Markdown page: shape by contender."""
    lines = [
        "# A step on embeddings over several processes",
        "",
        f"{made_on}. gsda, one global batch of 36 + 36 rows; median of the visits, ratios are medians of those within",
        "visits. Bytes: of the tensors that the collectives make or reduce in a step, on one process.",
        "",
        "| shape | contender | ms a step | times as fast | MB a step |",
        "|---|---|---:|---:|---:|",
    ]
    for shape, (times, sizes) in found.items():
        for name, own in times.items():
            faster = ratio(times["all-reduced"], own)
            cells = f"{1e3 * statistics.median(own):.0f} | {faster:.2f} | {sizes[name] / 1e6:.2f}"
            lines.append(f"| {shape} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["visda", "office31", "office-home"])
    parser.add_argument("--visits", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a Markdown file beside what is printed")
    options = parser.parse_args(arguments)
    found = {}
    with join("cpu", timeout=600) as ranks, tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.gather_objects(own)[0])
        made_on = f"{ranks.world_size} processes over gloo, each on {machine()}"
        for shape in options.shapes:
            if ranks.rank == 0:
                write_domains(folder, SHAPES[shape].num_classes, ROWS, DIM)
            torch.distributed.barrier()
            found[shape] = measured(SHAPES[shape], ranks, folder, options.visits)
        if ranks.rank == 0:
            text = table(found, made_on)
            if options.output is not None:
                options.output.write_text(text)
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
