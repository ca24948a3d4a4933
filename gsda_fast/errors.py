"""The exceptions that commands turn into a single line: a mistake of the user, a run that fails or was stopped."""

import unicodedata
from functools import partial
from typing import Any


def visible(text: str) -> str:
    """Return the text with escapes in place of what a terminal would obey or cannot show.

    Names of files and classes are anybody's. Control characters, line separators, marks that turn the direction of
    writing, and bytes that are no UTF-8 become ``\\x1b``, ``\\u2028`` and the like.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _in_one_line(text: str) -> str:
    return visible(" ".join(text.split()))


class UsageError(ValueError):
    """Something the user asked for that cannot be done, and how to mend it.

    Args:
        what: the option, argument or file at fault, by the name under which the user knows it (``--steps``).
        found: what was found there.
        expected: what would have been accepted.
        remedy: what to do about it; empty where `expected` already says so.

    Attributes:
        reported_elsewhere: another process of the run prints it, so that this one need not.
    """

    reported_elsewhere = False

    def __init__(self, what: str, *, found: str, expected: str, remedy: str = "") -> None:
        self.what, self.found, self.expected, self.remedy = what, found, expected, remedy
        # Names stand in the first two; in the others a line may have been broken for its length.
        line = f"{visible(what)}: found {visible(found)}; expected {_in_one_line(expected)}"
        super().__init__(f"{line}; {_in_one_line(remedy)}" if remedy else line)

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its positional arguments, and a worker's error must reach the parent process whole.
        return partial(type(self), found=self.found, expected=self.expected, remedy=self.remedy), (self.what,)


class FolderInUse(UsageError):
    """A folder that another process holds, and will let go of."""


class UsageWarning(UserWarning):
    """Something about the user's data or machine that stops nothing; commands print it in one line."""


class FileWarning(UsageWarning):
    """One about a file that this process alone has met, so that whichever process it is prints it."""


class TrainingError(RuntimeError):
    """A run that cannot go on, for a reason that lies in its numbers or its processes: one line, exit code 1.

    Attributes:
        reported_elsewhere: another process of the run prints it, so that this one need not.
    """

    reported_elsewhere = False


class Stopped(BaseException):
    """A run that was asked to stop and has done so in good order: one line on standard output, exit code 0.

    No `Exception`, like `KeyboardInterrupt`, so that nothing on its way takes it for a failure to deal with.

    Attributes:
        reported_elsewhere: another process of the run prints it, so that this one need not.
    """

    reported_elsewhere = False
