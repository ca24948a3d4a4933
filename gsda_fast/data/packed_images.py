"""A pack on disk: images of uint8 pixels in shards, and the table of what they show.

::

    PACK/pack.json           {"format", "side", "channels", "orientation",
                              "domains": {name: {"classes", "paths", "labels", "shards"}}}
    PACK/<domain>-00000.npy  (n, side, side, channels) uint8, and so on; `SHARD_IMAGES` images each but for the last;
                             the table names the files

`pack.json` is written last, so a folder without it is no pack. `data/pack.py` writes, this module reads. A pack may be
anybody's: its table is checked whole before anything is done with it, and its names are plain names in its folder.
Images are read, not mapped: a shard that is cut, or on a disk that fails, is an error and no signal that ends the
process.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from gsda_fast.commands import program
from gsda_fast.data.benchmarks import Orientation
from gsda_fast.errors import UsageError
from gsda_fast.files import is_path_below, is_plain_name

TABLE = "pack.json"
FORMAT = 1
SHARD_IMAGES = 2048
"""Images in a shard: 403 MB at 256x256."""

_LARGEST_SIDE = 4096


@dataclass(frozen=True)
class Shard:
    """One file of images.

    Attributes:
        file: its name. images: how many. sha256: of the whole file.
        made_from: digest of the names, sizes and times of the images that it was made from.
    """

    file: str
    images: int
    sha256: str
    made_from: str


class _OpenShard:
    """A shard's file and where its images begin; closed with the last reference to it.

    Raises:
        UsageError: it is missing, cut, or no shard of that shape.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self._bytes, self._shape = path, int(np.prod(shape[1:])), shape[1:]
        self.descriptor = -1
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError("no regular file")
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(self.descriptor, "rb", closefd=False) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"a file of NumPy's format {version}")
                found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()
                size = os.fstat(self.descriptor).st_size
        except OSError as error:
            raise self._no_shard(f"{error.strerror or error}") from error
        except Exception as error:  # NumPy parses the header as an expression
            raise self._no_shard(str(error) or type(error).__name__) from error
        if found != shape or dtype != np.uint8 or fortran:
            raise self._no_shard(f"{dtype} {found}", f"uint8 {shape}")
        whole = self._start + shape[0] * self._bytes
        if size != whole:
            raise self._no_shard(f"{size} bytes", f"{whole} bytes")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read(self, place: int) -> NDArray[np.uint8]:
        """Return (side, side, channels) uint8, in memory of its own."""
        image = np.empty(self._shape, np.uint8)
        try:
            count = os.preadv(self.descriptor, [image.data], self._start + place * self._bytes)
        except OSError as error:
            raise self._no_shard(f"{error.strerror}") from error
        if count != self._bytes:
            raise self._no_shard("a file that was cut while it was in use")
        return image

    def _no_shard(self, found: str, expected: str = "a shard of a pack") -> UsageError:
        return UsageError(str(self.path), found=found, expected=expected, remedy=_repair())


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Resized images of a domain, or of some of its samples, on disk. Nothing is read before it is asked for.

    Attributes:
        root: the pack. shards: in order. shape: of an image, (side, side, channels).
        rows: (n,) the place of every sample, counted over all shards. orientation: how the files were read.
    """

    root: Path
    shards: tuple[Shard, ...]
    shape: tuple[int, int, int]
    rows: NDArray[np.int64]
    orientation: Orientation
    _opened: dict[int, _OpenShard] = field(init=False, repr=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> NDArray[np.uint8]:
        """Return (side, side, channels) uint8, in memory of its own.

        Raises:
            UsageError: the shard cannot be read.
        """
        number, place = divmod(int(self.rows[sample]), SHARD_IMAGES)
        opened = self._opened.get(number)
        if opened is None:
            shard = self.shards[number]
            # Two threads may both open it: the one that comes later stays.
            opened = self._opened[number] = _OpenShard(self.root / shard.file, (shard.images, *self.shape))
        return opened.read(place)

    def take(self, samples: Sequence[int] | NDArray[np.int64]) -> "PackedImages":
        """Return the images of these samples, in their order."""
        return replace(self, rows=self.rows[np.asarray(samples, dtype=np.int64)])

    def files(self) -> list[str]:
        """Full paths of the shards that samples lie in."""
        return [str(self.root / self.shards[number].file) for number in np.unique(self.rows // SHARD_IMAGES).tolist()]

    def file(self, sample: int) -> str:
        """Full path of the shard that a sample lies in."""
        return str(self.root / self.shards[int(self.rows[sample]) // SHARD_IMAGES].file)

    def problem(self, path: str) -> str:
        """Return what is wrong with the shard of that path; nothing where its digest is right."""
        shard = next(shard for shard in self.shards if shard.file == Path(path).name)
        return shard_problem(self.root, shard)


def shard_problem(root: Path, shard: Shard) -> str:
    """Return what is wrong with a shard of a pack; nothing where its digest is right."""
    try:
        if not stat.S_ISREG(os.stat(root / shard.file).st_mode):
            return "no regular file"
        found = file_digest(root / shard.file)
    except OSError as error:
        return f"{error.strerror}"
    return "" if found == shard.sha256 else "its digest is not the one it was written with"


@dataclass(frozen=True, eq=False)
class PackedDomain:
    """A domain as it was packed: all its samples, in the label space that it was opened in."""

    classes: tuple[str, ...]
    paths: list[str]
    labels: NDArray[np.int64]
    images: PackedImages


def is_pack(root: Path) -> bool:
    """Return whether a folder is a finished pack."""
    return (root / TABLE).is_file()


def read_table(path: Path) -> dict[str, Any]:
    """Return the table of a finished pack, checked whole.

    Raises:
        UsageError: it is damaged, of another version of this package, or names something outside of the pack.
    """
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise no_table(path, f"{type(error).__name__}: {error}") from error
    problem = table_problem(table)
    if problem:
        raise no_table(path, problem)
    checked: dict[str, Any] = table
    return checked


def no_table(path: Path, found: str) -> UsageError:
    """Return the error for a table that is none."""
    return UsageError(str(path), found=found, expected=f"the table of a pack, format {FORMAT}", remedy=_repair())


def table_problem(table: Any, *, whole: bool = True) -> str:
    """Return what of the schema a table does not keep to; nothing where it does.

    Args:
        table: what a file holds. whole: every domain has all its shards, as in a finished pack.
    """
    if not isinstance(table, dict):
        return f"{type(table).__name__}, no table"
    if table.get("format") != FORMAT or not _is_int(table.get("format"), FORMAT, FORMAT):
        return f"format {str(table.get('format'))[:20]}"
    strangers = set(table) - {"format", "side", "channels", "orientation", "domains"}
    if strangers:
        return f"the entry '{min(strangers)[:60]}'"
    if not _is_int(table.get("side"), 1, _LARGEST_SIDE) or table.get("channels") not in (1, 3):
        return "images without a size"
    if orientation_of(table) not in get_args(Orientation):
        return f"the orientation {str(table['orientation'])[:20]}"
    if not isinstance(table.get("domains"), dict):
        return "no domains"
    for name, entry in table["domains"].items():
        problem = _entry_problem(entry, whole)
        if problem:
            return f"the domain '{name[:60]}' with {problem}"
    return ""


def orientation_of(table: dict[str, Any]) -> Orientation:
    """Return how the files of a pack were read. A table that does not say is older than the choice."""
    orientation: Orientation = table.get("orientation", "stored")
    return orientation


def _entry_problem(entry: Any, whole: bool) -> str:
    if not isinstance(entry, dict) or set(entry) != {"classes", "paths", "labels", "shards"}:
        return "other entries than a domain's"
    classes, paths, labels, shards = (entry.get(name) for name in ("classes", "paths", "labels", "shards"))
    if not isinstance(classes, list) or not all(type(name) is str for name in classes):
        return "no names of classes"
    if len(set(classes)) != len(classes):
        return "two classes of one name"
    if not isinstance(paths, list) or not all(map(is_path_below, paths)):
        return f"a path that leads out of its folder ({_first(paths, is_path_below)})"
    if not isinstance(labels, list) or len(labels) != len(paths):
        return "not one label for each path"
    if not all(_is_int(label, -1, len(classes) - 1) for label in labels):
        return "labels that are numbers of no class"
    if not isinstance(shards, list):
        return "no shards"
    for shard in shards:
        problem = shard_entry_problem(shard)
        if problem:
            return problem
    counts = [shard["images"] for shard in shards]
    if any(count != SHARD_IMAGES for count in counts[:-1]) or (whole and sum(counts) != len(paths)):
        return f"shards of {sum(counts)} images for {len(paths)} paths"
    return ""


def shard_entry_problem(shard: Any) -> str:
    """Return what of the schema the entry of a shard does not keep to; nothing where it does."""
    if not isinstance(shard, dict) or set(shard) != {"file", "images", "sha256", "made_from"}:
        return "a shard that is none"
    if not is_plain_name(shard["file"]) or shard["file"].startswith(".") or not shard["file"].endswith(".npy"):
        return f"a shard that is no file of the pack ({str(shard['file'])[:60]})"
    if not _is_int(shard["images"], 1, SHARD_IMAGES):
        return "a shard without images"
    if not all(isinstance(shard[name], str) and len(shard[name]) == 64 for name in ("sha256", "made_from")):
        return "a shard without its digests"
    return ""


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _first(values: Any, good: Any) -> str:
    bad: Iterable[Any] = (value for value in values if not good(value)) if isinstance(values, list) else [values]
    return str(next(iter(bad), ""))[:60]


def read_domain(root: Path, name: str) -> PackedDomain:
    """Return a domain of a pack.

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
    images = PackedImages(root, shards, shape, rows, orientation_of(table))
    return PackedDomain(tuple(entry["classes"]), entry["paths"], labels, images)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _repair() -> str:
    return f"remove it and run `{program('data')} pack` again"
