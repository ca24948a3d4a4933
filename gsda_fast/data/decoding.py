"""The one place that makes pixels of an image file, for `verify`, the torch loader and packs alike.

Files are anybody's. So:

- Only regular files are opened, of at most `MOST_BYTES`: a pipe, a device or a sparse file of a terabyte is an error.
- The first bytes say which format a file is, whatever its name says, and only the formats of `FORMATS` are decoded. A
  decoder of any other, or one that starts a program (Pillow's for PostScript does), never sees a byte.
- The size in the header is bounded before anything is decoded (`MOST_PIXELS`, `MOST_DECODED`).
- JPEG goes to torchvision.io, the fastest, and what it refuses to Pillow; everything else goes to Pillow. torchvision's
  decoder for PNG ends the process at damaged pixels under sound checksums, and libpng writes a warning for each file
  with an odd profile: no PNG gets to it. Of a PNG only the chunks that make pixels are passed on, checksums checked.
- Whatever a decoder raises becomes a `UsageError` that names the file.

`inspect` (for verify) decodes as the loaders do and looks once more at what one of them alone would refuse, so that
what it calls good all of them read.

A photo is turned as its EXIF orientation says, or left as stored, as the caller asks. Alpha is dropped, 16-bit values
keep their upper byte. What loaders would read in different ways is refused by name: animations, further pages, Lab,
premultiplied alpha, 32-bit values.

A JPEG of more than `MOST_PIXELS` (phones take photos of 108 and 200 megapixels) is decoded at half its width and
height, by libjpeg's scaling, which never makes the pixels between.
"""

import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin
from torch import Tensor

from gsda_fast.data.benchmarks import Orientation
from gsda_fast.errors import UsageError, visible

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF")
"""What is decoded, by Pillow's names."""

MOST_PIXELS = 89_478_485
"""Pixels of an image that is decoded as large as it is: Pillow's limit."""

MOST_HALVED = 4 * MOST_PIXELS
"""Pixels of a JPEG that is decoded at half its width and height."""

MOST_DECODED = 3 * MOST_PIXELS
"""Bytes that the pixels of an image take as stored: those of the largest RGB image of 8 bits."""

MOST_BYTES = 2**29
"""Bytes of a file."""

_INFLATED_AT_ONCE = 2**20  # bytes
_MOST_CHUNKS = 100_000  # of a PNG; 268 MB in chunks of 8 kB are 33,000
_MOST_SCANS = 200  # of a JPEG, each of which is a pass over all its pixels; a progressive one has about ten
_START_OF_SCAN = 0xDA  # markers of JPEG
_APP1 = 0xE1
_SEQUENTIAL = (0xC0, 0xC1)  # frames that are decoded row by row, where one scan has all their components
_EXIF = b"Exif\0\0"
_UPRIGHT = 1
# Flipped along these dimensions of (height, width), after they have changed places from 5 on.
_FLIPS = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}
_SMALLER = "make it smaller, or take it out of the data set"
_PALETTE = 3  # a colour type of PNG
_CHANNELS_OF_PNG = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS_OF_PNG = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_KINDS_OF_TIFF = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_ENTRIES = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class _Refused(Exception):
    """What is wrong with a file, in words that follow "found", and what to do about it."""

    def __init__(self, found: str, remedy: str = "repair it or take it out of the data set") -> None:
        super().__init__(found)
        self.remedy = remedy


class Sound(NamedTuple):
    """The bytes of a file, as far as they can be checked without decoding them.

    Attributes:
        data: of the file; of a PNG only the chunks that make pixels. format: one of `FORMATS`.
        orientation: from 1 to 8, as EXIF has it; 1 also where only decoding brings it to light.
        halved: a JPEG so large that it is decoded at half its width and height. cmyk: a JPEG of four components.
    """

    data: bytearray
    format: str
    orientation: int = _UPRIGHT
    halved: bool = False
    cmyk: bool = False


class Inspection(NamedTuple):
    """What verification learns of a file that can be read.

    Attributes:
        format: one of `FORMATS`. orientation: from 1 (upright) to 8, as EXIF has it. halved: see `Sound`.
    """

    format: str
    orientation: int
    halved: bool


def read_image(path: str, channels: int, orientation: Orientation) -> Tensor:
    """Read and decode an image file, to (channels, height, width) uint8.

    Args:
        path: of the file. channels: 3 for RGB, 1 for grey. orientation: "exif" turns a photo as it says, "stored" does
            not.

    Raises:
        UsageError: the file is gone, no regular file, of a format that is not in `FORMATS`, damaged, too large, or
            one that loaders would read in different ways.
    """
    with _naming(path):
        return _read_pixels(_read_sound(path), channels, orientation)


def read_encoded(path: str, channels: int, formats: Sequence[str], orientation: Orientation) -> bytearray:
    """Read an image file for another decoder, which gets to see nothing that can be refused before it.

    Args:
        path: of the file. channels: 3 for RGB, 1 for grey. formats: of `FORMATS`, which that decoder is trusted with.
        orientation: as for `read_image`. The other decoder turns a JPEG as its EXIF says: what it is given has the
            orientation that was found here, or none.

    Returns:
        The bytes of a file of these formats, of a PNG only the chunks that make pixels; of any other file, of a PNG
        that is to be turned and of what is decoded at half its size the pixels, uncompressed (binary PPM or PGM).

    Raises:
        UsageError: as `read_image`, but for what decoding alone brings to light.
    """
    with _naming(path):
        sound = _read_sound(path)
        number = sound.orientation if orientation == "exif" else _UPRIGHT
        # DALI makes CMYK a level darker or lighter where it turns it, and looks for no orientation in a PNG.
        turned_here = number != _UPRIGHT and (sound.format != "JPEG" or sound.cmyk)
        if sound.format not in formats or sound.halved or turned_here:
            return _uncompressed(_read_pixels(sound, channels, orientation))
        return _with_orientation(sound.data, number) if sound.format == "JPEG" else sound.data


def inspect(path: str, channels: int) -> Inspection:
    """Decode a file as the loaders do, and check what libpng alone would refuse.

    Raises:
        UsageError: as `read_image`.
    """
    with _naming(path):
        sound = _read_sound(path)
        _, number = _decode(sound, channels)
        if sound.format == "PNG":
            _require_whole_pixels(sound.data)
        return Inspection(sound.format, number, sound.halved)


def _read_sound(path: str) -> Sound:
    data = _read_file(path)
    found = format_of(data)
    if found not in FORMATS:
        raise _Refused(found)
    if found == "JPEG":
        return Sound(data, found, *_check_jpeg(data))
    if found == "PNG":
        return Sound(*_checked_png(data))
    if found == "WEBP":
        _require_size(*_size_of_webp(data))
    return Sound(data, found)


def _read_pixels(sound: Sound, channels: int, orientation: Orientation) -> Tensor:
    pixels, number = _decode(sound, channels)
    return _turned(pixels, number) if orientation == "exif" else pixels


def _decode(sound: Sound, channels: int) -> tuple[Tensor, int]:
    """Return the pixels as stored, and the orientation."""
    if sound.format == "JPEG" and not sound.halved:
        from torchvision.io import ImageReadMode, decode_image

        mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
        try:
            return decode_image(torch.frombuffer(sound.data, dtype=torch.uint8), mode=mode), sound.orientation
        except RuntimeError:
            pass  # CMYK in some of its forms, for one
    return _decode_with_pillow(sound, channels)


def _turned(pixels: Tensor, number: int) -> Tensor:
    """Return (C, H, W) pixels as an EXIF orientation says that they are to be seen; channels innermost, as decoded."""
    if number == _UPRIGHT:
        return pixels
    rows = pixels.permute(1, 2, 0)
    rows = rows.transpose(0, 1) if number >= 5 else rows
    return rows.flip(_FLIPS[number]).contiguous().permute(2, 0, 1)


def _orientation_in(exif: bytes | memoryview) -> int:
    """Return the orientation in a block of EXIF, which is a TIFF's first directory; upright where it is none.

    Pillow's own reader warns of every other entry that is odd.
    """
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(place: int, size: int) -> int:
        return int.from_bytes(exif[place : place + size], order)

    first = number(4, 4)
    for place in range(first + 2, min(first + 2 + 12 * number(first, 2), len(exif) - 11), 12):
        if number(place, 2) == ExifTags.Base.Orientation and number(place + 2, 2) == 3 and number(place + 4, 4) == 1:
            found = number(place + 8, 2)
            return found if found in _FLIPS else _UPRIGHT
    return _UPRIGHT


def _uncompressed(pixels: Tensor) -> bytearray:
    channels, height, width = pixels.shape
    header = bytearray(f"{'P6' if channels == 3 else 'P5'} {width} {height} 255\n".encode())
    return header + pixels.permute(1, 2, 0).contiguous().numpy().tobytes()


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the file in whatever is raised: decoders raise SyntaxError, KeyError, struct.error, RuntimeError, ..."""
    try:
        yield
    except FileNotFoundError as error:
        raise _unreadable(path, "no such file any more") from error
    except _Refused as refused:
        raise _unreadable(path, str(refused), refused.remedy) from None
    except OSError as error:
        raise _unreadable(path, error.strerror or f"{type(error).__name__}: {error}") from error
    except Warning:
        raise  # whoever made an error of it
    except Exception as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error


def _read_file(path: str) -> bytearray:
    # Before it is opened: opening a device may do something, and opening a pipe waits for a writer.
    _require_regular(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        _require_regular(status)
        data = bytearray(status.st_size)  # torch wants memory that it might write to
        view, filled = memoryview(data), 0
        while filled < len(data):
            count = file.readinto(view[filled:])
            if not count:
                break
            filled += count
        view.release()
        del data[filled:]
    return data


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _Refused(next((name for is_such, name in _ENTRIES if is_such(status.st_mode)), "no regular file"))
    if status.st_size > MOST_BYTES:
        raise _Refused(f"{status.st_size} bytes, more than the {MOST_BYTES} that an image may have", _SMALLER)


def format_of(data: bytes | bytearray) -> str:
    """Return which format the first bytes of a file (32 are enough) say it is: one of `FORMATS`, or why it is none of
    them.
    """
    start = bytes(data[:32])
    if start[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        if start[8:12] in (b"avif", b"avis") or b"avif" in start[16:]:
            return "AVIF"
        if start[8:12] in _HEIF_BRANDS:
            return "HEIC, which no decoder here reads: convert it to JPEG or PNG, with the package pillow-heif for one"
    if start[:2] == b"BM":
        return "BMP"
    return f"{len(data)} bytes that are no image of a known format ({', '.join(FORMATS)})"


def _require_size(width: int, height: int, bytes_a_pixel: float = 1) -> None:
    if width * height > MOST_PIXELS:
        raise _Refused(f"a header of {width}x{height} pixels, more than {MOST_PIXELS} in all", _SMALLER)
    if width * height * bytes_a_pixel > MOST_DECODED:
        size = f"{width}x{height} pixels of {bytes_a_pixel:g} bytes"
        raise _Refused(f"a header of {size}, more than {MOST_DECODED} bytes in all", _SMALLER)


# --------------------------------------------------------------------------------------------------------------- JPEG


def _segments(data: bytearray) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of the parts of a JPEG before the pixels of its first scan: each has a length.

    A file that ends before them yields fewer.
    """
    place = 2
    while place + 9 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF:
            raise _Refused(f"a damaged JPEG (no marker at byte {place})")
        if marker == 0xFF:  # a filling byte
            place += 1
        elif 0xD0 <= marker <= 0xD8 or marker == 0x01:
            place += 2
        else:
            end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
            yield marker, place, end
            place = end


def _is_exif(data: bytearray, marker: int, start: int) -> bool:
    return marker == _APP1 and data[start + 4 : start + 4 + len(_EXIF)] == _EXIF


def _check_jpeg(data: bytearray) -> tuple[int, bool, bool]:
    """Bound what decoding will cost. Return orientation, halved and cmyk as in `Sound`."""
    size, frame, components, orientation = None, 0, 0, 0
    for marker, start, end in _segments(data):
        if marker == _START_OF_SCAN and size is not None:
            row_by_row = frame in _SEQUENTIAL and data[start + 4] == components
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = int.from_bytes(data[start + 7 : start + 9]), int.from_bytes(data[start + 5 : start + 7])
            frame, components = marker, data[start + 9]
        elif not orientation and _is_exif(data, marker, start):
            orientation = _orientation_in(memoryview(data)[start + 4 + len(_EXIF) : end])
    else:
        raise _Refused(f"a damaged or truncated JPEG, without a whole header ({len(data)} bytes)")
    if not all(size):
        raise _Refused(f"a JPEG of {size[0]}x{size[1]} pixels")
    pixels = size[0] * size[1]
    if pixels > MOST_HALVED:
        raise _Refused(f"a header of {size[0]}x{size[1]} pixels, more than {MOST_HALVED} in all", _SMALLER)
    if pixels > MOST_PIXELS and not row_by_row:
        # A decoder keeps all coefficients of such a file until its last scan, however small the pixels become.
        found = f"a progressive JPEG of {size[0]}x{size[1]} pixels, more than {MOST_PIXELS} in all"
        raise _Refused(found, f"save it as a baseline JPEG, {_SMALLER}")
    scans = data.count(b"\xff\xda")
    if scans > _MOST_SCANS:
        raise _Refused(f"a JPEG of {scans} scans, more than {_MOST_SCANS}")
    return orientation or _UPRIGHT, pixels > MOST_PIXELS, components == 4


def _with_orientation(data: bytearray, number: int) -> bytearray:
    """Return a checked JPEG with this orientation in its EXIF and nothing else there; without EXIF for an upright one.

    No two readers of EXIF agree on what is odd in it.
    """
    parts, kept = [], 0
    for marker, start, end in _segments(data):
        if marker == _START_OF_SCAN:
            break
        if _is_exif(data, marker, start):
            parts.append(data[kept:start])
            kept = end
    if not parts and number == _UPRIGHT:
        return data
    written = b""
    if number != _UPRIGHT:
        entry = struct.pack(">HHIHH", ExifTags.Base.Orientation, 3, 1, number, 0)
        exif = _EXIF + b"MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)
        written = struct.pack(">BBH", 0xFF, _APP1, 2 + len(exif)) + exif
    rest = bytearray().join([*parts, data[kept:]])
    return rest[:2] + written + rest[2:]


# ---------------------------------------------------------------------------------------------------------------- PNG


def _checked_png(data: bytearray) -> tuple[bytearray, str, int]:
    """Return a PNG reduced to the chunks that make its pixels, all checksums and the size of the pixels checked, its
    format and its orientation.

    Texts, profiles and times can be bombs of their own, and decoders complain about them.
    """
    view, start, chunks, stripped, orientation = memoryview(data), 8, 0, False, 0
    kept, kinds = [view[:8]], set()
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4])
        kind = bytes(view[start + 4 : start + 8])
        if end + 4 > len(data):
            break
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise _Refused(f"a damaged PNG (checksum of the chunk {kind!r} at byte {start})")
        chunks += 1
        if chunks > _MOST_CHUNKS:
            raise _Refused(f"a PNG of more than {_MOST_CHUNKS} chunks")
        if (kind == b"IHDR") != (chunks == 1):
            raise _Refused("a damaged PNG (its header is not its first chunk, or not its only one)")
        if kind == b"IHDR":
            _require_png_header(view[start + 8 : end])
        if kind == b"acTL":
            raise _Refused("an animation (PNG)")
        if kind == b"PLTE" and (end - start - 8) % 3:
            raise _Refused("a damaged PNG (its palette is not in threes)")
        if kind in _PIXEL_CHUNKS:
            kept.append(view[start : end + 4])
            kinds.add(kind)
        elif kind[:1].isupper():
            raise _Refused(f"a PNG with the chunk {kind!r}, without which it cannot be read and which nobody knows")
        else:
            stripped = True
            if kind == b"eXIf" and not orientation:
                orientation = _orientation_in(view[start + 8 : end])
        if kind == b"IEND":
            if view[25] == _PALETTE and b"PLTE" not in kinds:
                raise _Refused("a damaged PNG (without its palette)")
            return bytearray().join(kept) if stripped else data, "PNG", orientation or _UPRIGHT
        start = end + 4
    raise _Refused(f"a truncated PNG ({len(data)} bytes)")


def _require_png_header(header: memoryview) -> None:
    if len(header) != 13:
        raise _Refused(f"a damaged PNG (a header of {len(header)} bytes)")
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    depth, colour, compression, filters, interlace = header[8:13]
    if not width or not height or depth not in _DEPTHS_OF_PNG.get(colour, ()) or compression or filters:
        raise _Refused(f"a damaged PNG ({width}x{height} pixels of {depth} bits, colour type {colour})")
    if interlace > 1:
        raise _Refused(f"a damaged PNG (interlacing {interlace})")
    _require_size(width, height, _CHANNELS_OF_PNG[colour] * depth / 8)


def _require_whole_pixels(data: bytearray) -> None:
    """Inflate the pixels of a checked PNG and keep none: Pillow bears with an end that libpng refuses."""
    view, start, found, inflater = memoryview(data), 8, 0, zlib.decompressobj()
    expected = _bytes_of_pixels(view[16:29])
    while not inflater.eof and start + 12 <= len(data):
        end = start + 8 + int.from_bytes(view[start : start + 4])
        if view[start + 4 : start + 8] == b"IDAT":
            rest: bytes | memoryview = view[start + 8 : end]
            while len(rest) and not inflater.eof:
                found += len(inflater.decompress(rest, _INFLATED_AT_ONCE))
                if found > expected:
                    return  # more than it needs, which does no harm and may be without end
                rest = inflater.unconsumed_tail
        start = end + 4
    if found < expected or not inflater.eof:
        raise _Refused(f"a truncated PNG ({found} bytes of pixels of {expected}, {'' if inflater.eof else 'no '}end)")


def _bytes_of_pixels(header: memoryview) -> int:
    """Return rows of whole bytes, each after a byte for its filter, in one pass or an interlaced image's seven."""
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    bits = _CHANNELS_OF_PNG[header[9]] * header[8]
    # First column and row, and the distance to the next.
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    total = 0
    for left, top, across, down in passes if header[12] else ((0, 0, 1, 1),):
        columns, rows = -(-max(0, width - left) // across), -(-max(0, height - top) // down)
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total


# ------------------------------------------------------------------------------------------------------------- others


def _size_of_webp(data: bytearray) -> tuple[int, int]:
    """Width and height: the decoder takes memory for all pixels when it opens a file."""
    kind, body = bytes(data[12:16]), data[20:30]
    if len(body) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if len(body) == 10 and kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    if len(body) >= 5 and kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise _Refused(f"a damaged or truncated WebP ({len(data)} bytes)")


def _decode_with_pillow(sound: Sound, channels: int) -> tuple[Tensor, int]:
    """Return the pixels as stored, and the orientation."""
    wanted = "RGB" if channels == 3 else "L"
    with _open_with_pillow(sound) as opened:
        image: Any = opened
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)) if _is_tiff(image) else (8,)
        if sound.halved:
            image.draft(wanted, (image.width // 2, image.height // 2))
        else:
            _require_size(image.width, image.height, sum(bits) / 8)
        # A GIF's frames would all be looked through for their number. A JPEG may have a second picture behind it.
        if sound.format != "JPEG" and getattr(image, "is_animated", False):
            raise _Refused("a TIFF of several pages" if _is_tiff(image) else f"an animation ({sound.format})")
        number = sound.orientation
        if _is_tiff(image):
            _require_plain_tiff(image)
            number = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
        elif sound.format in ("WEBP", "AVIF"):
            number = _orientation_in(image.info.get("exif", b"").removeprefix(_EXIF))
        if image.mode in ("I", "F"):
            raise _Refused("signed or 32-bit values, which have no defined scale of 8 bits")
        if image.mode in ("LAB", "HSV", "La", "RGBa"):
            raise _Refused(f"pixels of the kind {image.mode}, which loaders read in different ways")
        image.load()
        loaded: Image.Image = image
        if image.mode.startswith("I;16"):
            # Pillow's own conversion makes all above 255 white. A TIFF may use fewer of the 16 bits, 12 for one.
            depth = bits[0] if _is_tiff(image) else 16
            values = np.asarray(image)
            shifted = np.empty(values.shape, np.uint8)
            np.right_shift(values, depth - 8, out=shifted, casting="unsafe")
            loaded = Image.fromarray(shifted)
        converted = loaded if loaded.mode == wanted else loaded.convert(wanted)
        array = torch.from_numpy(np.array(converted))
        pixels = array.view(converted.height, converted.width, channels).permute(2, 0, 1)
    if number not in _FLIPS:
        return pixels, _UPRIGHT
    # Of a TIFF alone Pillow turns what it loads. Back: the two quarter turns undo each other, all others themselves.
    return _turned(pixels, {6: 8, 8: 6}.get(number, number)) if sound.format == "TIFF" else pixels, number


def _open_with_pillow(sound: Sound) -> Image.Image:
    if sound.halved:  # `open` refuses the size that it will not be decoded at
        return JpegImagePlugin.JpegImageFile(BytesIO(sound.data))
    return Image.open(BytesIO(sound.data), formats=(sound.format,))


def _is_tiff(image: Any) -> bool:
    return isinstance(image, TiffImagePlugin.TiffImageFile)


def _require_plain_tiff(image: Any) -> None:
    """Refuse by name what Pillow and DALI read in different ways."""
    tags = image.tag_v2
    if TiffImagePlugin.BITSPERSAMPLE not in tags:
        raise _Refused("a TIFF that does not say how many bits its values have")
    if image.mode == "LA":
        raise _Refused("a grey TIFF with alpha")
    kind = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)
    if kind not in _KINDS_OF_TIFF:
        name = {8: "Lab", 9: "ICC Lab", 10: "ITU Lab"}.get(kind, str(kind))
        raise _Refused(f"a TIFF whose colours are {name}; expected grey, RGB, a palette, CMYK or YCbCr")
    if 1 in tags.get(TiffImagePlugin.EXTRASAMPLES, ()):
        raise _Refused("a TIFF with premultiplied alpha")


def _unreadable(path: str, found: str, remedy: str = "repair it or take it out of the data set") -> UsageError:
    return UsageError(path, found=" ".join(visible(found).split()), expected="a readable image", remedy=remedy)
