"""Image files as anybody may have made them: what is decoded, what is refused, and that nothing else happens."""

import os
import socket
import struct
import subprocess
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_trees import natural_image, save_turned
from PIL import Image, ImageOps
from torchvision.io import decode_image

from gsda_fast.data import decoding
from gsda_fast.data.decoding import FORMATS, MOST_BYTES, format_of, inspect, read_encoded, read_image
from gsda_fast.errors import UsageError

NAMES = {"JPEG": "a.jpg", "PNG": "a.png", "BMP": "a.bmp", "GIF": "a.gif", "TIFF": "a.tif", "WEBP": "a.webp"}
NAMES["AVIF"] = "a.avif"


def encoded(kind: str, image: Image.Image | None = None, **how: object) -> bytes:
    memory = BytesIO()
    (image or natural_image(1)).save(memory, kind, **how)
    return memory.getvalue()


def refusal(path: Path, content: bytes, channels: int = 3) -> str:
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        inspect(str(path), channels)
    assert error.value.what == str(path)
    return error.value.found


# ------------------------------------------------------------------------------------------------------ what a file is


@pytest.mark.parametrize("kind", FORMATS)
def test_content_decides_and_not_the_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(kind))
    assert inspect(str(path), 3).format == kind
    assert read_image(str(path), 3, "exif").shape == (3, 30, 40)
    assert read_image(str(path), 1, "exif").shape == (1, 30, 40)
    # Another decoder is given the file, or what this one made of it.
    assert bytes(read_encoded(str(path), 3, (kind,), "exif")[:20]) == path.read_bytes()[:20]
    for channels, header in ((3, b"P6 40 30 255\n"), (1, b"P5 40 30 255\n")):
        data = read_encoded(str(path), channels, (), "exif")
        assert data.startswith(header)
        pixels = torch.frombuffer(data[len(header) :], dtype=torch.uint8).view(30, 40, channels).permute(2, 0, 1)
        assert torch.equal(pixels, read_image(str(path), channels, "exif"))


@pytest.mark.parametrize("kind", ["TGA", "PCX", "ICO", "PPM", "JPEG2000", "EPS", "PDF", "SGI", "MSP", "XBM"])
def test_other_formats_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    image = natural_image(1).convert("1" if kind in ("MSP", "XBM") else "RGB")
    assert "no image of a known format (JPEG, PNG, BMP" in refusal(tmp_path / "a.png", encoded(kind, image))


def test_pillow_is_never_asked_to_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing is what starts Ghostscript for PostScript."""
    opened = Image.open
    formats: list[object] = []

    def noted(file: object, **more: object) -> Image.Image:
        formats.append(more["formats"])
        return opened(file, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding.Image, "open", noted)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for kind in FORMATS:
        (tmp_path / "a").write_bytes(encoded(kind))
        inspect(str(tmp_path / "a"), 3)
    assert formats == [(kind,) for kind in FORMATS if kind != "JPEG"]
    refusal(tmp_path / "a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n")


def test_heic_gets_a_hint(tmp_path: Path) -> None:
    assert "pillow-heif" in refusal(tmp_path / "a.jpg", b"\0\0\0\x18ftypheic" + bytes(40))
    assert format_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif") == "AVIF"


# ----------------------------------------------------------------------------------------------------- what an entry is


def test_entries_that_are_no_files_are_named_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    short = Path(os.path.relpath(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short if len(str(short)) < 100 else tmp_path / "socket"))
    told = {"pipe": "a named pipe", "zero": "a device", "folder": "a folder", "socket": "a socket"}
    for name, words in (told | {"sparse": f"more than the {MOST_BYTES} that an image may have"}).items():
        with pytest.raises(UsageError, match=words):
            read_encoded(str(tmp_path / name), 3, FORMATS, "exif")


# -------------------------------------------------------------------------------------------------------------- sizes


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: bytes, width: int = 40, height: int = 30, bits: int = 8, colour: int = 2, *between: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *between, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


ROWS = b"".join(b"\0" + bytes((7 * y + 3 * x) & 255 for x in range(120)) for y in range(30))


def peak_bytes(path: Path) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(UsageError):
            inspect(str(path), 3)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def webp(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + b"VP8L" + bytes(4)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def wide_jpeg(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (png(zlib.compress(b""), 60_000, 60_000), "a header of 60000x60000 pixels"),
        (png(zlib.compress(b""), 9_000, 9_000, 16, 6), "9000x9000 pixels of 8 bytes"),
        (webp(1 << 24, 200), "a header of 16777216x200 pixels"),
        (wide_jpeg(65_000, 65_000), "a header of 65000x65000 pixels"),
        (encoded("JPEG")[:-2] + 300 * b"\xff\xda\0\x02" + b"\xff\xd9", "a JPEG of 301 scans"),
    ],
    ids=["png", "deep png", "webp", "jpeg", "scans"],
)
def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a"
    assert told in refusal(path, content)
    assert peak_bytes(path) < 8 * len(content) + 2**20


def test_a_png_of_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_MOST_CHUNKS", 1000)
    assert "more than 1000 chunks" in refusal(tmp_path / "a", png(b"", 40, 30, 8, 2, chunk(b"tIME", bytes(7)) * 1000))


def test_more_pixels_than_the_header_says_are_not_inflated(tmp_path: Path) -> None:
    deflater = zlib.compressobj(1)
    bomb = b"".join([deflater.compress(bytes(2**20)) for _ in range(40)]) + deflater.flush()
    path = tmp_path / "a.png"
    path.write_bytes(png(bomb))
    tracemalloc.start()
    assert inspect(str(path), 3).format == "PNG"
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_texts_and_profiles_of_a_png_go_nowhere(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(2**22), 1)
    extra = chunk(b"zTXt", b"x\0\0" + bomb) + chunk(b"iCCP", b"x\0\0" + bomb) + chunk(b"eXIf", b"MM\0*")
    path = tmp_path / "a.png"
    path.write_bytes(png(zlib.compress(ROWS), 40, 30, 8, 2, extra))
    assert bytes(read_encoded(str(path), 3, FORMATS, "exif")) == png(zlib.compress(ROWS))
    expected = torch.frombuffer(bytearray(ROWS), dtype=torch.uint8).view(30, 121)[:, 1:].reshape(30, 40, 3)
    assert torch.equal(read_image(str(path), 3, "exif").permute(1, 2, 0), expected)


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (png(zlib.compress(ROWS)[:-40]), "truncated"),
        (png(zlib.compress(ROWS)[:-4]), "no end"),
        (png(zlib.compress(ROWS[:-121])), "3509 bytes of pixels of 3630"),
        (png(zlib.compress(b"\x09" + ROWS[1:])), "unrecognized data stream"),
        (png(b""), "truncated"),
        (png(zlib.compress(bytes(30 * 41)), colour=3), "without its palette"),
        (png(zlib.compress(bytes(30 * 41)), 40, 30, 8, 3, chunk(b"PLTE", b"abcd")), "not in threes"),
        (png(zlib.compress(ROWS), 40, 30, 8, 2, chunk(b"ABCD", b"x")), "nobody knows"),
        (png(zlib.compress(ROWS), 40, 30, 8, 2, chunk(b"IHDR", bytes(13))), "not its first chunk"),
        (png(zlib.compress(ROWS), 40, 30, 7, 2), "of 7 bits"),
        (png(zlib.compress(ROWS), 0, 30), "0x30 pixels"),
        (png(zlib.compress(ROWS), 40, 30, 8, 2, chunk(b"acTL", bytes(8))), "an animation (PNG)"),
    ],
)
def test_png_with_sound_checksums_around_damage(tmp_path: Path, content: bytes, told: str) -> None:
    assert told in refusal(tmp_path / "a.png", content)


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(("mode", "bits"), [("1", 1), ("P", 4), ("P", 8), ("L", 8), ("LA", 8), ("RGB", 8), ("RGBA", 8)])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (33, 20)])
def test_the_size_of_pixels_is_what_they_inflate_to(
    tmp_path: Path, mode: str, bits: int, size: tuple[int, int], interlace: int
) -> None:
    header = struct.pack(">II", *size) + bytes([bits, {"1": 0, "L": 0, "RGB": 2, "P": 3, "LA": 4, "RGBA": 6}[mode]])
    if not interlace:
        data = encoded("PNG", natural_image(2, *size).convert(mode), bits=bits)
        place = data.index(b"IDAT")
        pixels = zlib.decompress(data[place + 4 : place + 4 + int.from_bytes(data[place - 4 : place], "big")])
        assert decoding._bytes_of_pixels(memoryview(header + bytes(3))) == len(pixels)
    else:  # every pixel once, in seven images
        assert decoding._bytes_of_pixels(memoryview(header + bytes([0, 0, 1]))) >= size[0] * size[1] * bits / 8


def test_a_jpeg_table_under_a_wrong_number_is_found(tmp_path: Path) -> None:
    data = bytearray(encoded("JPEG"))
    data[data.index(b"\xff\xdb") + 4] = 3
    refusal(tmp_path / "a.jpg", bytes(data))


def test_a_tiff_that_loaders_read_in_different_ways_is_refused(tmp_path: Path) -> None:
    image = natural_image(1)
    forms = {
        "Lab": encoded("TIFF", image.convert("LAB")),
        "grey TIFF with alpha": encoded("TIFF", image.convert("LA")),
        "several pages": encoded("TIFF", image, save_all=True, append_images=[image]),
        "how many bits": encoded("TIFF", image.convert("1")),
    }
    for told, content in forms.items():
        assert told in refusal(tmp_path / "a.tif", content), told


# -------------------------------------------------------------------------------------------------------- orientation


LOSSLESS: dict[str, dict[str, object]] = {
    "a.jpg": {}, "a.png": {}, "a.webp": {"lossless": True}, "a.tif": {}, "a.avif": {},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("number", range(1, 9))
def test_a_photo_is_turned_as_its_orientation_says(tmp_path: Path, name: str, number: int) -> None:
    upright = natural_image(3, 41, 30)
    path = save_turned(tmp_path / name, upright, number, **LOSSLESS[name])
    for channels in (3, 1):
        seen, stored = (read_image(str(path), channels, orientation) for orientation in ("exif", "stored"))
        assert seen.shape == (channels, 30, 41)
        # Pillow turns what was stored.
        image = Image.fromarray(stored.permute(1, 2, 0).squeeze(2).numpy())
        image.getexif()[0x0112] = number
        assert (np.asarray(ImageOps.exif_transpose(image)) == seen.permute(1, 2, 0).squeeze(2).numpy()).all()
        assert seen.permute(1, 2, 0).is_contiguous()
    if name in ("a.png", "a.webp", "a.tif"):
        assert (read_image(str(path), 3, "exif").permute(1, 2, 0).numpy() == np.asarray(upright)).all()
    assert inspect(str(path), 3).orientation == number


@pytest.mark.parametrize("number", range(1, 9))
def test_another_decoder_finds_one_orientation_and_no_more(tmp_path: Path, number: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = number, "a maker"
    path, other = tmp_path / "a.jpg", Image.Exif()
    other[0x0112] = 1 + number % 8
    data = encoded("JPEG", exif=exif, comment=b"kept")
    place = data.index(b"\xff\xdb")
    block = other.tobytes()
    second = struct.pack(">BBH", 0xFF, 0xE1, 2 + len(block)) + block
    path.write_bytes(data[:place] + second + data[place:])  # the first of two counts
    for orientation, expected in (("exif", number), ("stored", 1)):
        given = read_encoded(str(path), 3, ("JPEG",), orientation)
        assert given.count(b"Exif\0\0") == (expected != 1)
        with Image.open(BytesIO(given)) as image:
            assert dict(image.getexif()) == ({0x0112: expected} if expected != 1 else {})
            assert image.info["comment"] == b"kept"
        pixels = read_image(str(path), 3, "stored")
        assert torch.equal(decode_image(torch.frombuffer(given, dtype=torch.uint8), mode="RGB"), pixels)
    assert inspect(str(path), 3).orientation == number


def test_a_file_without_exif_reaches_another_decoder_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG"))
    assert bytes(read_encoded(str(path), 3, ("JPEG",), "exif")) == path.read_bytes()


def exif_block(entries: bytes, count: int, order: str = ">", first: int = 8) -> bytes:
    start = b"MM\0*" if order == ">" else b"II*\0"
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", first, count) + entries


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (exif_block(struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), 1, "<"), 6),
        (exif_block(struct.pack(">HHIIHHIHH", 0x010F, 2, 99, 2**31, 0x0112, 3, 1, 8, 0), 2), 8),
        (exif_block(struct.pack(">HHIHH", 0x0112, 3, 1, 0, 0), 1), 1),
        (exif_block(struct.pack(">HHIHH", 0x0112, 3, 1, 9, 0), 1), 1),
        (exif_block(struct.pack(">HHIHH", 0x0112, 2, 1, 6, 0), 1), 1),
        (exif_block(struct.pack(">HHIHH", 0x0112, 3, 7, 6, 0), 1), 1),
        (exif_block(struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)[:-3], 1), 1),
        (exif_block(b"", 65_535), 1),
        (exif_block(b"", 1, first=2**32 - 1), 1),
        (b"Exif\0\0", 1),
        (b"Exif\0\0MM", 1),
    ],
    ids=["little", "other", "zero", "nine", "text", "several", "cut", "empty", "far", "none", "short"],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_exif_that_says_nothing_means_upright(tmp_path: Path, block: bytes, expected: int) -> None:
    data, path = encoded("JPEG"), tmp_path / "a.jpg"
    path.write_bytes(data[:2] + struct.pack(">BBH", 0xFF, 0xE1, 2 + len(block)) + block + data[2:])
    assert inspect(str(path), 3).orientation == expected


# ------------------------------------------------------------------------------------------------------- large photos


def test_a_photo_of_200_megapixels_is_read_at_half_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    # Flat, so that 201 million pixels take little room. A phone's frame, in grey.
    Image.new("L", (16_384, 12_288), 90).save(path, quality=50)
    assert path.stat().st_size < 3 * 2**20
    found = read_image(str(path), 1, "exif")
    assert found.shape == (1, 6_144, 8_192)
    assert found.float().mean() == 90
    assert inspect(str(path), 1) == ("JPEG", 1, True)


def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For photos of 40 x 30 pixels, that are then read at half their size, and of 80 x 60, which are too large."""
    monkeypatch.setattr(decoding, "MOST_PIXELS", 1_000)
    monkeypatch.setattr(decoding, "MOST_HALVED", 4_000)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("number", [1, 6])
def test_what_is_halved_looks_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, channels: int, number: int
) -> None:
    path = save_turned(tmp_path / "a.jpg", natural_image(5, 42, 30).convert(mode), number, quality=95)
    whole = read_image(str(path), channels, "exif").float()
    small_limits(monkeypatch)
    halved = read_image(str(path), channels, "exif")
    assert halved.shape == (channels, 15, 21)
    means = torch.nn.functional.avg_pool2d(whole, 2)
    assert (halved - means).abs().mean() < 4
    # The other loader is given the same pixels.
    given = read_encoded(str(path), channels, ("JPEG",), "exif")
    assert given.startswith(b"P6 21 15 255" if channels == 3 else b"P5 21 15 255")
    assert bytes(given[13:]) == halved.permute(1, 2, 0).contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("size", "how", "told", "remedy"),
    [
        ((80, 60), {}, "a header of 80x60 pixels, more than 4000 in all", "make it smaller, or take it out"),
        ((40, 30), {"progressive": True}, "a progressive JPEG of 40x30 pixels, more than 1000", "as a baseline JPEG"),
    ],
)
def test_a_photo_that_is_too_large_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], how: dict[str, bool], told: str, remedy: str
) -> None:
    small_limits(monkeypatch)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG", natural_image(1, *size), **how))
    with pytest.raises(UsageError) as error:
        read_image(str(path), 3, "exif")
    assert told in error.value.found
    assert remedy in error.value.remedy


# --------------------------------------------------------------------------------------------------------------- fuzz


GOOD = {
    **{kind: encoded(kind) for kind in FORMATS},
    "progressive": encoded("JPEG", progressive=True),
    "deep": encoded("PNG", Image.fromarray(np.asarray(natural_image(1).convert("L"), dtype=np.uint16) * 257)),
    "palette": encoded("PNG", natural_image(1).convert("P")),
    "lzw": encoded("TIFF", compression="tiff_lzw"),
    "deflate": encoded("TIFF", compression="tiff_adobe_deflate"),
    "lossless": encoded("WEBP", lossless=True),
}


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A small image of any format with bytes changed, most of them near its start, or cut, or doubled in part."""
    data = bytearray(GOOD[draw(st.sampled_from(sorted(GOOD)))])
    for _ in range(draw(st.integers(1, 6))):
        near = draw(st.booleans())
        data[draw(st.integers(0, (min(200, len(data)) if near else len(data)) - 1))] = draw(st.integers(0, 255))
    if draw(st.integers(0, 4)) == 0:
        del data[draw(st.integers(1, len(data))) :]
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(data)))
        data[place:place] = data[: draw(st.integers(0, 300))]
    if data[:8] == GOOD["PNG"][:8] and draw(st.booleans()):
        _mend_checksums(data)
    return bytes(data)


def _mend_checksums(data: bytearray) -> None:
    place = 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
    database=None,
)
@given(content=damaged(), channels=st.sampled_from([1, 3]))
@pytest.mark.filterwarnings("ignore")
def test_no_damage_ends_in_anything_but_a_line_that_names_the_file(
    tmp_path: Path, content: bytes, channels: int
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    found = outcome(path, channels)
    if isinstance(found, UsageError):
        assert found.what == str(path)
        assert "\n" not in str(found)
    else:
        # What verification calls good is read.
        assert found in FORMATS
        pixels = read_image(str(path), channels, "exif")
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == channels


def outcome(path: Path, channels: int = 3) -> str | UsageError:
    """What is found in a file, or the one error that may come of it."""
    try:
        return inspect(str(path), channels).format
    except UsageError as error:
        return error


@pytest.mark.filterwarnings("ignore")
def test_damage_leaves_no_memory_behind(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def after(rounds: int) -> int:
        for number in range(rounds):
            for data in GOOD.values():
                changed = bytearray(data)
                changed[(number * 7919 + 13) % len(changed)] ^= 1 + number % 255
                path.write_bytes(changed)
                outcome(path)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = after(20)
    # An image that is kept takes 4 kB, and its file as much: a few hundred of 780 would show.
    assert after(60) - before < 5 * 2**20
