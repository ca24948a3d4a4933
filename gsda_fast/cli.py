"""`gsda COMMAND`: all commands under one name. `python -m gsda_fast.COMMAND` is the same."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from gsda_fast.commands import run_command
from gsda_fast.errors import UsageError

COMMANDS = {
    "train": "train a method on a transfer task, into a run's folder",
    "evaluate": "accuracy of a run's checkpoint on the target",
    "predict": "class probabilities of images or features, as CSV",
    "export": "the network of a run in files that load without this project",
    "report": "one page of plots and tables for a run, for several, or for a suite",
    "suite": "every transfer task, method and seed; a table beside the paper's",
    "embed": "features of a frozen backbone for every image, once",
    "data": "verify, pack or build a data set",
}
"""What each does, in the order of use."""


def main() -> None:
    """Run the command that the first argument names, and end the process."""
    command, arguments = sys.argv[1] if sys.argv[1:] else "", sys.argv[2:]
    if command in COMMANDS:
        sys.argv = [f"gsda {command}", *arguments]
        module: Any = importlib.import_module(f"gsda_fast.{'data.__main__' if command == 'data' else command}")
        run: Callable[[], int | None] = module.main
        run_command(run)
    run_command(lambda: _without_command(command))


def _without_command(argument: str) -> None:
    """Say what there is.

    Raises:
        UsageError: something else was asked for.
    """
    if argument not in ("", "-h", "--help"):
        raise UsageError("gsda", found=f"'{argument}'", expected=f"a command: {', '.join(COMMANDS)}")
    print("usage: gsda COMMAND ...\n")
    for name, does in COMMANDS.items():
        print(f"  {name:10}{does}")
    print("\ngsda COMMAND --help lists the options; gsda --version says which version this is")


if __name__ == "__main__":
    main()
