"""Checkpoints that a kill at any moment leaves usable: written aside, flushed, renamed, and verified when read."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import stat
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gsda_fast.files import atomic_file

_MAGIC = b"gsda-sha256:"
_TRAILER_LENGTH = len(_MAGIC) + hashlib.sha256().digest_size


Check = Callable[[dict[str, Any]], str]
"""What is wrong with the content of a checkpoint; nothing where it can be gone on with."""


class DamagedCheckpoint(Exception):
    """A checkpoint whose bytes cannot be read, are not those that were written, or hold something else."""


def no_check(state: dict[str, Any]) -> str:
    """Take any content."""
    return ""


def network_problem(state: dict[str, Any]) -> str:
    """Return what is wrong with the part of a checkpoint from which a network is made."""
    step, classes, method = (state.get(name) for name in ("step", "classes", "method"))
    if type(step) is not int or step < 0:
        return "no step"
    if not isinstance(classes, list) or not classes or not all(type(name) is str for name in classes):
        return "no names of classes"
    if not isinstance(method, dict) or not method or not all(type(name) is str for name in method):
        return "no parameters"
    for name, tensor in method.items():
        if not _is_plain_tensor(tensor):
            return f"'{name[:100]}', which is no tensor of numbers"
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"numbers in '{name[:100]}' that are not finite"
    return ""


def training_problem(state: dict[str, Any]) -> str:
    """Return what is wrong with a checkpoint that a training is to go on from."""
    problem = network_problem(state)
    if problem:
        return problem
    missing = sorted(set(_KINDS) - set(state))
    if missing:
        return f"no {missing[0]}"
    for name, kinds in _KINDS.items():
        if not isinstance(state[name], kinds) or isinstance(state[name], bool):
            return f"{name} of the kind {type(state[name]).__name__}"
    if not all(type(state[name]) is int or math.isfinite(state[name]) for name in ("training_seconds", "seconds")):
        return "times that are no numbers"
    table = state["target_table"]
    if table is not None and not (_is_plain_tensor(table) and table.dtype == torch.int64 and table.dim() == 1):
        return "pseudo-labels that are none"
    if not all(isinstance(each, dict) for each in state["ranks"]):
        return "no states of processes"
    files = state.get("unreadable_files", {})
    if not isinstance(files, dict) or not all(type(each) is str for pair in files.items() for each in pair):
        return "files that failed which are none"
    return ""


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("optimizers", "scaler", "history", "identity", "versions"), dict),
    "target_table": (Tensor, type(None)),
    "pending": (dict, type(None)),
    "ranks": list,
    "images_seen": int,
    **dict.fromkeys(("training_seconds", "seconds"), (int, float)),
}


def _is_plain_tensor(value: Any) -> bool:
    """Return whether it is a tensor that has the memory which its shape says: one number can pose as a billion."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


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
        """Return the steps of the checkpoints on disk, oldest first."""
        return sorted(int(file.stem.removeprefix("step-")) for file in self._written("pt"))

    def file(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `state` (tensors, numbers, strings, lists and dicts) as the checkpoint of `step`.

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
        """Return the files that a run has written. Others, such as ``step-00000800 (copy).pt``, are somebody else's."""
        name = re.compile(rf"step-([0-9]{{8}}|[1-9][0-9]{{8,}})\.({'|'.join(suffixes)})")
        return [file for file in self.path.glob("step-*") if name.fullmatch(file.name)]

    def _half_written(self) -> list[Path]:
        """Return what a kill has left of `atomic_file`."""
        name = re.compile(r"\.step-[0-9]{8,}\.pt\.tmp")
        return [file for file in self.path.glob(".step-*") if name.fullmatch(file.name)]

    def _drop_old(self) -> None:
        for old in self.steps()[: -self.keep]:
            self.file(old).unlink()

    def load(self, step: int, device: torch.device | str = "cpu", check: Check = no_check) -> dict[str, Any]:
        """Return the state saved at `step`.

        Raises:
            DamagedCheckpoint: see `read_checkpoint`; or the file of another step under this one's name.
        """
        state = read_checkpoint(self.file(step), device, check)
        if state.get("step", step) != step:
            raise DamagedCheckpoint(f"{self.file(step)}: it holds step {str(state['step'])[:20]}")
        return state

    def load_newest(
        self, device: torch.device | str = "cpu", check: Check = no_check
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the newest sound checkpoint's state, or None, and a line for each damaged one that was passed over."""
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step, device, check), damage
            except DamagedCheckpoint as error:
                damage.append(str(error))
        return None, damage

    def tidy(self, newest: int | None) -> None:
        """Remove what a kill has left half written or not removed yet, and set damaged checkpoints aside.

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
        """Remove all checkpoints, those half written or set aside too. Other files stay, and so does the folder."""
        for file in [*self._written("pt", "damaged"), *self._half_written()]:
            file.unlink()


def read_checkpoint(file: Path, device: torch.device | str = "cpu", check: Check = no_check) -> dict[str, Any]:
    """Return the state that a file holds. No code in it runs, whoever wrote it.

    Args:
        check: of the content, before anything is done with it.

    Raises:
        DamagedCheckpoint: it cannot be read, its bytes are truncated or altered, which `torch.load` alone would not
            notice, or its content is not a checkpoint's.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DamagedCheckpoint(f"{file}: no regular file")
        content = memoryview(file.read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from error
    payload, trailer = content[:-_TRAILER_LENGTH], content[-_TRAILER_LENGTH:]
    if trailer != _MAGIC + hashlib.sha256(payload).digest():
        raise DamagedCheckpoint(f"{file}: its content does not match its digest")
    try:
        _require_stored(payload)
        state = torch.load(BytesIO(payload), map_location=device, weights_only=True)
        problem = check(state) if isinstance(state, dict) else f"{type(state).__name__}, no table"
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint(f"{file}: no checkpoint (it holds more than tensors and plain values)") from error
    except Exception as error:  # bytes that are no archive, or none of PyTorch's, can end in any of them
        reason = str(error).partition("\n")[0][:200]
        raise DamagedCheckpoint(f"{file}: no checkpoint ({type(error).__name__}: {reason})") from error
    if problem:
        raise DamagedCheckpoint(f"{file}: no checkpoint ({problem})")
    checked: dict[str, Any] = state
    return checked


def _require_stored(payload: memoryview) -> None:
    """Refuse an archive whose members are packed: `torch.save` packs none, and a small one could unpack to anything."""
    with zipfile.ZipFile(BytesIO(payload)) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed")
    if sum(member.file_size for member in members) > len(payload):
        raise ValueError("its members are larger than it is")


class _HashingWriter:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self._error: OSError | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Write a state.

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
