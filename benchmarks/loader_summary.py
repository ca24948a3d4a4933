"""The table of a loader benchmark: ``python -m benchmarks.loader_summary RESULTS.json`` writes it as RESULTS.md.

A ratio is the median, over the visits, of a contender's images per CPU-second divided by the usual loader's in the same
visit; a rate is the median over the visits.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.loader_contenders import USUAL


def table(results: dict[str, Any]) -> str:
    per_second: dict[str, dict[int, float]] = defaultdict(dict)
    per_cpu_second: dict[str, dict[int, float]] = defaultdict(dict)
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        per_second[info["contender"]][info["visit"]] = info["images"] / benchmark["stats"]["median"]
        per_cpu_second[info["contender"]][info["visit"]] = info["images"] / info["cpu_seconds"]
    info = results["benchmarks"][0]["extra_info"]
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    lines = [
        f"{results['machine_info']['device']}, {info['workers']} workers each, {versions}, "
        f"Python {results['machine_info']['python_version']}, revision {results['commit_info']['id'][:10]}",
        "",
        "| 500x375 JPEG, random resized crop to 224 | images/s | images/CPU-s | CPU time against the usual |",
        "|---|---:|---:|---:|",
    ]
    for name, rates in per_cpu_second.items():
        ratio = statistics.median(rates[visit] / per_cpu_second[USUAL][visit] for visit in rates)
        medians = [f"{statistics.median(values.values()):.0f}" for values in (per_second[name], rates)]
        lines.append(f"| {name} | {' | '.join(medians)} | {ratio:.2f}x |")
    return "\n".join(lines) + "\n"


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        text = table(json.loads(path.read_text()))
        path.with_suffix(".md").write_text(text)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
