"""Building the class folders of `pictures`, their manifest, and the comparison of a folder with it.

::

    ROOT/<domain>/<class>/<name>.png     224 x 224 RGB
    ROOT/manifest.json                   where each picture comes from, under which licence, and its digest

Domains are drawn in ``ROOT/.building`` and moved when they are whole; the manifest is written after that. A digest is
of the pixels, not of the file: how a PNG is compressed differs between builds of Pillow, what it shows does not.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from gsda_fast.commands import program
from gsda_fast.data.decoding import read_image
from gsda_fast.data.pictures.archives import read_members
from gsda_fast.data.pictures.drawing import SIDE, draw, require_renderer
from gsda_fast.data.pictures.packages import (
    PACKAGES,
    BytesDone,
    Package,
    fetch,
    find,
    lacking_clients,
    require_room,
)
from gsda_fast.errors import UsageError
from gsda_fast.files import atomic_file, is_path_below

MANIFEST = "manifest.json"
FORMAT = 1
DIGEST = "973bded9d5547b5659f9283211578bfeecd0291368b2dc5ffe5639c19bd6fa02"
"""Of all four domains, drawn with the versions of Pillow and resvg-py in constraints.txt."""

_BUILDING = ".building"
_MADE_WITH = ("pillow", "resvg-py")
_BYTES_A_PICTURE = 40_000  # on average 19 kB, rounded up to whole blocks, and some to spare
_AT_ONCE = 64  # pictures handed to the threads together


@dataclass(frozen=True)
class Picture:
    """One entry of the list of pictures: what it is in the benchmark, and where it comes from."""

    domain: str
    class_name: str
    name: str
    package: str
    member: str
    """as `archives` names files in packages"""
    licence: str
    """SPDX, or ``public-domain``"""

    @property
    def file(self) -> str:
        """Its path below the root."""
        return f"{self.domain}/{self.class_name}/{self.name}.png"


@dataclass(frozen=True)
class Entry:
    """One picture in a manifest."""

    file: str
    package: str
    original: str
    licence: str
    sha256: str
    """of its pixels, `SIDE` x `SIDE` x 3 bytes"""


@dataclass(frozen=True)
class Manifest:
    """What a build wrote."""

    digest: str
    """of all files and their digests"""
    made_with: Mapping[str, str]
    pictures: tuple[Entry, ...]
    """sorted by file"""

    @property
    def domains(self) -> tuple[str, ...]:
        """Those that were built."""
        return tuple(sorted({entry.file.partition("/")[0] for entry in self.pictures}))


def frozen_list() -> list[Picture]:
    """Return the pictures of the benchmark, sorted by domain, class and name."""
    text = (files("gsda_fast.data.pictures") / "pictures.csv").read_text(encoding="utf-8")
    rows = csv.reader(io.StringIO(text))
    next(rows)
    return [Picture(*row) for row in rows]


def build(
    root: Path,
    *,
    cache: Path,
    packages: Path | None = None,
    domains: Sequence[str] | None = None,
    progress: BytesDone | None = None,
    pictures: Sequence[Picture] | None = None,
    sources: Sequence[Package] = PACKAGES,
) -> Manifest:
    """Build the domains that are not there yet.

    An interrupted call goes on where it stopped. A call that finds everything there reads the manifest and no more.

    Args:
        root: folder of the benchmark, made where it is missing.
        cache: where fetched packages are kept.
        packages: folder that holds the packages already; nothing is fetched then.
        domains: those to build; all if None.
        progress: called while packages are fetched and pictures drawn.
        pictures: the list to build; the benchmark's if None.
        sources: the packages that the list names.

    Returns:
        The manifest of everything that is now in `root`.

    Raises:
        UsageError: a package that cannot be had, too little space, a folder that cannot be written or that another
            process is building in.
    """
    listed = frozen_list() if pictures is None else pictures
    known = sorted({picture.domain for picture in listed})
    unknown = sorted(set(domains or ()) - set(known))
    if unknown:
        raise UsageError("--domains", found=unknown[0], expected=" ".join(known))
    earlier = read_manifest(root) if (root / MANIFEST).is_file() else None
    kept = {entry.file: entry for entry in earlier.pictures} if earlier else {}
    wanted = [picture for picture in listed if picture.domain in (domains or known)]
    left = [picture for picture in wanted if picture.file not in kept or not (root / picture.domain).is_dir()]
    if earlier is not None and not left:
        return earlier
    require_renderer()
    with _writing(root):
        needed = [package for package in sources if package.name in {picture.package for picture in left}]
        if packages is not None:
            paths = find(needed, packages, progress)
        else:
            _require_clients(needed, cache, wanted)
            paths = fetch(needed, cache, progress)
        require_room(root, _BYTES_A_PICTURE * len(left), "the pictures")
        rebuilt = {picture.domain for picture in left}
        part = [picture for picture in listed if picture.domain in rebuilt]
        entries = _draw_missing(root, part, paths, progress)
        for domain in sorted(rebuilt):
            (root / _BUILDING / domain).rename(root / domain)
        others = (entry for entry in kept.values() if entry.file.partition("/")[0] not in rebuilt)
        earlier = write_manifest(root, [*others, *entries])
        shutil.rmtree(root / _BUILDING, ignore_errors=True)
    assert earlier is not None
    return earlier


def verify(root: Path, progress: BytesDone | None = None) -> list[str]:
    """Compare a folder with its manifest.

    Args:
        root: folder of the benchmark. progress: called after each picture.

    Returns:
        What differs, a line for each picture; nothing where all is as it was built.

    Raises:
        UsageError: there is no manifest, or it is damaged.
    """
    manifest = read_manifest(root)
    problems = []
    if manifest.digest != manifest_digest(manifest.pictures):
        problems.append(f"{MANIFEST}: its digest is not that of its pictures")
    for done, entry in enumerate(manifest.pictures, start=1):
        try:
            if pixel_digest(root / entry.file) != entry.sha256:
                problems.append(f"{entry.file}: other pixels than were built")
        except UsageError as error:
            problems.append(f"{entry.file}: {error.found}")
        except ValueError as error:
            problems.append(f"{entry.file}: {error}")
        if progress is not None:
            progress("manifest", done, len(manifest.pictures))
    expected = {entry.file for entry in manifest.pictures}
    there = {path.relative_to(root).as_posix() for domain in manifest.domains for path in root.glob(f"{domain}/*/*")}
    return problems + [f"{file}: not in the manifest" for file in sorted(there - expected)]


def read_manifest(root: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises:
        UsageError: there is none, or it is damaged or of another version of this package.
    """
    path = root / MANIFEST
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']}")
        manifest = msgspec.convert(table, Manifest)
        outside = next((entry.file for entry in manifest.pictures if not _is_picture_name(entry.file)), None)
        if outside is not None:
            raise ValueError(f"the picture {outside!r}, which is not DOMAIN/CLASS/NAME")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError) as error:
        found = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UsageError(
            str(path),
            found=str(found),
            expected=f"the manifest of a build, format {FORMAT}",
            remedy=f"remove the folder and run `{program('data')} build pictures`",
        ) from error


def _is_picture_name(file: str) -> bool:
    return is_path_below(file) and file.count("/") == 2


def write_manifest(root: Path, entries: Iterable[Entry]) -> Manifest:
    """Write the manifest of these pictures, in place of an earlier one."""
    pictures = tuple(sorted(entries, key=lambda entry: entry.file))
    manifest = Manifest(manifest_digest(pictures), {name: version(name) for name in _MADE_WITH}, pictures)
    table = {
        "format": FORMAT,
        "digest": manifest.digest,
        "made_with": manifest.made_with,
        "pictures": [asdict(entry) for entry in pictures],
    }
    with atomic_file(root / MANIFEST) as file:
        file.write(json.dumps(table, indent=1).encode())
    return manifest


def manifest_digest(pictures: Iterable[Entry]) -> str:
    """SHA-256, hexadecimal, of the names and the digests of the pictures, in the order of the names."""
    lines = sorted(f"{entry.file} {entry.sha256}\n" for entry in pictures)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def pixel_digest(path: Path) -> str:
    """SHA-256, hexadecimal, of the pixels of a picture, row by row, as RGB bytes.

    Raises:
        UsageError: it cannot be read. ValueError: it is no picture of this benchmark's size.
    """
    pixels = read_image(str(path), 3, "stored")
    if pixels.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{pixels.shape[2]}x{pixels.shape[1]} pixels, not {SIDE}x{SIDE}")
    return hashlib.sha256(pixels.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()


def _draw_missing(
    root: Path, pictures: Sequence[Picture], packages: Mapping[str, Path], progress: BytesDone | None
) -> list[Entry]:
    """Draw whole domains below `_BUILDING`, except for what an interrupted call has drawn."""
    building = root / _BUILDING
    building.mkdir(exist_ok=True)
    for domain in {picture.domain for picture in pictures}:
        if (root / domain).is_dir():  # moved, but a kill came before the manifest; or the list has changed
            shutil.rmtree(building / domain, ignore_errors=True)
            (root / domain).rename(building / domain)
    digests = {picture.file: digest for picture in pictures if (digest := _drawn(building / picture.file))}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="draw") as pool:
        for package, path in packages.items():
            own = [picture for picture in pictures if picture.package == package]
            members = {picture.member: picture for picture in own if picture.file not in digests}
            if not members:
                continue
            contents = read_members(path, members)
            done = len(own) - len(members)
            while part := list(islice(contents, _AT_ONCE)):
                jobs = [(building, members[name], content) for name, content in part]
                for picture, digest in pool.map(_draw, jobs):
                    digests[picture.file] = digest
                    done += 1
                    if progress is not None:
                        progress(f"draw {package}", done, len(own))
    listed = {picture.file for picture in pictures}
    for path in [path for path in building.glob("*/*/*") if path.relative_to(building).as_posix() not in listed]:
        path.unlink()
    return [Entry(each.file, each.package, each.member, each.licence, digests[each.file]) for each in pictures]


def _drawn(path: Path) -> str | None:
    """Return the digest of a picture that is there already; None where it is not, or is damaged."""
    try:
        return pixel_digest(path)
    except ValueError:
        return None


def _draw(job: tuple[Path, Picture, bytes]) -> tuple[Picture, str]:
    building, picture, content = job
    try:
        image = draw(picture.member, content)
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(
            f"{picture.package} {picture.member}", found=f"what cannot be drawn ({error})", expected="a picture"
        ) from error
    path = building / picture.file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)
    return picture, hashlib.sha256(image.tobytes()).hexdigest()


def _require_clients(needed: Sequence[Package], cache: Path, wanted: Sequence[Picture]) -> None:
    """Raise one line that names the domains that can be built here and the way to the rest."""
    absent = [package for package in needed if not (cache / package.file).is_file()]
    lacking = lacking_clients(absent)
    if not lacking:
        return
    names = {package.name for packages in lacking.values() for package in packages}
    out_of_reach = {picture.domain for picture in wanted if picture.package in names}
    can = sorted({picture.domain for picture in wanted} - out_of_reach)
    commands = [" ".join(package.command) for packages in lacking.values() for package in packages]
    raise UsageError(
        "packages",
        found=f"no {' and no '.join(lacking)} here, which {', '.join(sorted(out_of_reach))} need",
        expected=f"both, or --domains {' '.join(can)}" if can else "them",
        remedy=f"or store what `{'; '.join(commands)}` stores on another machine, and give --packages DIR",
    )


@contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Hold the folder for this process, and turn what the disk refuses into one line.

    Raises:
        UsageError: another process builds in it, or it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".building.lock", timeout=0):
            yield
    except Timeout as error:
        raise UsageError(str(root), found="another process that builds in it", expected="one at a time") from error
    except OSError as error:
        raise UsageError(
            str(error.filename or root),
            found=f"{error.strerror}",
            expected="a folder that can be written",
            remedy="the same command goes on from what is done",
        ) from error
