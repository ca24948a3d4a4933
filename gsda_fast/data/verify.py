"""`data verify`: what a data set holds against what was published, and every file that cannot be read.

A JPEG with a sound header and its end marker, and a PNG whose checksums all hold, pass without being decoded; whatever
else there is, is decoded as the torch loader would. So a file passes if and only if both loaders can read it.

What was found is remembered, for each folder or list of files, under ``$XDG_CACHE_HOME/gsda_fast/verified``, together
with a digest of all names, sizes and times of change, and of the versions of the libraries that read them: good files
that are as they were are not opened again. Bad ones are: permissions that are given, and a disk that answers again,
leave no trace in size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gsda_fast.data.benchmarks import Benchmark, find_benchmark
from gsda_fast.data.digits import cache_home
from gsda_fast.data.domains import ImageDomain, open_domain, open_pair
from gsda_fast.data.torch_loader import MOST_PIXELS, image_threads, png_damage, read_image
from gsda_fast.errors import UsageError, UsageWarning

FilesDone = Callable[[str, int, int], None]
"""Called with (what is worked on, files done, files in all)."""

_SHOWN = 5  # files named by an error message
_FORMAT = "2"  # of what is remembered: another number makes everything be checked again
_READ_BY = ("pillow", "torchvision")  # another version may read other files; the digest of a pack asks neither


@dataclass(frozen=True)
class Finding:
    """What verification found in one domain.

    Attributes:
        name: of the domain, as known on the command line.
        domain: its files; None where it cannot be opened, and `error` says why.
        expected: published number of images, None where there is none.
        unreadable: (full path, what is wrong) of every file that cannot be read.
    """

    name: str
    domain: ImageDomain | None = None
    expected: int | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""

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
    workers: int = 0,
    progress: FilesDone | None = None,
) -> list[Finding]:
    """Checks the domains of a task: the two that are named or, where none is, all that its papers use.

    Args:
        task, source, target, data_root: as for `open_pair`.
        workers: threads; 0 = the usable cores.
        progress: called after each file.

    Raises:
        UsageError: there is no such task, or no such domain in it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # counts that differ: the table says so
        if task == "folder":
            opened = _open_folders(source, target, data_root)
        else:
            opened = _open_domains(find_benchmark(task), source, target, data_root)
    checked = []
    for finding in opened:
        bad = [] if finding.domain is None else unreadable_files(finding.domain, workers, progress)
        checked.append(replace(finding, unreadable=bad))
    return checked


def _open_folders(source: str | None, target: str | None, data_root: Path | None) -> list[Finding]:
    try:
        pair = open_pair("folder", source, target, data_root)
    except UsageError as error:
        return [Finding("folder", error=str(error))]
    return [Finding(domain.name, domain) for domain in pair]


def _open_domains(
    benchmark: Benchmark, source: str | None, target: str | None, data_root: Path | None
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
            domain = open_domain(benchmark.name, facts.name, data_root, partial=as_target)
            findings.append(Finding(shown, domain, expected))
        except UsageError as error:
            findings.append(Finding(shown, expected=expected, error=str(error)))
    return findings


def require_readable(task: str, *domains: ImageDomain, workers: int = 0, progress: FilesDone | None = None) -> None:
    """Checks every file of the domains before a training relies on them.

    Raises:
        UsageError: some cannot be read; the message names them.
    """
    bad = [file for domain in domains for file in unreadable_files(domain, workers, progress)]
    if bad:
        listed = "; ".join(f"{path} ({problem})" for path, problem in bad[:_SHOWN])
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise UsageError(
            "data",
            found=f"{len(bad)} unreadable files: {listed}{more}",
            expected="readable images",
            remedy=f"repair them, or run `python -m gsda_fast.data verify {task} --quarantine LIST` with the same "
            "data options and then train with --quarantine LIST",
        )


def unreadable_files(domain: ImageDomain, workers: int = 0, progress: FilesDone | None = None) -> list[tuple[str, str]]:
    """(full path, what is wrong) of every file of a domain that cannot be read.

    Where nothing changed since the last time, only the files that were bad then are looked at.
    """
    if domain.rows is not None:  # read and checked when the domain was opened
        return []
    frames = domain.frames
    files = [domain.file(i) for i in range(len(domain))] if frames is None else frames.files()
    check, read_by = (file_problem, _READ_BY) if frames is None else (frames.problem, ())
    with _pool(workers) as pool:
        state = _digest(files, pool.map(file_state, files), read_by)
        memory = _memory_of(domain)
        known = _recall(memory, state)
        in_doubt = files if known is None else [path for path, _ in known]
        bad = []
        for i, problem in enumerate(pool.map(check, in_doubt)):
            if problem:
                bad.append((in_doubt[i], problem))
            if progress is not None:
                progress(domain.name, i + 1, len(in_doubt))
    if bad != known:
        _remember(memory, state, bad)
    return bad


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    with warnings.catch_warnings(), image_threads(workers, "verify") as pool:
        # An image too large is a finding, in words of our own.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield pool


def file_problem(path: str) -> str:
    """Why a file cannot be read as an image; nothing where it can."""
    try:
        if _surely_sound(path):
            return ""
        read_image(path, 3)
    except UsageError as error:
        return error.found
    return ""


def _surely_sound(path: str) -> bool:
    """Whether a glance at the file is enough. False means doubt: only decoding it tells."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        with Image.open(BytesIO(data)) as header:
            if header.width * header.height > MOST_PIXELS:
                return False
            if header.format == "JPEG":
                return data.rstrip(b"\0").endswith(b"\xff\xd9")
            return header.format == "PNG" and getattr(header, "n_frames", 1) == 1 and not png_damage(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


# --------------------------------------------------------------------------------------------------- what is remembered


def file_state(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds; -1 where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _digest(files: list[str], states: Iterator[tuple[int, int]], read_by: tuple[str, ...]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for name in read_by:
        digest.update(f"{name} {version(name)}\0".encode())
    for path, state in zip(files, states):
        digest.update(f"{path}\0{state[0]} {state[1]}\0".encode())
    return digest.hexdigest()


def _memory_of(domain: ImageDomain) -> Path:
    # A partial target is other files of the same folder, a pack holds several domains in one.
    place = f"{domain.root.resolve()}\0{domain.name}\0{len(domain)}"
    return cache_home() / "verified" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"


def _recall(memory: Path, state: str) -> list[tuple[str, str]] | None:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
        if content["state"] == state:
            return [(path, problem) for path, problem in content["unreadable"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing remembered, or nothing of use: the files are looked at
    return None


def _remember(memory: Path, state: str, bad: list[tuple[str, str]]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"state": state, "unreadable": bad}), encoding="utf-8")
        temporary.replace(memory)
    except OSError as error:
        told = f"cannot remember what was verified: {memory.parent}: {error.strerror}"
        warnings.warn(told, UsageWarning, stacklevel=2)


# ------------------------------------------------------------------------------------------------ what the user is told


@contextmanager
def progress_bars(console: Console) -> Iterator[FilesDone]:
    """One bar for each thing that is worked on, while there is a terminal to show it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done)

        yield show


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
    """Adds every unreadable file to a list, one full path a line.

    Returns:
        The number of files on the list now.

    Raises:
        UsageError: the list cannot be written.
    """
    try:
        earlier = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        bad = {os.path.abspath(path) for finding in findings for path, _ in finding.unreadable}
        lines = sorted(bad.union(line.strip() for line in earlier if line.strip()))
        temporary = listed.with_name(f".{listed.name}.{os.getpid()}")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        temporary.replace(listed)
    except (OSError, UnicodeDecodeError) as error:
        found = f"{listed} ({error})"
        raise UsageError("--quarantine", found=found, expected="a text file that can be written") from error
    return len(lines)
