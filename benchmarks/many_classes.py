"""What a step of the adversarial head costs as the number of classes grows: by the byte model, and measured on a CPU.

    python -m benchmarks.many_classes            # writes benchmarks/results/many-classes.md and .png

Memory and times at full size (D 256, H 1024, 36 + 36 samples a process) are those of `byte_model`: not measured. A CPU
thread is measured at D 64, H 128 with the fastest backend, all numbers of classes in turns, as a ratio to twelve.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.byte_model import Machine, count, pairs_of, times
from benchmarks.contenders import closed_form, step
from benchmarks.shapes import HeadShape, make_inputs
from gsda_kernels import resolve_backend

OUTPUT = Path(__file__).parent / "results" / "many-classes.md"
CLASSES = (12, 31, 65, 126, 345, 1000)
MEMORY = 80e9
MIN_WEIGHT = 0.01
RANKS = 8
KIND = "mixed"


@dataclass(frozen=True)
class Way:
    """A way to lay out the discriminators of r classes.

    Attributes:
        share: of the discriminators that a process holds. min_weight: below which target pairs are left out.
        levels: of groups, each of about five members.
    """

    name: str
    levels: int = 1
    min_weight: float = 0.0
    share: float = 1.0

    def shape(self, classes: int) -> HeadShape:
        groups = [max(1, round(classes / 5**level)) for level in range(1, self.levels + 1)]
        return HeadShape(classes, sum(groups))


WAYS = (
    Way("groups of five"),
    Way("two levels of groups", levels=2),
    Way(f"groups of five, --min-weight {MIN_WEIGHT:g}", min_weight=MIN_WEIGHT),
    Way(f"groups of five, divided over {RANKS}", share=1 / RANKS),
)


def held_bytes(shape: HeadShape, share: float = 1.0, num_pairs: int | None = None) -> float:
    """Return the bytes of parameters and momentum, of half-precision copies, and of what a step's pairs keep.

    Float32, but for the copies (of w1 and w2) and the pairs, which are bfloat16.

    Divided over processes each computes its discriminators for all of their samples: its pairs stay as many.
    """
    pairs = sum(pairs_of(shape)) if num_pairs is None else num_pairs
    # h1, the mask of h2 with what it multiplies, the gradient of h1, and J: as `byte_model.count` writes them.
    kept = pairs * (4 * shape.hidden_dim + shape.feature_dim) * 2
    copies = 2 * shape.num_discriminators * shape.hidden_dim * (shape.feature_dim + shape.hidden_dim)
    return (8 * shape.num_parameters + copies) * share + kept


def active_pairs(shape: HeadShape, min_weight: float) -> int:
    """Return the pairs of which the weight is at least `min_weight`, and none of weight 0."""
    weight = make_inputs(replace(shape, feature_dim=1, hidden_dim=1)).sample_weight
    return int(((weight >= min_weight) & (weight > 0)).sum())


def largest(way: Way, memory: float = MEMORY) -> int:
    """Return the largest number of classes whose head and pairs fit into so many bytes, to two digits."""
    low, high = 12, 12
    while held_bytes(way.shape(high), way.share) < memory:
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if held_bytes(way.shape(middle), way.share) < memory else (low, middle)
    return low


def measure(classes: Sequence[int], visits: int = 9) -> dict[int, float]:
    """Return the least seconds of a step of both players on this CPU, by the number of classes, in turns."""
    contender = closed_form(resolve_backend("auto", "cpu"))
    shapes = {r: HeadShape(r, max(1, round(r / 5)), feature_dim=64, hidden_dim=128) for r in classes}
    found: dict[int, list[float]] = {r: [] for r in classes}
    for visit in range(visits + 1):
        for r, shape in shapes.items():
            inputs = make_inputs(shape).requires_grad_(True, True)
            start = time.perf_counter()
            step(contender, inputs)
            if visit:  # the first one allocates
                found[r].append(time.perf_counter() - start)
    return {r: min(each) for r, each in found.items()}


def page(classes: Sequence[int], seconds: dict[int, float]) -> str:
    """Return the tables in Markdown."""
    machine, baseline = Machine(), seconds[classes[0]]
    lines = [
        "# The adversarial head and the number of classes",
        "",
        "Counted and measured by `python -m benchmarks.many_classes`; D 256, H 1024, 36 + 36 samples a process, "
        "float32 parameters with momentum and half-precision copies, bfloat16 features. "
        "Memory and GPU times are a model, not measured. Two "
        "levels of groups are counted as one level of as many. Predictions are softmax(4 x), x normal.",
        "",
        f"| classes | K | {' | '.join(f'{way.name}, GB' for way in WAYS)} | pairs kept by min-weight | "
        "step on an H100, model, ms | step on a CPU, D 64, H 128, times that of 12 classes |",
        f"|---:|---:|{'---:|' * len(WAYS)}---:|---:|---:|",
    ]
    for r in classes:
        flat = WAYS[0].shape(r)
        kept = {way: active_pairs(way.shape(r), way.min_weight) if way.min_weight else None for way in WAYS}
        sizes = [f"{held_bytes(way.shape(r), way.share, kept[way]) / 1e9:.2f}" for way in WAYS]
        share = next(pairs for pairs in kept.values() if pairs is not None) / sum(pairs_of(flat))
        model = times(count(flat, KIND, machine), KIND, machine).fused / 1e3
        lines.append(
            f"| {r} | {flat.num_discriminators} | {' | '.join(sizes)} | {share:.0%} | {model:.2f} "
            f"| {seconds[r] / baseline:.1f} |"
        )
    alone, divided = largest(WAYS[0]), largest(WAYS[-1])
    lines += [
        "",
        f"By this count {alone} classes fit into {MEMORY / 1e9:.0f} GB alone, and {divided} divided over {RANKS} "
        "processes: the pairs stay as many. Backbone, classifier and what PyTorch's allocator adds are not in it.",
    ]
    return "\n".join(lines) + "\n"


def plot(classes: Sequence[int], path: Path) -> None:
    """Draw memory over the number of classes, a line for each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for way in WAYS:
        pairs = {r: active_pairs(way.shape(r), way.min_weight) if way.min_weight else None for r in classes}
        sizes = [held_bytes(way.shape(r), way.share, pairs[r]) / 1e9 for r in classes]
        axes.loglog(classes, sizes, marker="o", label=way.name)
    axes.axhline(MEMORY / 1e9, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="classes", ylabel="GB (model, not measured)", title="Head, momentum and pairs of a step")
    axes.set_xticks(classes, [str(r) for r in classes], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = page(options.classes, measure(options.classes))
    options.output.write_text(text)
    plot(options.classes, options.output.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
