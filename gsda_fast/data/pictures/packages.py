"""The packages that the pictures come from, and how to get them: by name and version, with their ordinary clients."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Literal

from gsda_fast.data.packed_images import file_digest
from gsda_fast.errors import UsageError

BytesDone = Callable[[str, int, int], None]
"""Called with what is worked on, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Package:
    """One file that holds pictures."""

    name: str
    version: str
    client: Literal["apt-get", "npm"]
    file: str
    """the name under which the client stores it"""
    size: int
    """bytes"""
    sha256: str

    @property
    def command(self) -> tuple[str, ...]:
        """What stores the file in the current folder."""
        if self.client == "npm":
            return "npm", "pack", "--silent", f"{self.name}@{self.version}"
        return "apt-get", "download", "--quiet", f"{self.name}={self.version}"


PACKAGES: tuple[Package, ...] = (
    Package(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "apt-get",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        160_880_444,
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
    Package(
        "gcompris-qt-data",
        "3.1-2",
        "apt-get",
        "gcompris-qt-data_3.1-2_all.deb",
        44_196_292,
        "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
    ),
    Package(
        "openclipart-png",
        "1:0.18+dfsg-19",
        "apt-get",
        "openclipart-png_1%3a0.18+dfsg-19_all.deb",
        130_910_028,
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    ),
    Package(
        "@iconify/json",
        "2.2.535",
        "npm",
        "iconify-json-2.2.535.tgz",
        104_043_282,
        "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
    ),
)


def find(packages: Sequence[Package], folder: Path, progress: BytesDone | None = None) -> dict[str, Path]:
    """Return packages that lie in a folder already, checked.

    Args:
        packages: those wanted. folder: where their files are. progress: called after each.

    Returns:
        The file of each, by the package's name.

    Raises:
        UsageError: one is missing, or is another file than the benchmark was made from.
    """
    missing = [package for package in packages if not (folder / package.file).is_file()]
    if missing:
        raise UsageError(
            "--packages",
            found=f"{folder} without {', '.join(package.file for package in missing)}",
            expected="the files that these commands store: " + _commands(missing),
        )
    for number, package in enumerate(packages, start=1):
        _require_digest(folder / package.file, package)
        if progress is not None:
            progress("check packages", number, len(packages))
    return {package.name: folder / package.file for package in packages}


def fetch(packages: Sequence[Package], cache: Path, progress: BytesDone | None = None) -> dict[str, Path]:
    """Return packages in a cache, fetched where they are not there; each appears whole and checked, or not at all.

    Args:
        packages: those wanted. cache: a folder, made where it is missing. progress: called while one is fetched.

    Returns:
        The file of each, by the package's name.

    Raises:
        UsageError: no room, no client, a registry out of reach, or another file than the benchmark was made from.
    """
    absent = [package for package in packages if not (cache / package.file).is_file()]
    cache.mkdir(parents=True, exist_ok=True)
    require_room(cache, sum(package.size for package in absent), "the packages")
    for package in absent:
        _fetch(package, cache, progress)
    return find(packages, cache, progress)


def lacking_clients(packages: Sequence[Package]) -> dict[str, list[Package]]:
    """Return the packages that no client on this machine can fetch, by the client that they need."""
    lacking: dict[str, list[Package]] = {}
    for package in packages:
        if shutil.which(package.client) is None:
            lacking.setdefault(package.client, []).append(package)
    return lacking


def require_room(folder: Path, needed: int, for_what: str) -> None:
    """Raise where a disk has less space left than needed.

    Args:
        folder: exists. needed: bytes. for_what: named in the message.

    Raises:
        UsageError: there is too little space.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            str(folder),
            found=f"{free / 1e6:.0f} MB of free space",
            expected=f"{needed / 1e6:.0f} MB for {for_what}",
            remedy="free some, or set XDG_CACHE_HOME or --data-root to another disk",
        )


def _fetch(package: Package, cache: Path, progress: BytesDone | None) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as temporary:
        folder = Path(temporary)
        with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
            try:
                process = subprocess.Popen(
                    package.command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            except OSError as error:
                raise _not_fetched(package, f"no {package.client} that runs ({error.strerror})") from error
            try:
                while _runs(process):
                    if progress is not None:
                        progress(f"fetch {package.name}", min(package.size - 1, _bytes_below(folder)), package.size)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
        file = folder / package.file
        if process.returncode or not file.is_file():
            # apt marks what went wrong with E:, npm with `npm error`; the rest is about progress.
            of_interest = [line for line in lines if line.startswith(("E:", "npm ERR", "npm error"))] or lines[-1:]
            message = shorten(" ".join(of_interest), 200, placeholder=" ...") or f"exit code {process.returncode}"
            raise _not_fetched(package, f"'{message}' from {package.client}")
        if progress is not None:
            progress(f"fetch {package.name}", package.size, package.size)
        _require_digest(file, package)
        file.replace(cache / package.file)


def _runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # renamed since it was listed
            continue
    return total


def _not_fetched(package: Package, found: str) -> UsageError:
    return UsageError(
        package.name,
        found=found,
        expected=f"{package.file} from `{' '.join(package.command)}`",
        remedy="the same command goes on once it can be reached; or store the file elsewhere and give --packages DIR",
    )


def _require_digest(path: Path, package: Package) -> None:
    found = file_digest(path)
    if found != package.sha256:
        release = " (Debian 12 has it; other releases may have rebuilt it)" if package.client == "apt-get" else ""
        raise UsageError(
            str(path),
            found=f"sha256 {found[:16]}...",
            expected=f"{package.sha256[:16]}..., the file of {package.name} {package.version}{release}",
            remedy="remove it, and give the right file with --packages DIR if it comes again",
        )


def _commands(packages: Sequence[Package]) -> str:
    return " and ".join(f"`{' '.join(package.command)}`" for package in packages)
