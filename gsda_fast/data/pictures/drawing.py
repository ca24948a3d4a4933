"""From a picture of any kind to a square: 224 x 224 RGB pixels, cut-outs and drawings on white."""

from __future__ import annotations

import io
import re
from importlib.util import find_spec

import numpy as np
from PIL import Image

from gsda_fast.errors import UsageError

SIDE = 224
"""Pixels, of the squares."""

_MARGIN = 12  # pixels of white around what is drawn
_OPAQUE = 250  # alpha above which nothing is cut out; a few encoders write 254
_INK = 8  # least alpha of what counts as drawn
_WHITE = 235  # least value in all corners of a photograph on white
_PAPER = 240  # least grey of white ground
_MOST_PIXELS = 400_000_000  # the largest clip art has 170 million


def require_renderer() -> None:
    """Raise where SVG drawings cannot be rendered.

    Raises:
        UsageError: the package that does it is not installed.
    """
    if find_spec("resvg_py") is None:
        raise UsageError(
            "resvg-py", found="no such package", expected="it installed", remedy='pip install "gsda-fast[pictures]"'
        )


def draw(name: str, content: bytes) -> Image.Image:
    """Make a square picture.

    Opaque photographs are cropped to the largest centred square. Cut-outs, drawings and photographs on white are
    cropped to what is drawn and fitted into the square, with a margin.

    Args:
        name: of the file that it was in; says whether it is an SVG document. content: the file.

    Returns:
        `SIDE` x `SIDE`, RGB.

    Raises:
        ValueError, OSError: nothing is drawn, or it cannot be decoded.
    """
    # A limit against files made to exhaust memory; these are known by their digests, and some are large.
    Image.MAX_IMAGE_PIXELS = _MOST_PIXELS
    is_drawing = content.lstrip()[:1] == b"<"
    with Image.open(io.BytesIO(_rendered(content) if is_drawing else content)) as opened:
        return _square(opened.convert("RGBA"))


def _rendered(document: bytes) -> bytes:
    """Return an SVG document as PNG. System fonts would make pictures differ from machine to machine."""
    import resvg_py

    # The renderer takes no `pt`; as pixels they give the same picture in another size.
    opening = re.compile(r'(<svg[^>]*?\b(?:width|height)="[0-9.]+)pt"')
    text = opening.sub(r'\1"', opening.sub(r'\1"', document.decode("utf-8"), count=1), count=1)
    return bytes(resvg_py.svg_to_bytes(svg_string=text, skip_system_fonts=True))


def _square(image: Image.Image) -> Image.Image:
    width, height = image.size
    alpha = image.getchannel("A")
    pixels = np.asarray(image)
    if pixels[..., 3].min() > _OPAQUE:
        if pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3].min() <= _WHITE:
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            photograph = image.convert("RGB").crop((left, top, left + side, top + side))
            return photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        drawn = image.convert("L").point(lambda value: 255 * (value < _PAPER))
    else:
        drawn = alpha.point(lambda value: 255 * (value > _INK))
    box = drawn.getbbox()
    if box is None:
        raise ValueError("nothing is drawn")
    image = image.crop(box)
    scale = (SIDE - 2 * _MARGIN) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(image, ((SIDE - width) // 2, (SIDE - height) // 2), image)
    return square
