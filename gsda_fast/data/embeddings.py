"""Embeddings on disk: those that `python -m gsda_fast.embed` writes, and those that were made elsewhere.

::

    DOMAIN.npy      (V, n, D) float32, row-major: view 0 of every image is its centre, the others are augmented
    DOMAIN.json     {"format", "digest", "names", "labels", "classes"}, written last: without it the rows are not whole

Made elsewhere: an ``.npz`` file with `features`, (n, D) or (V, n, D), and perhaps `labels`, (n,) whole numbers or
texts; or an ``.npy`` file with features alone. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from gsda_fast.commands import program
from gsda_fast.data.packed_images import file_digest
from gsda_fast.errors import UsageError
from gsda_fast.files import atomic_file

FORMAT = 1
SUFFIXES = (".npz", ".npy")
UNLABELLED = -1
"""Label of a row whose class is not known."""

_READ_BYTES = 2**30  # larger files stay on the disk, mapped, and share the memory of all processes
_CHECKED_ROWS = 8192  # at once, for numbers that are not finite


@dataclass(frozen=True, eq=False)
class Rows:
    """Features of a domain, or of some of its samples.

    Attributes:
        values: (V, m, D) floating point, as stored: V views of m rows, in memory or mapped.
        index: (n,) int64: the row of each sample.
        digest: SHA-256 of the file, hexadecimal.
    """

    values: NDArray[Any]
    index: NDArray[np.int64]
    digest: str

    @property
    def dim(self) -> int:
        """D"""
        return int(self.values.shape[2])

    @property
    def views(self) -> int:
        """V"""
        return int(self.values.shape[0])


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One file of features.

    Attributes:
        rows: the features. labels: (n,) int64, index of `classes`, `UNLABELLED` where there is none.
        classes: names, in the order of the table, or sorted: numbers by value, texts by letter.
        names: of the samples.
    """

    rows: Rows
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def labels_in(self, classes: tuple[str, ...], path: Path) -> NDArray[np.int64]:
        """Return the labels in another label space.

        Raises:
            UsageError: one of them is of a class that it lacks.
        """
        known = {name: label for label, name in enumerate(classes)}
        present = [self.classes[label] for label in np.unique(self.labels[self.labels >= 0])]
        lacking = [name for name in present if name not in known]
        if lacking:
            raise UsageError(
                str(path),
                found=f"labels of {len(lacking)} classes that the source lacks, such as '{lacking[0]}'",
                expected=f"labels among {', '.join(classes[:8])}{' ...' if len(classes) > 8 else ''}",
                remedy="remove those rows, or leave the target's labels out",
            )
        renamed = np.array([known.get(name, UNLABELLED) for name in self.classes] + [UNLABELLED], dtype=np.int64)
        return renamed[self.labels]


def read_embeddings(path: Path) -> Embeddings:
    """Read a file of features, of either kind.

    Raises:
        UsageError: there is no such file, or its content does not fit: see the module.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(str(path), found=f"a name that ends in '{path.suffix}'", expected=" or ".join(SUFFIXES))
    if not path.is_file():
        raise UsageError(str(path), found="nothing", expected="a file of features")
    arrays = _read_npz(path) if path.suffix == ".npz" else {"features": _read_npy(path)}
    values = _features(path, arrays["features"])
    rows = Rows(values, np.arange(values.shape[1]), file_digest(path))
    table = path.with_suffix(".json")
    if path.suffix == ".npy" and table.is_file():
        return _with_table(path, rows, table)
    labels, classes = _labels(path, arrays.get("labels"), values.shape[1])
    return Embeddings(rows, labels, classes, [f"row {number}" for number in range(values.shape[1])])


def rows_in_memory(name: str, features: NDArray[Any]) -> Rows:
    """Return features that were never in a file, as `read_embeddings` would; one row will do.

    Args:
        name: by which a message calls them. features: (n, D) or (V, n, D) floating point.

    Raises:
        UsageError: another shape or type, or a number that is not finite.
    """
    values = _features(name, features, least=1)
    return Rows(values, np.arange(values.shape[1]), "")


def write_table(path: Path, digest: str, names: list[str], labels: NDArray[np.int64], classes: tuple[str, ...]) -> None:
    """Write what stands beside the rows of `path`, a .npy file.

    Args:
        digest: of the images, the weights and the settings that the rows were computed from.
        names, labels, classes: as of a domain.
    """
    table = {"format": FORMAT, "digest": digest, "names": names, "labels": labels.tolist(), "classes": list(classes)}
    with atomic_file(path.with_suffix(".json")) as file:
        file.write(json.dumps(table).encode())


def digest_of_table(path: Path) -> str | None:
    """Return what finished rows were computed from; None where there are none."""
    try:
        table = _read_table(path.with_suffix(".json"))
    except (OSError, ValueError):
        return None
    return table.digest if path.is_file() else None


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if "features" not in stored:
                found = f"the arrays {', '.join(stored) or 'of an empty archive'}"
                raise UsageError(str(path), found=found, expected="an array named features")
            return {name: stored[name] for name in ("features", "labels") if name in stored}
    except UsageError:
        raise
    except Exception as error:  # zlib, zipfile and NumPy have no common ancestor for what damage makes them raise
        raise _unreadable(path, error) from error


def _read_npy(path: Path) -> NDArray[Any]:
    # Copy on write: torch wants memory that it might write to, and the file must never change.
    mode: Any = "c" if path.stat().st_size > _READ_BYTES else None
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays under the name of a single one")
        return array
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UsageError:
    if "pickle" in str(error).lower() or "object array" in str(error).lower():
        return UsageError(str(path), found="an array of Python objects", expected="arrays of numbers or of texts")
    return UsageError(str(path), found=f"a damaged file ({error})", expected="arrays that NumPy reads")


def _features(path: Path | str, array: NDArray[Any], least: int = 2) -> NDArray[Any]:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        found = f"features of type {array.dtype}"
        raise UsageError(str(path), found=found, expected="float16, float32 or float64")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        found = f"features of shape {array.shape}"
        raise UsageError(str(path), found=found, expected="(samples, size) or (views, samples, size)")
    if array.shape[1] < least:
        raise UsageError(str(path), found="one sample", expected="two or more")
    for view, rows in enumerate(array):
        for start in range(0, len(rows), _CHECKED_ROWS):
            bad = np.flatnonzero(~np.isfinite(rows[start : start + _CHECKED_ROWS]).all(axis=1))
            if len(bad):
                where = f"row {start + bad[0]}" + (f" of view {view}" if len(array) > 1 else "")
                raise UsageError(str(path), found=f"a number that is not finite in {where}", expected="finite features")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _labels(path: Path, labels: NDArray[Any] | None, count: int) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    if labels is None:
        return np.full(count, UNLABELLED, dtype=np.int64), ()
    if labels.shape != (count,):
        raise UsageError(str(path), found=f"labels of shape {labels.shape}", expected=f"({count},), one for each row")
    if labels.dtype.kind in "SU":
        decoded = np.char.decode(labels, "utf-8") if labels.dtype.kind == "S" else labels
        texts, numbers = np.unique(decoded, return_inverse=True)
        return numbers.astype(np.int64), tuple(texts.tolist())
    if labels.dtype.kind not in "iu":
        raise UsageError(str(path), found=f"labels of type {labels.dtype}", expected="whole numbers or texts")
    if labels.min() < UNLABELLED:
        found = f"the label {labels.min()}"
        raise UsageError(str(path), found=found, expected=f"labels >= 0, or {UNLABELLED} for rows without one")
    known = labels >= 0
    values, numbers = np.unique(labels[known], return_inverse=True)
    result = np.full(count, UNLABELLED, dtype=np.int64)
    result[known] = numbers
    return result, tuple(str(value) for value in values)


def _with_table(path: Path, rows: Rows, table_path: Path) -> Embeddings:
    try:
        table = _read_table(table_path)
        labels, count = np.asarray(table.labels, dtype=np.int64), rows.values.shape[1]
        if not len(table.names) == len(labels) == count:
            raise ValueError(f"{len(table.names)} names, {len(labels)} labels, {count} rows")
        if labels.max() >= len(table.classes):
            raise ValueError(f"the label {labels.max()}, {len(table.classes)} classes")
    except (OSError, ValueError) as error:
        raise UsageError(
            str(table_path),
            found=f"{type(error).__name__}: {error}",
            expected=f"the table of {path.name}, format {FORMAT}",
            remedy=f"remove both and run `{program('embed')}` again",
        ) from error
    return Embeddings(rows, labels, table.classes, table.names)


class _Table(msgspec.Struct):
    """What stands beside the rows."""

    format: Literal[1]
    digest: str
    names: list[str]
    labels: list[Annotated[int, Meta(ge=UNLABELLED, lt=2**31)]]
    classes: tuple[str, ...]


def _read_table(path: Path) -> _Table:
    """Return a table whose every entry has been looked at.

    Raises:
        OSError: it cannot be read. ValueError: it is none.
    """
    try:
        # Not msgspec's own decoder: names that are no UTF-8 stand there as lone surrogates.
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), _Table)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(str(error)) from error
