"""Paired differences between methods over the runs of one or several suites, with 95 % intervals.

    python -m benchmarks.paired runs/combinations runs/combinations-mcc --differences "gsda - mcc" "gsda+mcc - mcc" \
        --title "..." --output benchmarks/results/combinations-digits

A pair is a transfer task and a seed that both methods were run with. A method with terms added is named METHOD+TERM.
What counts is the overall accuracy of the target after the last step, in percent. Writes OUTPUT.md and OUTPUT.csv, the
latter with the accuracy of every run. Such a file can stand in a folder's place: of a run
that occurs twice, the one that is named last counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from gsda_fast.methods import METHODS
from gsda_fast.results.run_folder import RunFolder


def read_runs(places: Sequence[Path]) -> pd.DataFrame:
    """Return a row for every run of suites and of CSV files: method, task, seed, accuracies, revision."""
    found = pd.concat(
        [pd.read_csv(each, dtype={"revision": str}) if each.suffix == ".csv" else _of_folder(each) for each in places]
    )
    latest = found.drop_duplicates(["method", "task", "seed"], keep="last")
    return latest.sort_values(["method", "task", "seed"], ignore_index=True)


def _of_folder(suite: Path) -> pd.DataFrame:
    rows = []
    for path in sorted(suite.iterdir()):
        folder = RunFolder(path)
        result = folder.read_result() if folder.finished else None
        if result is None:
            continue
        rows.append(
            {
                "method": _name(folder, result.method),
                "task": f"{result.source}->{result.target}",
                "seed": result.seed,
                "last": result.accuracy.last,
                "mean_per_class": result.mean_per_class.last,
                "label_free": result.accuracy.label_free,
                "best": result.accuracy.best,
                "revision": folder.read_environment().get("git_revision", "unknown"),
            }
        )
    return pd.DataFrame(rows)


def _name(folder: RunFolder, method: str) -> str:
    """Return the method's name, with the terms that its own presets do not add."""
    added = folder.read_config().get("adaptation", {}).get("add", {})
    presets = METHODS[method].presets
    own = {name for tables in presets.values() for name in tables.get("adaptation", {}).get("add", {})}
    return "+".join([method, *sorted(set(added) - own)])


def difference(runs: pd.DataFrame, first: str, second: str) -> dict[str, float]:
    """Return mean, standard error and 95 % interval of first - second over their pairs, and how many are higher.

    Raises:
        ValueError: fewer than two pairs.
    """
    wide = runs.pivot(index=["task", "seed"], columns="method", values="last")
    missing = [name for name in (first, second) if name not in wide]
    pairs = (wide[first] - wide[second]).dropna() if not missing else pd.Series(dtype=float)
    if len(pairs) < 2:
        raise ValueError(f"{first} - {second}: found {len(pairs)} pairs; expected two or more")
    error = pairs.std() / len(pairs) ** 0.5
    low, high = stats.t.interval(0.95, len(pairs) - 1, loc=pairs.mean(), scale=error)
    return {
        "mean": pairs.mean(),
        "standard_error": error,
        "low": low,
        "high": high,
        "pairs": len(pairs),
        "higher": int((pairs > 0).sum()),
    }


def page(runs: pd.DataFrame, differences: Sequence[tuple[str, str]], title: str, command: str, note: str = "") -> str:
    """Return averages and differences in Markdown; the standard deviation over seeds where there are several."""
    tasks = list(dict.fromkeys(runs["task"]))
    by_task = runs.pivot_table(index="method", columns="task", values="last", aggfunc="mean")[tasks]
    by_seed = runs.groupby(["method", "seed"])["last"].mean().groupby("method")
    by_task["average"] = by_task.mean(axis=1)
    by_task["± over seeds"] = by_seed.std()
    # Earlier tables lack the mean over classes.
    names = {"mean_per_class": "mean per class", "label_free": "chosen without labels", "best": "best (upper bound)"}
    others = runs.reindex(columns=["method", *names]).groupby("method").mean().dropna(axis=1, how="all")
    table = by_task.join(others.rename(columns=names))
    table = table.sort_values("average", ascending=False).dropna(axis=1, how="all")
    counts, revisions = runs.groupby("method").size(), ", ".join(sorted({each[:12] for each in runs["revision"]}))
    rows = []
    for first, second in differences:
        found = difference(runs, first, second)
        resolved = "yes" if found["low"] > 0 or found["high"] < 0 else "no"
        rows.append(
            {
                "difference": f"{first} - {second}",
                "mean ± standard error": f"{found['mean']:+.2f} ± {found['standard_error']:.2f}",
                "95 % interval": f"{found['low']:+.2f} to {found['high']:+.2f}",
                "resolved": resolved,
                "higher in": f"{found['higher']:.0f} of {found['pairs']:.0f}",
            }
        )
    return "\n".join(
        [
            f"# {title}",
            "",
            f"Overall accuracy on the target after the last step, percent; {_range(counts)} runs each, "
            f"seeds {_range(runs['seed'])}, revision {revisions}.",
            "",
            table.round(1).to_markdown(floatfmt=".1f"),
            "",
            pd.DataFrame(rows).to_markdown(index=False),
            "",
            *([note, ""] if note else []),
            f"    {command}",
            "",
        ]
    )


def _range(numbers: pd.Series) -> str:
    least, most = numbers.min(), numbers.max()
    return f"{least}" if least == most else f"{least} to {most}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="suites, or CSV files of earlier ones")
    parser.add_argument("--differences", nargs="+", required=True, help='such as "gsda - mcc"')
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", default="", help="a paragraph below the tables")
    parser.add_argument("--output", type=Path, required=True, help="without an ending")
    options = parser.parse_args(arguments)
    runs = read_runs(options.folders)
    differences = [(first, second) for first, _, second in (each.partition(" - ") for each in options.differences)]
    quoted = " ".join(json.dumps(each) for each in options.differences)
    command = f"python -m benchmarks.paired {' '.join(map(str, options.folders))} --differences {quoted}"
    text = page(runs, differences, options.title, command, options.note)
    options.output.with_suffix(".md").write_text(text)
    runs.to_csv(options.output.with_suffix(".csv"), index=False, float_format="%.4f")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
