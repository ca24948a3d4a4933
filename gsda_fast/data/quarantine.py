"""The list of files that are to be left out: full paths, one a line.

A path with a control character, a line separator or a blank at either end stands in quotes as a JSON text, so that a
line is a file whatever its name holds.
"""

import json
from pathlib import Path

from gsda_fast.errors import UsageError

_WRITTEN_BY = "a list that `data verify --quarantine` wrote"


def list_line(path: str) -> bytes:
    """Return the line of a full path, which begins with a slash, so that a line in quotes differs from others."""
    plain = path.isprintable() and path == path.strip()
    return (path if plain else json.dumps(path)).encode(errors="surrogateescape") + b"\n"


def read_list(listed: Path) -> list[str]:
    """Return the paths of a list.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        content = listed.read_bytes().decode()
    except FileNotFoundError as error:
        found, remedy = f"{listed} ({error.strerror})", "leave the option out: where no file is bad, none is written"
        raise UsageError("--quarantine", found=found, expected=_WRITTEN_BY, remedy=remedy) from error
    except OSError as error:
        raise UsageError("--quarantine", found=f"{listed} ({error.strerror})", expected=_WRITTEN_BY) from error
    except UnicodeDecodeError as error:
        raise UsageError("--quarantine", found=f"{listed} ({error})", expected=_WRITTEN_BY) from error
    paths = []
    for number, line in enumerate(content.split("\n"), start=1):
        text: object = line.strip(" \t\r")
        if isinstance(text, str) and text.startswith('"'):
            try:
                text = json.loads(text)
            except (ValueError, RecursionError):
                text = None
        if not isinstance(text, str) or "\0" in text:
            found = f"{line[:60]!r} in line {number} of {listed}"
            raise UsageError("--quarantine", found=found, expected=f"a path; {_WRITTEN_BY}")
        if text:
            paths.append(text)
    return paths
