"""Domains on disk: finding a data set's layout and reading it into a list of files with labels in one label space.

Readers know two forms: a tree of class folders, and an ``image_list`` file with one ``path label`` a line. Files are
listed in sorted order whatever the form, so every layout of a data set gives the same samples with the same numbers.
No image is opened here.
"""

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gsda_fast.commands import program
from gsda_fast.data import digits
from gsda_fast.data.benchmarks import EMBEDDED, Benchmark, DomainFacts, Orientation, find_benchmark, plain_name
from gsda_fast.data.embeddings import SUFFIXES, Embeddings, Rows, read_embeddings
from gsda_fast.data.packed_images import PackedDomain, PackedImages, is_pack, read_domain
from gsda_fast.data.quarantine import read_list
from gsda_fast.errors import UsageError, UsageWarning
from gsda_fast.files import is_path_below

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif"}
)
UNKNOWN = -1
"""Label of a sample whose class the files do not show."""

_VERIFY = "check the copy of the data set"
_HEIF = ("heic", "heif", "hif")
_OTHER_PICTURES = {
    *_HEIF, "jp2", "j2k", "jpx", "jxl", "psd", "svg", "tga", "pcx", "ico", "eps", "ppm", "pgm", "pnm", "dng", "raw",
    "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "apng", "jpg_large", "dcm", "npy", "mp4",
}  # fmt: skip
_BESIDE = "image beside the class folders"
_HIDDEN = "hidden file"
_LEFT_OUT_FOLDER = "left-out folder"


@dataclass(frozen=True, eq=False)
class ImageDomain:
    """The images of one domain: files and labels.

    `labels` index `classes`, which both domains of a task share; a partial target simply lacks some of them.
    """

    name: str
    root: Path
    paths: list[str]
    """files, relative to `root`, sorted"""
    labels: NDArray[np.int64]
    """(n,), `UNKNOWN` (-1) where the files do not show it"""
    classes: tuple[str, ...]
    packed: PackedImages | None = None
    """the images themselves, where they come from a pack; `paths` then says where they once came from"""
    rows: Rows | None = None
    """features, where these take the place of images; `paths` then names what they were computed from"""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """files that were not looked at when the folder was read, and why: an ending, or what stands before them"""
    orientation: Orientation = "stored"
    """how the files are read, or were when they were packed"""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """Size of the label space, which may be more than the classes present here."""
        return len(self.classes)

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label, so that an accuracy can be computed."""
        return bool((self.labels >= 0).all())

    def file(self, index: int) -> str:
        """Return the full path of sample `index`."""
        return os.path.join(self.root, self.paths[index])

    @cached_property  # a look at every file, which on a network disk takes its time
    def identity(self) -> str:
        """Which images these are, wherever they lie: how many, and a digest of their names, sizes and labels.

        Of a pack, of the digests of its shards. A file that is not there counts as one of no size.
        """
        found = hashlib.sha256(repr((self.paths, self.labels.tolist())).encode())
        if self.packed is not None:
            found.update(repr([(shard.sha256, shard.images) for shard in self.packed.shards]).encode())
            return f"{len(self)} images of a pack with digest {found.hexdigest()[:12]}"
        if self.rows is not None:
            return f"{len(self)} rows of features with digest {found.hexdigest()[:12]}, {self.rows.digest[:12]}"
        found.update(repr([_size(self.file(i)) for i in range(len(self))]).encode())
        return f"{len(self)} files with digest {found.hexdigest()[:12]}"

    def told_passed_over(self) -> str:
        """Return what was not looked at, in a line."""
        kinds = []
        for reason, count in sorted(self.passed_over.items(), key=lambda each: (-each[1], each[0])):
            hint = " (no decoder here reads HEIC: convert them, with the package pillow-heif for one)"
            kinds.append(f"{count} {reason}{hint if reason.removeprefix('.') in _HEIF else ''}")
        return f"{sum(self.passed_over.values())} entries not looked at: {', '.join(kinds)}"

    def take(self, samples: list[int]) -> "ImageDomain":
        """Return the domain reduced to some of its samples."""
        packed = None if self.packed is None else self.packed.take(samples)
        rows = None if self.rows is None else replace(self.rows, index=self.rows.index[samples])
        paths = [self.paths[i] for i in samples]
        return replace(self, paths=paths, labels=self.labels[samples], packed=packed, rows=rows)


def open_pair(
    task: str,
    source: str | None = None,
    target: str | None = None,
    data_root: Path | None = None,
    quarantine: Path | None = None,
    orientation: Orientation = "exif",
) -> tuple[ImageDomain, ImageDomain]:
    """Source and target domain of a transfer task, in one label space.

    Args:
        task: a name in `BENCHMARKS`.
        source, target: domain names or aliases; for the task ``folder``, folders below the data root; for ``features``,
            files of features, below the data root if there is one. None: the task's usual ones.
        data_root: where the data set lies; None: the environment variable ``GSDA_DATA``. The tasks ``digits`` and
            ``digits-partial`` build their own images, in their cache or in a `data_root` that does not exist yet, and
            do not look at ``GSDA_DATA``.
        quarantine: a text file with the full path of a file a line; these are left out.
        orientation: whether photos are turned as their EXIF says. Nothing that this package makes is to be turned.

    Returns:
        The source, which has samples of every class, and the target, whose classes are among the source's. The labels
        of the target serve evaluation alone.

    Raises:
        UsageError: there is no such task, domain or folder, or its files do not fit.
    """
    benchmark = find_benchmark(task)
    if task == "features":
        return _open_own_features(source, target, data_root)
    if task == "folder":
        left_out = _Quarantine(quarantine)
        opened = _open_own_folders(source, target, _existing_root(data_root))
        for domain in dict.fromkeys(opened):
            _warn_of_pictures(domain)
        own, other = (_read_as(left_out.without(domain), orientation) for domain in opened)
        left_out.warn_of_strangers()
        return own, other
    names = (source or benchmark.default_source, target or benchmark.default_target)
    # Both names are checked before any folder is read.
    source_name, target_name = (benchmark.domain(str(name)).name for name in names)
    left_out = _Quarantine(quarantine)
    partial = benchmark.target_classes is not None
    pair = (
        _open_named(benchmark, source_name, data_root, left_out, orientation),
        _open_named(benchmark, target_name, data_root, left_out, orientation, partial=partial),
    )
    left_out.warn_of_strangers()
    return pair


def open_domain(
    task: str,
    name: str,
    data_root: Path | None = None,
    *,
    partial: bool = False,
    quarantine: Path | None = None,
    orientation: Orientation = "exif",
) -> ImageDomain:
    """One domain of a named benchmark, in the benchmark's label space.

    Args:
        task: a name in `BENCHMARKS`, not ``folder``. name: of the domain, or an alias.
        data_root, quarantine, orientation: as for `open_pair`.
        partial: leave out the classes that the target of a partial task lacks.

    Raises:
        UsageError: there is no such task, domain or folder, or its files do not fit.
    """
    return _open_named(find_benchmark(task), name, data_root, _Quarantine(quarantine), orientation, partial=partial)


def _open_named(
    benchmark: Benchmark,
    name: str,
    data_root: Path | None,
    left_out: "_Quarantine",
    orientation: Orientation,
    *,
    partial: bool = False,
) -> ImageDomain:
    facts = benchmark.domain(name)
    root = digits.build(data_root) if benchmark.built_in else _root_of(benchmark, data_root)
    opened = _open_domain(benchmark, facts, root, partial=partial, left_out=left_out)
    return _read_as(opened, benchmark.orientation(orientation))


def _read_as(domain: ImageDomain, orientation: Orientation) -> ImageDomain:
    """Return the domain with its files read so.

    Raises:
        UsageError: it comes from a pack whose files were read in the other way.
    """
    packed = domain.packed
    if packed is not None and packed.orientation != orientation:
        raise UsageError(
            "--orientation",
            found=f"{orientation}, for {packed.root}, a pack that was made with {packed.orientation}",
            expected=packed.orientation,
            remedy=f"or a pack that is made with `--orientation {orientation}`",
        )
    return replace(domain, orientation=orientation)


@contextmanager
def _naming_what_cannot_be_read() -> Iterator[None]:
    """For want of permission, or because a disk fails. A folder is never passed over: part of a data set looks whole.

    Raises:
        UsageError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            str(error.filename or "data set"), found=f"{error.strerror}", expected="files and folders that can be read"
        ) from error


@_naming_what_cannot_be_read()
def open_images(folder: Path, classes: tuple[str, ...], orientation: Orientation = "exif") -> ImageDomain:
    """Return all images below a folder, sorted by path, without labels.

    Args:
        classes: the label space. orientation: as for `open_pair`.

    Raises:
        UsageError: there is no such folder, no image in it, or part of it cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(str(folder), found="a file" if folder.exists() else "nothing", expected="a folder of images")
    domain = _unlabelled(str(folder), folder, classes)
    _warn_of_pictures(domain)
    return _read_as(domain, orientation)


@_naming_what_cannot_be_read()
def open_image(path: Path, classes: tuple[str, ...], orientation: Orientation = "exif") -> ImageDomain:
    """One image file, without a label.

    Args:
        classes: the label space. orientation: as for `open_pair`.

    Raises:
        UsageError: its name is none of an image.
    """
    if not _is_image(path.name):
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(str(path), found=f"a file of another kind ({_why_not(path.name)})", expected=f"one of {kinds}")
    return _read_as(_domain(str(path), path.parent, [(path.name, UNKNOWN)], classes), orientation)


def _unlabelled(name: str, folder: Path, classes: tuple[str, ...]) -> ImageDomain:
    passed_over: Counter[str] = Counter()
    paths = sorted(_images_below(folder, "", passed_over))
    _require_images(folder, paths)
    return _domain(name, folder, [(path, UNKNOWN) for path in paths], classes, passed_over)


def _root_of(benchmark: Benchmark, data_root: Path | None) -> Path:
    named = data_root is not None or (os.environ.get("GSDA_DATA") and not benchmark.embedded)
    if not (benchmark.buildable or benchmark.embedded) or named:
        return _existing_root(data_root)
    built = default_root(benchmark.name)
    if not built.is_dir():
        command = f"{program('data')} build {benchmark.name}"
        if benchmark.embedded:
            command = f"{program('embed')} {benchmark.name.removesuffix(EMBEDDED)}"
        raise UsageError(
            "--data-root",
            found=f"neither the option nor GSDA_DATA nor {built}",
            expected="the folder of the data set",
            remedy=f"`{command}` makes it",
        )
    return built


@_naming_what_cannot_be_read()
def open_folder(folder: Path, orientation: Orientation = "exif") -> ImageDomain:
    """Return a folder of class folders as a domain of its own; one of images alone as a domain without labels.

    The domain has the folder's own name.

    Args:
        orientation: as for `open_pair`.

    Raises:
        UsageError: there is no such folder, no image in it, or part of it cannot be read.
    """
    if not folder.is_dir() or not (folders := _class_folders(folder)):
        return replace(open_images(folder, (), orientation), name=folder.name)
    labels = {plain_name(name): label for label, name in enumerate(sorted(folders.values()))}
    return _read_as(_read_tree(folder.name, folder, folders, labels, tuple(sorted(folders.values()))), orientation)


def default_root(task: str) -> Path:
    """Return where `data build` puts a data set that it makes."""
    return digits.cache_home() / task


@_naming_what_cannot_be_read()
def _existing_root(data_root: Path | None) -> Path:
    what = "--data-root"
    if data_root is None:
        what, value = "GSDA_DATA", os.environ.get("GSDA_DATA")
        if not value:
            raise UsageError(
                "--data-root",
                found="neither the option nor the environment variable GSDA_DATA",
                expected="the folder of the data set",
            )
        data_root = Path(value)
    root = Path(data_root)
    if not root.is_dir():
        state = "which is a file" if root.exists() else "which does not exist"
        raise UsageError(what, found=f"{root}, {state}", expected="the folder of the data set")
    if not any(root.iterdir()):
        raise UsageError(what, found=f"{root}, which is empty", expected="the folder of the data set")
    return root


# ------------------------------------------------------------------------------------------------- named benchmarks


def _open_domain(
    benchmark: Benchmark, facts: DomainFacts, root: Path, *, partial: bool, left_out: "_Quarantine"
) -> ImageDomain:
    assert benchmark.classes is not None
    classes = benchmark.classes
    kept = benchmark.target_classes if partial and benchmark.target_classes else classes
    found = _find_domain(benchmark, facts, root, classes, kept)
    _warn_of_pictures(found)
    domain = left_out.without(found)
    present = set(domain.labels.tolist())
    missing = [name for label, name in enumerate(classes) if name in kept and label not in present]
    if missing and domain.labels.max(initial=UNKNOWN) != UNKNOWN:
        raise UsageError(
            f"domain {facts.name}",
            found=f"{domain.root} without images of {_some(missing)}",
            expected=f"images of all {len(kept)} classes",
            remedy=_VERIFY,
        )
    expected = facts.expected_target_images if partial else facts.expected_images
    if expected is not None and len(domain) != expected:
        message = f"domain {facts.name}: found {len(domain)} images in {domain.root}, published {expected}"
        warnings.warn(message, UsageWarning, stacklevel=5)
    return domain


@_naming_what_cannot_be_read()
def _find_domain(
    benchmark: Benchmark, facts: DomainFacts, root: Path, classes: tuple[str, ...], kept: tuple[str, ...]
) -> ImageDomain:
    """Return the domain in a pack, or the first of its layouts that is there."""
    if benchmark.embedded:
        path = root / f"{facts.name}.npy"
        embeddings = read_embeddings(path)
        return _from_embeddings(facts.name, path, embeddings, embeddings.labels_in(classes, path), classes)
    if is_pack(root):
        return _from_pack(facts.name, root, read_domain(root, facts.name), classes, kept)
    for base in (root / nested for nested in benchmark.roots):
        for list_file, start in facts.lists:
            if (base / list_file).is_file():
                return _read_list(facts.name, base / list_file, base / start, classes, kept)
        for folder in facts.folders:
            if (base / folder).is_dir():
                return _read_benchmark_tree(facts, base / folder, classes, kept)
    there = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    layouts = [*facts.folders, *(list_file for list_file, _ in facts.lists)]
    raise UsageError(
        "--data-root",
        found=f"{root}, which holds {_some(there)}",
        expected=f"the domain {facts.name} of {benchmark.name}: {' or '.join(layouts)}",
        remedy="give the folder that holds the domains",
    )


def _read_benchmark_tree(
    facts: DomainFacts, folder: Path, classes: tuple[str, ...], kept: tuple[str, ...]
) -> ImageDomain:
    folders = _class_folders(folder)
    known = {plain_name(name) for name in classes}
    strangers = [name for key, name in folders.items() if key not in known]
    if facts.may_be_unlabelled and len(strangers) == len(folders):
        return _unlabelled(facts.name, folder, classes)
    if not folders:
        raise UsageError(
            f"domain {facts.name}", found=f"{folder} without class folders", expected=f"{len(classes)} class folders"
        )
    if strangers:
        raise UsageError(
            f"domain {facts.name}",
            found=f"the folders {_some(strangers)} in {folder}",
            expected=f"class folders among {_some(classes)}",
            remedy="remove them, or use the task `folder` for classes of your own",
        )
    labels = {plain_name(name): label for label, name in enumerate(classes) if name in kept}
    return _read_tree(facts.name, folder, folders, labels, classes)


def _read_list(name: str, list_file: Path, start: Path, classes: tuple[str, ...], kept: tuple[str, ...]) -> ImageDomain:
    """Return lines ``path label``, or ``path`` alone.

    Paths may contain spaces: the label is what follows the last one.
    """
    wanted = {label for label, class_name in enumerate(classes) if class_name in kept}
    samples: list[tuple[str, int]] = []
    try:
        # A line ends with a newline alone: other separators may stand in a name.
        lines = list_file.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            str(list_file), found=f"bytes that are not UTF-8 at offset {error.start}", expected="a UTF-8 text file"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, _, last = line.strip().rpartition(" ")
        label = UNKNOWN
        if path and re.fullmatch(r"-?[0-9]+", last):
            label = int(last)
            if not 0 <= label < len(classes):
                raise UsageError(
                    f"{list_file}, line {number}",
                    found=f"label {label} for '{path.strip()}'",
                    expected=f"a label from 0 to {len(classes) - 1}",
                )
        else:
            path = line
        normal = os.path.normpath(path.strip())
        if not is_path_below(normal):
            raise UsageError(
                f"{list_file}, line {number}",
                found=f"'{path.strip()[:200]}'",
                expected=f"a path below {start}",
                remedy="remove the line: what it names does not belong to the data set",
            )
        if label == UNKNOWN or label in wanted:
            samples.append((normal, label))
    _require_images(list_file, samples)
    _require_listed_files(list_file, start, [path for path, _ in samples])
    return _domain(name, start, sorted(samples), classes)


def _require_listed_files(list_file: Path, start: Path, paths: list[str]) -> None:
    # One listing of each folder: a stat of each of 150,000 files takes minutes on a network file system.
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, file_name = os.path.split(path)
        if folder not in listings:
            try:
                listings[folder] = set(os.listdir(start / folder))
            except (FileNotFoundError, NotADirectoryError):
                listings[folder] = set()
        if file_name not in listings[folder]:
            missing.append(path)
    if missing:
        raise UsageError(
            str(list_file),
            found=f"{len(missing)} listed files that are missing from {start}: {_some(missing)}",
            expected="every listed file",
            remedy=_VERIFY,
        )


# --------------------------------------------------------------------------------------------------- the user's own


@_naming_what_cannot_be_read()
def _open_own_folders(source: str | None, target: str | None, root: Path) -> tuple[ImageDomain, ImageDomain]:
    if is_pack(root):
        return _open_own_pack(str(source), str(target), root)
    source_folder, target_folder = _own_folder("--source", source, root), _own_folder("--target", target, root)
    folders = _class_folders(source_folder)
    if len(folders) < 2:
        raise UsageError(
            "--source",
            found=f"{source_folder} with {len(folders)} class folders",
            expected="a folder of two or more class folders",
        )
    classes = tuple(sorted(folders.values()))
    labels = {plain_name(name): label for label, name in enumerate(classes)}
    opened = _read_tree(str(source), source_folder, folders, labels, classes)

    target_folders = _class_folders(target_folder)
    flat = sorted(_images_in(target_folder))
    if not target_folders:
        _require_images(target_folder, flat)
        passed_over = _beside(target_folder)
        del passed_over[_BESIDE]
        return opened, _domain(str(target), target_folder, [(path, UNKNOWN) for path in flat], classes, passed_over)
    if flat:
        raise UsageError(
            "--target",
            found=f"{target_folder} with {len(flat)} images beside the folders {_some(target_folders.values())}",
            expected="either class folders or images without labels",
        )
    lacking = [name for key, name in target_folders.items() if key not in labels]
    if lacking:
        raise UsageError(
            "--target",
            found=f"the classes {_some(lacking)}, which the source lacks",
            expected=f"classes among the source's: {_some(classes)}",
            remedy="rename or remove them, or put all images into one flat folder to train without target labels",
        )
    return opened, _read_tree(str(target), target_folder, target_folders, labels, classes)


def _open_own_pack(source: str, target: str, root: Path) -> tuple[ImageDomain, ImageDomain]:
    packed_source, packed_target = read_domain(root, source), read_domain(root, target)
    present = {packed_source.classes[label] for label in packed_source.labels.tolist() if label >= 0}
    classes = tuple(sorted(present))
    opened = _from_pack(source, root, packed_source, classes, classes)
    return opened, _from_pack(target, root, packed_target, classes, classes)


def _own_folder(option: str, name: str | None, root: Path) -> Path:
    if not name:
        raise UsageError(option, found="nothing", expected=f"a folder in {root}")
    folder = root / name
    if not folder.is_dir():
        raise UsageError(option, found=f"{folder}, which is no folder", expected=f"a folder in {root}")
    return folder


# -------------------------------------------------------------------------------------------------------- embeddings


@_naming_what_cannot_be_read()
def _open_own_features(
    source: str | None, target: str | None, data_root: Path | None
) -> tuple[ImageDomain, ImageDomain]:
    for option, name in (("--source", source), ("--target", target)):
        if not name:
            raise UsageError(option, found="nothing", expected=f"a file of features ({' or '.join(SUFFIXES)})")
    root = data_root or Path()
    source_path, target_path = root / str(source), root / str(target)
    own, other = read_embeddings(source_path), read_embeddings(target_path)
    if (own.labels == UNKNOWN).any():
        unlabelled = int((own.labels == UNKNOWN).sum())
        raise UsageError(
            "--source",
            found=f"{source_path} with {unlabelled} of {len(own)} rows without a label",
            expected="an array named labels, with a class for every row",
        )
    present = set(own.labels.tolist())
    if len(present) < 2:
        raise UsageError("--source", found=f"{source_path} with one class", expected="two or more")
    classes = tuple(name for label, name in enumerate(own.classes) if label in present)
    return (
        _from_embeddings(str(source), source_path, own, own.labels_in(classes, source_path), classes),
        _from_embeddings(str(target), target_path, other, other.labels_in(classes, target_path), classes),
    )


@_naming_what_cannot_be_read()
def open_features(path: Path, classes: tuple[str, ...]) -> ImageDomain:
    """Return all rows of a file of features, without labels.

    Args:
        classes: the label space.

    Raises:
        UsageError: there is no such file, or it does not fit.
    """
    embeddings = read_embeddings(path)
    unknown = np.full(len(embeddings), UNKNOWN, dtype=np.int64)
    return _from_embeddings(str(path), path, embeddings, unknown, classes)


def _from_embeddings(
    name: str, path: Path, embeddings: Embeddings, labels: NDArray[np.int64], classes: tuple[str, ...]
) -> ImageDomain:
    return ImageDomain(name, path.parent, embeddings.names, labels, classes, rows=embeddings.rows)


# ------------------------------------------------------------------------------------------------------------- packs


def _from_pack(
    name: str, root: Path, packed: PackedDomain, classes: tuple[str, ...], kept: tuple[str, ...]
) -> ImageDomain:
    """Return a packed domain in the label space `classes`, without the samples of classes that are not `kept`."""
    known = {plain_name(class_name): label for label, class_name in enumerate(classes)}
    lacking = {packed.classes[label] for label in packed.labels.tolist() if label >= 0} - {
        class_name for class_name in packed.classes if plain_name(class_name) in known
    }
    if lacking:
        raise UsageError(
            f"domain {name}", found=f"the classes {_some(sorted(lacking))} in {root}", expected=_some(classes)
        )
    renamed = [known.get(plain_name(class_name), UNKNOWN) for class_name in packed.classes]
    labels = np.array([renamed[label] if label >= 0 else UNKNOWN for label in packed.labels.tolist()], dtype=np.int64)
    domain = ImageDomain(name, root, packed.paths, labels, classes, packed.images)
    wanted = {label for label, class_name in enumerate(classes) if class_name in kept} | {UNKNOWN}
    return domain.take([i for i, label in enumerate(labels.tolist()) if label in wanted])


# ----------------------------------------------------------------------------------------------------- files on disk


def _read_tree(
    name: str, root: Path, folders: dict[str, str], labels: dict[str, int], classes: tuple[str, ...]
) -> ImageDomain:
    """Return all images of the class folders whose plain name is in `labels`."""
    samples: list[tuple[str, int]] = []
    passed_over = _beside(root)
    above = (Path(os.path.realpath(root)),)
    for key, folder in folders.items():
        if key in labels:
            paths = list(_images_below(root, folder, passed_over, above))
            _require_images(root / folder, paths)
            samples.extend((path, labels[key]) for path in paths)
    return _domain(name, root, sorted(samples), classes, passed_over)


def _beside(root: Path) -> Counter[str]:
    """Return what lies directly in a folder of class folders and is none."""
    passed_over: Counter[str] = Counter()
    for entry in os.scandir(root):
        if entry.is_dir():
            if _is_left_out(entry.name):
                passed_over[_LEFT_OUT_FOLDER] += 1
        else:
            passed_over[_BESIDE if _is_image(entry.name) else _why_not(entry.name)] += 1
    return passed_over


def _domain(
    name: str,
    root: Path,
    samples: list[tuple[str, int]],
    classes: tuple[str, ...],
    passed_over: Mapping[str, int] | None = None,
) -> ImageDomain:
    _require_utf8(root, (path for path, _ in samples))
    labels = np.fromiter((label for _, label in samples), dtype=np.int64, count=len(samples))
    return ImageDomain(name, root, [path for path, _ in samples], labels, classes, passed_over=dict(passed_over or {}))


class _Quarantine:
    """The files of a quarantine list, and which of its entries were met.

    Raises:
        UsageError: the list cannot be read.
    """

    def __init__(self, listed: Path | None) -> None:
        self._listed, self._entries = listed, frozenset(() if listed is None else read_list(listed))
        self._met: set[str] = set()
        self._roots: list[str] = []

    def without(self, domain: ImageDomain) -> ImageDomain:
        """Return the domain without the files of the list, or without the samples of a pack's shards on it.

        Raises:
            UsageError: nothing of a class is left.
        """
        if not self._entries:
            return domain
        self._roots.append(os.path.abspath(domain.root))
        kept = []
        for i in range(len(domain)):
            names = {os.path.abspath(domain.file(i))}
            if domain.packed is not None:
                names.add(os.path.abspath(domain.packed.file(i)))
            listed = names & self._entries
            self._met |= listed
            if not listed:
                kept.append(i)
        if len(kept) == len(domain):
            return domain
        rest = domain.take(kept)
        emptied = sorted(set(domain.labels.tolist()) - set(rest.labels.tolist()))
        if emptied:
            names_of = [domain.classes[label] if label != UNKNOWN else "the domain" for label in emptied]
            raise UsageError(
                "--quarantine",
                found=f"every image of {_some(names_of)} in {domain.root}",
                expected="at least one image left of each class",
            )
        return rest

    def warn_of_strangers(self) -> None:
        """Warn of entries that should have been met: those below the domains' folders, or all if none was."""
        below = tuple(f"{root}{os.sep}" for root in self._roots)
        strangers = sorted(entry for entry in self._entries - self._met if not self._met or entry.startswith(below))
        if strangers:
            message = f"{self._listed}: {len(strangers)} of {len(self._entries)} entries are no images here"
            warnings.warn(f"{message}: {_some(strangers, 3)}", UsageWarning, stacklevel=3)


def _warn_of_pictures(domain: ImageDomain) -> None:
    """Warn of what looks like pictures among what was passed over. `data verify` reports everything else."""
    pictures = [
        reason for reason in domain.passed_over if reason == _BESIDE or reason.removeprefix(".") in _OTHER_PICTURES
    ]
    if pictures:
        warnings.warn(f"domain {domain.name}: {domain.told_passed_over()}", UsageWarning, stacklevel=4)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _class_folders(root: Path) -> dict[str, str]:
    """Return class folders by plain name, in sorted order."""
    found: dict[str, str] = {}
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_left_out(entry.name))
    _require_utf8(root, names)
    for name in names:
        if plain_name(name) in found:
            raise UsageError(
                str(root),
                found=f"the folders '{found[plain_name(name)]}' and '{name}'",
                expected="class names that differ by more than case, spaces, hyphens and the encoding of accents",
                remedy="merge or rename one of them",
            )
        found[plain_name(name)] = name
    return found


def _images_in(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if _is_image(entry.name) and not entry.is_dir()]


def _images_below(root: Path, folder: str, passed_over: Counter[str], above: tuple[Path, ...] = ()) -> Iterator[str]:
    """Yield paths of all images in `folder` and below, relative to `root`.

    Symbolic links are followed, except to a folder that they lie in: images would be found again and again. What is no
    regular file counts, too: whoever reads it says so.

    Args:
        passed_over: counts what is no image. above: the real paths of the folders on the way here.

    Raises:
        OSError: a folder cannot be read.
    """
    real = Path(os.path.realpath(root / folder))
    if any(known.is_relative_to(real) for known in above):
        return
    with os.scandir(root / folder) as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.is_dir():
                if _is_left_out(entry.name):
                    passed_over[_LEFT_OUT_FOLDER] += 1
                else:
                    yield from _images_below(root, path, passed_over, (*above, real))
            elif _is_image(entry.name):
                yield path
            else:
                passed_over[_why_not(entry.name)] += 1


def _why_not(name: str) -> str:
    if name.startswith("."):
        return _HIDDEN
    return os.path.splitext(name)[1].lower() or "without an ending"


def _is_left_out(folder_name: str) -> bool:
    """Hidden folders, and those of archive tools (``__MACOSX``) and network disks (``@eaDir``), hold no samples."""
    return folder_name.startswith((".", "__")) or folder_name == "@eaDir"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _require_images(place: Path, found: list[str] | list[tuple[str, int]]) -> None:
    if not found:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(str(place), found="no image", expected=f"at least one file ({kinds})")


def _require_utf8(root: Path, names: Iterable[str]) -> None:
    bad = [repr(os.fsencode(name)) for name in names if not name.isascii() and not _is_utf8(name)]
    if bad:
        raise UsageError(
            str(root),
            found=f"{len(bad)} names that are not UTF-8: {_some(bad)}",
            expected="file names in UTF-8",
            remedy="rename them",
        )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(names: Iterable[str], at_most: int = 8) -> str:
    listed = list(names)
    more = f" and {len(listed) - at_most} more" if len(listed) > at_most else ""
    return (", ".join(listed[:at_most]) + more) or "nothing"
