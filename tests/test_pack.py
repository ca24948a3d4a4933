"""Packs: written by `gsda_fast.data.pack`, read through `gsda_fast.data.packed_images`."""

import errno
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np
import pytest
import torch
from image_trees import class_tree, natural_image, save, save_turned
from rich.console import Console

from gsda_fast.data import pack as pack_module
from gsda_fast.data import packed_images
from gsda_fast.data.__main__ import main
from gsda_fast.data.benchmarks import BENCHMARKS, Preprocessing
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.loaders import DataSettings, open_loader, resolve_loader
from gsda_fast.data.pack import pack
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.data.verify import unreadable_files, verify
from gsda_fast.errors import TrainingError, UsageError
from gsda_fast.files import FolderLock

PREPROCESSING = BENCHMARKS["folder"].preprocessing
OFFICE31 = BENCHMARKS["office31"].classes or ()
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:domain .* published")


@pytest.fixture(autouse=True)
def _small_shards_and_own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for module in (packed_images, pack_module):
        monkeypatch.setattr(module, "SHARD_IMAGES", 4)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    class_tree(tmp_path / "raw" / "photos", ["cat", "dog", "horse"], per_class=3)
    class_tree(tmp_path / "raw" / "new", ["horse", "cat"], per_class=2, suffix=".png")
    return tmp_path / "raw"


@pytest.fixture
def packed(raw: Path) -> Path:
    return pack("folder", "photos", "new", raw, output=raw.parent / "pack")


def open_folders(root: Path) -> tuple[ImageDomain, ImageDomain]:
    return open_pair("folder", "photos", "new", root)


def file_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def test_pack_opens_like_the_raw_tree(raw: Path, packed: Path) -> None:
    assert visible_files(packed) == [
        "new-00000.npy",
        "pack.json",
        "photos-00000.npy",
        "photos-00001.npy",
        "photos-00002.npy",
    ]
    for ours, theirs in zip(open_folders(packed), open_folders(raw), strict=True):
        assert (ours.name, ours.paths, ours.classes) == (theirs.name, theirs.paths, theirs.classes)
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert ours.packed is not None
        assert len(ours.packed) == len(theirs)


@pytest.mark.parametrize("cache", [False, True])
def test_same_samples_and_close_pixels(raw: Path, packed: Path, cache: bool) -> None:
    ours, theirs = open_folders(packed), open_folders(raw)
    arguments = {"batch_size": 4, "device": CPU, "workers": 2}
    fast = TorchLoader(*ours, PREPROCESSING, **arguments, cache_on_device=cache)
    direct = TorchLoader(*theirs, PREPROCESSING, **arguments)
    plan = SamplingPlan(theirs[0].labels, len(theirs[1]), preprocessing=PREPROCESSING, batch_size=5, seed=1)
    for a, b in zip(fast.train(plan, range(3)), direct.train(plan, range(3)), strict=True):
        for name in ("source_index", "source_labels", "target_index"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        levels = (a.source_images - b.source_images).abs() * 255 * 0.226
        assert levels.mean() < 5  # of 255; from images of 40x30 pixels: their window is in whole pixels
        assert ((a.source_images - b.source_images.roll(1, 0)).abs() * 255 * 0.226).mean() > 15
    for (a, i), (b, j) in zip(fast.evaluate("target"), direct.evaluate("target"), strict=True):
        assert torch.equal(i, j)
        assert torch.equal(a, b)
    fast.close()
    direct.close()


def test_frames_are_those_of_the_samples_and_cannot_be_spoilt(raw: Path, packed: Path) -> None:
    source, _ = open_folders(packed)
    assert source.packed is not None
    for sample in range(len(source)):
        frame = source.packed[sample]
        assert frame.shape == (256, 256, 3)
        assert abs(float(frame.mean()) - np.asarray(natural_image(_seed(source.paths[sample]))).mean()) < 3
    before = file_times(packed)
    source.packed[0][:] = 0
    assert open_folders(packed)[0].packed[0].any()  # type: ignore[index]
    assert file_times(packed) == before


def _seed(path: str) -> int:
    name, file = path.split("/")
    return 100 * ["cat", "dog", "horse"].index(name) + int(file[6:10])


def test_partial_and_full_tasks_share_a_pack(tmp_path: Path) -> None:
    for domain in ("amazon", "webcam", "dslr"):
        class_tree(tmp_path / "raw" / domain / "images", OFFICE31, per_class=1)
    packed = pack("office31-partial", data_root=tmp_path / "raw", output=tmp_path / "pack")
    for task in ("office31", "office31-partial"):
        for source_name, target_name in (("A", "W"), ("D", "A")):
            pairs = [open_pair(task, source_name, target_name, root) for root in (tmp_path / "raw", packed)]
            for theirs, ours in zip(*pairs, strict=True):
                assert (ours.name, ours.paths, ours.classes) == (theirs.name, theirs.paths, theirs.classes)
                assert ours.labels.tolist() == theirs.labels.tolist()
    target = open_pair("office31-partial", "A", "W", packed)[1]
    assert target.packed is not None
    whole = open_pair("office31", "A", "W", packed)[1]
    assert whole.packed is not None
    sample = target.paths.index("projector/frame_0001.jpg")
    np.testing.assert_array_equal(target.packed[sample], whole.packed[whole.paths.index("projector/frame_0001.jpg")])
    assert [finding.good for finding in verify("office31", data_root=packed)] == [True] * 3


@pytest.mark.parametrize("orientation", ["exif", "stored"])
def test_photos_are_packed_as_training_would_read_them(raw: Path, orientation: Literal["exif", "stored"]) -> None:
    for number in range(1, 9):
        save_turned(raw / "photos" / "cat" / f"{number}.jpg", natural_image(1, 60, 40), number)
    packed = pack("folder", "photos", "new", raw, output=raw.parent / "pack", orientation=orientation)
    ours, theirs = (open_pair("folder", "photos", "new", root, orientation=orientation) for root in (packed, raw))
    loaders = [TorchLoader(*pair, PREPROCESSING, batch_size=20, device=CPU) for pair in (ours, theirs)]
    (found, _), (expected, _) = (next(loader.evaluate("source")) for loader in loaders)
    assert torch.equal(found, expected)
    apart = (found[1:8] - found[:1]).abs().mean(dim=(1, 2, 3))  # one scene, held in eight ways
    assert (apart < 0.1).all() if orientation == "exif" else (apart > 0.2).all()


def test_a_pack_is_read_as_it_was_made(raw: Path, packed: Path) -> None:
    told = (
        r"--orientation: found stored, for .*/pack, a pack that was made with exif; expected exif; "
        r"or a pack that is made with `--orientation stored`"
    )
    with pytest.raises(UsageError, match=told):
        open_pair("folder", "photos", "new", packed, orientation="stored")
    with pytest.raises(UsageError, match=r"--orientation: found stored, for .*; expected the same for a whole pack"):
        pack("folder", "photos", "new", raw, output=packed, orientation="stored")
    # A pack that does not say is older than the choice.
    table = json.loads((packed / "pack.json").read_text())
    assert table.pop("orientation") == "exif"
    (packed / "pack.json").write_text(json.dumps(table))
    assert open_pair("folder", "photos", "new", packed, orientation="stored")[0].orientation == "stored"
    with pytest.raises(UsageError, match=r"found exif, for .*, a pack that was made with stored"):
        open_folders(packed)
    (packed / "pack.json").write_text(json.dumps({**table, "orientation": "sideways"}))
    with pytest.raises(UsageError, match="found the orientation sideways; expected the table of a pack"):
        open_folders(packed)


def test_what_this_package_makes_is_read_alike_either_way(few_digits: Path, tmp_path: Path) -> None:
    packed = pack("digits", data_root=few_digits, output=tmp_path / "pack", workers=1)
    for orientation in ("exif", "stored"):
        assert open_pair("digits", data_root=packed, orientation=orientation)[0].orientation == "stored"


def test_unlabelled_target_and_swapped_folders(raw: Path) -> None:
    for number in range(2):
        save(raw / "flat" / f"{number}.jpg", seed=number)
    packed = pack("folder", "photos", "flat", raw, output=raw.parent / "pack")
    assert open_pair("folder", "photos", "flat", packed)[1].labels.tolist() == [-1, -1]
    pack("folder", "photos", "new", raw, output=packed)
    source, target = open_pair("folder", "photos", "new", packed)
    assert (source.classes, target.labels.tolist()) == (("cat", "dog", "horse"), [0, 0, 2, 2])
    with pytest.raises(UsageError, match=r"domain photos: found the classes dog in .*; expected cat, horse"):
        open_pair("folder", "new", "photos", packed)


def test_finished_pack_is_left_alone_and_changes_are_followed(raw: Path, packed: Path) -> None:
    before = file_times(packed)
    assert pack("folder", "photos", "new", raw, output=packed) == packed
    assert file_times(packed) == before
    save(raw / "photos" / "horse" / "frame_0003.jpg", seed=7)
    pack("folder", "photos", "new", raw, output=packed)
    after = file_times(packed)
    assert [name for name in after if after[name] != before[name]] == ["photos-00002.npy"]
    shutil.rmtree(raw / "photos" / "horse")
    shutil.rmtree(raw / "new" / "horse")
    pack("folder", "photos", "new", raw, output=packed)
    assert sorted(file_times(packed)) == ["new-00000.npy", "photos-00000.npy", "photos-00001.npy"]
    assert all(not unreadable_files(domain) for domain in open_folders(packed))


def test_files_of_the_user_stay(raw: Path) -> None:
    output = raw.parent / "pack"
    output.mkdir()
    for name in ("features.npy", "photos-00009.npy", "notes.txt"):
        (output / name).write_text("mine")
    pack("folder", "photos", "new", raw, output=output)
    shutil.rmtree(raw / "photos" / "horse")
    shutil.rmtree(raw / "new" / "horse")
    pack("folder", "photos", "new", raw, output=output)
    shards = ["new-00000.npy", "photos-00000.npy", "photos-00001.npy"]
    assert sorted(file_times(output)) == sorted([*shards, "features.npy", "photos-00009.npy"])
    assert all((output / name).read_text() == "mine" for name in ("features.npy", "photos-00009.npy", "notes.txt"))


def test_shards_that_an_interrupted_call_was_to_replace_do_not_stay(
    raw: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    shutil.rmtree(raw / "photos" / "horse")
    shutil.rmtree(raw / "new" / "horse")
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "read_resized", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack("folder", "photos", "new", raw, output=packed, workers=1)
    pack("folder", "photos", "new", raw, output=packed)
    assert visible_files(packed) == ["new-00000.npy", "pack.json", "photos-00000.npy", "photos-00001.npy"]


def test_folders_whose_names_differ_in_a_slash_have_shards_of_their_own(raw: Path) -> None:
    names = ("a/b", "a_b", "a%2Fb")
    for seed, name in enumerate(names):
        save(raw / name / "cat" / "1.jpg", seed=2 * seed)
        save(raw / name / "dog" / "1.jpg", seed=2 * seed + 1)
    output = raw.parent / "pack"
    pack("folder", "a/b", "a_b", raw, output=output)
    pack("folder", "a%2Fb", "a_b", raw, output=output)
    assert len(file_times(output)) == 3
    for seed, name in enumerate(names):
        packed, _ = open_pair("folder", name, name, output)
        assert packed.packed is not None
        assert unreadable_files(packed) == []
        for i in range(2):
            assert abs(float(packed.packed[i].mean()) - np.asarray(natural_image(2 * seed + i)).mean()) < 3


def test_pack_with_other_names_of_shards_is_read_and_followed(raw: Path, packed: Path) -> None:
    """As an earlier version named the shards of a folder with a slash in its name."""
    (packed / "photos-00001.npy").rename(packed / "other.npy")
    table = (packed / "pack.json").read_text()
    (packed / "pack.json").write_text(table.replace("photos-00001.npy", "other.npy"))
    assert all(not unreadable_files(domain) for domain in open_folders(packed))
    pack("folder", "photos", "new", raw, output=packed)
    assert sorted(file_times(packed)) == ["new-00000.npy", *(f"photos-0000{i}.npy" for i in range(3))]
    assert all(not unreadable_files(domain) for domain in open_folders(packed))


def visible_files(folder: Path) -> list[str]:
    """All but the lock, which stays."""
    return sorted(name for name in os.listdir(folder) if name != ".lock")


def pack_six_of_photos(raw: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_resized, reads = pack_module.read_resized, []

    def interrupted(domain: ImageDomain, sample: int, preprocessing: Preprocessing) -> torch.Tensor:
        reads.append(sample)
        if len(reads) > 6:
            raise KeyboardInterrupt
        return read_resized(domain, sample, preprocessing)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "read_resized", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack("folder", "photos", "new", raw, output=output, workers=1)


def test_interrupted_pack_goes_on(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = raw.parent / "pack"
    pack_six_of_photos(raw, output, monkeypatch)
    assert visible_files(output) == ["pack.partial.json", "photos-00000.npy"]
    assert not packed_images.is_pack(output)
    before, steps = file_times(output), []
    pack("folder", "photos", "new", raw, output=output, progress=lambda *done: steps.append(done))
    assert file_times(output)["photos-00000.npy"] == before["photos-00000.npy"]
    assert steps == [("photos", i, 9) for i in range(5, 10)] + [("new", i, 4) for i in range(1, 5)]
    whole = pack("folder", "photos", "new", raw, output=raw.parent / "other")
    for file in file_times(whole):
        assert (whole / file).read_bytes() == (output / file).read_bytes()


def test_a_domain_that_stayed_unfinished_is_not_in_the_pack(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = raw.parent / "pack"
    pack_six_of_photos(raw, output, monkeypatch)
    pack("folder", "new", "new", raw, output=output)
    assert visible_files(output) == ["new-00000.npy", "pack.json"]
    with pytest.raises(UsageError, match="a pack of new; expected one with the domain photos"):
        open_pair("folder", "photos", "new", output)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_damaged_shard_is_found_by_its_digest(packed: Path) -> None:
    path = packed / "photos-00001.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    source, target = open_folders(packed)
    assert unreadable_files(source) == [(str(path), "its digest is not the one it was written with")]
    assert unreadable_files(target) == []
    path.unlink()
    assert unreadable_files(source) == [(str(path), "No such file or directory")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "photos-00000.npy: found "),
        (lambda path: path.write_bytes(b""), "photos-00000.npy: found "),
        (lambda path: path.unlink(), "photos-00000.npy: found .*No such file"),
        (lambda path: np.save(path, np.zeros(3)), "photos-00000.npy: found float64"),
    ],
)
def test_shard_that_is_no_shard(packed: Path, spoil: object, message: str) -> None:
    spoil(packed / "photos-00000.npy")  # type: ignore[operator]
    loader = open_loader(DataSettings(), *open_folders(packed), PREPROCESSING, batch_size=4, device=CPU)
    with pytest.raises(UsageError, match=message):
        list(loader.evaluate("source"))
    loader.close()


@pytest.mark.parametrize("content", ["", "{}", "[]", json.dumps({"format": 99})])
def test_table_that_is_no_table(packed: Path, content: str) -> None:
    (packed / "pack.json").write_text(content)
    with pytest.raises(UsageError, match=r"pack.json: found .*; expected the table of a pack, format 1"):
        open_folders(packed)


def test_pack_that_does_not_fit(raw: Path, packed: Path) -> None:
    with pytest.raises(UsageError, match=r"a pack of photos, new; expected one with the domain amazon"):
        open_pair("office31", data_root=packed)
    with pytest.raises(UsageError, match=r"--data-root: found .*pack, a pack; expected images to pack"):
        pack("folder", "photos", "new", packed, output=raw.parent / "again")
    with pytest.raises(UsageError, match=r"a pack of images of shape \(256, 256, 3\); expected .*\(64, 64, 3\)"):
        TorchLoader(*open_folders(packed), replace(PREPROCESSING, resize=64, crop=48), batch_size=4, device=CPU)


def test_loaders_of_a_pack(packed: Path) -> None:
    pair = open_folders(packed)
    assert resolve_loader(DataSettings(), *pair, torch.device("cuda")) == "torch"
    with pytest.raises(UsageError, match=r"--loader: found dali, with a pack; expected torch or auto"):
        resolve_loader(DataSettings(loader="dali"), *pair, CPU)


def test_unreadable_images_are_named_before_anything_is_written(raw: Path) -> None:
    (raw / "photos" / "cat" / "frame_0002.jpg").write_text("no image")
    output = raw.parent / "pack"
    with pytest.raises(UsageError, match=r"1 unreadable files: .*cat/frame_0002.jpg"):
        pack("folder", "photos", "new", raw, output=output)
    assert not output.exists()
    (raw / "bad.txt").write_text(f"{raw}/photos/cat/frame_0002.jpg\n")
    pack("folder", "photos", "new", raw, output=output, quarantine=raw / "bad.txt")
    assert len(open_folders(output)[0]) == 8


def test_no_space(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UsageError, match=r"--output: found .*0.0 GiB of free space; expected the 0.0 GiB"):
        pack("folder", "photos", "new", raw, output=raw.parent / "pack")


def test_command(raw: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    output = str(raw.parent / "pack")
    arguments = ["pack", "folder", "--source", "photos", "--target", "new", "--data-root", str(raw)]
    assert main([*arguments, "--output", output], console) == 0
    assert f"{output}: 0.00 GiB; train with --data-root {output}" in console.export_text()
    assert len(open_folders(Path(output))[0]) == 9


# ------------------------------------------------------------------------------------------------- what it is made of


def test_a_folder_is_held_while_it_is_packed(raw: Path, packed: Path) -> None:
    before = file_times(packed)
    with FolderLock(packed), pytest.raises(UsageError, match=r"--output: found .*pack, in use by process"):
        pack("folder", "photos", "new", raw, output=packed)
    assert file_times(packed) == before


@pytest.mark.parametrize("spoil", ["a byte", "cut", "gone", "a folder's link"])
def test_a_damaged_shard_is_mended(raw: Path, packed: Path, spoil: str) -> None:
    path = packed / "photos-00001.npy"
    whole, times = path.read_bytes(), path.stat()
    if spoil == "a byte":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif spoil == "cut":
        os.truncate(path, 5000)
    else:
        path.unlink()
        if spoil != "gone":
            path.symlink_to(packed)
    assert not verify("folder", "photos", "new", packed)[0].good
    pack("folder", "photos", "new", raw, output=packed)
    assert path.read_bytes() == whole
    assert all(finding.good for finding in verify("folder", "photos", "new", packed))


def test_a_shard_that_is_cut_while_it_is_read_is_an_error(packed: Path) -> None:
    source, _ = open_folders(packed)
    assert source.packed is not None
    assert source.packed[0].any()
    os.truncate(packed / "photos-00000.npy", 1000)
    with pytest.raises(UsageError, match=r"photos-00000.npy: found a file that was cut while it was in use"):
        source.packed[1]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_disk_that_fills_up_is_one_line_and_the_same_call_goes_on(
    raw: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = raw.parent / "pack"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(TrainingError, match=r"written \(No space left on device\); free some space"):
            pack("folder", "photos", "new", raw, output=output)
    assert not [name for name in os.listdir(output) if name.endswith((".npy", ".partial", ".tmp"))]
    pack("folder", "photos", "new", raw, output=output)
    assert all(finding.good for finding in verify("folder", "photos", "new", output))


def test_a_disk_that_is_read_only_is_the_users_to_mend(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, *_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UsageError, match=r"--output: found .*Read-only file system.; expected a folder that"):
        pack("folder", "photos", "new", raw, output=raw.parent / "pack")


def test_a_shard_costs_a_line_of_the_table(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: what is written beside the frames grows with the number of images, and not with its square."""
    written: list[int] = []
    add = pack_module._add_line

    def counting(file: IO[bytes], line: dict[str, Any]) -> None:
        written.append(len(json.dumps(line)))
        add(file, line)

    monkeypatch.setattr(pack_module, "_add_line", counting)
    pack("folder", "photos", "new", raw, output=raw.parent / "pack")
    assert len(written) == 2 + 3 + 1  # two domains, three shards and one
    assert max(written[1:4]) < 260


def test_the_same_images_at_another_place_are_packed_already(raw: Path, packed: Path) -> None:
    before = file_times(packed)
    moved = raw.parent / "moved"
    raw.rename(moved)
    assert pack("folder", "photos", "new", moved, output=packed) == packed
    assert file_times(packed) == before
    assert open_folders(packed)[0].identity == open_folders(packed)[0].identity
