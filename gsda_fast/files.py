"""Files and folders that others may write, too: whole or not at all, held while in use, named without tricks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gsda_fast.errors import FolderInUse, TrainingError, UsageError, UsageWarning

_CANNOT_BE_MENDED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ESTALE)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS)


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
        with new_file(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def new_file(path: Path) -> IO[bytes]:
    """Open a file that was not there, in place of any that was: through a link, somebody else's would be overwritten.

    Raises:
        OSError: it cannot be made.
    """
    try:
        return path.open("x+b")
    except FileExistsError:
        path.unlink()
        return path.open("x+b")


def write_at(descriptor: int, data: memoryview, place: int) -> None:
    """Write bytes at a place of an open file, all of them.

    Raises:
        OSError: they cannot be written.
    """
    data = data.cast("B")
    while len(data):
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


@contextmanager
def naming_what_cannot_be_written(folder: Path, option: str = "--output") -> Iterator[None]:
    """Report in one line a folder without permission or on a disk that is full.

    Args:
        folder: what is written. option: by which the user named it.

    Raises:
        UsageError, TrainingError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason, place = error.strerror or str(error), error.filename or folder
        if error.errno in _CANNOT_BE_MENDED:
            message = f"{place} cannot be written ({reason}); free some space, then the same command goes on from there"
            raise TrainingError(message) from error
        found = f"{folder} ({reason})"
        raise UsageError(option, found=found, expected="a folder that can be made and written") from error


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


class FolderLock:
    """Keeps every other process from holding a folder, until `release` or this process's end.

    The kernel lets go of it when the process dies, however that happens: the lock file that stays says nothing.

    Args:
        folder: exists. option: by which the user named it, for messages.

    Attributes:
        held: False where the file system has no locks; a `UsageWarning` has said so.

    Raises:
        FolderInUse: another process holds the folder. UsageError: it cannot be held, since the lock file is another
            user's and cannot be opened, for one.
    """

    def __init__(self, folder: Path, option: str = "--output") -> None:
        self.file = folder / ".lock"
        self._descriptor: int | None = None
        try:
            self._descriptor, writable = self._open()
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if error.errno in _NO_LOCKS:
                message = f"{folder} cannot be locked ({error.strerror}): make sure that no other process writes there"
                warnings.warn(message, UsageWarning, stacklevel=3)
                return
            kind: type[UsageError] = UsageError
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                kind, found = FolderInUse, f"{folder}, in use by {self._holder()}"
            elif error.errno in (errno.EACCES, errno.EPERM, errno.EBADF) and os.path.lexists(self.file):
                whose = f"{self.file.name} in it is theirs ({error.strerror})"
                found = f"{folder}, which another user may be using: {whose}"
            else:
                found = f"{folder}, which cannot be held ({error.strerror})"
            raise kind(
                option,
                found=found,
                expected="a folder that no other process writes into",
                remedy=f"wait for it or end it, or give another {option}",
            ) from None
        if writable:
            with contextlib.suppress(OSError):  # a full disk, which is no reason to refuse
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        """Let other processes hold the folder again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _open(self) -> tuple[int, bool]:
        """Return the lock file, and whether it can be written: another user's is locked by reading it, all the same."""
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            # For everybody whom the folder's owner lets in, as far as the umask does.
            return os.open(self.file, os.O_RDWR | os.O_CREAT | flags, 0o666), True
        except PermissionError:
            return os.open(self.file, os.O_RDONLY | flags), False

    def _holder(self) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self.file.read_bytes()[:200].decode().strip() or "another process"
        return "another process"


def is_plain_name(name: object) -> bool:
    """Return whether a text that was read from a file names an entry of a folder, and of no other folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def is_path_below(path: object) -> bool:
    """Return whether a text that was read from a file names a file below a folder, by plain names alone."""
    return isinstance(path, str) and all(map(is_plain_name, path.split("/")))


def file_state(path: str | Path) -> str:
    """Return size and time of a file in a word, by which a later look tells whether it changed; "gone" without it."""
    try:
        status = os.stat(path)
    except OSError:
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"
