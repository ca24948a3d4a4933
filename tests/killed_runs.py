"""Runs of a few steps that are killed at a chosen moment, each in a process of its own: see `Order`.

A moment is the n-th of what the child does to files in its run's folder (opening one for writing, each write to it, its
flush, its closing, fsync, rename, unlink, mkdir), or the end of one of its steps. At a write, the child leaves half of
the bytes behind.
"""

import builtins
import io
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from processes import start
from rich.console import Console

from gsda_fast.config import parse_config
from gsda_fast.errors import Stopped
from gsda_fast.train import train
from gsda_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Order:
    """One run.

    Attributes:
        arguments: of the command. output: the run's folder. kill_at: the moment, counted from 1; 0 lets it finish.
        log: a file for the names of the moments, a line each; none if empty.
    """

    arguments: list[str]
    output: str
    kill_at: int = 0
    log: str = ""


class Moments:
    """Counts what is done to the files of a folder, and kills this process at the chosen one."""

    def __init__(self, folder: str, kill_at: int, log: str) -> None:
        self.folder, self.kill_at, self.count = os.path.abspath(folder), kill_at, 0
        self.log = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND) if log else None
        self.here: dict[int, str] = {}

    def concerns(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        absolute = os.path.abspath(os.fspath(path))
        # TensorBoard writes in a thread of its own, at moments of its own.
        return absolute.startswith(self.folder) and "tensorboard" not in absolute

    def moment(self, name: str, last_words: Callable[[], Any] = lambda: None) -> None:
        self.count += 1
        if self.log is not None:
            os.write(self.log, f"{name}\n".encode())
        if self.count == self.kill_at:
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        original_open, original_fsync = io.open, os.fsync

        def watched_open(path: Any, mode: str = "r", *rest: Any, **kinds: Any) -> Any:
            if not self.concerns(path) or not set(mode) & set("wa+"):
                return original_open(path, mode, *rest, **kinds)
            name = os.path.basename(path)
            self.moment(f"open {name}")
            file = original_open(path, mode, *rest, **kinds)
            self.here[file.fileno()] = name
            return WatchedFile(file, name, self)

        def watched_fsync(descriptor: int) -> None:
            self.moment(f"fsync {self.here.get(descriptor, '')}")
            original_fsync(descriptor)

        io.open = watched_open  # type: ignore[assignment]
        builtins.open = watched_open  # type: ignore[assignment]
        os.fsync = watched_fsync
        for function in ("replace", "rename", "unlink", "mkdir", "truncate"):
            setattr(os, function, self.watched(function, getattr(os, function)))
        original_step = Trainer._train_step

        def watched_step(trainer: Trainer, step: int, batch: Any) -> Any:
            outcome = original_step(trainer, step, batch)
            self.moment(f"step {step + 1}")
            return outcome

        Trainer._train_step = watched_step  # type: ignore[method-assign]

    def watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **kinds: Any) -> Any:
            if self.concerns(path):
                self.moment(f"{name} {os.path.basename(path)}")
            return original(path, *rest, **kinds)

        return call


class WatchedFile:
    """A file whose writes are moments."""

    def __init__(self, file: Any, name: str, moments: Moments) -> None:
        self.file, self.name, self.moments = file, name, moments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        half = data[: len(data) // 2]
        self.moments.moment(f"write {self.name}", lambda: (self.file.write(half), self.file.flush()))
        return int(self.file.write(data))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.moments.moment(f"flush {self.name}")
        self.file.flush()

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.moments.moment(f"close {self.name}")
        self.file.close()


def child(order: Order) -> None:
    Moments(order.output, order.kill_at, order.log).watch()
    config = parse_config([*order.arguments, "--output", order.output], "train")
    try:
        train(config, Console(quiet=True))
    except Stopped:
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run(order: Order) -> int:
    """The exit code of the run's process, negative if a signal ended it."""
    process = start(child, order)
    process.join()
    assert process.exitcode is not None
    return process.exitcode
