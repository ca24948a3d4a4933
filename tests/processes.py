"""Processes for tests, forked off a server that has imported everything once: an import takes longer than most tests.

The server has one thread and no state of the tests, so that a process of it begins as a new one does. It has the
environment of its first use. What is about the start of a process itself, or about torchrun, starts real ones.
"""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = (
    *("pytest", "rich.console", "torchvision", "torch.distributed", "torch.utils.tensorboard"),
    *("gsda_fast.train", "gsda_fast.evaluate", "gsda_fast.export", "gsda_fast.suite"),
)
_CONTEXT.set_forkserver_preload(list(_IMPORTED))


class Ended(NamedTuple):
    """How a command ended: its exit code (negative: a signal), and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """`python -m MODULE ARGUMENTS`, in a process of its own from now on.

    Args:
        folder: for what it writes. module: its name. arguments: of the command line. environment: added to the
            server's. before: called in the process before the command; it can be pickled.
    """

    def __init__(
        self,
        folder: Path,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._written = folder / "stdout", folder / "stderr"
        self.process = start(_command, module, list(arguments), dict(environment or {}), self._written, before)

    def wait(self, timeout: float = 600) -> Ended:
        """Wait for its end, and return how it came to that."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"no end within {timeout} s"
        return Ended(self.process.exitcode, *(path.read_text() for path in self._written))


def start(work: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """Start `work(*arguments)` in a process of its own, with one computing thread."""
    process = _CONTEXT.Process(target=_alone, args=(work, arguments))
    process.start()
    return process


def run_ranks(work: Callable[..., object], arguments: tuple[Any, ...], nprocs: int) -> None:
    """Run `work(rank, *arguments)` in `nprocs` processes at once, as `torch.multiprocessing.start_processes` does."""
    processes = [start(work, rank, *arguments) for rank in range(nprocs)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * nprocs


def _alone(work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    work(*arguments)


def _command(
    module: str,
    arguments: list[str],
    environment: Mapping[str, str],
    written: tuple[Path, Path],
    before: Callable[[], None] | None,
) -> None:
    from gsda_fast.commands import run_command

    for descriptor, path in zip((1, 2), written):
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.environ |= environment
    sys.argv = [module, *arguments]
    if before is not None:
        before()
    run_command(importlib.import_module(module).main)
