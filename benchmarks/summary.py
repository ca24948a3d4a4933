"""Turns saved benchmark results into the README's table and a plot: ``python -m benchmarks.summary RESULTS.json``.

Writes RESULTS.md and RESULTS.png beside the file and prints the table. A ratio is the median, over the visits, of the
baseline's time divided by the contender's time in the same visit.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.contenders import BASELINE, INDEXING, REFERENCE


@dataclass
class Measured:
    """One contender at one shape. `seconds`: median time by visit; `facts`: what the first visit counted."""

    seconds: dict[int, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds.values())

    def times_faster_than(self, other: Measured) -> float:
        shared = self.seconds.keys() & other.seconds.keys()
        return statistics.median(other.seconds[visit] / self.seconds[visit] for visit in shared)


Groups = dict[tuple[str, str], dict[str, Measured]]


def read_groups(results: dict[str, Any]) -> Groups:
    """Return (shape, player) -> contender -> what was measured, in the order of the file."""
    groups: Groups = {}
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        contender = groups.setdefault((info["shape"], info["player"]), {}).setdefault(info["contender"], Measured())
        contender.seconds[info["visit"]] = benchmark["stats"]["median"]
        contender.facts.update(info)
    return groups


def table(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    lines = [
        f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"Python {machine['python_version']}, revision {results['commit_info']['id'][:10]}",
        "",
        "| shape | step | contender | time | vs baseline | vs loop | vs indexing loop | multiply-adds | units "
        "| peak memory | floor |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (shape, player), contenders in read_groups(results).items():
        for name, measured in contenders.items():
            facts = measured.facts
            ratios = [
                f"{measured.times_faster_than(contenders[other]):.1f}x" if other in contenders else ""
                for other in (BASELINE, REFERENCE, INDEXING)
            ]
            cells = [
                shape, player, name, f"{1e3 * measured.median:.1f} ms", *ratios,
                f"{facts['multiply_adds'] / 1e9:.2f} G", f"{facts['multiply_adds'] / facts['unit']:.2f}",
                f"{facts['peak_memory'] / 1e6:.0f} MB", f"{1e3 * facts['floor_seconds']:.1f} ms",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot how many times faster than the baseline, by shape, both players."""
    groups = {shape: group for (shape, player), group in read_groups(results).items() if player == "both players"}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(names)
    for position, name in enumerate(names):
        ratios = [group[name].times_faster_than(group[BASELINE]) if name in group else 0 for group in groups.values()]
        places = [index + position * width for index in range(len(groups))]
        bars = axes.bar(places, ratios, width, label=name)
        axes.bar_label(bars, [f"{ratio:.1f}" if ratio else "" for ratio in ratios], fontsize=7)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(groups))], list(groups))
    axes.set_ylabel(f"times faster than the {BASELINE}")
    axes.set_title(f"Adversarial head, forward and backward: {results['machine_info']['device']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(paths: Iterable[str]) -> None:
    for path in map(Path, paths):
        results = json.loads(path.read_text())
        path.with_suffix(".md").write_text(table(results))
        plot(results, path.with_suffix(".png"))
        print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
