"""A pack on disk: frames of uint8 pixels in memory-mapped shards, and the table of what they show.

::

    PACK/pack.json           {"format", "side", "channels", "domains": {name: {"classes", "paths", "labels", "shards"}}}
    PACK/<domain>-00000.npy  (n, side, side, channels) uint8, and so on; `SHARD_IMAGES` frames each but for the last;
                             the table names the files

`pack.json` is written last, so a folder without it is no pack. `data/pack.py` writes, this module reads.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsda_fast.errors import UsageError

TABLE = "pack.json"
FORMAT = 1
SHARD_IMAGES = 2048
"""Frames in a shard: 403 MB at 256x256."""

_REPAIR = "remove it and run `python -m gsda_fast.data pack` again"


@dataclass(frozen=True)
class Shard:
    """One file of frames.

    Attributes:
        file: its name. images: frames in it. sha256: of the whole file.
        made_from: digest of the names, sizes and times of the images that it was made from.
    """

    file: str
    images: int
    sha256: str
    made_from: str


@dataclass(frozen=True, eq=False)
class PackedFrames:
    """Frames of a domain, or of some of its samples, as they lie on disk. Nothing is read before it is asked for.

    Attributes:
        root: the pack. shards: in order. shape: of a frame, (side, side, channels).
        rows: (n,) the frame of every sample, counted over all shards.
    """

    root: Path
    shards: tuple[Shard, ...]
    shape: tuple[int, int, int]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> NDArray[np.uint8]:
        """(side, side, channels) uint8: a view of the mapped file; what is written to it stays in memory."""
        shard, place = divmod(int(self.rows[sample]), SHARD_IMAGES)
        return self._mapped[shard][place]

    def take(self, samples: Sequence[int] | NDArray[np.int64]) -> "PackedFrames":
        """The frames of these samples, in their order."""
        return replace(self, rows=self.rows[np.asarray(samples, dtype=np.int64)])

    def files(self) -> list[str]:
        """Full paths of the shards."""
        return [str(self.root / shard.file) for shard in self.shards]

    def problem(self, path: str) -> str:
        """What is wrong with the shard of that path; nothing where its digest is right."""
        expected = next(shard.sha256 for shard in self.shards if shard.file == Path(path).name)
        try:
            found = file_digest(Path(path))
        except OSError as error:
            return f"{error.strerror}"
        return "" if found == expected else "its digest is not the one it was written with"

    @cached_property
    def _mapped(self) -> list[NDArray[np.uint8]]:
        return [self._map(shard) for shard in self.shards]

    def _map(self, shard: Shard) -> NDArray[np.uint8]:
        path = self.root / shard.file
        try:
            # Copy on write: torch wants memory that it might write to, and the file must never change.
            frames: NDArray[np.uint8] = np.lib.format.open_memmap(path, mode="c")
        except (OSError, ValueError) as error:
            raise UsageError(str(path), found=str(error), expected="a shard of a pack", remedy=_REPAIR) from error
        if frames.shape != (shard.images, *self.shape) or frames.dtype != np.uint8:
            found = f"{frames.dtype} {frames.shape}"
            raise UsageError(str(path), found=found, expected=f"uint8 {(shard.images, *self.shape)}", remedy=_REPAIR)
        return frames


@dataclass(frozen=True, eq=False)
class PackedDomain:
    """A domain as it was packed: all its samples, in the label space that it was opened in."""

    classes: tuple[str, ...]
    paths: list[str]
    labels: NDArray[np.int64]
    frames: PackedFrames


def is_pack(root: Path) -> bool:
    """Whether a folder is a finished pack."""
    return (root / TABLE).is_file()


def read_table(path: Path) -> dict[str, Any]:
    """The table of a pack.

    Raises:
        UsageError: it is damaged, or of another version of this package.
    """
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] == FORMAT:
            return table
        found = f"format {table['format']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise UsageError(str(path), found=found, expected=f"the table of a pack, format {FORMAT}", remedy=_REPAIR)


def read_domain(root: Path, name: str) -> PackedDomain:
    """A domain of a pack.

    Raises:
        UsageError: the pack lacks it, or is damaged.
    """
    table = read_table(root / TABLE)
    if name not in table["domains"]:
        found = f"{root}, a pack of {', '.join(table['domains'])}"
        raise UsageError("--data-root", found=found, expected=f"one with the domain {name}")
    entry = table["domains"][name]
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    shape = (table["side"], table["side"], table["channels"])
    rows = np.arange(len(entry["paths"]))
    labels = np.asarray(entry["labels"], dtype=np.int64)
    return PackedDomain(tuple(entry["classes"]), entry["paths"], labels, PackedFrames(root, shards, shape, rows))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
