"""Checkpoints that a kill at any moment leaves usable: written aside, flushed, renamed, and verified when read."""

from __future__ import annotations

import hashlib
import re
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch

from gsda_fast.files import atomic_file

_MAGIC = b"gsda-sha256:"
_TRAILER_LENGTH = len(_MAGIC) + hashlib.sha256().digest_size


class DamagedCheckpoint(Exception):
    """A checkpoint whose bytes cannot be read or are not those that were written."""


class CheckpointFolder:
    """The newest checkpoints of a run, ``step-00000800.pt``; older ones are deleted once a newer one is safe.

    Args:
        path: the folder, made when the first checkpoint is saved. keep: how many to keep, at least 2.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep: found {keep}; expected at least 2, so that one is good while another is written")
        self.path, self.keep = path, keep

    def steps(self) -> list[int]:
        """The steps of the checkpoints on disk, oldest first."""
        return sorted(int(file.stem.removeprefix("step-")) for file in self._written("pt"))

    def file(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes `state` (tensors, numbers, strings, lists and dicts) as the checkpoint of `step`.

        Raises:
            OSError: it cannot be written, for lack of space for one; the checkpoints before it are as they were.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file(step)) as file:
            digest = _HashingWriter(file)
            digest.save(state)
            file.write(_MAGIC + digest.sha256.digest())
        self._drop_old()

    def _written(self, *suffixes: str) -> list[Path]:
        """The files that a run has written. Others, such as ``step-00000800 (copy).pt``, are somebody else's."""
        name = re.compile(rf"step-([0-9]{{8}}|[1-9][0-9]{{8,}})\.({'|'.join(suffixes)})")
        return [file for file in self.path.glob("step-*") if name.fullmatch(file.name)]

    def _half_written(self) -> list[Path]:
        """What a kill has left of `atomic_file`."""
        name = re.compile(r"\.step-[0-9]{8,}\.pt\.tmp")
        return [file for file in self.path.glob(".step-*") if name.fullmatch(file.name)]

    def _drop_old(self) -> None:
        for old in self.steps()[: -self.keep]:
            self.file(old).unlink()

    def load(self, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The state saved at `step`.

        Raises:
            DamagedCheckpoint: truncated or altered bytes, which `torch.load` alone would not notice.
        """
        return read_checkpoint(self.file(step), device)

    def load_newest(self, device: torch.device | str = "cpu") -> tuple[dict[str, Any] | None, list[str]]:
        """The newest sound checkpoint's state, or None, and a line for each damaged one that was passed over."""
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step, device), damage
            except DamagedCheckpoint as error:
                damage.append(str(error))
        return None, damage

    def tidy(self, newest: int | None) -> None:
        """Removes what a kill has left half written or not removed yet, and sets damaged checkpoints aside.

        Under their names they would count among those that are kept, in the place of sound ones.

        Args:
            newest: the newest sound checkpoint; those after it are damaged, or all of them if there is none.
        """
        for file in self._half_written():
            file.unlink()
        for step in self.steps():
            if newest is None or step > newest:
                self.file(step).replace(self.file(step).with_suffix(".damaged"))
        self._drop_old()

    def clear(self) -> None:
        """Removes all checkpoints, those half written or set aside too. Other files stay, and so does the folder."""
        for file in [*self._written("pt", "damaged"), *self._half_written()]:
            file.unlink()


def read_checkpoint(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that a file holds.

    Raises:
        DamagedCheckpoint: it cannot be read, or its bytes are truncated or altered, which `torch.load` alone would not
            notice.
    """
    try:
        content = memoryview(file.read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from error
    payload, trailer = content[:-_TRAILER_LENGTH], content[-_TRAILER_LENGTH:]
    if trailer != _MAGIC + hashlib.sha256(payload).digest():
        raise DamagedCheckpoint(f"{file}: its content does not match its digest")
    state: dict[str, Any] = torch.load(BytesIO(payload), map_location=device, weights_only=True)
    return state


class _HashingWriter:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self._error: OSError | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Writes a state.

        Raises:
            OSError: the file cannot be written. `torch.save` makes it an error of its own, without the reason.
        """
        try:
            torch.save(state, self)  # type: ignore[arg-type]
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        self.file.flush()
