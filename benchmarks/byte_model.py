"""Bytes, multiply-adds, programs and least times of every launch of a step on a GPU, by counting. No GPU is asked.

    python -m benchmarks.byte_model                                  # writes benchmarks/results/byte-model.md
    python -m benchmarks.byte_model --kind half --rows 128 --hbm 4.3e12 --output model.md

The launches are counted at the tiles of the table of configurations and at pairs as training routes them. The time of a
launch is the longest of three, and a fixed part for its start, fill and drain: bytes from memory, bytes from the
second-level cache to the multiprocessors, multiply-adds at the rate of the unit that does them. A model, not a
measurement: it says which change is worth trying, and what a first measurement is to be compared with.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.shapes import SHAPES, HeadShape
from gsda_kernels.triton.configs import Configuration, Product, configure

OUTPUT = Path(__file__).parent / "results" / "byte-model.md"
DEFAULT_SHAPES = ("visda", "office31", "office-home", "visda-128", "office31-128", "office-home-128")
# Dtype of the features, of the parameters, precision of float32 products, and whether tensor cores multiply.
KINDS = {
    "mixed": (torch.bfloat16, torch.float32, "ieee", True),
    "half": (torch.bfloat16, torch.bfloat16, "ieee", True),
    "tf32": (torch.float32, torch.float32, "tf32", True),
    "float32": (torch.float32, torch.float32, "ieee", False),
}
# Attributes of a step, and what they are called in the tables.
PARTS = {
    "forward": "forward",
    "forward_copies": "forward that reads copies",
    "backward": "backward",
    "update": "update",
    "encoder": "encoder",
}


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU; those of an H100 where no other are given.

    Attributes:
        memory, cache: bytes a second. products: half-precision floating-point operations a second of the tensor cores.
        plain: those without tensor cores. efficiency: the share of its peak that a product reaches.
        fixed: seconds a launch. kept: bytes that survive from one launch to the next in the second-level cache.
    """

    memory: float = 3.0e12
    cache: float = 5.5e12
    products: float = 790e12
    plain: float = 60e12
    efficiency: float = 0.6
    fixed: float = 3.0e-6
    kept: float = 35e6


@dataclass(frozen=True)
class Launch:
    """One launch, counted: bytes from and to memory, bytes through the second-level cache, operations, programs."""

    name: str
    memory: float
    cache: float
    operations: float
    programs: int

    def seconds(self, machine: Machine, peak: float) -> float:
        return max(self.memory / machine.memory, self.cache / machine.cache, self.operations / peak) + machine.fixed


@dataclass(frozen=True)
class Step:
    """The launches of both players' step.

    Attributes:
        forward: of either player. backward: the discriminators' gradients. update: the fused step in its place.
        forward_copies: the forward that reads the matrices in half precision, as the fused step leaves them; the same
            as `forward` where the parameters are no wider than the features.
        encoder: the encoder's backward pass. num_pairs, num_tiles: that do work. parameter_bytes: of the weights.
    """

    forward: tuple[Launch, ...]
    forward_copies: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    update: tuple[Launch, ...]
    encoder: tuple[Launch, ...]
    num_pairs: int
    num_tiles: int
    block_rows: int
    num_parameters: int
    parameter_bytes: int


def pairs_of(shape: HeadShape, seed: int = 0) -> list[int]:
    """Return pairs of each discriminator as training routes them: one-hot sources, every target sample in every one."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(shape.num_classes, (shape.num_source,), generator=generator)
    group = torch.randperm(shape.num_classes, generator=generator) % shape.num_groups
    of_groups = torch.bincount(group[classes], minlength=shape.num_groups)
    of_classes = torch.bincount(classes, minlength=shape.num_classes)
    return [shape.num_samples, *(shape.num_target + int(own) for own in (*of_groups, *of_classes))]


def count(shape: HeadShape, kind: str, machine: Machine, rows: int | None = None) -> Step:
    """Return the launches of a step at one shape.

    Args:
        rows: pairs to a tile; None for the table's.
    """
    dtype, parameter_dtype, precision, _ = KINDS[kind]
    k, hidden, dim = shape.num_discriminators, shape.hidden_dim, shape.feature_dim
    item, weight_item = dtype.itemsize, parameter_dtype.itemsize
    config = configure(shape.num_samples, dim, hidden, dtype, parameter_dtype, precision)
    if rows is not None:
        layers = [replace(product, block_rows=rows) for product in (config.layer, config.jacobian)]
        config = Configuration(*layers, config.weight)
    pairs = pairs_of(shape)
    total, height = sum(pairs), config.block_pairs
    tiles = sum(math.ceil(each / height) for each in pairs)
    cells_1, cells_2 = k * hidden * dim, k * hidden * hidden
    w1, w2 = cells_1 * weight_item, cells_2 * weight_item
    # Beside wider parameters the fused step keeps copies of the matrices in the features' dtype.
    copy_1, copy_2 = cells_1 * item, cells_2 * item
    stored_1, stored_2 = (copy_1, copy_2) if item < weight_item else (0, 0)
    of_hidden, of_dim = total * hidden * item, total * dim * item

    def from_memory(size: float) -> float:
        return size if size > machine.kept else 0.0

    def product(name: str, inner: int, columns: int, cut: Product, weights: int, read: float, written: float) -> Launch:
        blocks = math.ceil(columns / cut.block_columns)
        # Every tile reads its columns of the weight; every block of columns reads the tile's rows.
        through = weights / k * tiles + tiles * height * inner * item * blocks + written
        operations = 2 * tiles * height * inner * columns
        return Launch(name, weights + from_memory(read) + written, through, operations, tiles * blocks)

    def sums(name: str, columns: int, right: float, extra: float, cut: Product) -> Launch:
        high, wide = math.ceil(hidden / cut.block_rows), math.ceil(columns / cut.block_columns)
        through = extra + wide * of_hidden + high * total * columns * item
        padded = sum(math.ceil(each / cut.block_inner) * cut.block_inner for each in pairs)
        memory = extra + from_memory(of_hidden) + from_memory(right)
        return Launch(name, memory, through, 2 * padded * hidden * columns, high * wide * k)

    def w3_parts(cut: Product) -> int:
        return k * hidden * math.ceil(hidden / cut.block_columns) * 4

    def small(name: str, size: float) -> Launch:
        return Launch(name, size, size, 0, k)

    def forward(w1: int, w2: int) -> tuple[Launch, ...]:
        return (
            small("route", k * shape.num_samples * 4),
            product("first_layer", dim, hidden, config.layer, w1, shape.num_samples * dim * item, of_hidden),
            product("second_layer", hidden, hidden, config.layer, w2, of_hidden, 2 * of_hidden),
            product("hidden_gradient", hidden, hidden, config.layer, w2, 2 * of_hidden, of_hidden),
            product("jacobian", hidden, dim, config.jacobian, w1, of_hidden, of_dim),
            small("terms", total * 24 * 4),
        )

    def hidden_backward(w1: int) -> Launch:
        return product("hidden_backward", dim, hidden, config.layer, w1, of_dim + of_hidden, of_hidden)

    pair_gradient = small("pair_gradient", 3 * of_dim)
    backward = (
        pair_gradient,
        sums("weight_gradient 1", dim, of_dim, w1, config.weight),
        hidden_backward(w1),
        sums("weight_gradient 2", hidden, of_hidden, 2 * w2, config.weight),
        small("sum of w3's parts", w3_parts(config.weight)),
    )
    update = (
        pair_gradient,
        hidden_backward(copy_1),
        small("bad_operands", 2 * of_hidden + of_dim),
        sums("weight_gradient 2, moves W2", hidden, of_hidden, 4 * w2 + stored_2, config.update),
        sums("weight_gradient 1, moves W1", dim, of_dim, 4 * w1 + stored_1, config.update),
        small("small_update", w3_parts(config.update) + k * hidden * 3 * 20),
    )
    encoder = (small("feature_gradient", of_dim),)
    launches = (forward(w1, w2), forward(copy_1, copy_2), backward, update, encoder)
    return Step(*launches, total, tiles, height, shape.num_parameters, shape.num_parameters * weight_item)


@dataclass(frozen=True)
class Times:
    """Microseconds of a step's parts."""

    forward: float
    forward_copies: float
    backward: float
    update: float
    encoder: float
    norm: float
    copy: float
    sgd: float

    @property
    def with_copy(self) -> float:
        return self.without_copy + self.copy

    @property
    def without_copy(self) -> float:
        return 2 * self.forward + self.backward + self.encoder + self.norm + self.sgd

    @property
    def fused(self) -> float:
        return 2 * self.forward_copies + self.update + self.encoder


def times(step: Step, kind: str, machine: Machine) -> Times:
    def of(launches: Sequence[Launch]) -> float:
        return 1e6 * sum(launch.seconds(machine, peak_of(kind, machine)) for launch in launches)

    once = 1e6 * step.parameter_bytes / machine.memory
    # Gradient read; parameter and momentum read and written; these and the gradient read.
    norm, copy, sgd = once, 4 * once, 5 * once
    parts = (step.forward, step.forward_copies, step.backward, step.update, step.encoder)
    return Times(*map(of, parts), norm, copy, sgd)


def peak_of(kind: str, machine: Machine) -> float:
    """Return operations a second of the products."""
    if not KINDS[kind][3]:
        return machine.plain * machine.efficiency
    return machine.products * machine.efficiency * (0.5 if kind == "tf32" else 1.0)


def bytes_per_parameter(shape: HeadShape, kind: str) -> dict[str, float]:
    """Return bytes from and to memory for a parameter of a matrix in a step of both players, by way of doing it."""
    half, item = KINDS[kind][0].itemsize, KINDS[kind][1].itemsize
    first_layer = shape.feature_dim / (shape.feature_dim + shape.hidden_dim)
    both_forwards = 2 * 2 * item  # each weight is an operand of two products
    # W1 for the gradient through the norm, W2 for that of w3; gradients written, read for their norm, and by SGD, which
    # reads and writes parameter and momentum.
    gradients, norm, sgd = first_layer * item + (1 - first_layer) * item + item, item, 5 * item
    copy = 4 * item  # parameter and momentum, read and written
    return {
        "backward, norm, copy, SGD": both_forwards + gradients + norm + copy + sgd,
        "backward, norm, SGD": both_forwards + gradients + norm + sgd,
        "fused update": both_forwards + first_layer * item + 4 * item,
        # The copies are read in place of the matrices, and written where they are narrower.
        "fused update, copies in half precision": (4 + first_layer) * half + 4 * item + (half if half < item else 0),
    }


def page(shapes: Sequence[str], kind: str, machine: Machine, rows: int | None = None) -> str:
    """Return the tables in Markdown."""
    steps = {name: count(SHAPES[name], kind, machine, rows) for name in shapes}
    every = {name: times(step, kind, machine) for name, step in steps.items()}
    height = "the table's" if rows is None else f"{rows} rows"
    lines = [
        "# The adversarial part of a step on an H100: model, not measured",
        "",
        f"Counted by `python -m benchmarks.byte_model` for operands `{kind}`, tiles of {height}: memory "
        f"{machine.memory / 1e12:g} TB/s, second-level cache {machine.cache / 1e12:g} TB/s, products "
        f"{peak_of(kind, machine) / 1e12:.0f} TFLOP/s, {1e6 * machine.fixed:g} us a launch.",
        "",
        "## Bytes a parameter, both players",
        "",
        "| way | bytes |",
        "|---|---:|",
    ]
    lines += [f"| {way} | {size:.1f} |" for way, size in bytes_per_parameter(SHAPES[shapes[0]], kind).items()]
    lines += ["", "## Microseconds", "", f"| | {' | '.join(shapes)} |", f"|---|{'---:|' * len(shapes)}"]

    def row(name: str, values: Sequence[object]) -> None:
        lines.append(f"| {name} | {' | '.join(str(value) for value in values)} |")

    row("pairs", [step.num_pairs for step in steps.values()])
    row("tiles", [f"{step.num_tiles} of {step.block_rows} rows" for step in steps.values()])
    row(
        "rows multiplied for a pair",
        [f"{step.num_tiles * step.block_rows / step.num_pairs:.2f}" for step in steps.values()],
    )
    for part in PARTS:
        for index, launch in enumerate(getattr(next(iter(steps.values())), part)):
            launches = [getattr(step, part)[index] for step in steps.values()]
            found = [f"{1e6 * each.seconds(machine, peak_of(kind, machine)):.0f}" for each in launches]
            row(f"{PARTS[part]}: {launch.name}", found)
        row(f"**{PARTS[part]}**", [f"{getattr(each, part):.0f}" for each in every.values()])
    for part, name in (("norm", "norm of the gradients"), ("copy", "copy for an undo"), ("sgd", "SGD")):
        row(name, [f"{getattr(each, part):.0f}" for each in every.values()])
    for part, name in (
        ("with_copy", "both players: backward, norm, copy, SGD"),
        ("without_copy", "both players: backward, norm, SGD"),
        ("fused", "both players: fused update, copies in half precision"),
    ):
        row(f"**{name}**", [f"**{getattr(each, part):.0f}**" for each in every.values()])
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES)
    parser.add_argument("--kind", choices=list(KINDS), default="mixed", help="operands (default: those of training)")
    parser.add_argument("--rows", type=int, help="pairs to a tile (default: the table's)")
    parser.add_argument("--hbm", type=float, default=Machine.memory, help="bytes a second of the memory")
    parser.add_argument("--l2", type=float, default=Machine.cache, help="bytes a second of the second-level cache")
    parser.add_argument("--peak", type=float, default=Machine.products, help="half-precision operations a second")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    machine = Machine(options.hbm, options.l2, options.peak)
    text = page(options.shapes, options.kind, machine, options.rows)
    options.output.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
