"""Stopping in good order: SIGTERM and SIGINT become a wish that the training loop looks at."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from gsda_fast.errors import Stopped

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

SAME_REQUEST = 1.0
"""Seconds within which further signals say what the first has said: Slurm signals torchrun's workers, and so does
torchrun, which it signals as well."""


class StopRequest:
    """Whether this process has been asked to stop; the first signal asks, one that comes later ends it at once."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._interruptible = False
        self._handlers: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked_at is not None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals for the length of the block, in the main thread, the only one that Python gives them to.

        Signals that are ignored, as in the background of a shell, stay so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        # None: a handler that was not set from Python and could not be put back.
        self._handlers = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}
        for number in self._handlers:
            signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def interruptible(self, make: Callable[[], T]) -> Callable[[], T]:
        """Return `make`, which the first signal ends wherever it is: for work that leaves nothing behind.

        Raises:
            Stopped: by the call, asked before or during it.
        """

        def made() -> T:
            self._interruptible = True
            try:
                if self():
                    raise Stopped
                return make()
            finally:
                self._interruptible = False

        return made

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if self._interruptible:
                raise Stopped
        elif now - self._asked_at >= SAME_REQUEST:
            # As if nobody had listened: a KeyboardInterrupt, or the end.
            signal.signal(number, self._handlers[number])
            os.kill(os.getpid(), number)
