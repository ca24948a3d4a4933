"""Small trees of natural-looking images in the layouts of the real data sets, for the data tests."""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def natural_image(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth colour gradients with some texture: compresses and resizes as photographs do, unlike noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    texture = generator.integers(-6, 7, smooth.shape)
    return Image.fromarray(np.clip(smooth + texture, 0, 255).astype(np.uint8))


def save(path: Path, seed: int = 0, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    natural_image(seed, width, height).save(path)
    return path


def class_tree(root: Path, classes: Iterable[str], per_class: int = 2, suffix: str = ".jpg") -> Path:
    """``root/<class>/frame_0001.jpg`` and on."""
    for position, name in enumerate(classes):
        for number in range(1, per_class + 1):
            save(root / name / f"frame_{number:04d}{suffix}", seed=100 * position + number)
    return root


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int = errno.EACCES) -> None:
    """As `chmod 000` does, which does not stop root: the folder cannot be listed and nothing in it be looked at."""

    def refusing(call: Callable[..., Any], *, itself: bool) -> Callable[..., Any]:
        def checked(path: Any = ".", *arguments: Any, **more: Any) -> Any:
            if isinstance(path, str | Path) and (folder in Path(path).parents or (itself and folder == Path(path))):
                raise OSError(code, os.strerror(code), str(path))
            return call(path, *arguments, **more)

        return checked

    monkeypatch.setattr(os, "stat", refusing(os.stat, itself=False))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir, itself=True))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir, itself=True))


STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera did to what it saw, by the EXIF orientation that undoes it; Pillow counts angles anticlockwise."""


def save_turned(path: Path, image: Image.Image, orientation: int, **how: Any) -> Path:
    """Store an image as a camera does that is held some way: pixels as its sensor has them, and an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(STORED_AS[orientation]) if orientation in STORED_AS else image
    stored.save(path, exif=exif, **how)
    return path
