import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gsda_fast.data.pictures.packages import PACKAGES, Package, fetch, find, lacking_clients, require_room
from gsda_fast.errors import UsageError
from tests.picture_packages import write_packages


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Package]:
    """Clients that store files of a folder, as apt-get and npm do, and count their calls; no others can be found."""
    packages, _ = write_packages(tmp_path / "registry")
    clients = tmp_path / "bin"
    clients.mkdir()
    for package in packages:
        argument = package.command[-1].replace("/", ".")
        (tmp_path / "registry" / package.file).rename(tmp_path / "registry" / argument)
        (tmp_path / "registry" / f"{argument}.name").write_text(package.file)
    for client in ("apt-get", "npm"):
        script = clients / client
        script.write_text(
            f"#!/bin/sh\necho {client} >> {tmp_path}/calls\nfor last; do :; done\n"
            f"last={tmp_path}/registry/$(echo $last | /usr/bin/tr / .)\n"
            '[ -f "$last" ] || { echo noise; echo "E: Unable to locate it"; exit 100; }\n'
            'read -r name < "$last.name" || true; /bin/cp "$last" "$name"\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(clients))
    return packages


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text().splitlines())


def test_packages_are_fetched_once(tmp_path: Path, registry: list[Package]) -> None:
    seen: list[tuple[str, int, int]] = []
    fetched = fetch(registry, tmp_path / "cache", lambda *done: seen.append(done))
    assert {name: path.name for name, path in fetched.items()} == {each.name: each.file for each in registry}
    assert ("fetch stamps", registry[0].size, registry[0].size) in seen
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(each.file for each in registry)
    assert fetch(registry, tmp_path / "cache") == fetched
    assert calls(tmp_path) == 3
    fetched["stamps"].unlink()
    fetch(registry, tmp_path / "cache")
    assert calls(tmp_path) == 4


def test_a_registry_out_of_reach_is_one_line_and_leaves_nothing(tmp_path: Path, registry: list[Package]) -> None:
    lost = replace(registry[1], version="9")
    with pytest.raises(
        UsageError, match=r"games: found 'E: Unable to locate it' from apt-get.*--packages DIR"
    ) as error:
        fetch([registry[0], lost, registry[2]], tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "cache") == [registry[0].file]


def test_another_file_than_was_published_is_refused(tmp_path: Path, registry: list[Package]) -> None:
    other = replace(registry[0], sha256=hashlib.sha256(b"").hexdigest())
    with pytest.raises(UsageError, match=r"found sha256 .* expected e3b0c44298fc1c14.*stamps 1-2 \(Debian 12"):
        fetch([other], tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_packages_of_a_folder(tmp_path: Path) -> None:
    packages, _ = write_packages(tmp_path)
    assert find(packages, tmp_path) == {each.name: tmp_path / each.file for each in packages}
    (tmp_path / packages[2].file).unlink()
    with pytest.raises(UsageError, match=r"without icons-json-2.0.tgz.*`npm pack --silent @icons/json@2.0`"):
        find(packages, tmp_path)
    (tmp_path / packages[0].file).write_bytes(b"cut short")
    with pytest.raises(UsageError, match=r"stamps_1-2_all\.deb: found sha256"):
        find(packages[:1], tmp_path)


def test_clients_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: list[Package]) -> None:
    assert lacking_clients(registry) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lacking_clients(registry) == {"apt-get": registry[:2], "npm": registry[2:]}
    with pytest.raises(UsageError, match="no apt-get that runs"):
        fetch(registry, tmp_path / "cache")


def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 5_000_000))  # type: ignore[attr-defined]
    require_room(tmp_path, 5_000_000, "them")
    with pytest.raises(UsageError, match=r"found 5 MB of free space; expected 6 MB for them"):
        require_room(tmp_path, 6_000_000, "them")


def test_no_registry_is_named() -> None:
    """Packages come from wherever the clients of this machine look."""
    for package in PACKAGES:
        assert "//" not in " ".join(package.command)
        assert package.command[-1] in (f"{package.name}={package.version}", f"{package.name}@{package.version}")
