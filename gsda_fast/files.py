"""Writing files so that a kill, a full disk or a loss of power leaves the old content or the new, whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` when the block ends well, and leaves no trace when it does not.

    It is on the disk before it is renamed, so that after a kill or a loss of power `path` holds all of the old content
    or all of the new. A kill can leave the temporary file behind; its name is fixed, so the next write takes it over.

    Args:
        path: the file, in a folder that exists.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename in a folder durable: without it a power cut can bring the old name back.

    Raises:
        OSError: the folder cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
