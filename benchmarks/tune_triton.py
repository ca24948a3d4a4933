"""Times every sensible configuration of the Triton products on the GPU at hand, and writes the table of the best.

    python -m benchmarks.tune_triton                               # the whole table, for this GPU
    python -m benchmarks.tune_triton --kinds half --output t.py    # some of its rows, into another file
    python -m benchmarks.tune_triton --list --chip sm_90           # the candidates and their compilation; needs no GPU

Candidates that do not compile, spill registers, take more shared memory than the chip has or miss its tensor cores are
dropped before anything is timed. The rest take turns, kernel by kernel, at the shapes that each row stands for; only
the quickest go into the later rounds. A row is written for this chip alone, after its results have been compared with
those of the row before, and only if it is clearly faster. Training itself never tunes anything.

Needs PyTorch and Triton, nothing installed from this repository.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.testing import do_bench

from benchmarks.cross_compile import (
    ALL_KERNELS,
    PRODUCT_OF,
    SHARED_MEMORY,
    compile_launch,
    head_launches,
    recorded_launches,
)
from benchmarks.shapes import SHAPES, HeadInputs, HeadShape, make_inputs
from gsda_kernels import backends
from gsda_kernels.triton import configs
from gsda_kernels.triton.configs import KINDS, SHAPE_CLASSES, Configuration, Key, Product, Rows, look_up
from gsda_kernels.triton.table import TABLE

TABLE_FILE = Path(__file__).resolve().parents[1] / "kernels" / "gsda_kernels" / "triton" / "table.py"
PRODUCTS = tuple(field.name for field in fields(Configuration))

# The dtype of the features, of the parameters, and whether TF32 is allowed.
OPERANDS = {
    "half": (torch.bfloat16, torch.bfloat16, False),
    "mixed": (torch.bfloat16, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
    "float32": (torch.float32, torch.float32, False),
}
TUNED_AT = {
    "small": (SHAPES["visda"], SHAPES["office31"], SHAPES["office-home"]),
    "medium": (SHAPES["visda-128"], SHAPES["office-home-128"]),
    "large": (replace(SHAPES["visda"], num_source=512, num_target=512),),
    "unaligned": (replace(SHAPES["visda"], feature_dim=250, hidden_dim=1000),),
}
KEPT_FOR_LATER_ROUNDS = 8
CLEARLY_FASTER = 0.97  # of the time before

Times = Mapping[str, Mapping[Product, Sequence[float]]]


def candidates(product: str, kind: str, shape_class: str, shared_memory: int) -> list[Product]:
    """Every configuration of one kind of product that could be worth compiling.

    Bounded by what it must hold: the accumulators of a tile in registers, the tiles in flight in shared memory.
    """
    left = 2 if kind in ("half", "mixed") else 4
    right = left if product == "weight" or kind == "half" else 4
    # Without tensor cores, or with an address for each element, a thread has registers for few accumulators.
    scattered = kind == "float32" or shape_class == "unaligned"
    inner_sizes = (16, 32) if scattered else tuple(bytes_ // right for bytes_ in (64, 128, 256))
    found = [
        Product(rows, columns, inner, warps, stages)
        for rows, columns, inner, warps, stages in itertools.product(
            (64, 128), (32, 64, 128, 256), inner_sizes, (4, 8), (2, 3, 4)
        )
        if (8 if scattered else 16) <= rows * columns / (32 * warps) <= (16 if scattered else 128)
        and stages * inner * (rows * left + columns * right) <= shared_memory
    ]
    return list(dict.fromkeys(found))


def with_product(configuration: Configuration, product: str, value: Product) -> Configuration:
    """Return `configuration` with one of its products replaced; layer and jacobian cut the pairs into the same rows."""
    changed = replace(configuration, **{product: value})
    if product == "layer":
        return replace(changed, jacobian=replace(changed.jacobian, block_rows=value.block_rows))
    if product == "jacobian":
        return replace(changed, layer=replace(changed.layer, block_rows=value.block_rows))
    return changed


def choose(times: Times) -> Configuration:
    """Return the configuration with the least sum of times, each relative to the quickest at its shape.

    Args:
        times: product -> candidate -> time at each shape, in one order. layer and jacobian must have the same rows.
    """
    best = [min(at_shape) for at_shape in zip(*(t for product in times.values() for t in product.values()))]

    def cost(*each: Sequence[float]) -> float:
        return sum(sum(at_shape) / quickest for *at_shape, quickest in zip(*each, best))

    layer, jacobian = min(
        (pair for pair in itertools.product(times["layer"], times["jacobian"]) if _same_rows(*pair)),
        key=lambda pair: cost(times["layer"][pair[0]], times["jacobian"][pair[1]]),
    )
    weight = min(times["weight"], key=lambda candidate: cost(times["weight"][candidate]))
    return Configuration(layer, jacobian, weight)


def _same_rows(layer: Product, jacobian: Product) -> bool:
    return layer.block_rows == jacobian.block_rows


def render(table: Rows) -> str:
    """Return the source of table.py."""
    lines = [
        '"""Tiles of the Triton products, by chip, operands and shape class: see configs.py.',
        "",
        "Written by benchmarks/tune_triton.py. ``any`` serves chips without rows of their own, and fits them all. Each",
        "product: block_rows, block_columns, block_inner, num_warps, num_stages.",
        '"""',
        "",
        "TABLE: dict[tuple[str, str, str], dict[str, tuple[int, int, int, int, int]]] = {",
    ]
    for key in sorted(table, key=_order):
        lines.append('    ("{}", "{}", "{}"): {{'.format(*key))
        lines += [f'        "{product}": {table[key][product]},' for product in PRODUCTS]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def _order(key: tuple[str, str, str]) -> tuple[int, str, int, int]:
    chip, kind, size = key
    return int(re.sub(r"\D", "", chip) or 0), chip, KINDS.index(kind), SHAPE_CLASSES.index(size)


def row(configuration: Configuration) -> dict[str, tuple[int, int, int, int, int]]:
    return {product: astuple(getattr(configuration, product)) for product in PRODUCTS}


# ---- Compiling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One candidate for one kind of product of one row of the table."""

    key: Key
    product: str
    candidate: Product

    @contextmanager
    def in_force(self) -> Iterator[None]:
        configuration = with_product(look_up(self.key), self.product, self.candidate)
        with mock.patch.dict(configs.TABLE, {self.key: row(configuration)}), precision_of(self.key.kind):
            yield


@dataclass(frozen=True)
class Verdict:
    """What the compiler made of a candidate: the most of any of its kernels, and why it is dropped, if it is."""

    registers: int
    shared: int
    flaw: str | None


@contextmanager
def precision_of(kind: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if OPERANDS[kind][2] else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def inspect(trial: Trial) -> Verdict:
    """Compile every kernel of the trial's product for the chip that its row is for."""
    capability = capability_of(trial.key.chip)
    shape = TUNED_AT[trial.key.shape_class][0]
    dtype, parameter_dtype, _ = OPERANDS[trial.key.kind]
    with trial.in_force():
        forward, backward = head_launches(
            num_samples=shape.num_samples,
            num_discriminators=shape.num_discriminators,
            dim=shape.feature_dim,
            hidden=shape.hidden_dim,
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            capability=capability,
        )
    registers = shared = 0
    with tempfile.TemporaryDirectory() as folder:
        for launch in forward + backward:
            if PRODUCT_OF.get(launch.name) != trial.product:
                continue
            try:
                made = compile_launch(launch, capability, Path(folder))
            except Exception as error:  # whatever the compiler raises: its own, LLVM's, the assembler's
                return Verdict(registers, shared, f"does not compile: {str(error).splitlines()[0] or type(error)}")
            registers, shared = max(registers, made.registers), max(shared, made.shared)
            flaw = made.flaw(capability, tensor_cores=trial.key.kind != "float32")
            if flaw is not None:
                return Verdict(registers, shared, f"{launch.name}: {flaw}")
    return Verdict(registers, shared, None)


def inspected(trials: Sequence[Trial], workers: int) -> Iterator[tuple[Trial, Verdict]]:
    """Compile in `workers` processes, whose results stay in Triton's own cache for the timing."""
    if workers < 2:
        yield from ((trial, inspect(trial)) for trial in trials)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from zip(trials, pool.map(inspect, trials, chunksize=4))


def capability_of(chip: str) -> int:
    return int(chip.removeprefix("sm_"))


# ---- Timing ----------------------------------------------------------------------------------------------------------


def inputs_at(shape: HeadShape, kind: str) -> HeadInputs:
    dtype, parameter_dtype, _ = OPERANDS[kind]
    inputs = make_inputs(shape, dtype=parameter_dtype, device="cuda")
    return replace(inputs, features=inputs.features.to(dtype))


def results_of(inputs: HeadInputs) -> list[torch.Tensor]:
    """Both results and every gradient."""
    tensors, label = (inputs.features, *inputs.disc), inputs.domain.float()
    backend, needs_grad = backends.get("triton"), [True] * 7
    loss, norm, saved = backend.forward(tensors, (), inputs.sample_weight, label, inputs.max_pairs, needs_grad)
    upstream = (inputs.grad_loss, inputs.grad_gradient_norm)
    gradients = backend.backward(tensors, inputs.sample_weight, label, saved, *upstream, None, needs_grad)
    return [loss, norm, *(gradient for gradient in gradients if gradient is not None)]


def milliseconds(trial: Trial, inputs: HeadInputs) -> float:
    """Return the device's time for the trial's kernels in one forward and backward, each launch alone, its inputs
    uncached.
    """
    # All run once, in order: a kernel's time depends on the numbers that it is given, and fresh memory holds anything.
    with trial.in_force(), recorded_launches(execute=ALL_KERNELS) as launches:
        results_of(inputs)
    own = [launch for launch in launches if PRODUCT_OF.get(launch.name) == trial.product]
    return sum(do_bench(launch, warmup=2, rep=10, return_mode="median") for launch in own)


def tune_row(key: Key, sound: Mapping[str, Sequence[Product]], rounds: int) -> tuple[Configuration, float]:
    """Return the best configuration for one row, and its time as a share of that of the row in force.

    Args:
        sound: the candidates of each product that the compiler has passed.
    """
    before = look_up(key)
    inputs = [inputs_at(shape, key.kind) for shape in TUNED_AT[key.shape_class]]
    times: dict[str, dict[Product, list[float]]] = {product: {} for product in PRODUCTS}
    for round_ in range(rounds):
        for product in PRODUCTS:
            # What is in force stays in, to be compared with.
            turn = list(dict.fromkeys([getattr(before, product), *sound[product]]))
            if round_ > 0:
                turn = sorted(times[product], key=lambda each: sum(times[product][each]))
                turn = list(dict.fromkeys([getattr(before, product), *_best_of_each_height(turn)]))
            for candidate in turn:
                found = [milliseconds(Trial(key, product, candidate), each) for each in inputs]
                known = times[product].get(candidate, [math.inf] * len(found))
                times[product][candidate] = [min(pair) for pair in zip(found, known)]
    best = choose(times)

    def total(configuration: Configuration) -> float:
        return sum(sum(times[product][getattr(configuration, product)]) for product in PRODUCTS)

    for each in inputs:
        _check_results(key, best, each)
    return best, total(best) / total(before)


def _best_of_each_height(ordered: Iterable[Product]) -> list[Product]:
    """Return the quickest of either number of rows, since layer and jacobian have to agree on it."""
    heights: dict[int, list[Product]] = {}
    for candidate in ordered:
        heights.setdefault(candidate.block_rows, []).append(candidate)
    return [candidate for group in heights.values() for candidate in group[: KEPT_FOR_LATER_ROUNDS // 2]]


def _check_results(key: Key, configuration: Configuration, inputs: HeadInputs) -> None:
    with precision_of(key.kind):
        expected = results_of(inputs)
        with mock.patch.dict(configs.TABLE, {key: row(configuration)}):
            found = results_of(inputs)
    for a, b in zip(found, expected):
        error, scale = (torch.linalg.vector_norm(each.double()) for each in (a - b, b))
        # Not `error > ...`: a NaN has to fail.
        if not error <= 1e-2 * scale:
            raise RuntimeError(f"{key}: {configuration} computes something else: error {error:.1e} of {scale:.1e}")


# ---- The command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the candidates and what the compiler makes of each")
    parser.add_argument("--chip", help="what to compile for with --list, e.g. sm_90 (default: this GPU)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="operands (default: all)")
    parser.add_argument("--shape-classes", nargs="+", choices=SHAPE_CLASSES, default=SHAPE_CLASSES, help="default: all")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=PRODUCTS, help="with --list (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the best candidates are timed (default: 3)")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="processes that compile")
    parser.add_argument("--output", type=Path, default=TABLE_FILE, help="file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        chip = _chip(options.chip, options.list)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keys = [Key(chip, kind, size) for kind in options.kinds for size in options.shape_classes]
    trials = [
        Trial(key, product, candidate)
        for key in keys
        for product in (options.products if options.list else PRODUCTS)
        for candidate in candidates(product, key.kind, key.shape_class, SHARED_MEMORY[capability_of(chip)])
    ]
    if options.list:
        for trial, verdict in inspected(trials, options.workers):
            print(describe(trial, verdict), flush=True)
        return 0
    print(f"compiling {len(trials)} candidates in {options.workers} processes", flush=True)
    sound: dict[Key, dict[str, list[Product]]] = {key: {product: [] for product in PRODUCTS} for key in keys}
    for trial, verdict in inspected(trials, options.workers):
        if verdict.flaw is None:
            sound[trial.key][trial.product].append(trial.candidate)
    table: dict[Any, Any] = dict(TABLE)
    for key in keys:
        best, share = tune_row(key, sound[key], options.rounds)
        clear = share < CLEARLY_FASTER
        outcome = "written" if clear else "left as it is"
        print(f"{' '.join(key)}: {share:.2f} of the time before, {outcome}: {best}", flush=True)
        if clear:
            table[tuple(key)] = row(best)
            # After every row, so that a session that is cut off leaves what it found.
            options.output.write_text(render(table))
    return 0


def describe(trial: Trial, verdict: Verdict) -> str:
    each = trial.candidate
    tile = f"{each.block_rows}x{each.block_columns}x{each.block_inner}"
    launch = f"{tile}, {each.num_warps} warps, {each.num_stages} stages"
    in_force = "  (in force)" if getattr(look_up(trial.key), trial.product) == each else ""
    result = verdict.flaw or f"{verdict.registers} registers, {verdict.shared} bytes of shared memory"
    return f"{' '.join(trial.key)} {trial.product}: {launch}: {result}{in_force}"


def _chip(asked: str | None, listing: bool) -> str:
    known = [f"sm_{capability}" for capability in SHARED_MEMORY]
    if asked is not None:
        if not listing:
            raise ValueError("--chip: found it without --list; expected the GPU at hand to be timed: leave --chip out")
        if asked not in known:
            raise ValueError(f"--chip: found {asked!r}; expected one of {', '.join(known)}")
        return asked
    if not torch.cuda.is_available():
        raise ValueError("found no CUDA device; expected one to time the kernels on; --list --chip sm_90 needs none")
    chip = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if chip not in known:
        raise ValueError(
            f"found a GPU of {chip}; expected one of {', '.join(known)}: name its shared memory in "
            "benchmarks/cross_compile.py"
        )
    return chip


if __name__ == "__main__":
    sys.exit(main())
