"""The reference loader: a thread pool, one antialiased bilinear resample, nothing hidden.

Every other loader answers to this one: the same samples, windows and flips from the same plan, pixels within a stated
tolerance.

- Files are decoded, and photos turned, by `decoding.read_image`.
- A file that fails in a run gives its place to another sample of its class (`substitutes`); in an evaluation, where a
  sample has no other in its place, it is an image of the mean colour.
- Training: the window, drawn in the square resized image, is mapped to whole source pixels and resampled once.
  Evaluation: the whole image is resized, then its centre is cut out.
- A pack holds resized images: windows are cut from these, and so resampled a second time.
- With `cache_on_device` all images of both domains are resized once and stay on the device as uint8,
  divided over the processes of the run (`image_cache`). Windows are then cut from these and resampled a second
  time, bilinear without antialiasing (a window is hardly larger than the crop). Where the crop is the whole (digits)
  both ways give equal pixels.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gsda_fast.data.batches import Batch, Crops, Role, samples_in_batch, to_device
from gsda_fast.data.benchmarks import Preprocessing
from gsda_fast.data.decoding import read_image
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.image_cache import ImageCache
from gsda_fast.data.sampling import Augmentation, BatchPlan, IntArray, SamplingPlan, source_window
from gsda_fast.data.substitutes import Substitutes
from gsda_fast.data.views import finish_view
from gsda_fast.errors import UsageError

Result = TypeVar("Result")

_AHEAD = 2  # batches in the thread pool beyond the one that is handed out
_MAX_WORKERS = 16


class TorchLoader:
    """Decodes with a pool of threads in this process.

    Args:
        source, target: the two domains.
        preprocessing: sizes, augmentation and normalisation.
        batch_size: images in a batch of `evaluate`.
        device: where batches are put.
        workers: threads; 0 = the usable cores, divided by the processes that share this machine.
        cache_on_device: keep all images on the device as uint8.
        dtype: of the images.
        most_failed: files that may fail before a `UsageError` names one.

    Raises:
        UsageError: a pack of another preprocessing or, with `cache_on_device`, an image that cannot be read, or more
            images than fit.
    """

    def __init__(
        self,
        source: ImageDomain,
        target: ImageDomain,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        cache_on_device: bool = False,
        dtype: torch.dtype = torch.float32,
        most_failed: int = 0,
    ) -> None:
        for domain in (source, target):
            _require_fitting_pack(domain, preprocessing)
        self._domains: dict[Role, ImageDomain] = {"source": source, "target": target}
        self._substitutes = Substitutes(self._domains, most_failed)
        self._preprocessing = preprocessing
        self._batch_size = batch_size
        self._device, self._dtype = torch.device(device), dtype
        self._pool = image_threads(workers, "decode")
        # For a row of pixels, channels innermost: a pass that repeats three numbers costs a CPU four times as much.
        std = torch.tensor(preprocessing.std, device=self._device).repeat(preprocessing.crop)
        mean = torch.tensor(preprocessing.mean, device=self._device).repeat(preprocessing.crop)
        self._scale, self._shift = 1 / (255 * std), mean / std
        self._labels = torch.from_numpy(source.labels).to(self._device)
        self._cache: ImageCache | None = None
        if cache_on_device:
            sizes: dict[Role, int] = {"source": len(source), "target": len(target)}
            self._cache = ImageCache(sizes, preprocessing, self._device, self._decode_resized)

    @property
    def failed(self) -> list[tuple[str, str]]:
        """See `Loader.failed`."""
        return self._substitutes.failed

    # ------------------------------------------------------------------------------------------------------ training

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        """See `Loader.train`."""
        if self._cache is not None:
            cache = self._cache
            return (self._cached_batch(cache, plan, step, rank) for step in steps)
        return _prefetch(self._start_batch(plan, step, rank) for step in steps)

    def _start_batch(self, plan: SamplingPlan, step: int, rank: int) -> "_Pending[Batch]":
        batch = plan.batch(step, rank)
        source = self._start_crops("source", batch.source_index, [batch.source_augmentation], plan.source_labels)
        views = [batch.target_augmentation, *batch.further_views]
        target = self._start_crops("target", batch.target_index, views, plan.target_table)

        def finish() -> Batch:
            source_index = self._to_device(torch.from_numpy(batch.source_index))
            first, *further = (self._normalise(pixels) for pixels in target.pixels)
            return Batch(
                source_images=self._normalise(source.pixels[0]),
                source_labels=self._labels[source_index],
                target_images=first,
                source_index=source_index,
                target_index=self._to_device(torch.from_numpy(batch.target_index)),
                further_views=self._finished(further, batch),
            )

        return _Pending(source.futures + target.futures, finish)

    def _finished(self, views: list[Tensor], batch: BatchPlan) -> tuple[Tensor, ...]:
        return tuple(finish_view(view, drawn, self._preprocessing) for view, drawn in zip(views, batch.further_views))

    def _start_crops(
        self, role: Role, index: NDArray[np.int64], views: list[Augmentation], labels: IntArray | None
    ) -> "_Crops":
        """Where a file fails, its number in `index` becomes that of its substitute."""
        from torchvision.transforms.v2 import functional as transforms

        preprocessing = self._preprocessing
        pixels = [self._empty_pixels(len(index), preprocessing.crop) for _ in views]

        def decode(i: int) -> None:
            index[i], image = self._read_or_substitute(role, int(index[i]), labels)
            height, width = image.shape[-2:]
            for view, augmentation in zip(pixels, views):
                window = source_window(augmentation.window[i], height, width, preprocessing.resize)
                crop = transforms.resized_crop(
                    image, *window, size=[preprocessing.crop, preprocessing.crop], antialias=True
                )
                view[i] = crop.flip(-1) if augmentation.flip[i] else crop

        return _Crops(pixels, [self._pool.submit(decode, i) for i in range(len(index))])

    def _read_or_substitute(self, role: Role, sample: int, labels: IntArray | None) -> tuple[int, Tensor]:
        domain, channels = self._domains[role], self._preprocessing.channels
        if self._substitutes.has_failed(role, sample):
            sample = self._substitutes.of(role, sample, labels)
        while True:
            try:
                return sample, read_sample(domain, sample, channels)
            except UsageError as error:
                self._substitutes.note(role, sample, error)
                sample = self._substitutes.of(role, sample, labels)

    def _cached_batch(self, cache: ImageCache, plan: SamplingPlan, step: int, rank: int) -> Batch:
        batch = plan.batch(step, rank)
        source = cache.samples("source", batch.source_index)
        target = cache.samples("target", batch.target_index)
        source_index = self._to_device(torch.from_numpy(batch.source_index))
        return Batch(
            source_images=self._cached_crops(source, batch.source_augmentation),
            source_labels=self._labels[source_index],
            target_images=self._cached_crops(target, batch.target_augmentation),
            source_index=source_index,
            target_index=self._to_device(torch.from_numpy(batch.target_index)),
            further_views=self._finished([self._cached_crops(target, view) for view in batch.further_views], batch),
        )

    def _cached_crops(self, images: Tensor, augmentation: Augmentation) -> Tensor:
        preprocessing = self._preprocessing
        if preprocessing.crop == preprocessing.resize and preprocessing.random_scale is None and not preprocessing.flip:
            return self._normalise(images)
        window = self._to_device(torch.from_numpy(augmentation.window))
        flip = self._to_device(torch.from_numpy(augmentation.flip))
        return self._normalise(crop_windows(images, window, flip, preprocessing.crop))

    def augmented(self, domain: Role, samples: IntArray, views: list[Augmentation]) -> list[Tensor]:
        """Return (n, C, H, W) for each view: training crops of these samples, without a plan; each file is decoded
        once.
        """
        crops = self._start_crops(domain, samples.copy(), views, None)
        for future in crops.futures:
            future.result()
        return [self._normalise(pixels) for pixels in crops.pixels]

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, domain: Role, samples: IntArray | None = None, crops: Crops = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.evaluate`."""
        chosen = np.arange(len(self._domains[domain])) if samples is None else samples
        size = samples_in_batch(self._batch_size, crops)
        parts = torch.from_numpy(chosen).split(size) if len(chosen) else ()
        if self._cache is not None:
            cache = self._cache
            return (self._cached_evaluation(cache, domain, part, crops) for part in parts)
        return _prefetch(self._start_evaluation(domain, part, crops) for part in parts)

    def _cached_evaluation(self, cache: ImageCache, role: Role, part: Tensor, crops: Crops) -> tuple[Tensor, Tensor]:
        images = cache.samples(role, part.numpy())
        return self._normalise(cut_crops(images, self._preprocessing.crop, crops)), self._to_device(part)

    def _start_evaluation(self, role: Role, part: Tensor, crops: Crops) -> "_Pending[tuple[Tensor, Tensor]]":
        from torchvision.transforms.v2 import functional as transforms

        domain, preprocessing = self._domains[role], self._preprocessing
        # Ten crops are cut on the device: the resized image is smaller than they are together.
        side = preprocessing.crop if crops == 1 else preprocessing.resize
        pixels = self._empty_pixels(len(part), side)

        def centre(i: int, sample: int) -> None:
            try:
                image = read_resized(domain, sample, preprocessing)
            except UsageError as error:
                self._substitutes.note(role, sample, error)
                pixels[i] = torch.tensor(preprocessing.mean).mul(255).round().to(torch.uint8).view(-1, 1, 1)
                return
            pixels[i] = transforms.center_crop(image, [side])

        def finish() -> tuple[Tensor, Tensor]:
            return self._normalise(cut_crops(self._to_device(pixels), preprocessing.crop, crops)), self._to_device(part)

        futures = [self._pool.submit(centre, i, sample) for i, sample in enumerate(part.tolist())]
        return _Pending(futures, finish)

    def close(self) -> None:
        """See `Loader.close`."""
        self._pool.shutdown(cancel_futures=True)
        self._cache = None

    # -------------------------------------------------------------------------------------------------------- pixels

    def _decode_resized(self, role: Role, samples: IntArray) -> Tensor:
        """Return (n, C, resize, resize) uint8."""
        domain, preprocessing = self._domains[role], self._preprocessing
        return torch.stack(list(self._pool.map(lambda i: read_resized(domain, i, preprocessing), samples.tolist())))

    def _empty_pixels(self, count: int, side: int) -> Tensor:
        """Return (count, C, side, side) uint8 in channels_last, page-locked where that makes the copy to the device
        faster.
        """
        pinned = self._device.type == "cuda"
        pixels = torch.empty((count, side, side, self._preprocessing.channels), dtype=torch.uint8, pin_memory=pinned)
        return pixels.permute(0, 3, 1, 2)

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Return (x / 255 - mean) / std, computed in float32, on the device, in channels_last."""
        rows = self._to_device(pixels).permute(0, 2, 3, 1).to(torch.float32).flatten(2)
        images = rows.mul_(self._scale).sub_(self._shift).to(self._dtype)
        return images.unflatten(2, (-1, self._preprocessing.channels)).permute(0, 3, 1, 2)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self._device)


def usable_cores() -> int:
    """Return cores that this process may use, divided by the processes that torchrun started on this machine; at most
    16.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MAX_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def image_threads(workers: int, name: str) -> ThreadPoolExecutor:
    """Return threads that work on an image each, alone: by itself torch would give every one of them a team of its own.

    Args:
        workers: their number; 0 = the usable cores. name: what theirs begin with.
    """
    # A thread that torch has not asked yet would take over the number that is set below.
    torch.get_num_threads()
    return ThreadPoolExecutor(
        workers or usable_cores(), thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,)
    )


def read_resized(domain: ImageDomain, sample: int, preprocessing: Preprocessing) -> Tensor:
    """Return an image resized as `preprocessing` says, (C, resize, resize) uint8: antialiased bilinear."""
    from torchvision.transforms.v2 import functional as transforms

    image = read_sample(domain, sample, preprocessing.channels)
    return transforms.resize(image, [preprocessing.resize, preprocessing.resize], antialias=True)


def read_sample(domain: ImageDomain, sample: int, channels: int) -> Tensor:
    """Return an image, (channels, height, width) uint8: that of the file or, in a pack, the resized image.

    Raises:
        UsageError: see `read_image`.
    """
    if domain.packed is None:
        return read_image(domain.file(sample), channels, domain.orientation)
    return torch.from_numpy(domain.packed[sample]).permute(2, 0, 1)


def cut_crops(images: Tensor, crop: int, crops: Crops) -> Tensor:
    """Cut the centres of resized images, or four corners, centre and the mirror images of these five.

    Args:
        images: (B, C, R, R). crop: side of the result. crops: 1 or 10.

    Returns:
        (B * crops, C, crop, crop), the crops of an image one after another.
    """
    from torchvision.transforms.v2 import functional as transforms

    if crops == 1:
        return transforms.center_crop(images, [crop])
    return torch.stack(transforms.ten_crop(images, [crop, crop]), dim=1).flatten(0, 1)


def crop_windows(images: Tensor, window: Tensor, flip: Tensor, crop: int) -> Tensor:
    """Return windows of a batch of resized images, each resampled to `crop` x `crop`: bilinear, all in one call.

    Points are kept inside their window, so that the result is that of cutting the window out first and resizing it.

    Args:
        images: (B, C, R, R) uint8.
        window: (B, 4) int64: top, left, height, width.
        flip: (B,) bool.
        crop: side of the result.

    Returns:
        (B, C, crop, crop) float32 on the scale 0..255.
    """
    side = images.shape[-1]
    centres = (torch.arange(crop, device=images.device) + 0.5) / crop
    top, left, height, width = window.to(torch.float32).unsqueeze(-1).unbind(1)

    def points(start: Tensor, length: Tensor, places: Tensor) -> Tensor:
        inside = torch.minimum((places * length - 0.5).clamp_min(0), length - 1)
        return (2 * (start + inside) + 1) / side - 1  # to grid_sample's -1..1, align_corners=False

    columns = torch.where(flip.unsqueeze(-1), centres.flip(0), centres)
    rows = points(top, height, centres.expand_as(columns))
    columns = points(left, width, columns)
    grid = torch.stack([columns.unsqueeze(1).expand(-1, crop, -1), rows.unsqueeze(2).expand(-1, -1, crop)], dim=-1)
    return functional.grid_sample(
        images.to(torch.float32), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _require_fitting_pack(domain: ImageDomain, preprocessing: Preprocessing) -> None:
    expected = (preprocessing.resize, preprocessing.resize, preprocessing.channels)
    if domain.packed is not None and domain.packed.shape != expected:
        found = f"{domain.root}, a pack of images of shape {domain.packed.shape}"
        raise UsageError("--data-root", found=found, expected=f"images of shape {expected}")


@dataclass(frozen=True, eq=False)
class _Crops:
    pixels: list[Tensor]
    futures: list[Future[None]]


@dataclass(frozen=True, eq=False)
class _Pending(Generic[Result]):
    """A batch whose images are being decoded, and what to do when they are."""

    futures: list[Future[None]]
    finish: Callable[[], Result]


def _prefetch(started: Iterable[_Pending[Result]]) -> Iterator[Result]:
    """Yield the finished batches in order, the next `_AHEAD` of them already in the pool."""
    waiting: deque[_Pending[Result]] = deque()
    try:
        for pending in started:
            waiting.append(pending)
            if len(waiting) > _AHEAD:
                yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())
    finally:
        for pending in waiting:
            for future in pending.futures:
                future.cancel()


def _finished(pending: _Pending[Result]) -> Result:
    for future in pending.futures:
        future.result()
    return pending.finish()
