"""The table of a loader or data wait benchmark: ``python -m benchmarks.loader_summary RESULTS.json`` writes RESULTS.md.

A ratio is the median, over the visits, of a contender's images per CPU-second divided by a DataLoader's in the same
visit; everything else is the median over the visits.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loader_contenders import DESCRIPTIONS, LEAN, USUAL


def table(results: dict[str, Any]) -> str:
    """Return images per second and per CPU-second of every contender, against both DataLoaders."""
    per_second = _by_visit(results, lambda each, info: info["images"] / each["stats"]["median"])
    per_cpu_second = _by_visit(results, lambda each, info: info["images"] / info["cpu_seconds"])
    lines = [
        f"{_setting(results)}, {_info(results)['workers']} workers each",
        "",
        "| 500x375 JPEG, random resized crop to 224 | images/s | images/CPU-s | against the usual | against the lean |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rates in per_cpu_second.items():
        ratios = [
            statistics.median(rates[visit] / per_cpu_second[baseline][visit] for visit in rates)
            for baseline in (USUAL, LEAN)
        ]
        cells = [f"{statistics.median(values.values()):.0f}" for values in (per_second[name], rates)]
        lines.append(f"| {' | '.join([DESCRIPTIONS[name], *cells, *(f'{ratio:.2f}x' for ratio in ratios)])} |")
    return "\n".join(lines) + "\n"


def wait_table(results: dict[str, Any]) -> str:
    """Return the share of a training step spent waiting, with every contender."""
    waits = _by_visit(results, lambda each, info: info["data_wait"])
    rates = _by_visit(results, lambda each, info: info["images_per_second"])
    lines = [
        f"{_setting(results)}, {results['machine_info']['threads']} computing thread(s), {_info(results)['network']}",
        "",
        "| 500x375 JPEG, gsda | images/s | step spent waiting for data | longest visit |",
        "|---|---:|---:|---:|",
    ]
    for name, shares in waits.items():
        share, longest = statistics.median(shares.values()), max(shares.values())
        lines.append(f"| {name} | {statistics.median(rates[name].values()):.1f} | {share:.1%} | {longest:.1%} |")
    return "\n".join(lines) + "\n"


def _by_visit(results: dict[str, Any], value: Callable[[Any, Any], float]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for each in results["benchmarks"]:
        info = each["extra_info"]
        found[info["contender"]][info["visit"]] = value(each, info)
    return found


def _info(results: dict[str, Any]) -> dict[str, Any]:
    info: dict[str, Any] = results["benchmarks"][0]["extra_info"]
    return info


def _setting(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in _info(results)["versions"].items())
    machine, revision = results["machine_info"], results["commit_info"]["id"][:10]
    return f"{machine['device']}, {versions}, Python {machine['python_version']}, revision {revision}"


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        results = json.loads(path.read_text())
        text = wait_table(results) if "data_wait" in _info(results) else table(results)
        path.with_suffix(".md").write_text(text)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
