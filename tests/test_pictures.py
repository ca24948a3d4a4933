"""Building the benchmark from tiny packages; the list of the real one."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from gsda_fast.data import __main__ as command
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import open_domain
from gsda_fast.data.pictures import build as building
from gsda_fast.data.pictures.build import (
    MANIFEST,
    Manifest,
    Picture,
    build,
    frozen_list,
    read_manifest,
    verify,
)
from gsda_fast.data.pictures.drawing import SIDE, draw
from gsda_fast.data.pictures.packages import PACKAGES, Package
from gsda_fast.errors import UsageError
from tests.picture_packages import png, write_packages

pytest.importorskip("resvg_py")

# Of the six pictures of `write_packages`, drawn with the versions in constraints.txt.
TINY_DIGEST = "7133cf6d77cf2c5703d7059b866a94681521a8a94d7c9b965064a6b47983ffa3"


class Tiny:
    def __init__(self, folder: Path) -> None:
        self.packages: list[Package]
        self.pictures: list[Picture]
        self.folder, self.root = folder / "packages", folder / "root"
        self.packages, self.pictures = write_packages(self.folder)

    def build(self, root: Path | None = None, domains: list[str] | None = None) -> Manifest:
        return build(
            root or self.root,
            cache=self.root.parent / "cache",
            packages=self.folder,
            domains=domains,
            pictures=self.pictures,
            sources=self.packages,
        )


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)


def test_class_folders_and_manifest(tiny: Tiny) -> None:
    manifest = tiny.build()
    assert manifest.digest == TINY_DIGEST
    assert manifest == read_manifest(tiny.root)
    assert [entry.file for entry in manifest.pictures] == [picture.file for picture in tiny.pictures]
    assert manifest.pictures[5].file == "photo/dog/s--dog.png"
    assert (manifest.pictures[5].package, manifest.pictures[5].original) == ("stamps", "usr/stamps/dog.png")
    assert manifest.pictures[5].licence == "GPL-2.0-or-later"
    there = sorted(path.relative_to(tiny.root).as_posix() for path in tiny.root.rglob("*.png"))
    assert there == [picture.file for picture in tiny.pictures]
    assert sorted(path for path in os.listdir(tiny.root) if not path.endswith(".lock")) == ["icon", MANIFEST, "photo"]
    assert verify(tiny.root) == []


def test_a_second_call_reads_the_manifest_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny.build()
    for path in tiny.folder.iterdir():
        path.unlink()
    monkeypatch.setattr(building, "_writing", None)
    assert tiny.build() == first


def test_an_interrupted_build_goes_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = tiny.build(tmp_path / "whole")
    drawn: list[str] = []

    def failing(name: str, content: bytes) -> Image.Image:
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(name)
        return draw(name, content)

    monkeypatch.setattr(building, "draw", failing)
    monkeypatch.setattr(building, "_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        tiny.build()
    assert not (tiny.root / MANIFEST).exists()
    assert not (tiny.root / "photo").exists()
    left = [picture.member for picture in tiny.pictures if picture.member not in drawn]
    # What a kill left half written is drawn again.
    broken = next(picture for picture in tiny.pictures if picture.member == drawn[0])
    (tiny.root / ".building" / broken.file).write_bytes(b"half")
    again: list[str] = []

    def counting(name: str, content: bytes) -> Image.Image:
        again.append(name)
        return draw(name, content)

    monkeypatch.setattr(building, "draw", counting)
    assert tiny.build() == whole
    assert sorted(again) == sorted([*left, drawn[0]])
    assert not (tiny.root / ".building").exists()


def test_a_kill_between_the_move_and_the_manifest(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.build()
    (tiny.root / MANIFEST).unlink()
    monkeypatch.setattr(building, "draw", None)  # nothing needs drawing
    assert tiny.build() == whole


def test_domains_one_after_another(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny.build(tmp_path / "whole")
    assert tiny.build(domains=["icon"]).domains == ("icon",)
    assert not (tiny.root / "photo").exists()
    assert verify(tiny.root) == []
    assert tiny.build() == whole
    with pytest.raises(UsageError, match="--domains: found sketch; expected icon photo"):
        tiny.build(domains=["sketch"])


def test_verify_names_what_differs(tiny: Tiny) -> None:
    tiny.build()
    Image.new("RGB", (SIDE, SIDE)).save(tiny.root / "icon/cat/set--cat.png")
    (tiny.root / "photo/cat/s--cat.png").unlink()
    (tiny.root / "photo/dog/s--dog.png").write_bytes(b"no picture")
    (tiny.root / "photo/dog/own.png").write_bytes(b"")
    problems = verify(tiny.root)
    assert [line.partition(":")[0] for line in problems] == [
        "icon/cat/set--cat.png",
        "photo/cat/s--cat.png",
        "photo/dog/s--dog.png",
        "photo/dog/own.png",
    ]
    table = json.loads((tiny.root / MANIFEST).read_text())
    table["pictures"][0]["sha256"] = "0" * 64
    (tiny.root / MANIFEST).write_text(json.dumps(table))
    assert verify(tiny.root)[0] == f"{MANIFEST}: its digest is not that of its pictures"


@pytest.mark.parametrize("content", ["", "[]", '{"format": 0}', '{"format": 1, "pictures": [{}]}'])
def test_a_damaged_manifest(tiny: Tiny, content: str) -> None:
    tiny.root.mkdir()
    (tiny.root / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json: found .*remove the folder"):
        tiny.build()


@pytest.mark.parametrize("reach", ["../private/cat/a.png", "/etc/cat/a.png", "photo/../../a.png", "photo/a.png"])
def test_a_manifest_reaches_nothing_outside(tiny: Tiny, reach: str) -> None:
    tiny.build()
    table = json.loads((tiny.root / MANIFEST).read_text())
    table["pictures"][0]["file"] = reach
    (tiny.root / MANIFEST).write_text(json.dumps(table))
    for read in (lambda: verify(tiny.root), tiny.build):
        with pytest.raises(UsageError, match=r"manifest\.json: found .*which is not DOMAIN/CLASS/NAME"):
            read()


def test_an_entry_in_a_pictures_place_is_named_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build()
    pipe, program = tiny.root / "photo/cat/s--cat.png", tiny.root / "photo/dog/s--dog.png"
    pipe.unlink()
    os.mkfifo(pipe)
    program.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 224 224\n%%EndComments\nshowpage\n%%EOF\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program was started"))
    named, read = verify(tiny.root)
    assert named == "photo/cat/s--cat.png: a named pipe"
    assert read.startswith("photo/dog/s--dog.png: 80 bytes that are no image of a known format")


def test_without_a_client_the_message_names_what_can_be_built(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == "apt-get" else f"/usr/bin/{name}")
    arguments = {"cache": tiny.root.parent / "cache", "pictures": tiny.pictures, "sources": tiny.packages}
    with pytest.raises(UsageError) as error:
        build(tiny.root, **arguments)  # type: ignore[arg-type]
    assert "found no apt-get here, which photo need; expected both, or --domains icon" in str(error.value)
    assert "apt-get download --quiet stamps=1-2; apt-get download --quiet games=3:1" in str(error.value)
    assert "--packages DIR" in str(error.value)


def test_two_builds_at_once(tiny: Tiny) -> None:
    with building._writing(tiny.root), pytest.raises(UsageError, match="another process that builds in it"):
        tiny.build()


def test_cut_outs_have_a_margin_and_photographs_fill_the_square() -> None:
    cut_out = draw("a.png", png("red", (400, 100)))
    assert (cut_out.size, cut_out.mode) == ((SIDE, SIDE), "RGB")
    assert cut_out.convert("L").point(lambda value: 255 * (value < 250)).getbbox() == (12, 87, 212, 137)
    photograph = draw("a.png", png("red", (400, 100), cut_out=False))
    assert photograph.getcolors() == [(SIDE * SIDE, (255, 0, 0))]
    on_white = Image.new("RGB", (100, 100), "white")
    on_white.paste(Image.new("RGB", (20, 20)), (70, 70))
    written = io.BytesIO()
    on_white.save(written, format="PNG")
    assert draw("a.png", written.getvalue()).convert("L").point(lambda value: 255 - value).getbbox() == (
        12,
        12,
        212,
        212,
    )
    with pytest.raises(ValueError, match="nothing is drawn"):
        draw("a.png", png("white", cut_out=False))


def test_the_list_is_that_of_the_benchmark() -> None:
    pictures, benchmark = frozen_list(), BENCHMARKS["pictures"]
    assert len({picture.file for picture in pictures}) == len(pictures) == 2874
    assert pictures == sorted(pictures, key=lambda each: (each.domain, each.class_name, each.name))
    counts = Counter(picture.domain for picture in pictures)
    assert counts == {facts.name: facts.expected_images for facts in benchmark.domains}
    assert {picture.class_name for picture in pictures} == set(benchmark.classes or ())
    assert {picture.package for picture in pictures} == {package.name for package in PACKAGES}
    assert all(picture.licence for picture in pictures)
    assert all(picture.name.isascii() and "/" not in picture.name for picture in pictures)


def test_the_built_folder_is_found_where_it_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GSDA_DATA", raising=False)
    with pytest.raises(UsageError, match=r"`python -m gsda_fast\.data build pictures` makes it"):
        open_domain("pictures", "photo")
    for name in BENCHMARKS["pictures"].classes or ():
        folder = tmp_path / "gsda_fast/pictures/photo" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE)).save(folder / "a.png")
    with pytest.warns(UserWarning, match="published 347"):
        assert len(open_domain("pictures", "P")) == 11


def test_the_command_builds_and_compares(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(building, "build", lambda root, **options: tiny.build(root, options["domains"]))
    console = Console(width=200)
    assert command.main(["build", "pictures", "--data-root", str(tiny.root)], console) == 0
    assert f"{tiny.root}: 6 pictures, icon, photo" in capsys.readouterr().out
    with pytest.raises(UsageError, match="TASK: found 'digits'; expected one that is made: pictures"):
        command.main(["build", "digits"], console)


@pytest.mark.filterwarnings("ignore:domain .* found .* images")
def test_verify_fails_where_pixels_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entries = []
    for facts in BENCHMARKS["pictures"].domains:
        for name in BENCHMARKS["pictures"].classes or ():
            path = tmp_path / "root" / facts.name / name / "a.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (SIDE, SIDE), "red").save(path)
            file = path.relative_to(tmp_path / "root").as_posix()
            entries.append(building.Entry(file, "p", "m", "MIT", building.pixel_digest(path)))
    building.write_manifest(tmp_path / "root", entries)
    arguments = ["verify", "pictures", "--data-root", str(tmp_path / "root")]
    assert command.main(arguments, Console(width=200)) == 0
    Image.new("RGB", (SIDE, SIDE), "blue").save(tmp_path / "root/photo/bug/a.png")
    assert command.main(arguments, Console(width=200)) == 1
    assert "photo/bug/a.png: other pixels than were built" in capsys.readouterr().out
