"""What a step on embeddings spends outside the kernels of its adversarial head, by shape and batch size.

    OMP_NUM_THREADS=1 python -m benchmarks.features_step --output benchmarks/results/features-step-cpu.md

A step of the task `features` after warm-up, as the trainer takes it: the batch, both players' updates, the guard.
The kernels are the calls of the backend: forward twice, the discriminators' update, the encoder's backward. All else is
outside: sampling plan, rows, network, losses, the registration of the operations, optimizers, guard.

The network alone, forward, cross-entropy, backward and SGD of the same layers as plain PyTorch, is measured beside it:
a step that had it and the kernels and nothing else would still be that much outside. Shapes and both take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

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


class Visit(NamedTuple):
    """Seconds of a step, in one visit.

    Attributes:
        step: the whole of it. kernels: of these, in the kernels. network: of the network alone, apart from the step.
    """

    step: float
    kernels: float
    network: float


def steps_of(shape: HeadShape, batch_size: int, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a call that takes the next step of a run, and one that moves a copy of its network alone."""
    config = config_of(shape, folder, 100_000, batch_size=batch_size, warmup=0)
    trainer = build_trainer(*resolve(config))
    trainer.method.train()
    numbers, batches = iter(range(100_000)), trainer.loader.train(trainer.plan, range(100_000))

    def step() -> None:
        trainer._train_step(next(numbers), next(batches))

    network, batch = copy.deepcopy(trainer.method.trained), next(batches)
    rows, settings = torch.cat([batch.source_images, batch.target_images]), config.optimizer
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-6, settings.momentum, weight_decay=settings.weight_decay, nesterov=True, fused=True
    )

    def network_alone() -> None:
        logits = network(rows).logits
        loss = F.cross_entropy(logits[: len(batch.source_labels)], batch.source_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, network_alone


def measured(visits: int, steps: int) -> dict[tuple[str, int], list[Visit]]:
    """Return the seconds of every visit, by case and batch size."""
    # On one thread the processor's own time, which others on the machine do not add to.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[tuple[str, int], list[Visit]] = {}

    def seconds(take: Callable[[], None]) -> float:
        take()  # takes back the caches that the one before has used
        start, kernels.seconds = clock(), 0.0
        for _ in range(steps):
            take()
        return (clock() - start) / steps

    with timed_kernels(clock) as kernels:
        takes = {}
        for name, shape in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                write_domains(Path(folder), shape.num_classes, ROWS, DIM)
                for batch_size in BATCHES:
                    takes[name, batch_size] = steps_of(shape, batch_size, Path(folder))
        for _ in range(visits):
            for case, (step, network_alone) in takes.items():
                whole = seconds(step)
                of_kernels = kernels.seconds / steps
                found.setdefault(case, []).append(Visit(whole, of_kernels, seconds(network_alone)))
    return found


def table(found: dict[tuple[str, int], list[Visit]], made_on: str, command: str) -> str:
    """Return a Markdown page: step, outside of the kernels, and that as a share, medians over the visits."""
    lines = [
        "# A step on embeddings: what is outside the kernels of its head",
        "",
        f"{made_on}. Rows of {DIM}, bottleneck and discriminators 256 wide.",
        "",
        "The last column is the share outside that would be left of a step of the kernels and the network alone.",
        "",
        f"    {command}",
        "",
        "| shape | batch | step, ms | outside, ms | share | network alone, ms | share left |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, batch_size), visits in found.items():
        step, outside, share, network, left = map(
            statistics.median,
            zip(*(
                (v.step, v.step - v.kernels, 1 - v.kernels / v.step, v.network, v.network / (v.network + v.kernels))
                for v in visits
            )),
        )  # fmt: skip
        batch = f"{batch_size} + {batch_size}"
        lines.append(
            f"| {name} | {batch} | {1e3 * step:.1f} | {1e3 * outside:.1f} | {share:.1%} "
            f"| {1e3 * network:.1f} | {left:.1%} |"
        )
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
