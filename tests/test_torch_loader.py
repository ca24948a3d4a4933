import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from image_trees import class_tree, natural_image
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gsda_fast.data import torch_loader
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.sampling import SamplingPlan, source_window
from gsda_fast.data.torch_loader import TorchLoader, crop_windows, read_image, usable_cores
from gsda_fast.data.verify import file_problem
from gsda_fast.errors import UsageError

PHOTOS = replace(BENCHMARKS["office31"].preprocessing, resize=64, crop=48)
DIGITS = BENCHMARKS["digits"].preprocessing
CPU = torch.device("cpu")

Pair = tuple[ImageDomain, ImageDomain]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("photos")
    class_tree(root / "photos", ["cat", "dog", "horse"], per_class=5)
    class_tree(root / "sketches", ["cat", "horse"], per_class=7, suffix=".png")
    return open_pair("folder", "photos", "sketches", root)


@pytest.fixture
def loader(pair: Pair) -> Iterator[TorchLoader]:
    opened = TorchLoader(*pair, PHOTOS, batch_size=4, device=CPU, workers=2)
    yield opened
    opened.close()


@pytest.fixture
def cached(pair: Pair) -> Iterator[TorchLoader]:
    opened = TorchLoader(*pair, PHOTOS, batch_size=4, device=CPU, workers=2, cache_on_device=True)
    yield opened
    opened.close()


def plan_for(pair: Pair, **changes: int) -> SamplingPlan:
    arguments = {"batch_size": 6, "seed": 3} | changes
    return SamplingPlan(pair[0].labels, len(pair[1]), preprocessing=PHOTOS, **arguments)  # type: ignore[arg-type]


def normalised(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PHOTOS.mean, PHOTOS.std))
    return (image.float() / 255 - mean) / std


def with_pillow(path: str) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


# --------------------------------------------------------------------------------------------------------- training


def test_batches_are_those_of_the_plan(pair: Pair, loader: TorchLoader) -> None:
    plan = plan_for(pair)
    batches = list(loader.train(plan, range(5, 9)))
    assert len(batches) == 4
    for step, batch in zip(range(5, 9), batches, strict=True):
        expected = plan.batch(step)
        assert batch.source_index.tolist() == expected.source_index.tolist()
        assert batch.target_index.tolist() == expected.target_index.tolist()
        assert batch.source_labels.tolist() == pair[0].labels[expected.source_index].tolist()
        for images in (batch.source_images, batch.target_images):
            assert images.shape == (6, 3, 48, 48)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_pixels_are_crop_resize_flip_normalise(pair: Pair, loader: TorchLoader) -> None:
    plan = plan_for(pair, batch_size=12)
    batch, expected = next(iter(loader.train(plan, range(2, 3)))), plan.batch(2)
    assert set(expected.target_augmentation.flip.tolist()) == {True, False}
    for i in range(12):
        image = with_pillow(pair[1].file(int(expected.target_index[i])))
        top, left, height, width = source_window(expected.target_augmentation.window[i], 30, 40, 64)
        image = transforms.resize(image[:, top : top + height, left : left + width], [48, 48], antialias=True)
        image = image.flip(-1) if expected.target_augmentation.flip[i] else image
        torch.testing.assert_close(batch.target_images[i], normalised(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", [False, True])
def test_two_ranks_see_together_what_one_rank_sees(pair: Pair, cache: bool) -> None:
    opened = TorchLoader(*pair, PHOTOS, batch_size=4, device=CPU, workers=2, cache_on_device=cache)
    one = list(opened.train(plan_for(pair, batch_size=8), range(3)))
    ranks = [list(opened.train(plan_for(pair, batch_size=4, world_size=2), range(3), rank)) for rank in (0, 1)]
    for whole, *halves in zip(one, *ranks, strict=True):
        assert torch.equal(whole.source_images, torch.cat([half.source_images for half in halves]))
        assert torch.equal(whole.target_images, torch.cat([half.target_images for half in halves]))
    opened.close()


def test_number_of_workers_changes_nothing(pair: Pair, loader: TorchLoader) -> None:
    other = TorchLoader(*pair, PHOTOS, batch_size=4, device=CPU, workers=1)
    plan = plan_for(pair)
    for first, second in zip(loader.train(plan, range(3)), other.train(plan, range(3)), strict=True):
        assert torch.equal(first.source_images, second.source_images)
        assert torch.equal(first.target_images, second.target_images)
    other.close()


def test_segment_that_is_left_early_can_be_followed_by_another(pair: Pair, loader: TorchLoader) -> None:
    plan = plan_for(pair)
    first = iter(loader.train(plan, range(100)))
    next(first)
    del first
    assert next(iter(loader.train(plan, range(1, 2)))).source_index.tolist() == plan.batch(1).source_index.tolist()


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_gives_every_sample_once(pair: Pair, loader: TorchLoader, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        share = np.arange(rank, 14, world_size)
        index = torch.cat([index for _, index in loader.evaluate("target", share)])
        assert index.tolist() == share.tolist()
        seen += index.tolist()
    assert sorted(seen) == list(range(14))


def test_evaluation_has_a_last_partial_batch_and_empty_shards(loader: TorchLoader) -> None:
    assert [len(index) for _, index in loader.evaluate("source")] == [4, 4, 4, 3]
    assert list(loader.evaluate("source", np.arange(20, 15))) == []


def test_evaluation_pixels_are_resize_and_centre_crop(pair: Pair, loader: TorchLoader) -> None:
    for images, index in loader.evaluate("target"):
        for image, sample in zip(images, index.tolist(), strict=True):
            frame = transforms.resize(with_pillow(pair[1].file(sample)), [64, 64], antialias=True)
            torch.testing.assert_close(image, normalised(frame[:, 8:56, 8:56]), rtol=0, atol=1e-5)


# Top and left of the crops of 48 pixels in a frame of 64: corners, centre.
PLACES = [(0, 0), (0, 16), (16, 0), (16, 16), (8, 8)]


@pytest.mark.parametrize("cache", [False, True])
def test_ten_crops_are_corners_centre_and_their_mirror_images(pair: Pair, cache: bool) -> None:
    opened = TorchLoader(*pair, PHOTOS, batch_size=45, device=CPU, workers=2, cache_on_device=cache)
    seen = []
    for images, index in opened.evaluate("target", crops=10):
        assert images.shape == (10 * len(index), 3, 48, 48)
        assert images.is_contiguous(memory_format=torch.channels_last)
        seen.append(index.tolist())
        for crops, sample in zip(images.unflatten(0, (-1, 10)), index.tolist(), strict=True):
            frame = transforms.resize(with_pillow(pair[1].file(sample)), [64, 64], antialias=True)
            expected = [
                normalised(image[:, top : top + 48, left : left + 48])
                for image in (frame, frame.flip(-1))
                for top, left in PLACES
            ]
            torch.testing.assert_close(crops, torch.stack(expected), rtol=0, atol=1e-5)
    # Batches have about as many images as with one crop: 45 are the crops of 4 samples.
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]
    opened.close()


def test_ten_crops_of_a_share_and_of_a_small_batch(loader: TorchLoader) -> None:
    share = np.array([5, 1, 9])
    found = [(len(images), index.tolist()) for images, index in loader.evaluate("target", share, crops=10)]
    assert found == [(10, [5]), (10, [1]), (10, [9])]


# ------------------------------------------------------------------------------------------------- cache on the device


def test_cached_evaluation_is_the_same(loader: TorchLoader, cached: TorchLoader) -> None:
    for (images, index), (cached_images, cached_index) in zip(
        loader.evaluate("target"), cached.evaluate("target"), strict=True
    ):
        assert torch.equal(index, cached_index)
        assert torch.equal(images, cached_images)


def test_cached_windows_are_close(pair: Pair, loader: TorchLoader, cached: TorchLoader) -> None:
    plan = plan_for(pair, batch_size=32)
    direct, from_cache = next(iter(loader.train(plan, range(1)))), next(iter(cached.train(plan, range(1))))
    assert torch.equal(direct.source_labels, from_cache.source_labels)
    assert from_cache.source_images.is_contiguous(memory_format=torch.channels_last)
    levels = (direct.source_images - from_cache.source_images).abs() * 255 * 0.226
    assert levels.mean() < 4  # of 255; sources of 40x30 pixels, enlarged to 64x64: two resamples instead of one
    shuffled = (direct.source_images - from_cache.source_images.roll(1, 0)).abs() * 255 * 0.226
    assert shuffled.mean() > 20


def test_crop_of_frames_is_cut_then_resize() -> None:
    frames = torch.stack([with_natural(seed) for seed in range(4)])
    window = torch.tensor([[0, 0, 64, 64], [3, 10, 20, 31], [40, 2, 24, 9], [63, 63, 1, 1]])
    flip = torch.tensor([False, True, False, True])
    ours = crop_windows(frames, window, flip, 48)
    for i, (top, left, height, width) in enumerate(window.tolist()):
        part = frames[i, :, top : top + height, left : left + width].float()
        part = transforms.resize(part, [48, 48], antialias=False)
        torch.testing.assert_close(ours[i], part.flip(-1) if flip[i] else part, rtol=0, atol=0.02)


def with_natural(seed: int) -> Tensor:
    return torch.from_numpy(np.array(natural_image(seed, 64, 64))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def digits_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("digits")
    for domain in ("fonts", "optdigits"):
        for position in range(500):
            path = root / domain / str(position % 10) / f"{position:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            natural_image(position, 16, 16).convert("L").save(path)
    return open_pair("digits", data_root=root)


@pytest.mark.filterwarnings("ignore:domain .* published")
def test_digits_are_the_same_pixels_both_ways_and_cheap(digits_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = TorchLoader(*digits_pair, DIGITS, batch_size=8, device=CPU, workers=2)
    fast = TorchLoader(*digits_pair, DIGITS, batch_size=8, device=CPU, workers=2, cache_on_device=True)
    plan = SamplingPlan(digits_pair[0].labels, 500, preprocessing=DIGITS, batch_size=64, seed=0)
    for first, second in zip(direct.train(plan, range(3)), fast.train(plan, range(3)), strict=True):
        assert torch.equal(first.source_images, second.source_images)
        assert torch.equal(first.target_images, second.target_images)
    file = np.asarray(Image.open(digits_pair[0].file(int(first.source_index[0]))), dtype=np.float32)
    np.testing.assert_allclose(first.source_images[0, 0].numpy(), (file / 255 - 0.5) / 0.5, atol=1e-6)

    # Counted, not timed: one gather of frames a step, and no file is opened for it.
    gathered: list[int] = []
    kept = fast._cache.samples
    monkeypatch.setattr(fast._cache, "samples", lambda role, index: gathered.append(len(index)) or kept(role, index))
    monkeypatch.setattr(torch_loader, "read_sample", lambda *_: pytest.fail("a file was read"))
    assert len(list(fast.train(plan, range(200)))) == 200
    assert gathered == [64] * 400  # of each domain
    direct.close()
    fast.close()


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("grey.jpg", "L"),
        ("cmyk.jpg", "CMYK"),
        ("colour.png", "RGB"),
        ("alpha.png", "RGBA"),
        ("palette.png", "P"),
        ("bitmap.bmp", "RGB"),
        ("one_frame.gif", "P"),
        ("tagged.tiff", "RGB"),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_formats_read_as_pillow_reads_them(tmp_path: Path, name: str, mode: str, channels: int) -> None:
    natural_image(1).convert(mode).save(tmp_path / name)
    image = read_image(str(tmp_path / name), channels, "exif")
    assert image.shape == (channels, 30, 40)
    assert image.dtype == torch.uint8
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB" if channels == 3 else "L"), dtype=int)
    difference = np.abs(image.permute(1, 2, 0).numpy().reshape(expected.shape).astype(int) - expected)
    assert difference.max() <= (channels == 1)  # grey weights are rounded differently


RAMP = np.arange(0, 65536, 55, dtype=np.uint16)[:1190].reshape(34, 35)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(values: NDArray[np.uint16], colour_type: int) -> bytes:
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0), b"IDAT": zlib.compress(rows)}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*part) for part in (*parts.items(), (b"IEND", b"")))


DEEP_PNGS = {
    "grey": _png(RAMP[..., None], 0),
    "colour": _png(np.stack([RAMP] * 3, axis=-1), 2),
    "grey and alpha": _png(np.stack([RAMP, RAMP[::-1]], axis=-1), 4),
    "colour and alpha": _png(np.stack([RAMP] * 3 + [RAMP[::-1]], axis=-1), 6),
}


@pytest.mark.parametrize("kind", DEEP_PNGS)
@pytest.mark.parametrize("channels", [3, 1])
def test_16_bit_png_keeps_its_upper_byte(tmp_path: Path, kind: str, channels: int) -> None:
    (tmp_path / "deep.png").write_bytes(DEEP_PNGS[kind])
    difference = read_image(str(tmp_path / "deep.png"), channels, "exif").numpy().astype(int) - (RAMP >> 8)
    assert np.abs(difference).max() <= (channels == 1 and "colour" in kind)  # grey weights are rounded


def _tiff(values: bytes, bits: int, order: Literal["<", ">"] = "<", sample_format: int = 1) -> bytes:
    """Grey, of the shape of `RAMP`, in the byte order that is told."""
    height, width = RAMP.shape
    # Tag: (type, value); 3 is a short, 4 a long. The pixels follow the ten entries.
    tags = {256: (3, width), 257: (3, height), 258: (3, bits), 259: (3, 1), 262: (3, 1), 273: (4, 134)}
    tags |= {277: (3, 1), 278: (3, height), 279: (4, len(values)), 339: (3, sample_format)}
    entries = b"".join(
        struct.pack(f"{order}HHIHH" if kind == 3 else f"{order}HHII", tag, kind, 1, value, *[0] * (kind == 3))
        for tag, (kind, value) in tags.items()
    )
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return start + entries + bytes(4) + values


def _twelve_bits() -> bytes:
    """Rows of 35 values of 12 bits, filled up to whole bytes."""
    rows = ["".join(f"{value >> 4:012b}" for value in row) for row in RAMP.tolist()]
    return b"".join(int(f"{row}0000", 2).to_bytes(53, "big") for row in rows)


DEEP_TIFFS = {
    "little endian": _tiff(RAMP.astype("<u2").tobytes(), 16),
    "big endian": _tiff(RAMP.astype(">u2").tobytes(), 16, ">"),
    "twelve bits": _tiff(_twelve_bits(), 12),
}


@pytest.mark.parametrize("kind", DEEP_TIFFS)
@pytest.mark.parametrize("channels", [3, 1])
def test_deep_grey_tiff_keeps_its_upper_byte(tmp_path: Path, kind: str, channels: int) -> None:
    (tmp_path / "deep.tif").write_bytes(DEEP_TIFFS[kind])
    image = read_image(str(tmp_path / "deep.tif"), channels, "exif")
    assert image.shape == (channels, *RAMP.shape)
    assert (image.numpy() == RAMP >> 8).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_compressed_deep_tiff(tmp_path: Path, compression: str, mode: str) -> None:
    values = RAMP.astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (35, 34), values.tobytes())
    image.save(tmp_path / "deep.tif", compression=compression)
    assert (read_image(str(tmp_path / "deep.tif"), 3, "exif").numpy() == RAMP >> 8).all()


@pytest.mark.parametrize(("bits", "sample_format", "kind"), [(32, 2, "i4"), (32, 3, "f4"), (16, 2, "i2")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_values_without_a_scale_are_refused(
    tmp_path: Path, bits: int, sample_format: int, kind: str, order: Literal["<", ">"]
) -> None:
    path = tmp_path / "deep.tif"
    path.write_bytes(_tiff((RAMP >> 1).astype(order + kind).tobytes(), bits, order, sample_format))
    with pytest.raises(UsageError, match=rf"{path}: found signed or 32-bit values, .*; expected a readable image"):
        read_image(str(path), 3, "exif")
    assert "32-bit values" in file_problem(str(path))


def _png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*part) for part in parts)


def write_bad(path: Path, kind: str) -> None:
    natural_image(1, 400, 300).save(path, format="PNG" if kind == "truncated png" else "JPEG")
    if kind.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "damaged png":
        natural_image(1).save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:400] + bytes(100) + path.read_bytes()[500:])
    elif kind == "png without its end":
        natural_image(1).save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:-12])
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no image")
    elif kind == "animation":
        natural_image(1).save(path, format="GIF", save_all=True, append_images=[natural_image(2)])
    elif kind == "absurd size":
        path.write_bytes(_png_header(12_000, 12_000))
    elif kind == "more absurd size":
        path.write_bytes(_png_header(60_000, 60_000))
    elif kind == "32-bit values":
        Image.fromarray(np.asarray(natural_image(1).convert("L"), dtype=np.int32)).save(path, format="TIFF")
    elif kind == "missing":
        path.unlink()


BAD = {
    "truncated jpeg": "truncated",
    "truncated png": "truncated",
    "damaged png": "a damaged PNG .checksum of the chunk b'IDAT' at byte 33",
    "png without its end": "a truncated PNG",
    "zero bytes": "bytes that are no image",
    "text": "bytes that are no image",
    "animation": "an animation",
    "absurd size": "a header of 12000x12000 pixels",
    "more absurd size": "a header of 60000x60000 pixels",
    "32-bit values": "signed or 32-bit values",
    "missing": "no such file any more",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("cache", [False, True])
def test_bad_file_is_named(tmp_path: Path, kind: str, cache: bool) -> None:
    class_tree(tmp_path / "photos", ["cat", "dog"], per_class=3)
    class_tree(tmp_path / "new", ["cat"], per_class=3)
    source, target = open_pair("folder", "photos", "new", tmp_path)
    bad = tmp_path / "new" / "cat" / "frame_0002.jpg"
    write_bad(bad, kind)

    def train() -> None:
        opened = TorchLoader(source, target, PHOTOS, batch_size=4, device=CPU, workers=2, cache_on_device=cache)
        plan = SamplingPlan(source.labels, len(target), preprocessing=PHOTOS, batch_size=3, seed=0)
        try:
            list(opened.train(plan, range(1)))
        finally:
            opened.close()

    with pytest.raises(UsageError, match=rf"{bad}: found .*{BAD[kind]}.*; expected a readable image"):
        train()


# A process of its own: the tests' computes in one thread anyway.
THREADS = """
import json, sys, threading
from pathlib import Path
import torch, torchvision
from gsda_fast.data.benchmarks import find_benchmark
from gsda_fast.data.domains import open_pair
from gsda_fast.data.pack import pack
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.data.verify import require_readable

torch.set_num_threads(4)
found, opened = {}, torchvision.io.decode_image
def counting(data, mode):
    found[threading.current_thread().name.partition("_")[0]] = torch.get_num_threads()
    return opened(data, mode=mode)
torchvision.io.decode_image = counting

root, preprocessing = Path(sys.argv[1]), find_benchmark("folder").preprocessing
source, target = open_pair("folder", "photos", "photos", root)
require_readable("folder", source, target)
found["main, before it computes"] = torch.get_num_threads()
pack("folder", "photos", "photos", root, output=root / "pack")
loader = TorchLoader(source, target, preprocessing, batch_size=2, device="cpu")
plan = SamplingPlan(source.labels, len(target), preprocessing=preprocessing, batch_size=2, seed=0)
list(loader.train(plan, range(1)))
loader.close()
found["main"] = torch.get_num_threads()
print(json.dumps(found))
"""


def test_threads_that_work_on_images_have_no_teams_of_their_own(tmp_path: Path) -> None:
    class_tree(tmp_path / "photos", ["cat", "dog"])
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", THREADS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    expected = {"verify": 1, "pack": 1, "decode": 1, "main, before it computes": 4, "main": 4}
    assert json.loads(done.stdout) == expected


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert usable_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert usable_cores() == 1
