"""What decodes the images in the loader benchmark: each contender yields batches of 36 + 36 images, without end.

All read, decode, crop at random, resize to 224, flip and normalise the same tree. `DESCRIPTIONS` says how. The usual
DataLoader is the code that the literature shares (CDAN, MADA, tllib), so it does the job that a loader here replaces.
The lean one and the plain loop leave its first resize out, as this package's loaders do.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.loaders import DataSettings, open_loader
from gsda_fast.data.pack import pack
from gsda_fast.data.sampling import SamplingPlan

PREPROCESSING = BENCHMARKS["office31"].preprocessing
BATCH = 36
WORKERS = 2
CLASSES, PER_CLASS = 12, 40
USUAL, LEAN, LOOP = "usual DataLoader", "lean DataLoader", "plain Pillow loop"
DESCRIPTIONS = {
    "DALI": "`--loader dali`: one resample, in DALI's threads",
    "torch loader": "`--loader torch`: one resample, in a pool of threads",
    "pack": "`--loader torch` from a pack of 256x256 images",
    USUAL: "usual DataLoader, worker processes: Pillow, resize to 256x256, random resized crop",
    LEAN: "lean DataLoader, worker processes: Pillow, random resized crop alone",
    LOOP: "plain loop, one thread: Pillow, random resized crop alone",
}
CONTENDERS = tuple(DESCRIPTIONS)


@lru_cache(maxsize=1)
def image_tree(root: Path) -> Path:
    """Return 480 smooth, slightly textured JPEG images of 500x375, 33 kB each, as source and target alike."""
    generator = np.random.default_rng(0)
    for number in range(CLASSES * PER_CLASS):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(smooth + generator.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
        path = root / "raw" / "images" / f"class_{number % CLASSES:02d}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
    return root / "raw"


@lru_cache(maxsize=1)
def packed_tree(root: Path) -> Path:
    """Return the same images as a pack."""
    return pack("folder", "images", "images", image_tree(root), output=root / "pack")


class UsualDataset(Dataset[tuple[Tensor, int]]):
    """What most code has: Pillow, and torchvision's transforms on its images."""

    def __init__(self, domain: ImageDomain, *, resize_first: bool) -> None:
        self.domain = domain
        self.transform = v2.Compose(
            [
                v2.Resize((PREPROCESSING.resize, PREPROCESSING.resize)) if resize_first else torch.nn.Identity(),
                v2.RandomResizedCrop(PREPROCESSING.crop, PREPROCESSING.random_scale or (1.0, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.domain)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(self.domain.file(index)).convert("RGB")
        return self.transform(image), int(self.domain.labels[index])


def batches(contender: str, root: Path) -> Iterator[int]:
    """Decode on and on; yields the number of images of each batch."""
    tree = packed_tree(root) if contender == "pack" else image_tree(root)
    source, target = open_pair("folder", "images", "images", tree)
    if contender in (USUAL, LEAN, LOOP):
        dataset = UsualDataset(source, resize_first=contender == USUAL)
        order = _endless_order(len(dataset))
        if contender != LOOP:
            loader = DataLoader(dataset, 2 * BATCH, sampler=order, num_workers=WORKERS, persistent_workers=True)
            for images, _ in loader:
                yield len(images)
        while True:
            yield len(torch.stack([dataset[next(order)][0] for _ in range(2 * BATCH)]))
    settings = DataSettings(loader="dali" if contender == "DALI" else "torch", workers=WORKERS)
    ours = open_loader(settings, source, target, PREPROCESSING, batch_size=BATCH, device=torch.device("cpu"))
    plan = SamplingPlan(source.labels, len(target), preprocessing=PREPROCESSING, batch_size=BATCH, seed=0)
    for batch in ours.train(plan, range(10**9)):
        yield len(batch.source_images) + len(batch.target_images)


def _endless_order(count: int) -> Iterator[int]:
    generator = np.random.default_rng(0)
    return (int(index) for _ in itertools.count() for index in generator.permutation(count))


def has_dali() -> bool:
    """Return whether DALI can be imported."""
    try:
        importlib.import_module("nvidia.dali")
    except ImportError:
        return False
    return True


def package_versions() -> dict[str, str]:
    """Return the versions of what decodes and resamples."""
    versions = {name: version(name) for name in ("torch", "torchvision", "pillow", "numpy")}
    if has_dali():
        versions["DALI"] = importlib.import_module("nvidia.dali").__version__
    return versions


def cpu_seconds() -> float:
    """CPU time of this process and of the worker processes that it has now."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
