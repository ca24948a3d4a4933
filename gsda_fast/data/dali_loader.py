"""The DALI loader: order in Python, bytes in DALI; on the GPU where there is one, else on the CPU.

A callback hands each step's paths, windows and flips to the pipeline, straight from the sampling plan; reading,
decoding and resampling happen in DALI's threads. Both domains are one DALI batch: the source's B images, then the
target's. Between two segments the pipeline is reset, not rebuilt, whatever plan comes next.

- Training decodes the window alone (region of interest) and resamples it once, antialiased bilinear. The window is
  found from the size in the file's header, with the integer arithmetic of `sampling.source_window`.
- Evaluation resamples the whole image onto the centre crop of the recipe's frame, as resize and centre crop do; for
  ten crops onto the whole frame, which is cut up afterwards.
- As with the reference loader an EXIF orientation is ignored and alpha is dropped. DALI reads no GIF.

Pixels differ from the reference's (torchvision resamples 8 bits in two rounded passes) by 0.2 levels of 255 in the
mean and by at most 4, evaluation images by at most 1: on the CPU, for JPEG (baseline, progressive, grey, CMYK), PNG (8
and 16 bit, grey, palette, alpha), BMP, TIFF and WebP. On a GPU nvJPEG decodes, with the CPU's way of upsampling chroma;
PNG stays on the CPU.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali.math
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from gsda_fast.data.batches import Batch, Crops, Role, samples_in_batch, to_device
from gsda_fast.data.benchmarks import ImageRecipe
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import Augmentation, IntArray, SamplingPlan
from gsda_fast.data.torch_loader import cut_crops, read_image, usable_cores
from gsda_fast.data.views import finish_view
from gsda_fast.errors import UsageError

_AHEAD = 2  # batches that DALI prepares beyond the one that is handed out


class DaliLoader:
    """Reads, decodes and resamples in DALI's threads or on the GPU.

    Args:
        source, target: the two domains.
        recipe: sizes, augmentation and normalisation.
        batch_size: images in a batch of `evaluate`.
        device: where batches are put; with a CUDA device, where JPEG is decoded and images are resampled too.
        workers: threads; 0 = the usable cores, divided by the processes that share this machine.
        dtype: of the images. DALI writes float32 or float16; to any other, float32 is rounded, once.
    """

    def __init__(
        self,
        source: ImageDomain,
        target: ImageDomain,
        recipe: ImageRecipe,
        *,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._domains: dict[Role, ImageDomain] = {"source": source, "target": target}
        self._recipe, self._batch_size, self._device = recipe, batch_size, torch.device(device)
        if self._device == torch.device("cuda"):
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._dtype = dtype
        self._graph = _Graph(recipe, self._device, workers or usable_cores(), dtype)
        self._labels = torch.from_numpy(source.labels).to(self._device)
        self._lent = _Lent(self._device)
        self._training: _Feed | None = None
        self._evaluation: dict[Crops, _Feed] = {}

    # ------------------------------------------------------------------------------------------------------ training

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        """See `Loader.train`."""
        size, numbers = plan.batch_size, iter(steps)
        feed, capacity = self._training, (1 + plan.target_views) * plan.batch_size
        if feed is None or not feed.idle or feed.capacity != capacity:
            feed = self._training = _Feed(capacity, self._graph.training, self._lent)
        for images, index in feed.run(lambda i: self._requests(plan, steps[i], rank), len(steps)):
            images, source_index = images.to(self._dtype), index[:size]
            source, target, *views = images.split(size)
            drawn = plan.batch(next(numbers), rank).further_views if views else ()
            yield Batch(
                source_images=source,
                source_labels=self._labels[source_index],
                target_images=target,
                source_index=source_index,
                target_index=index[size : 2 * size],
                further_views=tuple(finish_view(*each, self._recipe) for each in zip(views, drawn)),
            )

    def _requests(self, plan: SamplingPlan, step: int, rank: int) -> "_Requests":
        batch = plan.batch(step, rank)
        views = [batch.source_augmentation, batch.target_augmentation, *batch.further_views]
        target_views = len(views) - 1
        return _Requests(
            self._files("source", batch.source_index) + target_views * self._files("target", batch.target_index),
            np.concatenate([batch.source_index, *target_views * [batch.target_index]]),
            Augmentation(
                np.concatenate([view.window for view in views]),
                np.concatenate([view.flip for view in views]),
            ),
        )

    def _files(self, role: Role, index: IntArray) -> list[str]:
        return [self._domains[role].file(sample) for sample in index.tolist()]

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, domain: Role, samples: IntArray | None = None, crops: Crops = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.evaluate`."""
        chosen = np.arange(len(self._domains[domain])) if samples is None else np.asarray(samples)
        size = samples_in_batch(self._batch_size, crops)
        feed = self._evaluation.get(crops)
        if feed is None or not feed.idle:
            side = self._recipe.crop if crops == 1 else self._recipe.resize
            feed = self._evaluation[crops] = _Feed(size, partial(self._graph.evaluation, side=side), self._lent)

        def requests(i: int) -> _Requests:
            index = chosen[i * size : (i + 1) * size]
            return _Requests(self._files(domain, index), index)

        for images, index in feed.run(requests, -(-len(chosen) // size)):
            cropped = images if crops == 1 else cut_crops(images, self._recipe.crop, crops)
            yield cropped.to(self._dtype, memory_format=torch.channels_last), index

    def close(self) -> None:
        """See `Loader.close`."""
        self._lent.take_back()
        self._training, self._evaluation = None, {}


@dataclass(frozen=True, eq=False)
class _Requests:
    """What the pipeline is asked for in one step."""

    files: list[str]
    index: IntArray
    augmentation: Augmentation | None = None
    """None for evaluation"""

    def one(self, i: int) -> "_Requests":
        """Request `i` alone."""
        place, drawn = slice(i, i + 1), self.augmentation
        augmentation = Augmentation(drawn.window[place], drawn.flip[place]) if drawn else None
        return _Requests(self.files[place], self.index[place], augmentation)

    def arrays(self) -> tuple[Any, ...]:
        """In the order of the pipeline's `external_source`."""
        paths = [np.frombuffer(os.fsencode(file), dtype=np.uint8) for file in self.files]
        if self.augmentation is None:
            return paths, self.index.astype(np.int64)
        window, flip = self.augmentation.window, self.augmentation.flip
        return paths, self.index.astype(np.int64), window.astype(np.int32), flip.astype(np.int32)


class _Feed:
    """A pipeline and the requests of its present segment.

    DALI calls back some batches ahead of the training, so what it asks is answered by pure functions of the step.

    Args:
        capacity: images in a full batch.
        graph: makes the pipeline of that capacity from the callback.
        lent: takes what the consumer of a batch has done with.
    """

    def __init__(
        self, capacity: int, graph: Callable[[int, Callable[[Any], tuple[Any, ...]]], Pipeline], lent: "_Lent"
    ) -> None:
        self.capacity, self._graph, self._lent = capacity, graph, lent
        self.idle = True
        """False during a segment, and for good after one that failed or was left early: DALI resets at an end only."""
        self._requests: Callable[[int], _Requests] | None = None
        self._length = 0
        self._pipeline = graph(capacity, self._answer)

    def _answer(self, info: Any) -> tuple[Any, ...]:
        if self._requests is None or info.iteration >= self._length:
            raise StopIteration
        return self._requests(info.iteration).arrays()

    def run(self, requests: Callable[[int], _Requests], length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (n, C, H, W), index (n,)) of each of the `length` batches of a segment.

        The images share DALI's memory. On a GPU they are safe from what is queued until the next batch is asked for.

        Raises:
            UsageError: a file cannot be read.
        """
        if not length:
            return
        self._requests, self._length, self.idle = requests, length, False
        for i in range(length):
            try:
                images, index = self._pipeline.run()
            except RuntimeError as error:
                raise self._named(error, i) from error
            pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
            # A copy: beside a GPU this memory is page-locked, which DLPack counts as a device that torch does not know,
            # and DALI would write into it again while its transfer is still queued.
            numbers = torch.from_numpy(np.array(index.as_tensor()))
            if i == length - 1:
                # Before the last batch is handed out: who asks for `length` batches never comes back for the end.
                with suppress(StopIteration):
                    self._pipeline.run()
                self._pipeline.reset()
                self.idle = True
            try:
                yield pixels, to_device(numbers, self._lent.device)
            finally:
                self._lent.add(pixels)

    def _named(self, error: RuntimeError, failed: int) -> UsageError:
        """The file behind an error of DALI, which names a sample number at most; it may belong to a batch ahead."""
        assert self._requests is not None
        ahead = range(failed, min(failed + _AHEAD + 2, self._length))
        asked = [self._requests(i) for i in ahead]
        for file in (file for requests in asked for file in requests.files):
            try:
                read_image(file, 3)
            except UsageError as bad_file:
                return bad_file
        for alone in (requests.one(i) for requests in asked for i in range(len(requests.files))):
            refusal = self._refusal(alone)
            if refusal:
                return UsageError(
                    alone.files[0],
                    found=f"an image that DALI refuses ({refusal})",
                    expected="a format that it reads",
                    remedy="convert the file, or use --loader torch",
                )
        return UsageError("--loader", found=f"dali, which failed ({_reason(error)})", expected="torch, or another try")

    def _refusal(self, alone: _Requests) -> str:
        """What DALI says to a single request; nothing where it has no objection."""
        feed = _Feed(1, self._graph, self._lent)
        feed._requests, feed._length = lambda _: alone, 1
        try:
            feed._pipeline.run()
        except RuntimeError as error:
            return _reason(error)
        return ""


class _Lent:
    """Images in DALI's memory that work on a GPU may have yet to read.

    A GPU works off a queue, far behind the host. DALI takes memory back as soon as the host refers to it no more and
    writes to it from streams of its own, whatever still waits in that queue. So images are kept here until all that
    was queued by the time that their consumer had done with them is over. On a CPU nothing waits.

    Args:
        device: where the images are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waiting: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def add(self, images: Tensor) -> None:
        """Keeps images until what is queued now is over. Waits for older ones where more than `_AHEAD` are kept."""
        event = _end_of_queue(self.device)
        if event is None:
            return
        self._waiting.append((event, images))
        while len(self._waiting) > _AHEAD or (self._waiting and self._waiting[0][0].query()):
            self._take_back_oldest()

    def take_back(self) -> None:
        """Waits until nothing that is queued reads any of the images, and lets go of them."""
        while self._waiting:
            self._take_back_oldest()

    def _take_back_oldest(self) -> None:
        event, _ = self._waiting[0]
        event.synchronize()
        self._waiting.popleft()


def _end_of_queue(device: torch.device) -> torch.cuda.Event | None:
    """An event that is over when all is that is queued now; None where nothing is ever queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Graph:
    """The two pipelines: what happens to a file."""

    def __init__(self, recipe: ImageRecipe, device: torch.device, threads: int, dtype: torch.dtype) -> None:
        self._recipe, self._threads = recipe, threads
        self._dtype = types.FLOAT16 if dtype == torch.float16 else types.FLOAT
        # None, not a missing argument: DALI then needs no driver.
        self._device_id: int | None = device.index if device.type == "cuda" else None
        self._decode: dict[str, Any] = {
            "output_type": types.RGB if recipe.channels == 3 else types.GRAY,
            "adjust_orientation": False,
            "device": "cpu",
        }
        if self._device_id is not None:
            # The hardware decoder and the fast upsampling give other pixels than the CPU's decoder.
            self._decode |= {"device": "mixed", "hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}

    def training(self, capacity: int, answer: Callable[[Any], tuple[Any, ...]]) -> Pipeline:
        """Decode the window, resample it to the crop, flip, normalise."""
        with self._pipeline(capacity) as pipeline:
            path, index, window, flip = fn.external_source(
                answer,
                num_outputs=4,
                batch=True,
                batch_info=True,
                dtype=[types.UINT8, types.INT64, types.INT32, types.INT32],
                ndim=[1, 0, 1, 0],
            )
            encoded = fn.io.file.read(path)
            size = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT32)[:2]
            first, last = _source_window(window, size, self._recipe.resize)
            part = fn.decoders.image_slice(encoded, start=first, end=last, axes=(0, 1), **self._decode)
            crop = self._recipe.crop
            part = fn.resize(part, size=[crop, crop], interp_type=types.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(self._normalised(part, flip), index)
        return pipeline

    def evaluation(self, capacity: int, answer: Callable[[Any], tuple[Any, ...]], side: int) -> Pipeline:
        """Decode, resample what falls on the frame's central `side` x `side` pixels, normalise."""
        frame = self._recipe.resize
        first = round((frame - side) / 2)  # as torchvision's center_crop rounds
        with self._pipeline(capacity) as pipeline:
            path, index = fn.external_source(
                answer, num_outputs=2, batch=True, batch_info=True, dtype=[types.UINT8, types.INT64], ndim=[1, 0]
            )
            image = fn.decoders.image(fn.io.file.read(path), **self._decode)
            image = fn.resize(
                image,
                size=[side, side],
                roi_start=[first / frame] * 2,
                roi_end=[(first + side) / frame] * 2,
                roi_relative=True,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            pipeline.set_outputs(self._normalised(image, flip=0), index)
        return pipeline

    def _pipeline(self, capacity: int) -> Pipeline:
        return Pipeline(
            batch_size=capacity,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=_AHEAD,
            exec_dynamic=True,  # the executor that leaves an output alone while something refers to it
        )

    def _normalised(self, images: Any, flip: Any) -> Any:
        """(x / 255 - mean) / std, height x width x channels."""
        return fn.crop_mirror_normalize(
            images,
            mirror=flip,
            mean=[255 * value for value in self._recipe.mean],
            std=[255 * value for value in self._recipe.std],
            dtype=self._dtype,
            output_layout="HWC",
        )


def _source_window(window: Any, size: Any, frame: int) -> tuple[Any, Any]:
    """First and one past the last (row, column): `sampling.source_window` as a graph of 32-bit integers.

    It holds for images of up to two million pixels a side, at a frame of 512.
    """
    start, length = window[0:2], window[2:4]
    first = nvidia.dali.math.min((2 * start * size + frame) // (2 * frame), size - 1)
    last = nvidia.dali.math.max((2 * (start + length) * size + frame) // (2 * frame), first + 1)
    return first, last


def _reason(error: RuntimeError) -> str:
    """What DALI's message of twenty lines says."""
    text = str(error).split("encountered:")[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no message"
