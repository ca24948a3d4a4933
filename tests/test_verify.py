import io
import json
import os
import re
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from image_trees import class_tree, natural_image, save, save_turned
from rich.console import Console
from test_torch_loader import BAD, write_bad

from gsda_fast.console import plain_console
from gsda_fast.data import decoding
from gsda_fast.data import verify as verify_module
from gsda_fast.data.__main__ import main
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.decoding import Inspection, inspect
from gsda_fast.data.domains import open_pair
from gsda_fast.data.verify import file_problem, require_readable, unreadable_files, verify, write_quarantine
from gsda_fast.errors import UsageError

OFFICE31 = BENCHMARKS["office31"].classes or ()
GOOD = Inspection("JPEG", 1, False)

pytestmark = pytest.mark.filterwarnings("ignore:domain .* published")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    class_tree(tmp_path / "photos", ["cat", "dog"], per_class=3)
    class_tree(tmp_path / "new", ["cat"], per_class=3, suffix=".png")
    return tmp_path


def office31(root: Path) -> Path:
    class_tree(root / "amazon" / "images", OFFICE31, per_class=1)
    class_tree(root / "webcam", OFFICE31, per_class=1)
    class_tree(root / "dslr", OFFICE31, per_class=1, suffix=".png")
    return root


def run(*arguments: str) -> tuple[int, str]:
    console = Console(width=200, record=True, file=io.StringIO())
    code = main(list(arguments), console)
    return code, console.export_text()


def refused(path: str) -> NoReturn:
    raise UsageError(path, found="permission denied", expected="a readable image")


FOLDER = ("verify", "folder", "--source", "photos", "--target", "new")

# ---------------------------------------------------------------------------------------------------------- one file


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_found(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "frame.jpg"
    write_bad(path, kind)
    assert BAD[kind].replace(".checksum", "(checksum") in file_problem(str(path))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.gif", "a.tiff", "a.webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_good_file_passes(tmp_path: Path, name: str, mode: str) -> None:
    natural_image(1).convert(mode).save(tmp_path / name)
    assert file_problem(str(tmp_path / name)) == ""


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("cut", [1, 2, 4, 12, 13, 100, 400])
def test_file_that_is_cut_anywhere_is_found(tmp_path: Path, name: str, cut: int) -> None:
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-cut])
    assert "truncated" in file_problem(str(path)).lower()


@pytest.mark.parametrize(("name", "tail"), [("a.jpg", b"\0" * 50), ("a.jpg", b"hello"), ("a.png", b"hello")])
def test_what_follows_the_image_does_no_harm(tmp_path: Path, name: str, tail: bytes) -> None:
    path = save(tmp_path / name)
    path.write_bytes(path.read_bytes() + tail)
    assert file_problem(str(path)) == ""


# ---------------------------------------------------------------------------------------------------------- domains


def test_findings_of_a_benchmark(tmp_path: Path) -> None:
    findings = verify("office31", data_root=office31(tmp_path))
    assert [(f.name, len(f.domain or ()), f.expected) for f in findings] == [
        ("amazon", 31, 2817),
        ("webcam", 31, 795),
        ("dslr", 31, 498),
    ]
    assert all(finding.good for finding in findings)
    named = verify("office31", "dslr", "W", tmp_path)
    assert [finding.name for finding in named] == ["dslr", "webcam"]
    partial = verify("office31-partial", data_root=tmp_path)
    assert [(f.name, len(f.domain or ()), f.expected) for f in partial][3:] == [
        ("amazon, as target", 10, 958),
        ("webcam, as target", 10, 295),
        ("dslr, as target", 10, 157),
    ]


def test_table_and_exit_code_of_a_good_data_set(tmp_path: Path) -> None:
    code, text = run("verify", "office31", "--data-root", str(office31(tmp_path)))
    assert code == 0
    assert "31 of 31" in text
    assert "2817" in text
    assert text.count("warning: the count differs") == 3


def test_every_unreadable_file_is_listed(photos: Path) -> None:
    bad = [photos / "photos" / "dog" / "frame_0002.jpg", photos / "new" / "cat" / "frame_0001.png"]
    write_bad(bad[0], "absurd size")
    write_bad(bad[1], "text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*torchvision.*", DeprecationWarning)
        # What is wrong with a file is told once, in the list.
        code, text = run(*FOLDER, "--data-root", str(photos))
    assert code == 1
    for path in bad:
        assert f"unreadable: {path}: " in text
    assert text.count("unreadable: ") == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "webcam" / "mug" / "frame_0001.jpg").unlink(), "webcam/mug: found no image"),
        (lambda root: (root / "webcam" / "Mug").mkdir(), "the folders 'Mug' and 'mug'"),
        (lambda root: save(root / "webcam" / "caf\udce9" / "a.jpg"), "1 names that are not UTF-8"),
    ],
)
def test_domain_that_cannot_be_opened_is_a_finding(tmp_path: Path, spoil: object, message: str) -> None:
    office31(tmp_path)
    try:
        spoil(tmp_path)  # type: ignore[operator]
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    code, text = run("verify", "office31", "--data-root", str(tmp_path))
    assert code == 1
    assert message in text
    assert text.count("not usable") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [("bus/gone.jpg 2", "missing from .*: bus/gone.jpg"), ("bus/frame_0001.jpg 12", "line 13: found label 12")],
)
def test_bad_list_is_a_finding(tmp_path: Path, line: str, message: str) -> None:
    classes = BENCHMARKS["visda"].classes or ()
    for domain in ("train", "validation"):
        class_tree(tmp_path / domain, classes, per_class=1)
    lines = [f"{name}/frame_0001.jpg {label}" for label, name in enumerate(classes)]
    (tmp_path / "validation" / "image_list.txt").write_text("\n".join([*lines, line]))
    train, validation = verify("visda", data_root=tmp_path)
    assert train.good
    assert not validation.good
    assert validation.domain is None
    assert re.search(message, validation.error)


def test_mistakes_in_the_command() -> None:
    with pytest.raises(UsageError, match="TASK: found 'imagenet'"):
        run("verify", "imagenet")
    with pytest.raises(UsageError, match="found 'unpack'; expected a command: verify"):
        run("unpack")
    with pytest.raises(UsageError, match="expected a domain of office31"):
        run("verify", "office31", "--source", "caltech")


# ------------------------------------------------------------------------------------------------------- what is kept


def test_files_are_opened_again_only_when_something_changed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(verify_module, "inspect", lambda path, channels: opened.append(path) or GOOD)
    source, _ = open_pair("folder", "photos", "new", photos)
    unreadable_files(source)
    assert len(opened) == 6
    unreadable_files(source)
    assert len(opened) == 6
    changed = photos / "photos" / "cat" / "frame_0001.jpg"
    os.utime(changed, ns=(1, 1))
    unreadable_files(source)
    assert len(opened) == 12
    changed.rename(changed.with_name("other.jpg"))
    unreadable_files(open_pair("folder", "photos", "new", photos)[0])
    assert len(opened) == 18


def test_bad_files_alone_are_opened_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = photos / "photos" / "dog" / "frame_0002.jpg"
    write_bad(bad, "zero bytes")
    source, _ = open_pair("folder", "photos", "new", photos)
    first = unreadable_files(source)
    assert [path for path, _ in first] == [str(bad)]
    opened: list[str] = []
    monkeypatch.setattr(verify_module, "inspect", lambda path, channels: opened.append(path) or inspect(path, channels))
    assert unreadable_files(source) == first
    assert opened == [str(bad)]


def test_a_file_that_is_repaired_without_a_trace_is_good_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = open_pair("folder", "photos", "new", photos)
    with monkeypatch.context() as failing:
        failing.setattr(verify_module, "inspect", lambda path, _: refused(path) if "dog" in path else GOOD)
        assert len(unreadable_files(source)) == 3
    assert unreadable_files(source) == []
    monkeypatch.setattr(verify_module, "inspect", lambda path, _: pytest.fail(f"{path} was opened"))
    assert unreadable_files(source) == []


@pytest.mark.parametrize("library", ["pillow", "torchvision"])
def test_another_version_of_what_reads_them_opens_all_files(
    photos: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    source, _ = open_pair("folder", "photos", "new", photos)
    assert unreadable_files(source) == []
    installed = verify_module.version
    monkeypatch.setattr(verify_module, "version", lambda name: "0" if name == library else installed(name))
    monkeypatch.setattr(verify_module, "inspect", lambda path, _: refused(path))
    assert len(unreadable_files(source)) == 6


def test_damaged_memory_is_no_obstacle(photos: Path) -> None:
    source, _ = open_pair("folder", "photos", "new", photos)
    unreadable_files(source)
    (memory,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.jsonl")
    for content in ("", "[]", json.dumps({"state": 1})):
        memory.write_text(content)
        assert unreadable_files(source) == []


def test_memory_that_cannot_be_written_is_a_warning(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos / "file"))
    source, _ = open_pair("folder", "photos", "new", photos)
    with pytest.warns(UserWarning, match="cannot remember what was verified"):
        assert unreadable_files(source) == []


# --------------------------------------------------------------------------------------------- training and quarantine


def test_training_is_told_the_files(photos: Path) -> None:
    for number in (1, 2, 3):
        write_bad(photos / "photos" / "dog" / f"frame_000{number}.jpg", "zero bytes")
        write_bad(photos / "new" / "cat" / f"frame_000{number}.png", "text")
    pair = open_pair("folder", "photos", "new", photos)
    with pytest.raises(UsageError, match=r"6 unreadable files: .*frame_0001.jpg \(0 bytes.*; and 1 more; .*quarantine"):
        require_readable("folder", *pair)
    good = open_pair("folder", "photos", "photos", class_tree(photos / "x" / "photos", ["a", "b"]).parent)
    require_readable("folder", *good)


def test_quarantined_files_are_left_out(photos: Path) -> None:
    write_bad(photos / "photos" / "dog" / "frame_0002.jpg", "zero bytes")
    listed = photos / "bad files.txt"
    command = (*FOLDER, "--data-root", str(photos), "--quarantine", str(listed))
    code, told = run(*command)
    assert code == 0
    assert f"train with --quarantine '{listed}'" in told  # as a shell takes it: there is a space in it
    assert listed.read_text() == f"{photos}/photos/dog/frame_0002.jpg\n"
    source, target = open_pair("folder", "photos", "new", photos, listed)
    assert source.paths == [f"cat/frame_000{i}.jpg" for i in (1, 2, 3)] + ["dog/frame_0001.jpg", "dog/frame_0003.jpg"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert len(target) == 3
    require_readable("folder", source, target)

    write_bad(photos / "new" / "cat" / "frame_0003.png", "text")
    assert run(*command)[0] == 0
    assert len(listed.read_text().splitlines()) == 2


def test_a_quarantine_list_of_nothing_is_not_written(photos: Path) -> None:
    listed = photos / "bad.txt"
    code, told = run(*FOLDER, "--data-root", str(photos), "--quarantine", str(listed))
    assert code == 0
    assert f"{listed}: not written, as nothing is to be left out" in told
    assert not listed.exists()
    with pytest.raises(UsageError, match=r"--quarantine: found .*bad.txt .*; leave the option out"):
        open_pair("folder", "photos", "new", photos, listed)


def test_names_in_brackets_are_told_whole(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bad(photos / "photos" / "dog" / "[red] 1.jpg", "zero bytes")
    listed = photos / "[bad].txt"
    main([*FOLDER, "--data-root", str(photos), "--quarantine", str(listed)], plain_console())
    told = capsys.readouterr().out
    assert f"unreadable: {photos}/photos/dog/[red] 1.jpg: 0 bytes" in told
    assert f"train with --quarantine '{listed}'" in told


def test_quarantine_of_a_benchmark(tmp_path: Path) -> None:
    office31(tmp_path)
    extra = save(tmp_path / "webcam" / "mug" / "frame_0002.jpg")
    listed = tmp_path / "bad.txt"
    listed.write_text(f"{extra}\n\n")
    assert len(open_pair("office31", data_root=tmp_path, quarantine=listed)[1]) == 31
    listed.write_text(f"{extra}\n{extra.with_name('frame_0001.jpg')}\n")
    with pytest.raises(UsageError, match=r"--quarantine: found every image of mug in .*webcam"):
        open_pair("office31", data_root=tmp_path, quarantine=listed)


def test_quarantine_list_that_cannot_be_used(photos: Path) -> None:
    with pytest.raises(UsageError, match=r"--quarantine: found .*nowhere.txt"):
        open_pair("folder", "photos", "new", photos, photos / "nowhere.txt")
    write_bad(photos / "photos" / "dog" / "frame_0002.jpg", "zero bytes")
    with pytest.raises(UsageError, match=r"--quarantine: found .*that can be written"):
        write_quarantine(photos / "nowhere" / "bad.txt", verify("folder", "photos", "new", photos))
    (photos / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="--quarantine"):
        open_pair("folder", "photos", "new", photos, photos / "binary")


def test_unlabelled_target_can_be_cut_down(photos: Path) -> None:
    flat = [save(photos / "flat" / f"{i}.jpg", seed=i) for i in range(3)]
    (photos / "bad.txt").write_text(f"{flat[1]}\n")
    _, target = open_pair("folder", "photos", "flat", photos, photos / "bad.txt")
    assert target.paths == ["0.jpg", "2.jpg"]
    np.testing.assert_array_equal(target.labels, [-1, -1])


# -------------------------------------------------------------------------------------------------------------- notes


def test_what_is_not_looked_at_is_told(photos: Path) -> None:
    for number in range(3):
        (photos / "photos" / "cat" / f"IMG_{number}.HEIC").write_bytes(b"x")
        natural_image(number).save(photos / "photos" / "cat" / f"{number}.jfif", "JPEG")
        natural_image(number).save(photos / "photos" / "cat" / f"{number}.avif")
    (photos / "photos" / "notes.txt").touch()
    (photos / "photos" / ".DS_Store").touch()
    (photos / "photos" / "__MACOSX").mkdir()
    save(photos / "photos" / "beside.jpg")
    with pytest.warns(UserWarning, match="domain photos: 7 entries not looked at: 3 .heic .*pillow-heif"):
        source, _ = open_pair("folder", "photos", "new", photos)
    assert len(source) == 12
    code, text = run(*FOLDER, "--data-root", str(photos))
    assert code == 0
    for told in ("3 .heic", "1 .txt", "1 hidden file", "1 left-out folder", "1 image beside the class folders"):
        assert told in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), "which training applies (--orientation exif)"),
        (("--orientation", "stored"), "which training ignores (--orientation stored)"),
    ],
)
def test_photos_that_are_to_be_turned_are_counted(photos: Path, given: tuple[str, ...], told: str) -> None:
    for number in range(1, 9):
        save_turned(photos / "photos" / "cat" / f"{number}.jpg", natural_image(1), number)
    save_turned(photos / "photos" / "dog" / "a.png", natural_image(1), 3)
    bad = photos / "photos" / "cat" / "8.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:300])
    options = (*FOLDER, "--data-root", str(photos), *given)
    for _ in range(2):  # the second time from what is remembered
        assert f"photos: 7 images with an orientation other than upright, {told}" in run(*options)[1]
    status = bad.stat()
    bad.write_bytes(whole)
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        code, text = run(*options)
        assert code == 0
        assert f"photos: 8 images with an orientation other than upright, {told}" in text
    assert "new: " not in text


def test_photos_that_are_read_at_half_their_size_are_counted(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    natural_image(1, 80, 60).save(photos / "photos" / "cat" / "large.jpg")
    monkeypatch.setattr(decoding, "MOST_PIXELS", 40 * 30)
    for _ in range(2):
        assert "photos: 1 photos of more than " in run(*FOLDER, "--data-root", str(photos))[1]


def test_another_format_than_the_name_says_is_told(photos: Path) -> None:
    natural_image(1).save(photos / "photos" / "cat" / "a.jpg", "GIF")
    natural_image(1).save(photos / "photos" / "cat" / "b.png", "AVIF")
    code, text = run(*FOLDER, "--data-root", str(photos))
    assert code == 0
    assert "2 files with another format than their name says: " in text
    assert "a.jpg (GIF)" in text
    assert "b.png (AVIF)" in text
    again = run(*FOLDER, "--data-root", str(photos))[1]
    assert "b.png (AVIF)" in again  # remembered, not looked at again


def test_a_check_that_is_killed_has_not_been_in_vain(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_BLOCK", 2)
    source, _ = open_pair("folder", "photos", "new", photos)
    opened: list[str] = []

    def killed(path: str, channels: int) -> Inspection:
        opened.append(path)
        if len(opened) == 6:
            raise KeyboardInterrupt
        return GOOD

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "inspect", killed)
        with pytest.raises(KeyboardInterrupt):
            unreadable_files(source, workers=1)
    opened.clear()
    monkeypatch.setattr(verify_module, "inspect", lambda path, _: opened.append(path) or GOOD)
    unreadable_files(source, workers=1)
    assert opened == [source.file(4), source.file(5)]


def test_a_second_check_asks_for_nothing_but_the_state_of_each_file(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: one look at each entry, no opening, no more tasks for the threads than blocks."""
    source, _ = open_pair("folder", "photos", "new", photos)
    unreadable_files(source)
    digests: list[int] = []
    digest = verify_module._digest
    monkeypatch.setattr(verify_module, "_digest", lambda files, key: digests.append(len(files)) or digest(files, key))
    monkeypatch.setattr(verify_module, "inspect", lambda path, _: pytest.fail(f"{path} was opened"))
    unreadable_files(source)
    assert digests == [6]


def test_bytes_that_change_under_the_same_size_and_time_are_seen(photos: Path) -> None:
    source, _ = open_pair("folder", "photos", "new", photos)
    assert unreadable_files(source) == []
    path = Path(source.file(0))
    times, size = path.stat(), path.stat().st_size
    path.write_bytes(bytes(size))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [bad for bad, _ in unreadable_files(source)] == [str(path)]
