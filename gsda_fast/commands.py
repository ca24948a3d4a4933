"""What every command shares: how it parses its options and how it ends when the user made a mistake."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import tyro

from gsda_fast.errors import FileWarning, Stopped, TrainingError, UsageError, UsageWarning, visible
from gsda_fast.version import VERSION

T = TypeVar("T")

_OPTIONAL = tyro.constructors.ConstructorRegistry()
_PLACEHOLDERS = {Path: "PATH", str: "STR", int: "INT"}

UNSAID = tyro.conf.arg(
    help_behavior_hint=lambda default: f"(default: {default})" if default not in ("None", "") else ""
)
"""For an option whose help says what happens without it: `(default: None)` behind that says less."""


@_OPTIONAL.primitive_rule
def _optional(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Show what an option takes that may also be left out as `PATH`; tyro's own form is `{None}|PATH`."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if NoneType not in get_args(info.type) or len(kinds) != 1:
        return None
    if get_origin(kinds[0]) is Literal:
        return _optional_choice(get_args(kinds[0]))
    if kinds[0] not in _PLACEHOLDERS:
        return None
    kind: Any = kinds[0]
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=_PLACEHOLDERS[kind],
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


def _optional_choice(choices: tuple[Any, ...]) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    words = {str(choice): choice for choice in choices}
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(words)}}}",
        instance_from_str=lambda given: words[given[0]],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=tuple(words),
    )


_FAILING_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_NOT_TO_BE_USED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENXIO, errno.ENOTEMPTY, errno.ETXTBSY),
)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and end the process with its exit code.

    A `UsageError` becomes one line on standard error and exit code 2, a `TrainingError` one line and exit code 1, a
    `Stopped` one line on standard output and exit code 0; an interrupt from the keyboard one line (with what the
    `KeyboardInterrupt` says, if anything) and exit code 130, as in a shell; standard output that nobody reads any more
    (`| head`) ends the command quietly, with a shell's 141. A file or folder that cannot be used, wherever it is met,
    is reported as a `UsageError` is, a disk that is full or fails as a `TrainingError`. Any other exception is a defect
    and keeps its traceback. A `UsageWarning` is one line on standard error, from the first of the processes that
    torchrun started; a `FileWarning` from any of them. What standard output cannot show, it shows as escapes.

    With `--version` among the arguments the version is printed, and nothing else is done.

    Args:
        main: the command; returns its exit code, None for 0.
    """
    show_warnings_as_lines()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _refuse_empty_options(sys.argv[1:])
        if "--version" in sys.argv[1:]:
            print(f"gsda-fast {VERSION}")
            code = None
        else:
            code = main()
        sys.stdout.flush()
    except (UsageError, TrainingError) as error:
        if not error.reported_elsewhere:
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
            refused = UsageError(str(error.filename), found=f"{error.strerror}", expected=expected)
            print(f"error: {_one_line(str(refused))}", file=sys.stderr)
            code = 2
        else:
            raise
    except Stopped as stopped:
        # All is saved. A signal that comes while the interpreter goes down must not make a failure of that.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if not stopped.reported_elsewhere:
            print(stopped, flush=True)
        code = 0
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def show_warnings_as_lines() -> None:
    """Show every `UsageWarning` of this process as `run_command` does."""
    warnings.showwarning = partial(_show_warning, warnings.showwarning)


def _show_warning(
    show: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any, **more: Any
) -> None:
    if not issubclass(category, UsageWarning):
        show(message, category, *place, **more)
    elif os.environ.get("RANK", "0") == "0" or issubclass(category, FileWarning):
        print(f"warning: {_one_line(str(message))}", file=sys.stderr)


@contextmanager
def reported_by_first_process() -> Iterator[None]:
    """Let the first process report what goes wrong in this block, which goes wrong alike in all that torchrun started.

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
        error.reported_elsewhere = True
        raise


def program(command: str) -> str:
    """Return how a command is called, for its help: as the user has called this process."""
    return f"gsda {command}" if sys.argv[0].startswith("gsda ") else f"python -m gsda_fast.{command}"


def parse_command_line(parse: Callable[[], T]) -> T:
    """Parse the options with tyro, which names a mistaken one and the one that is nearest to it.

    Args:
        parse: calls `tyro.cli`.

    Raises:
        UsageError: from the `__post_init__` of an options class.
        SystemExit: code 2 after any other mistake in the options, 0 after `--help`.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written), _OPTIONAL:
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
        sys.stderr.write(written.getvalue())
        raise SystemExit(2) from None
    sys.stderr.write(written.getvalue())
    return options


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
