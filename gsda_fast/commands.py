"""What every command shares: how it parses its options and how it ends when the user made a mistake."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from gsda_fast.errors import UsageError

T = TypeVar("T")

_ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# tyro draws its boxes with these where standard output is UTF-8, and with ASCII elsewhere.
_BORDER = re.compile(r"^[╭+][─-]|^[╰+][─-]")
_SIDE = re.compile(r"^[│|] ?| ?[│|]$")
_RULE = re.compile(r"^[─-]{3,}$")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and ends the process with its exit code.

    A `UsageError` becomes one line on standard error and exit code 2; an interrupt from the keyboard exit code 130, as
    in a shell. Any other exception is a defect and keeps its traceback.

    Args:
        main: the command; returns its exit code, None for 0.
    """
    try:
        code = main()
    except UsageError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)


def parse_command_line(parse: Callable[[], T]) -> T:
    """Parses the options with tyro, whose boxes of several lines become one line.

    Args:
        parse: calls `tyro.cli`.

    Raises:
        SystemExit: code 2 after a mistake in the options, 0 after `--help`.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            options = parse()
    except SystemExit as end:
        if end.code in (0, None):
            raise
        print(f"error: {_box_message(written.getvalue())}; see --help", file=sys.stderr)
        raise SystemExit(2) from None
    sys.stderr.write(written.getvalue())
    return options


def _box_message(box: str) -> str:
    """The text of tyro's box up to its first horizontal rule: what follows is the help of the option."""
    message: list[str] = []
    for line in _ANSI_COLOUR.sub("", box).splitlines():
        if _BORDER.match(line):
            continue
        text = _SIDE.sub("", line).strip()
        if _RULE.match(text):
            break
        message.append(text)
    return _one_line(" ".join(message)).rstrip(".")


def _one_line(text: str) -> str:
    return " ".join(text.split())
