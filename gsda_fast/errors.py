"""The exceptions that commands turn into a single line: a mistake of the user, a run that fails or was stopped."""

from functools import partial
from typing import Any


class UsageError(ValueError):
    """Something the user asked for that cannot be done, and how to mend it.

    Args:
        what: the option, argument or file at fault, by the name under which the user knows it (``--steps``).
        found: what was found there.
        expected: what would have been accepted.
        remedy: what to do about it; empty where `expected` already says so.

    Attributes:
        told: another process of the run tells the user, so that this one need not.
    """

    told = False

    def __init__(self, what: str, *, found: str, expected: str, remedy: str = "") -> None:
        self.what, self.found, self.expected, self.remedy = what, found, expected, remedy
        line = f"{what}: found {found}; expected {expected}"
        super().__init__(f"{line}; {remedy}" if remedy else line)

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its positional arguments, and a worker's error must reach the parent process whole.
        return partial(UsageError, found=self.found, expected=self.expected, remedy=self.remedy), (self.what,)


class UsageWarning(UserWarning):
    """Something about the user's data or machine that stops nothing; commands tell of it in one line."""


class TrainingError(RuntimeError):
    """A run that cannot go on, for a reason that lies in its numbers or its processes: one line, exit code 1.

    Attributes:
        told: another process of the run tells the user, so that this one need not.
    """

    told = False


class Stopped(BaseException):
    """A run that was asked to stop and has done so in good order: one line on standard output, exit code 0.

    No `Exception`, like `KeyboardInterrupt`, so that nothing on its way takes it for a failure to deal with.

    Attributes:
        told: another process of the run tells the user, so that this one need not.
    """

    told = False
