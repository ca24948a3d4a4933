"""A small tree of images for every task, in the layout of its data set."""

from collections.abc import Callable
from pathlib import Path

from image_trees import class_tree

from gsda_fast.data.benchmarks import BENCHMARKS


def visda(root: Path) -> None:
    for domain, suffix in (("train", ".png"), ("validation", ".jpg")):
        class_tree(root / domain, BENCHMARKS["visda"].classes or (), per_class=2, suffix=suffix)
        files = sorted((root / domain).glob(f"*/*{suffix}"))
        lines = [f"{file.relative_to(root / domain)} {number // 2}" for number, file in enumerate(files)]
        (root / domain / "image_list.txt").write_text("\n".join(lines))


def office31(root: Path) -> None:
    for domain in ("amazon", "webcam"):
        class_tree(root / domain / "images", BENCHMARKS["office31"].classes or (), per_class=1)


def office_home(root: Path) -> None:
    for domain in ("Real World", "Art"):
        images = root / "OfficeHomeDataset_10072016" / domain
        class_tree(images, BENCHMARKS["office-home"].classes or (), per_class=1)


def folder(root: Path) -> None:
    class_tree(root / "photos", ["cat", "dog", "horse"], per_class=4)
    class_tree(root / "sketches", ["cat", "horse"], per_class=4, suffix=".png")


TASKS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "visda": (visda, "train", "validation"),
    "office31": (office31, "amazon", "webcam"),
    "office31-partial": (office31, "A", "W"),
    "office-home": (office_home, "Rw", "Ar"),
    "office-home-partial": (office_home, "real_world", "art"),
    "folder": (folder, "photos", "sketches"),
}
"""Task -> (builder of its tree, source, target)."""
