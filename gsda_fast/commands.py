"""What every command shares: how it parses its options and how it ends when the user made a mistake."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.text import Text

from gsda_fast.errors import FileWarning, Stopped, TrainingError, UsageError, UsageWarning, visible

T = TypeVar("T")

_ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# tyro frames a message with these where standard output is UTF-8; elsewhere it writes a title, a rule and the message.
_BORDER = re.compile(r"[╭╰].*")
_SIDES = re.compile(r"^│|│$")
_RULE = re.compile(r"[─-]{3,}")


_FAILING_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_NOT_TO_BE_USED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENXIO, errno.ENOTEMPTY, errno.ETXTBSY),
)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and ends the process with its exit code.

    A `UsageError` becomes one line on standard error and exit code 2, a `TrainingError` one line and exit code 1, a
    `Stopped` one line on standard output and exit code 0; an interrupt from the keyboard one line (with what the
    `KeyboardInterrupt` says, if anything) and exit code 130, as in a shell; standard output that nobody reads any more
    (`| head`) ends the command quietly, with a shell's 141. A file or folder that cannot be used, wherever it is met,
    is told as a `UsageError` is, and a disk that is full or fails as a `TrainingError`. Any other exception is a defect
    and keeps its traceback. A `UsageWarning` is one line on standard error, from the first of the processes that
    torchrun started; a `FileWarning` from any of them. What standard output cannot show, it shows as escapes.

    Args:
        main: the command; returns its exit code, None for 0.
    """
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _refuse_empty_options(sys.argv[1:])
        code = main()
        sys.stdout.flush()
    except (UsageError, TrainingError) as error:
        if not error.told:
            print(f"error: {_one_line(str(error))}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        # The reader, `| head` for one, has seen enough; the interpreter would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno in _FAILING_DISK:
            place = "the disk" if error.filename is None else str(error.filename)
            print(f"error: {_one_line(f'{place}: {error.strerror}; free some space or see to it')}", file=sys.stderr)
            code = 1
        elif error.filename is not None and error.errno in _NOT_TO_BE_USED:
            expected = "permission to use it" if isinstance(error, PermissionError) else "a file or folder to use"
            told = UsageError(str(error.filename), found=f"{error.strerror}", expected=expected)
            print(f"error: {_one_line(str(told))}", file=sys.stderr)
            code = 2
        else:
            raise
    except Stopped as stopped:
        # All is saved. A signal that comes while the interpreter goes down must not make a failure of that.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if not stopped.told:
            print(stopped, flush=True)
        code = 0
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        code = 130
    sys.exit(code or 0)


class VisibleConsole(Console):
    """A console for text in which names of files and classes occur: what a terminal would obey is shown as escapes."""

    def render_str(self, text: str, **more: Any) -> Text:
        """Render a string: every one that is printed, a table's cells among them, comes by here."""
        return super().render_str("\n".join(map(visible, text.split("\n"))), **more)

    def on_broken_pipe(self) -> None:
        """Leave it to `run_command`: by itself rich would end the process, with another code."""
        raise BrokenPipeError


def plain_console(stderr: bool = False) -> Console:
    """Prints names as they are: rich would take the `[raw]` of a path for a style and its `:key:` for an emoji."""
    return VisibleConsole(markup=False, emoji=False, stderr=stderr)


def spreadsheet_text(name: str) -> str:
    """A name for a table: control characters as escapes, and an apostrophe before what would be taken for a formula."""
    shown = visible(name)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def echo(text: str) -> None:
    """Print a line on standard output in which names of files and classes may occur."""
    print(visible(text))


def _show_warning(
    show: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any, **more: Any
) -> None:
    if not issubclass(category, UsageWarning):
        show(message, category, *place, **more)
    elif os.environ.get("RANK", "0") == "0" or issubclass(category, FileWarning):
        print(f"warning: {_one_line(str(message))}", file=sys.stderr)


@contextmanager
def told_by_first_process() -> Iterator[None]:
    """What goes wrong in this block goes wrong alike in every process that torchrun started: the first one tells of it.

    Raises:
        UsageError, SystemExit: as raised in the block.
    """
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    except UsageError as error:
        error.told = True
        raise


def parse_command_line(parse: Callable[[], T]) -> T:
    """Parses the options with tyro, whose boxes of several lines become one line.

    Args:
        parse: calls `tyro.cli`.

    Raises:
        UsageError: from the `__post_init__` of an options class.
        SystemExit: code 2 after any other mistake in the options, 0 after `--help`.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            options = parse()
    except SystemExit as end:
        if end.code in (0, None):
            raise
        # tyro wraps a ValueError of a dataclass's own checks; a UsageError says it better.
        cause: BaseException | None = end
        while cause is not None:
            if isinstance(cause, UsageError):
                raise cause from None
            cause = cause.__context__
        print(f"error: {_box_message(written.getvalue())}; see --help", file=sys.stderr)
        raise SystemExit(2) from None
    sys.stderr.write(written.getvalue())
    return options


def _box_message(box: str) -> str:
    """The message in tyro's box: from below its title to the next rule, after which comes the option's help."""
    lines = [_SIDES.sub("", line).strip() for line in _ANSI_COLOUR.sub("", box).splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if _BORDER.fullmatch(line) or _RULE.fullmatch(line):
            parts.append([])
        else:
            parts[-1].append(line)
    # What stands before the first border or rule is the title, or nothing.
    message = _one_line(" ".join(parts[min(1, len(parts) - 1)]))
    return message.rstrip(".")


def _refuse_empty_options(arguments: list[str]) -> None:
    """An empty path is the current folder to Python: never what a script with an unset variable meant.

    Raises:
        UsageError: an option with nothing as its value.
    """
    for option, value in pairwise(arguments):
        if option.startswith("--") and not value:
            raise UsageError(option, found="an empty text", expected="a value")
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and equals and not value:
            raise UsageError(option, found="an empty text", expected="a value")


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))
