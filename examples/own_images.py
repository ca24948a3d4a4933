"""One's own images: two folders of class folders in, an adapted classifier, a table and a page of plots out.

The images here are drawn: squares, circles and triangles, on white in the source, on a coloured ground in the target.
The network starts from random weights and takes few steps, so that the example needs no download and no GPU: it shows
the way, not an accuracy. For real images leave out `backbone`, `weights` and `steps`.
Run: python examples/own_images.py [FOLDER]
"""

import random
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

import gsda_fast

SHAPES = ("circle", "square", "triangle")


def draw(shape: str, *, target: bool, generator: random.Random) -> Image.Image:
    """Return an image of 64x64 pixels."""
    ground = tuple(generator.randrange(90, 256) for _ in range(3)) if target else (255, 255, 255)
    image = Image.new("RGB", (64, 64), ground)
    pen, size, left, top = ImageDraw.Draw(image), generator.randrange(24, 40), *generator.sample(range(4, 24), 2)
    box = (left, top, left + size, top + size)
    if shape == "circle":
        pen.ellipse(box, fill=(40, 40, 40))
    elif shape == "square":
        pen.rectangle(box, fill=(40, 40, 40))
    else:
        pen.polygon([(left, top + size), (left + size, top + size), (left + size / 2, top)], fill=(40, 40, 40))
    return image


def write_domain(folder: Path, *, target: bool, count: int) -> Path:
    """Write `count` images of each class: folder/CLASS/NUMBER.png."""
    generator = random.Random(int(target))
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            draw(shape, target=target, generator=generator).save(folder / shape / f"{number}.png")
    return folder


def main(root: Path) -> None:
    source = write_domain(root / "white", target=False, count=16)
    target = write_domain(root / "coloured", target=True, count=8)
    # The same call again finds the finished run; an interrupted one it takes up where it was.
    adapted = gsda_fast.adapt(
        source,
        target,
        "dann",
        output=root / "run",
        backbone="resnet18",
        weights="none",
        bottleneck_dim=32,
        steps=6,
        warmup=3,
        batch_size=6,
        refresh_every=6,
    )
    print(f"accuracy on {target.name} after {adapted.result.steps} steps: {adapted.accuracy:.1f} %")
    one = target / "square" / "0.png"
    probabilities = dict(zip(adapted.classes.tolist(), adapted.predict_proba(one)[0].astype(float).round(2).tolist()))
    print(f"{one.parent.name}/{one.name}: {adapted.predict(one)[0]} {probabilities}")
    print(f"run: {adapted.run}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
