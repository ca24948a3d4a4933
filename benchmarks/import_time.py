"""CPU seconds of an import and of every command's --help, as a share of those of `import torch`, measured in turns.

Usage: python -m benchmarks.import_time [TURNS]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

COMMANDS = (
    *("train", "train digits", "evaluate", "predict", "export", "embed", "suite digits", "report", "data"),
    "data verify",
)


def cpu_seconds(arguments: list[str]) -> float:
    """Return the user and system time of a Python process with these arguments, which must end well."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(turns: int) -> None:
    cases = {"import torch": ["-c", "import torch"], "import gsda_fast.api": ["-c", "import gsda_fast.api"]}
    for command in COMMANDS:
        module, *rest = command.split()
        cases[f"{command} --help"] = ["-m", f"gsda_fast.{module}", *rest, "--help"]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(turns):
        for name, arguments in cases.items():
            seconds[name].append(cpu_seconds(arguments))
    torch = statistics.median(seconds["import torch"])
    print(f"{'':28}{'median s':>9}{'least':>8}{'most':>8}{'ratio':>8}")
    for name, measured in seconds.items():
        median = statistics.median(measured)
        print(f"{name:28}{median:9.2f}{min(measured):8.2f}{max(measured):8.2f}{median / torch:8.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
