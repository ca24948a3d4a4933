"""Tiles of 64, 128 and 256 pairs side by side: what the compiler makes of them, and what they read. No GPU is asked.

    python -m benchmarks.tiles                      # writes benchmarks/results/tiles.md; a few minutes
    python -m benchmarks.tiles --kind half --output tiles.md

The kernels are compiled for three chips (static_report.py), the bytes counted (byte_model.py). Of mixed operands, those
kernels are meant that read half-precision copies of the weights, as in training.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.byte_model import Machine, count
from benchmarks.shapes import SHAPES, HeadShape
from benchmarks.static_report import CHIPS, Report, launches_of, report

OUTPUT = Path(__file__).parent / "results" / "tiles.md"
HEIGHTS = (64, 128, 256)
OVER_PAIRS = ("first_layer", "second_layer", "hidden_gradient", "jacobian", "hidden_backward")
DATA_SETS = ("visda", "office31", "office-home")
SAMPLES = (36, 64, 128, 256)  # of each domain
COMPILED_AT = 128

# Kernel, height and capability.
Compiled = dict[tuple[str, int, int], Report]


def batch(data_set: str, samples: int) -> HeadShape:
    return replace(SHAPES[data_set], num_source=samples, num_target=samples)


def compiled(kind: str, capabilities: Sequence[int], heights: Sequence[int]) -> Compiled:
    """Return the kernels over pairs at every height, and the sums over pairs, whose tiles are cut otherwise, at one."""
    found: Compiled = {}
    for capability, height in itertools.product(capabilities, heights):
        launches = launches_of(batch("visda", COMPILED_AT), kind, capability, height)
        with tempfile.TemporaryDirectory() as folder:
            # Of two with one name then, the one that reads copies stays.
            for name, launch in {name.removesuffix(", copies"): launch for name, launch in launches.items()}.items():
                if name in OVER_PAIRS or height == heights[0]:
                    found[name, height, capability] = report(name, launch, capability, Path(folder))
    return found


def compiled_table(found: Compiled) -> list[str]:
    capabilities = list(dict.fromkeys(capability for _, _, capability in found))
    chips = " / ".join(f"sm_{capability}" for capability in capabilities)
    lines = [
        f"| {chips} | tile | warps, stages | registers | spills | shared KB | programs a multiprocessor | waves |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kernel, height in dict.fromkeys((kernel, height) for kernel, height, _ in found):
        each = [found[kernel, height, capability] for capability in capabilities]
        cells = (
            [one.registers for one in each],
            [one.spills for one in each],
            [round(one.shared / 1024) for one in each],
            [one.occupancy for one in each],
            [f"{one.waves:.2f}" for one in each],
        )
        values = " | ".join(" / ".join(map(str, cell)) for cell in cells)
        lines.append(f"| {kernel} | {each[0].tile} | {each[0].warps}, {each[0].stages} | {values} |")
    return lines


def bytes_table(kind: str, heights: Sequence[int]) -> list[str]:
    """Return megabytes through the second-level cache, in sum also as a share of those at the first height."""
    lines = [
        f"| | rows | rows multiplied for a pair | {' | '.join(OVER_PAIRS)} | sum | share |",
        f"|---|{'---:|' * (len(OVER_PAIRS) + 4)}",
    ]
    for data_set in DATA_SETS:
        for samples in SAMPLES:
            sums: list[float] = []
            for height in heights:
                step = count(batch(data_set, samples), kind, Machine(), height)
                launches = {each.name: each for each in (*step.forward_copies, *step.update)}
                read = [launches[name].cache / 1e6 for name in OVER_PAIRS]
                sums.append(sum(read))
                padded = step.num_tiles * height / step.num_pairs
                lines.append(
                    f"| {data_set}, {samples} + {samples} | {height} | {padded:.2f} | "
                    f"{' | '.join(f'{size:.0f}' for size in read)} | {sums[-1]:.0f} | {sums[-1] / sums[0]:.2f} |"
                )
    return lines


def page(kind: str, heights: Sequence[int] = HEIGHTS) -> str:
    found = compiled(kind, list(CHIPS), heights)
    lines = [
        "# Tiles of 64, 128 and 256 pairs: compiled and counted; model, not measured",
        "",
        f"By `python -m benchmarks.tiles` for operands `{kind}`. In force are 64 rows up to 96 samples, 128 beyond.",
        "",
        "## What the compiler makes of them",
        "",
        f"At {COMPILED_AT} + {COMPILED_AT} samples of VisDA, for an A100, an H100 and a B200. A spill is an access to "
        "local memory in the machine code; waves are of the launched grid, some of whose programs find no pairs.",
        "",
        *compiled_table(found),
        "",
        "## Megabytes through the second-level cache",
        "",
        "At pairs as training routes them.",
        "",
        *bytes_table(kind, heights),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("mixed", "half"), default="mixed", help="operands (default: training's)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    text = page(options.kind)
    options.output.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
