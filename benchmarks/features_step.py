"""What a step on embeddings spends outside the kernels of its adversarial head, by shape and batch size.

    OMP_NUM_THREADS=1 python -m benchmarks.features_step --output benchmarks/results/features-step-cpu.md

A step of the task `features` after warm-up, as the trainer takes it: the batch, both players' updates, the guard.
The kernels are the calls of the backend: forward twice, the discriminators' update, the encoder's backward. All else is
outside: sampling plan, rows, network, losses, the registration of the operations, optimizers, guard. Shapes take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.features_run import DIM, ROWS, config_of, machine, write_domains
from benchmarks.shapes import SHAPES, HeadShape
from gsda_fast.assemble import build_trainer, resolve
from gsda_kernels import backends, resolve_backend

CASES = {
    "pictures, r 11": replace(SHAPES["visda"], num_classes=11, num_groups=3),
    "Office-31, r 31": SHAPES["office31"],
    "Office-Home, r 65": SHAPES["office-home"],
}
BATCHES = (36, 128)


class Kernels:
    """A backend whose calls are timed.

    Attributes:
        seconds: spent in them so far.
    """

    def __init__(self, backend: Any, clock: Callable[[], float]) -> None:
        self._backend, self._clock, self.seconds = backend, clock, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in ("forward", "backward", "update"):
            return found

        def timed(*arguments: Any) -> Any:
            start = self._clock()
            try:
                return found(*arguments)
            finally:
                self.seconds += self._clock() - start

        return timed


@contextmanager
def timed_kernels(clock: Callable[[], float]) -> Iterator[Kernels]:
    """Time the calls of the backend that training on a CPU takes."""
    name, original = resolve_backend("auto", "cpu"), backends.get
    kernels = Kernels(original(name), clock)
    backends.get = lambda asked: kernels if asked == name else original(asked)
    try:
        yield kernels
    finally:
        backends.get = original


def steps_of(shape: HeadShape, batch_size: int, folder: Path) -> Callable[[], None]:
    """Return a call that takes the next step of a run."""
    config = config_of(shape, folder, 100_000, batch_size=batch_size, warmup=0)
    trainer = build_trainer(*resolve(config))
    trainer.method.train()
    numbers, batches = iter(range(100_000)), trainer.loader.train(trainer.plan, range(100_000))

    def step() -> None:
        trainer._train_step(next(numbers), next(batches))

    return step


def measured(visits: int, steps: int) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Return seconds of a step and of its kernels, of every visit, by case and batch size."""
    # On one thread the processor's own time, which others on the machine do not add to.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with timed_kernels(clock) as kernels:
        takes = {}
        for name, shape in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                write_domains(Path(folder), shape.num_classes, ROWS, DIM)
                for batch_size in BATCHES:
                    takes[name, batch_size] = steps_of(shape, batch_size, Path(folder))
                    takes[name, batch_size]()
        for _ in range(visits):
            for case, take in takes.items():
                take()  # takes back the caches that the one before has used
                start, kernels.seconds = clock(), 0.0
                for _ in range(steps):
                    take()
                found.setdefault(case, []).append(((clock() - start) / steps, kernels.seconds / steps))
    return found


def table(found: dict[tuple[str, int], list[tuple[float, float]]], made_on: str, command: str) -> str:
    """Return a Markdown page: step, outside of the kernels, and that as a share, medians over the visits."""
    lines = [
        "# A step on embeddings: what is outside the kernels of its head",
        "",
        f"{made_on}. Rows of {DIM}, bottleneck and discriminators 256 wide.",
        "",
        f"    {command}",
        "",
        "| shape | batch | step, ms | outside, ms | share |",
        "|---|---:|---:|---:|---:|",
    ]
    for (name, batch_size), visits in found.items():
        step, outside, share = (
            statistics.median(of(whole, head) for whole, head in visits)
            for of in (lambda whole, _: whole, lambda whole, head: whole - head, lambda whole, head: 1 - head / whole)
        )
        batch = f"{batch_size} + {batch_size}"
        lines.append(f"| {name} | {batch} | {1e3 * step:.1f} | {1e3 * outside:.1f} | {share:.1%} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="in a visit")
    parser.add_argument("--output", type=Path, help="a Markdown file beside what is printed")
    options = parser.parse_args(arguments)
    own = " ".join(["python -m benchmarks.features_step", *(sys.argv[1:] if arguments is None else arguments)])
    page = table(measured(options.visits, options.steps), machine(), f"OMP_NUM_THREADS={torch.get_num_threads()} {own}")
    if options.output is not None:
        options.output.write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
