from pathlib import Path

import pytest

from gsda_fast.data.pictures.archives import icon_svg, read_members, read_rcc
from gsda_fast.errors import UsageError
from tests.picture_packages import ICONS, deb, png, rcc, write_packages


def test_members_of_every_kind_of_package(tmp_path: Path) -> None:
    packages, pictures = write_packages(tmp_path)
    read = {}
    for package in packages:
        wanted = [picture.member for picture in pictures if picture.package == package.name]
        read |= dict(read_members(tmp_path / package.file, wanted))
    assert set(read) == {picture.member for picture in pictures}
    assert read["usr/stamps/dog.png"] == png("brown")
    assert read["usr/share/games.rcc!images/dogs/rex.png"] == png("red")  # compressed there
    assert read["usr/share/games.rcc!images/cats/tom.png"] == png("blue")
    assert read["package/json/set.json!cat"].startswith(b"<svg ")


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    packages, _ = write_packages(tmp_path)
    for member in ("usr/stamps/fox.png", "usr/share/games.rcc!images/dogs/lassie.png"):
        package = packages["games" in member]
        with pytest.raises(UsageError, match=member):
            list(read_members(tmp_path / package.file, [member]))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"!<arch>\n", deb({"a": b"b" * 5000})[:-900]])
def test_a_damaged_package(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a_1_all.deb"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a_1_all\.deb: found (a damaged file|nothing named a)"):
        list(read_members(path, ["a"]))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_resource_files_of_every_version(version: int) -> None:
    files = {"a/b/one": b"1", "a/two": b"2" * 300, "three": b"", "a/b/four": b"4"}
    content = rcc(files, version, compressed=("a/two",))
    assert read_rcc(content, set(files)) == files
    assert read_rcc(content, {"a/two"}) == {"a/two": files["a/two"]}


def test_icons_are_black_and_have_the_size_of_their_set_or_their_own() -> None:
    dog, cat = (icon_svg(ICONS, name).decode() for name in ("dog", "cat"))
    assert 'fill="#000"' in dog
    assert 'width="240" height="240" viewBox="0 0 8 8"' in dog
    assert 'width="240" height="120" viewBox="0 0 16 8"' in cat
