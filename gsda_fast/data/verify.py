"""`data verify`: what a data set holds against what was published, and every file that cannot be read.

Every file is decoded as the loaders decode it (`decoding.inspect`), so a file passes if and only if they can read it.

What was found is remembered, for each folder or list of files, under ``$XDG_CACHE_HOME/gsda_fast/verified``: a line for
every few thousand files as soon as they are done, with a digest of their names, sizes and times of change, and of the
versions of the libraries that read them. Good files that are as they were are not opened again. Bad ones are:
permissions that are given, and a disk that answers again, leave no trace in size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.table import Table
from rich.text import Text

from gsda_fast.commands import program
from gsda_fast.console import FilesDone
from gsda_fast.data.benchmarks import Benchmark, Orientation, find_benchmark
from gsda_fast.data.decoding import MOST_PIXELS, Inspection, inspect
from gsda_fast.data.digits import cache_home
from gsda_fast.data.domains import ImageDomain, open_domain, open_pair
from gsda_fast.data.quarantine import list_line, read_list
from gsda_fast.data.torch_loader import image_threads
from gsda_fast.errors import UsageError, UsageWarning
from gsda_fast.files import atomic_file

_SHOWN = 5  # files named by an error message
_BLOCK = 2000  # files that are remembered together
_FORMAT = "4"  # of what is remembered: another number makes everything be checked again
_ENDINGS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{f".{name.lower()}": name for name in ("PNG", "BMP", "GIF", "WEBP", "AVIF")},
}
_READ_BY = ("pillow", "torchvision")  # another version may read other files; the digest of a pack asks neither


@dataclass(frozen=True)
class Finding:
    """What verification found in one domain.

    Attributes:
        name: of the domain, as known on the command line.
        domain: its files; None where it cannot be opened, and `error` says why.
        expected: published number of images, None where there is none.
        unreadable: (full path, what is wrong) of every file that cannot be read.
        misnamed: (full path, format) of every file that holds another format than its name says. It is read all the
            same.
        turned: files with an orientation other than upright. halved: photos so large that they are decoded at half
            their width and height.
    """

    name: str
    domain: ImageDomain | None = None
    expected: int | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    misnamed: list[tuple[str, str]] = field(default_factory=list)
    turned: int = 0
    halved: int = 0
    error: str = ""

    @property
    def notes(self) -> list[str]:
        """What is no fault, and should not be passed over in silence either: a line each."""
        notes = []
        if self.domain is not None and self.domain.passed_over:
            notes.append(self.domain.told_passed_over())
        if self.misnamed:
            shown = ", ".join(f"{path} ({found})" for path, found in self.misnamed[:_SHOWN])
            more = f" and {len(self.misnamed) - _SHOWN} more" if len(self.misnamed) > _SHOWN else ""
            notes.append(f"{len(self.misnamed)} files with another format than their name says: {shown}{more}")
        if self.turned:
            done = {"exif": "which training applies", "stored": "which training ignores"}
            orientation = self.domain.orientation if self.domain is not None else "stored"
            count = f"{self.turned} images with an orientation other than upright"
            notes.append(f"{count}, {done[orientation]} (--orientation {orientation})")
        if self.halved:
            notes.append(f"{self.halved} photos of more than {MOST_PIXELS} pixels, read at half their width and height")
        return notes

    @property
    def good(self) -> bool:
        """Whether the domain can be trained on. A count that differs from the published one is no fault."""
        return not self.error and not self.unreadable


def verify(
    task: str,
    source: str | None = None,
    target: str | None = None,
    data_root: Path | None = None,
    *,
    orientation: Orientation = "exif",
    workers: int = 0,
    progress: FilesDone | None = None,
) -> list[Finding]:
    """Check the domains of a task: the two that are named or, where none is, all that its papers use.

    Args:
        task, source, target, data_root, orientation: as for `open_pair`.
        workers: threads; 0 = the usable cores.
        progress: called after each file.

    Raises:
        UsageError: there is no such task, or no such domain in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # counts that differ: the table says so
        if task == "folder":
            opened = _open_folders(source, target, data_root, orientation)
        else:
            opened = _open_domains(find_benchmark(task), source, target, data_root, orientation)
    channels, checked = find_benchmark(task).preprocessing.channels, []
    for finding in opened:
        if finding.domain is not None:
            # Asked for in so many words: a disk may have lost bits of a shard since, which leaves no trace in its time.
            afresh = finding.domain.packed is not None
            found = check_files(finding.domain, workers, progress, channels=channels, afresh=afresh)
            finding = replace(finding, **found._asdict())
        checked.append(finding)
    return checked


def _open_folders(
    source: str | None, target: str | None, data_root: Path | None, orientation: Orientation
) -> list[Finding]:
    try:
        pair = open_pair("folder", source, target, data_root, orientation=orientation)
    except UsageError as error:
        return [Finding("folder", error=str(error))]
    return [Finding(domain.name, domain) for domain in pair]


def _open_domains(
    benchmark: Benchmark, source: str | None, target: str | None, data_root: Path | None, orientation: Orientation
) -> list[Finding]:
    partial = benchmark.target_classes is not None
    if source or target:
        wanted = [(source or benchmark.default_source, False), (target or benchmark.default_target, partial)]
    else:
        papers = {name for pair in benchmark.transfer_tasks for name in pair}
        wanted = [(facts.name, False) for facts in benchmark.domains if facts.name in papers]
        wanted += [(name, True) for name, _ in wanted] if partial else []
    findings = []
    for name, as_target in wanted:
        facts = benchmark.domain(str(name))
        shown = f"{facts.name}, as target" if as_target else facts.name
        expected = facts.expected_target_images if as_target else facts.expected_images
        try:
            domain = open_domain(benchmark.name, facts.name, data_root, partial=as_target, orientation=orientation)
            findings.append(Finding(shown, domain, expected))
        except UsageError as error:
            findings.append(Finding(shown, expected=expected, error=str(error)))
    return findings


def require_readable(task: str, *domains: ImageDomain, workers: int = 0, progress: FilesDone | None = None) -> None:
    """Check every file of the domains before a training relies on them.

    Raises:
        UsageError: some cannot be read; the message names them.
    """
    channels = find_benchmark(task).preprocessing.channels
    bad = [file for domain in domains for file in unreadable_files(domain, workers, progress, channels=channels)]
    if bad:
        listed = "; ".join(f"{path} ({problem})" for path, problem in bad[:_SHOWN])
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UsageError(
            "data",
            found=f"{len(bad)} unreadable files: {listed}{more}",
            expected="readable images",
            remedy=f"repair them, or run `{program('data')} verify {task} --quarantine LIST` with the same "
            "data options and then train with --quarantine LIST",
        )


class Checked(NamedTuple):
    """What the files of a domain are like: see `Finding`."""

    unreadable: list[tuple[str, str]]
    misnamed: list[tuple[str, str]]
    turned: int
    halved: int


def unreadable_files(
    domain: ImageDomain, workers: int = 0, progress: FilesDone | None = None, *, channels: int = 3
) -> list[tuple[str, str]]:
    """Return (full path, what is wrong) of every file of a domain that cannot be read: see `check_files`."""
    return check_files(domain, workers, progress, channels=channels).unreadable


def check_files(
    domain: ImageDomain,
    workers: int = 0,
    progress: FilesDone | None = None,
    *,
    channels: int = 3,
    afresh: bool = False,
) -> Checked:
    """Look at every file of a domain that is not remembered as good, or (`afresh`) at every file.

    Args:
        domain: its files, or the shards of its pack. workers: threads; 0 = the usable cores.
        progress: called after each file. channels: of the task's images, 3 or 1.
    """
    if domain.rows is not None:  # read and checked when the domain was opened
        return Checked([], [], 0, 0)
    packed = domain.packed
    files = [domain.file(i) for i in range(len(domain))] if packed is None else packed.files()
    check = partial(_checked, channels=channels) if packed is None else partial(_checked_shard, packed.problem)
    key = f"{_FORMAT} {channels} {' '.join(map(version, _READ_BY))}" if packed is None else _FORMAT
    memory = _Memory(domain)
    found: list[_Block] = []
    with _pool(workers) as pool:
        blocks = [files[start : start + _BLOCK] for start in range(0, len(files), _BLOCK)]
        digests = list(pool.map(lambda block: _digest(block, key), blocks))
        known = memory.read()
        if afresh:
            known = {}
        in_doubt = [_in_doubt(block, known.get(digest)) for block, digest in zip(blocks, digests)]
        done, total = 0, sum(map(len, in_doubt))
        for digest, looked_at in zip(digests, in_doubt):
            earlier = known.get(digest)
            # What was good is so still; the rest is looked at again.
            kept = [] if earlier is None else [pair for pair in earlier.misnamed if pair[0] not in looked_at]
            block = _Block(digest, [], kept, *((0, 0) if earlier is None else (earlier.turned, earlier.halved)))
            for path, (problem, file) in zip(looked_at, pool.map(check, looked_at)):
                if problem:
                    block.unreadable.append((path, problem))
                elif file is not None:
                    if file.format != _named_format(path, file.format):
                        block.misnamed.append((path, file.format))
                    turned, halved = block.turned + (file.orientation != 1), block.halved + file.halved
                    block = block._replace(turned=turned, halved=halved)
                done += 1
                if progress is not None:
                    progress(domain.name, done, total)
            found.append(block)
            if block != earlier:
                memory.add(block)
    memory.keep(found)
    return Checked(
        list(chain.from_iterable(block.unreadable for block in found)),
        list(chain.from_iterable(block.misnamed for block in found)),
        sum(block.turned for block in found),
        sum(block.halved for block in found),
    )


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    with warnings.catch_warnings(), image_threads(workers, "verify") as pool:
        # An image too large is a finding, in words of our own; what Pillow says of odd tags concerns no pixel.
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield pool


def file_problem(path: str, channels: int = 3) -> str:
    """Why a file cannot be read as an image; nothing where it can."""
    return _checked(path, channels)[0]


def _checked(path: str, channels: int) -> tuple[str, Inspection | None]:
    """Return what is wrong with a file, or what it is."""
    try:
        return "", inspect(path, channels)
    except UsageError as error:
        return error.found, None


def _named_format(path: str, otherwise: str) -> str:
    """Return the format that a file's name says."""
    return _ENDINGS.get(os.path.splitext(path)[1].lower(), otherwise)


def _checked_shard(problem: Callable[[str], str], path: str) -> tuple[str, None]:
    return problem(path), None


# --------------------------------------------------------------------------------------------------- what is remembered


class _Block(NamedTuple):
    """What was found among some files, which a digest stands for."""

    digest: str
    unreadable: list[tuple[str, str]]
    misnamed: list[tuple[str, str]]
    turned: int
    halved: int


def _in_doubt(files: list[str], earlier: _Block | None) -> list[str]:
    if earlier is None:
        return files
    bad = {path for path, _ in earlier.unreadable}
    return [path for path in files if path in bad] if bad else []


def _digest(files: Sequence[str], key: str) -> str:
    """Of names, sizes and times of change. The time of the entry tells of a change that set back the file's own."""
    digest = hashlib.sha256(key.encode())
    for path in files:
        try:
            status = os.stat(path)
            state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        except OSError:
            state = "gone"
        digest.update(f"{path}\0{state}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


class _Memory:
    """What was found in a domain before: a line of JSON for each block. Lines that are none are passed over."""

    def __init__(self, domain: ImageDomain) -> None:
        # A partial target is other files of the same folder, a pack holds several domains in one.
        place = f"{domain.root.resolve()}\0{domain.name}\0{len(domain)}"
        digest = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()
        self._file = cache_home() / "verified" / f"{digest[:32]}.jsonl"
        self._lines, self._warned = 0, False

    def read(self) -> dict[str, _Block]:
        try:
            lines = self._file.read_bytes().splitlines()
        except OSError:
            return {}
        self._lines = len(lines)
        blocks = (_block(line) for line in lines)
        return {block.digest: block for block in blocks if block is not None}

    def add(self, block: _Block) -> None:
        """Remember a block now: a check that is killed has not been in vain."""
        with self._writing():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                file.write(json.dumps(block._asdict()).encode() + b"\n")
        self._lines += 1

    def keep(self, blocks: list[_Block]) -> None:
        """Forget all but these blocks, where others are there too."""
        if self._lines == len(blocks):
            return
        with self._writing():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._file) as file:
                file.writelines(json.dumps(block._asdict()).encode() + b"\n" for block in blocks)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            pass  # another process that checks the same files was at it at the same time
        except OSError as error:
            if not self._warned:
                message = f"cannot remember what was verified: {self._file.parent}: {error.strerror}"
                warnings.warn(message, UsageWarning, stacklevel=4)
            self._warned = True


def _block(line: bytes) -> _Block | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or set(content) != set(_Block._fields) or type(content["digest"]) is not str:
        return None
    if not all(_is_list_of_pairs(content[name]) for name in ("unreadable", "misnamed")):
        return None
    if not all(type(content[name]) is int and content[name] >= 0 for name in ("turned", "halved")):
        return None
    unreadable, misnamed = (list(map(tuple, content[name])) for name in ("unreadable", "misnamed"))
    return _Block(content["digest"], unreadable, misnamed, content["turned"], content["halved"])


def _is_list_of_pairs(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    return all(isinstance(pair, list) and len(pair) == 2 and all(type(each) is str for each in pair) for pair in values)


# ------------------------------------------------------------------------------------------------ what the user sees


def findings_table(task: str, findings: list[Finding]) -> Table:
    """Found and expected, a row for each domain."""
    table = Table("domain", "classes", "images", "published", "unreadable", "", title=task)
    for finding in findings:
        domain, expected = finding.domain, "-" if finding.expected is None else str(finding.expected)
        if domain is None:
            table.add_row(finding.name, "-", "-", expected, "-", Text("not usable", "red"))
            continue
        present = len({label for label in domain.labels.tolist() if label >= 0})
        remark = Text("unreadable files", "red") if finding.unreadable else Text("good", "green")
        if finding.good and finding.expected not in (None, len(domain)):
            remark = Text("warning: the count differs", "yellow")
        counts = (f"{present} of {domain.num_classes}", str(len(domain)), expected, str(len(finding.unreadable)))
        table.add_row(finding.name, *counts, remark)
    return table


def write_quarantine(listed: Path, findings: list[Finding]) -> int:
    """Add every unreadable file to a list, one full path a line; a list of none is not written.

    Returns:
        The number of files on the list now.

    Raises:
        UsageError: the list cannot be written.
    """
    try:
        earlier = read_list(listed) if listed.exists() else []
        bad = {os.path.abspath(path) for finding in findings for path, _ in finding.unreadable}
        paths = sorted(bad.union(earlier))
        if not paths:
            return 0
        with atomic_file(listed) as file:
            file.writelines(list_line(path) for path in paths)
    except OSError as error:
        found = f"{listed} ({error.strerror})"
        raise UsageError("--quarantine", found=found, expected="a text file that can be written") from error
    return len(paths)
