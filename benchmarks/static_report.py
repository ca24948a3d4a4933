"""What the compiler makes of every launch of a step, without a GPU: registers, shared memory, occupancy, waves, loops.

    python -m benchmarks.static_report --kinds mixed --shapes visda visda-128
    python -m benchmarks.static_report --rows 128 --shapes visda-128        # with other tiles over pairs

Prints a Markdown table; of mixed operands with half-precision copies of the weights, too. Occupancy is how many
programs a multiprocessor of the chip (an A100, H100 or B200) holds at once by registers, shared memory and threads;
waves are the grid's programs over what the whole chip holds. The loop is the one with the
matrix instructions (HGMMA, HMMA; FFMA without tensor cores) and is given by its most frequent instructions.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.cross_compile import PRODUCT_OF, Launch, compile_launch, head_launches, update_launches
from benchmarks.shapes import SHAPES, HeadShape
from benchmarks.tune_triton import OPERANDS, precision_of, row, with_product
from gsda_kernels.triton import configs
from gsda_kernels.triton.configs import ANY_CHIP, Key, look_up, shape_class


class Chip(NamedTuple):
    """How many multiprocessors, and the bytes of shared memory of each."""

    multiprocessors: int
    shared_memory: int


CHIPS = {80: Chip(108, 167936), 90: Chip(132, 233472), 100: Chip(148, 233472)}  # A100, H100, B200
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # of a multiprocessor
_RESERVED_SHARED = 1024  # of each program
_MULTIPLIES = ("HGMMA", "HMMA", "FFMA")
_OPERATION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA(?:\.\S+)?\s+.*?`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Report:
    """One launch. `loop`: the instructions of its product's loop; `waves`: of programs over the chip."""

    kernel: str
    tile: str
    warps: int
    stages: int
    registers: int
    shared: int
    spills: int
    occupancy: int
    programs: int
    waves: float
    loop: Counter[str]


def occupancy(registers: int, shared: int, warps: int, chip: Chip = CHIPS[90]) -> int:
    """Return programs that a multiprocessor holds at once."""
    a_warp = math.ceil(registers * 32 / 256) * 256  # registers are handed out in these portions
    by_registers, by_threads = REGISTERS // (a_warp * warps), THREADS // (32 * warps)
    return min(by_registers, chip.shared_memory // (shared + _RESERVED_SHARED), by_threads, PROGRAMS)


def loops(sass: str) -> list[list[str]]:
    """Return the lines of each innermost loop: a branch back, with no other one inside."""
    lines = sass.splitlines()
    labels = {found[1]: index for index, line in enumerate(lines) if (found := _LABEL.match(line))}
    back = [
        (labels[found[1]], index)
        for index, line in enumerate(lines)
        if (found := _BRANCH.search(line)) and labels.get(found[1], len(lines)) < index
    ]
    inner = [
        (first, last)
        for first, last in back
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in back)
    ]
    return [lines[first : last + 1] for first, last in inner]


def instructions(lines: Sequence[str]) -> Counter[str]:
    """By name; copies and loads with their width, so that narrow ones show."""
    found: Counter[str] = Counter()
    for match in filter(None, map(_OPERATION.match, lines)):
        base, *rest = match[1].split(".")
        if base in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
            base += "." + next((width for width in rest if width in ("64", "128", "U16", "U8")), "32")
        found[base] += 1
    return found


def report(name: str, launch: Launch, capability: int, folder: Path) -> Report:
    """Compile the launch."""
    made = compile_launch(launch, capability, folder)
    bodies = [body for body in map(instructions, loops(made.sass)) if any(body[name] for name in _MULTIPLIES)]
    options, programs = launch.options, math.prod(launch.grid)
    warps, chip = options.get("num_warps", 4), CHIPS[capability]
    held = occupancy(made.registers, made.shared, warps, chip)
    tile = "x".join(
        str(options[f"BLOCK_{side}"]) for side in ("ROWS", "COLUMNS", "INNER") if f"BLOCK_{side}" in options
    )
    return Report(
        name,
        tile,
        warps,
        options.get("num_stages", 1),
        made.registers,
        made.shared,
        made.local_accesses,
        held,
        programs,
        programs / (held * chip.multiprocessors),
        # The bias's sums are a loop of multiply-adds too: matrix instructions go first.
        max(bodies, key=lambda body: (body["HGMMA"] + body["HMMA"], body["FFMA"]), default=Counter()),
    )


def _variant(launch: Launch) -> str:
    if "SECOND_LAYER" not in launch.options:
        return ""
    return f" {2 if launch.options['SECOND_LAYER'] else 1}{', moves' if launch.options['UPDATE'] else ''}"


@contextlib.contextmanager
def tiles_of(key: Key, rows: int | None) -> Iterator[None]:
    """Return the table's tiles, or with other rows where they go over pairs; twice the warps for twice the rows."""
    if rows is None:
        yield
        return
    now = look_up(key)
    warps = now.layer.num_warps * max(1, rows // now.layer.block_rows)
    layer = replace(now.layer, block_rows=rows, num_warps=min(16, warps))
    changed = row(with_product(now, "layer", layer))
    with mock.patch.dict(configs.TABLE, {key: changed}):
        yield


def launches_of(shape: HeadShape, kind: str, capability: int, rows: int | None) -> dict[str, Launch]:
    """Return the launches of forward, backward and update by their names in the tables.

    Those that read half-precision copies of the weights come after the same ones that do not.
    """
    dtype, parameter_dtype, _ = OPERANDS[kind]
    arguments: dict[str, Any] = {
        "num_samples": shape.num_samples,
        "num_discriminators": shape.num_discriminators,
        "dim": shape.feature_dim,
        "hidden": shape.hidden_dim,
        "max_pairs": shape.num_pairs,
        "dtype": dtype,
        "parameter_dtype": parameter_dtype,
        "capability": capability,
    }
    size = shape_class(shape.num_samples, shape.feature_dim, shape.hidden_dim)
    copies = parameter_dtype.itemsize > dtype.itemsize
    with precision_of(kind), tiles_of(Key(ANY_CHIP, kind, size), rows):
        forward, backward = head_launches(**arguments, needs_grad=[False] + [True] * 6)
        launches = {launch.name + _variant(launch): launch for launch in (*forward, *backward)}
        if copies:
            reading, _ = head_launches(**arguments, half_weights=True)
            launches |= {f"{launch.name}, copies": launch for launch in reading}
        moving = update_launches(**arguments, half_weights=copies)
        launches |= {launch.name + _variant(launch) + ", copies" * copies: launch for launch in moving}
    return {name.replace("_kernel", ""): launch for name, launch in launches.items() if launch.name in PRODUCT_OF}


def table(found: Sequence[Report]) -> str:
    lines = [
        "| kernel | tile | warps, stages | registers | shared KB | spills | programs a multiprocessor | waves | loop |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for each in found:
        body = ", ".join(f"{name} {times}" for name, times in each.loop.most_common(8))
        lines.append(
            f"| {each.kernel} | {each.tile} | {each.warps}, {each.stages} | {each.registers} | "
            f"{each.shared / 1024:.0f} | {each.spills} | {each.occupancy} | {each.waves:.2f} | {body} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(OPERANDS), default=["mixed"], help="operands")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["visda", "visda-128"])
    parser.add_argument("--kernels", nargs="+", choices=list(PRODUCT_OF), default=list(PRODUCT_OF))
    parser.add_argument("--rows", type=int, help="pairs to a tile (default: the table's)")
    parser.add_argument("--capability", type=int, choices=CHIPS, default=90, help="what to compile for (default: 90)")
    options = parser.parse_args(arguments)
    for kind in options.kinds:
        for name in options.shapes:
            launches = launches_of(SHAPES[name], kind, options.capability, options.rows)
            with tempfile.TemporaryDirectory() as folder:
                found = [
                    report(each, launch, options.capability, Path(folder))
                    for each, launch in launches.items()
                    if launch.name in options.kernels
                ]
            print(f"\n{kind}, {name}\n\n{table(found)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
