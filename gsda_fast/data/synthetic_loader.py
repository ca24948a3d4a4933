"""Random images that are made on the device once: what training costs where data costs nothing, without any data."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gsda_fast.data.batches import Batch, Crops, Role, samples_in_batch
from gsda_fast.data.benchmarks import Benchmark, Preprocessing
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import IntArray, SamplingPlan

_SAMPLES = 64  # of a domain, if it has no more classes: few, so that a dry run is not mostly evaluation
_CLASSES = 12  # of a benchmark whose classes only its folders show


def synthetic_pair(benchmark: Benchmark) -> tuple[ImageDomain, ImageDomain]:
    """Return a source and a target with the benchmark's classes and no files."""
    classes = benchmark.classes or tuple(f"class {number}" for number in range(_CLASSES))
    labels = np.arange(max(_SAMPLES, len(classes)), dtype=np.int64) % len(classes)
    paths = [f"synthetic/{number}" for number in range(len(labels))]
    source, target = (ImageDomain(f"synthetic-{role}", Path(), paths, labels, classes) for role in ("source", "target"))
    return source, target


class SyntheticLoader:
    """The same random images in every batch, normally distributed, as normalised ones about are.

    Args:
        source: for its labels.
        target: for its size.
        preprocessing: channels and size of the images.
        batch_size: images in a batch of `evaluate`.
        device: where the images are.
        dtype: of the images.
    """

    def __init__(
        self,
        source: ImageDomain,
        target: ImageDomain,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._labels = torch.from_numpy(source.labels).to(device)
        self._sizes: dict[Role, int] = {"source": len(source), "target": len(target)}
        self._shape, self._batch_size = (preprocessing.channels, preprocessing.crop, preprocessing.crop), batch_size
        self._device, self._dtype = device, dtype
        self._made: dict[tuple[Role | None, int], Tensor] = {}

    @property
    def failed(self) -> list[tuple[str, str]]:
        """See `Loader.failed`: no file is read."""
        return []

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        """See `Loader.train`."""
        for step in steps:
            batch = plan.batch(step, rank)
            source, target = (
                torch.from_numpy(index).to(self._device, non_blocking=True)
                for index in (batch.source_index, batch.target_index)
            )
            yield Batch(
                source_images=self._images("source", len(source)),
                source_labels=self._labels[source],
                target_images=self._images("target", len(target)),
                source_index=source,
                target_index=target,
                further_views=tuple(self._images("target", len(target)) for _ in batch.further_views),
            )

    def evaluate(
        self, domain: Role, samples: IntArray | None = None, crops: Crops = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.evaluate`."""
        chosen = np.arange(self._sizes[domain]) if samples is None else samples
        for part in torch.from_numpy(chosen).to(self._device).split(samples_in_batch(self._batch_size, crops)):
            yield self._images(None, len(part) * crops), part

    def close(self) -> None:
        """See `Loader.close`."""
        self._made = {}

    def _images(self, role: Role | None, count: int) -> Tensor:
        if (role, count) not in self._made:
            images = torch.randn((count, *self._shape), device=self._device).to(self._dtype)
            self._made[role, count] = images.contiguous(memory_format=torch.channels_last)
        return self._made[role, count]
