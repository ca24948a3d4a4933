"""The tables of a training benchmark: ``python -m benchmarks.training_summary RESULTS.json`` writes RESULTS.md."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def tables(results: dict[str, Any]) -> str:
    """Every kind of benchmark that the results hold, a table each."""
    machine = results["machine_info"]
    parts = [
        f"{machine['device']}, {machine['threads']} thread(s) a process, torch {machine['torch']}, "
        f"Python {machine['python_version']}, revision {results['commit_info']['id'][:10]}; "
        f"{machine['task']}, {machine['batch_size']} + {machine['batch_size']} random images\n"
    ]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for benchmark in results["benchmarks"]:
        kinds.setdefault(benchmark["name"].partition("[")[0], []).append(benchmark)
    parts += [TABLES[kind](benchmarks) for kind, benchmarks in kinds.items()]
    return "\n".join(parts)


def _table(head: str, rows: list[list[str]]) -> str:
    names = head.split("|")
    rule = ["---", *["---:"] * (len(names) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in ([name.strip() for name in names], rule, *rows))


def _steps(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        name = f"{info['method']}, {info['precision']}, {'compiled' if info['compiled'] else 'eager'}"
        figures = [f"{1e3 * benchmark['stats']['median']:.1f} ms", f"{info['images_per_second']:.0f}"]
        rows.append([name, *figures, f"{info['seconds_to_first_step']:.1f} s", f"{info['peak_memory_gib']:.2f} GiB"])
    return _table("step | median | images/s | first step | peak memory so far", rows)


def _turns(benchmarks: list[dict[str, Any]]) -> str:
    """Return ratios are medians of the ratios of neighbours in time."""
    seconds: dict[str, list[float]] = benchmarks[0]["extra_info"]["seconds"]
    rows = []
    for method, own in seconds.items():
        ratios = [statistics.median(a / b for a, b in zip(own, seconds[base])) for base in ("source-only", "dann")]
        rows.append([method, f"{statistics.median(own):.3f} s", *(f"{ratio:.2f}x" for ratio in ratios)])
    return _table(f"step, {len(own)} in turns | median | vs source-only | vs dann", rows)


def _checkpoint(benchmarks: list[dict[str, Any]]) -> str:
    rows = []
    for benchmark in benchmarks:
        info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
        size, every = f"{info['bytes'] / 2**20:.0f} MiB", str(info["steps_between_scorings"])
        rows.append(["gsda", f"{seconds:.2f} s", size, every, f"{100 * info['share_of_time']:.1f} %"])
    return _table("checkpoint | to save | size | steps between two | share of the training time", rows)


def _scaling(benchmarks: list[dict[str, Any]]) -> str:
    rates = {(b["extra_info"]["processes"], b["extra_info"]["batch"]): b["extra_info"] for b in benchmarks}
    rows = []
    for (processes, batch), info in rates.items():
        rate, alone = info["images_per_second"], rates[1, batch]["images_per_second"]
        row = [f"{processes}, equal batch {batch}", f"{info['own_batch']} + {info['own_batch']}", f"{rate:.0f}"]
        rows.append([*row, f"{rate / alone:.2f}x"])
    return _table("processes | batch of each | images/s in all | vs one process", rows)


def _first_step(benchmarks: list[dict[str, Any]]) -> str:
    rows = [
        ["compiled" if b["extra_info"]["compiled"] else "eager", f"{b['stats']['median']:.1f} s"] for b in benchmarks
    ]
    return _table("from the command to the first step | time", rows)


TABLES = {
    "test_step": _steps,
    "test_methods_in_turns": _turns,
    "test_saving_a_checkpoint": _checkpoint,
    "test_scaling": _scaling,
    "test_time_to_first_step": _first_step,
}


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        text = tables(json.loads(path.read_text()))
        path.with_suffix(".md").write_text(text)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
