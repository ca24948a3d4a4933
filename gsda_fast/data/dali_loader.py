"""The DALI loader: order and files in Python, pixels in DALI; on the GPU where there is one, else on the CPU.

A callback hands each step's files, windows and flips to the pipeline, straight from the sampling plan. Threads in
Python read the files one batch ahead and check what can be checked without decoding (`decoding.read_encoded`): a pipe
is no file, a PNG's checksums hold, and no profile that libpng complains of is passed on. Decoding and resampling happen
in DALI's threads. Both domains are one DALI batch: the source's B images, then the target's. Between two calls the
pipeline is reset, not rebuilt, whatever plan comes next.

A file that fails gives its place to another sample of its class (`substitutes`). One that only DALI finds out about
ends its pipeline, and the batches go on with another.

- Training decodes the window alone (region of interest) and resamples it once, antialiased bilinear. The window is
  found from the size in the file's header, with the integer arithmetic of `sampling.source_window`.
- Evaluation resamples the whole image onto the centre crop of the resized image, as resize and centre crop do; for
  ten crops onto the whole resized image, which is cut up afterwards.
- Photos are turned, or not, as with the reference loader: DALI turns by the orientation that `decoding` leaves in a
  file, and finds none where there is nothing to turn. Alpha is dropped.
- DALI decodes JPEG and PNG alone. Of TIFF, BMP and WebP it reads less than the reference, of GIF and AVIF nothing:
  these, and whatever else it refuses, come to it as pixels that the reference's decoder made.

Pixels differ from the reference's (torchvision resamples 8 bits in two rounded passes) by 0.2 levels of 255 in the
mean and by at most 4, evaluation images by at most 1: on the CPU, for JPEG (baseline, progressive, grey, CMYK), PNG (8
and 16 bit, grey, palette, alpha), BMP, TIFF and WebP. On a GPU nvJPEG decodes, with the CPU's way of upsampling chroma;
PNG stays on the CPU.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from gsda_fast.data.benchmarks import Preprocessing
from gsda_fast.data.decoding import inspect, read_encoded
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import Augmentation, IntArray, SamplingPlan
from gsda_fast.data.substitutes import Substitutes
from gsda_fast.data.torch_loader import cut_crops, image_threads, usable_cores
from gsda_fast.data.views import finish_view
from gsda_fast.errors import UsageError

_AHEAD = 2  # batches that DALI prepares beyond the one that is handed out
_DECODED_BY_DALI = ("JPEG", "PNG")
_DOT = b"P5 1 1 255\n\0"  # an image of one pixel, in place of one that cannot be read


class DaliLoader:
    """Decodes and resamples in DALI's threads or on the GPU.

    Args:
        source, target: the two domains.
        preprocessing: sizes, augmentation and normalisation.
        batch_size: images in a batch of `evaluate`.
        device: where batches are put; with a CUDA device, where JPEG is decoded and images are resampled too.
        workers: threads; 0 = the usable cores, divided by the processes that share this machine.
        dtype: of the images. DALI writes float32 or float16; to any other, float32 is rounded, once.
        most_failed: files that may fail before a `UsageError` names one.
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
        dtype: torch.dtype = torch.float32,
        most_failed: int = 0,
    ) -> None:
        self._domains: dict[Role, ImageDomain] = {"source": source, "target": target}
        self._substitutes = Substitutes(self._domains, most_failed)
        self._preprocessing, self._batch_size, self._device = preprocessing, batch_size, torch.device(device)
        if self._device == torch.device("cuda"):
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._dtype = dtype
        self._graph = _Graph(preprocessing, self._device, workers or usable_cores(), dtype)
        self._readers = image_threads(workers, "read")
        self._labels = torch.from_numpy(source.labels).to(self._device)
        self._in_use = _BuffersInUse(self._device)
        self._training: _FeedQueue | None = None
        self._evaluation: dict[Crops, _FeedQueue] = {}
        self._refused: set[tuple[Role, int]] = set()

    @property
    def failed(self) -> list[tuple[str, str]]:
        """See `Loader.failed`."""
        return self._substitutes.failed

    # ------------------------------------------------------------------------------------------------------ training

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        """See `Loader.train`."""
        size, numbers = plan.batch_size, iter(steps)
        capacity = (1 + plan.target_views) * size

        def feed() -> _FeedQueue:
            kept = self._training
            if kept is None or not kept.idle or kept.capacity != capacity:
                kept = self._training = _FeedQueue(capacity, self._graph.training, self._in_use, self._readers)
            return kept

        def read(requests: _Requests, i: int) -> Any:
            role, labels = requests.roles[i], (plan.source_labels, plan.target_table)[requests.roles[i] == "target"]
            return self._read_or_substitute(requests, i, role, labels)

        for images, index in self._batches(feed, lambda i: self._requests(plan, steps[i], rank), len(steps), read):
            images, source_index = images.to(self._dtype), index[:size]
            source, target, *views = images.split(size)
            drawn = plan.batch(next(numbers), rank).further_views if views else ()
            yield Batch(
                source_images=source,
                source_labels=self._labels[source_index],
                target_images=target,
                source_index=source_index,
                target_index=index[size : 2 * size],
                further_views=tuple(finish_view(*each, self._preprocessing) for each in zip(views, drawn)),
            )

    def _requests(self, plan: SamplingPlan, step: int, rank: int) -> "_Requests":
        batch = plan.batch(step, rank)
        views = [batch.source_augmentation, batch.target_augmentation, *batch.further_views]
        target_views = len(views) - 1
        targets: list[Role] = ["target"] * target_views
        return _Requests(
            [role for role in ("source", *targets) for _ in range(plan.batch_size)],
            np.concatenate([batch.source_index, *target_views * [batch.target_index]]),
            Augmentation(
                np.concatenate([view.window for view in views]),
                np.concatenate([view.flip for view in views]),
            ),
        )

    def _batches(
        self,
        feed: Callable[[], "_FeedQueue"],
        requests: Callable[[int], "_Requests"],
        length: int,
        read: Callable[["_Requests", int], Any],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one call, from as many pipelines as it takes: DALI ends one at a file it cannot decode.

        Raises:
            UsageError: more files than are borne with.
        """
        done = 0
        while done < length:
            first = done
            try:
                for batch in feed().run(lambda i, first=first: requests(first + i), length - first, read):  # type: ignore[misc]
                    yield batch
                    done += 1
            except _DecodingFailed as failed:
                self._note_culprits(failed)

    def _read_or_substitute(self, requests: "_Requests", i: int, role: Role, labels: IntArray | None) -> Any:
        """Return the bytes for request `i`, whose number becomes that of a substitute where a file fails."""
        sample = int(requests.index[i])
        if self._substitutes.has_failed(role, sample):
            sample = self._substitutes.of(role, sample, labels)
        while True:
            try:
                data = self._read(role, sample)
                requests.index[i] = sample
                return data
            except UsageError as error:
                self._substitutes.note(role, sample, error)
                sample = self._substitutes.of(role, sample, labels)

    def _read(self, role: Role, sample: int) -> Any:
        """Return what DALI is given for a file, as an array of bytes."""
        formats = () if (role, sample) in self._refused else _DECODED_BY_DALI
        domain = self._domains[role]
        data = read_encoded(domain.file(sample), self._preprocessing.channels, formats, domain.orientation)
        return np.frombuffer(data, dtype=np.uint8)

    def _note_culprits(self, failed: "_DecodingFailed") -> None:
        """Note the files behind an error of DALI, which names a sample number at most.

        They may belong to a batch ahead. Files that DALI alone refuses are decoded by the reference's decoder from
        now on.

        Raises:
            UsageError: more than are borne with, or none is found.
        """
        before = len(self._substitutes.failed)
        asked = {(role, sample) for each in failed.asked for role, sample in zip(each.roles, each.index.tolist())}
        doubtful = sorted(each for each in asked if not self._substitutes.has_failed(*each))
        for role, sample in doubtful:
            try:
                inspect(self._domains[role].file(sample), self._preprocessing.channels)
            except UsageError as bad_file:
                self._substitutes.note(role, sample, bad_file)
        if len(self._substitutes.failed) > before:
            return
        refused: set[tuple[Role, int]] = set()
        for alone in (requests.one(i) for requests in failed.asked for i in range(len(requests.roles))):
            role, sample = alone.roles[0], int(alone.index[0])
            refusal = "" if self._substitutes.has_failed(role, sample) else self._refusal(alone, failed.graph)
            if refusal and (role, sample) in self._refused:
                error = UsageError(
                    self._domains[role].file(sample),
                    found=f"an image that DALI refuses ({refusal})",
                    expected="one that it resamples",
                    remedy="take it out of the data set, or use --loader torch",
                )
                self._substitutes.note(role, sample, error)
            elif refusal:
                refused.add((role, sample))
        self._refused |= refused
        if not refused and len(self._substitutes.failed) == before:
            reason = _reason(failed.error)
            raise UsageError(
                "--loader", found=f"dali, which failed ({reason})", expected="torch, or another try"
            ) from failed.error

    def _refusal(self, alone: "_Requests", graph: "_MakePipeline") -> str:
        """Return what DALI says to a single request; nothing where it has no objection."""
        feed = _FeedQueue(1, graph, self._in_use, self._readers)

        def read(requests: _Requests, i: int) -> Any:
            return self._read(requests.roles[i], int(requests.index[i]))

        try:
            next(feed.run(lambda _: alone, 1, read))
        except _DecodingFailed as failed:
            return _reason(failed.error)
        return ""

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, domain: Role, samples: IntArray | None = None, crops: Crops = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.evaluate`."""
        chosen = np.arange(len(self._domains[domain])) if samples is None else np.asarray(samples)
        size = samples_in_batch(self._batch_size, crops)

        def feed() -> _FeedQueue:
            kept = self._evaluation.get(crops)
            if kept is None or not kept.idle:
                side = self._preprocessing.crop if crops == 1 else self._preprocessing.resize
                graph = partial(self._graph.evaluation, side=side)
                kept = self._evaluation[crops] = _FeedQueue(size, graph, self._in_use, self._readers)
            return kept

        def requests(i: int) -> _Requests:
            index = chosen[i * size : (i + 1) * size]
            return _Requests([domain] * len(index), index)

        def read(requests: _Requests, i: int) -> Any:
            sample = int(requests.index[i])
            try:
                if not self._substitutes.has_failed(domain, sample):
                    return self._read(domain, sample)
            except UsageError as error:
                self._substitutes.note(domain, sample, error)
            return np.frombuffer(_DOT, dtype=np.uint8)

        for images, index in self._batches(feed, requests, -(-len(chosen) // size), read):
            for row, sample in enumerate(index.tolist() if self._substitutes.failed else ()):
                if self._substitutes.has_failed(domain, sample):
                    images[row] = 0  # the mean colour
            cropped = images if crops == 1 else cut_crops(images, self._preprocessing.crop, crops)
            yield cropped.to(self._dtype, memory_format=torch.channels_last), index

    def close(self) -> None:
        """See `Loader.close`."""
        self._in_use.take_back()
        self._readers.shutdown(cancel_futures=True)
        self._training, self._evaluation = None, {}


@dataclass(frozen=True, eq=False)
class _Requests:
    """What the pipeline is asked for in one step.

    Attributes:
        roles: the domain of each image. index: its number there. augmentation: None for evaluation.
    """

    roles: list[Role]
    index: IntArray
    augmentation: Augmentation | None = None

    def one(self, i: int) -> "_Requests":
        """Request `i` alone."""
        place, drawn = slice(i, i + 1), self.augmentation
        augmentation = Augmentation(drawn.window[place], drawn.flip[place]) if drawn else None
        return _Requests(self.roles[place], self.index[place], augmentation)

    def arrays(self, files: list[Any]) -> tuple[Any, ...]:
        """In the order of the pipeline's `external_source`, with the bytes of the files."""
        if self.augmentation is None:
            return files, self.index.astype(np.int64)
        window, flip = self.augmentation.window, self.augmentation.flip
        return files, self.index.astype(np.int64), window.astype(np.int32), flip.astype(np.int32)


_MakePipeline = Callable[[int, Callable[[Any], tuple[Any, ...]]], Pipeline]


class _DecodingFailed(Exception):
    """An error of DALI: what was asked for about then, and by which pipeline."""

    def __init__(self, error: RuntimeError, asked: list[_Requests], graph: _MakePipeline) -> None:
        super().__init__(str(error))
        self.error, self.asked, self.graph = error, asked, graph


class _FeedQueue:
    """A pipeline and the requests of the present call.

    DALI calls back some batches ahead of the training, so what it asks is answered by pure functions of the step.

    Args:
        capacity: images in a full batch.
        graph: makes the pipeline of that capacity from the callback.
        in_use: takes what the consumer of a batch has done with.
        readers: threads that read files, one batch ahead of the callback.
    """

    def __init__(
        self, capacity: int, graph: _MakePipeline, in_use: "_BuffersInUse", readers: ThreadPoolExecutor
    ) -> None:
        self.capacity, self._graph, self._in_use, self._readers = capacity, graph, in_use, readers
        self.idle = True
        """False during a call, and for good after one that failed or was left early: DALI resets at an end only."""
        self._requests: Callable[[int], _Requests] | None = None
        self._read: Callable[[_Requests, int], Any] | None = None
        self._length = 0
        self._started: dict[int, tuple[_Requests, list[Future[Any]]]] = {}
        self._asked: deque[_Requests] = deque(maxlen=_AHEAD + 2)
        self._pipeline = graph(capacity, self._answer)

    def _answer(self, info: Any) -> tuple[Any, ...]:
        number = info.iteration
        if self._requests is None or number >= self._length:
            raise StopIteration
        for ahead in range(number, min(number + 2, self._length)):
            if ahead not in self._started:
                self._started[ahead] = self._start(self._requests(ahead))
        requests, files = self._started.pop(number)
        self._asked.append(requests)
        return requests.arrays([file.result() for file in files])

    def _start(self, requests: _Requests) -> tuple[_Requests, list[Future[Any]]]:
        assert self._read is not None
        return requests, [self._readers.submit(self._read, requests, i) for i in range(len(requests.roles))]

    def run(
        self, requests: Callable[[int], _Requests], length: int, read: Callable[[_Requests, int], Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (n, C, H, W), index (n,)) of each of the `length` batches of a call.

        The images share DALI's memory. On a GPU they are safe from what is queued until the next batch is asked for.

        Args:
            requests: what is asked for in a batch. length: number of batches.
            read: the bytes for one request, whose number it may change.

        Raises:
            UsageError: raised by `read`.
            _DecodingFailed: DALI cannot decode what it was given.
        """
        if not length:
            return
        self._requests, self._read, self._length, self.idle = requests, read, length, False
        self._started.clear()
        self._asked.clear()
        for i in range(length):
            try:
                images, index = self._pipeline.run()
            except RuntimeError as error:
                raise _DecodingFailed(error, list(self._asked), self._graph) from error
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
                yield pixels, to_device(numbers, self._in_use.device)
            finally:
                self._in_use.add(pixels)


class _BuffersInUse:
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
        """Keep images until what is queued now is over. Waits for older ones where more than `_AHEAD` are kept."""
        event = _end_of_queue(self.device)
        if event is None:
            return
        self._waiting.append((event, images))
        while len(self._waiting) > _AHEAD or (self._waiting and self._waiting[0][0].query()):
            self._take_back_oldest()

    def take_back(self) -> None:
        """Wait until nothing that is queued reads any of the images, and let go of them."""
        while self._waiting:
            self._take_back_oldest()

    def _take_back_oldest(self) -> None:
        event, _ = self._waiting[0]
        event.synchronize()
        self._waiting.popleft()


def _end_of_queue(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that is over when all is that is queued now; None where nothing is ever queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Graph:
    """The two pipelines: what happens to a file."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device, threads: int, dtype: torch.dtype) -> None:
        self._preprocessing, self._threads = preprocessing, threads
        self._dtype = types.FLOAT16 if dtype == torch.float16 else types.FLOAT
        # None, not a missing argument: DALI then needs no driver.
        self._device_id: int | None = device.index if device.type == "cuda" else None
        self._decode: dict[str, Any] = {
            "output_type": types.RGB if preprocessing.channels == 3 else types.GRAY,
            "adjust_orientation": True,
            "device": "cpu",
        }
        if self._device_id is not None:
            # The hardware decoder and the fast upsampling give other pixels than the CPU's decoder.
            self._decode |= {"device": "mixed", "hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}

    def training(self, capacity: int, answer: Callable[[Any], tuple[Any, ...]]) -> Pipeline:
        """Decode the window, resample it to the crop, flip, normalise."""
        with self._pipeline(capacity) as pipeline:
            encoded, index, window, flip = fn.external_source(
                answer,
                num_outputs=4,
                batch=True,
                batch_info=True,
                dtype=[types.UINT8, types.INT64, types.INT32, types.INT32],
                ndim=[1, 0, 1, 0],
            )
            size = fn.peek_image_shape(encoded, adjust_orientation=True, dtype=types.INT32)[:2]
            first, last = _source_window(window, size, self._preprocessing.resize)
            part = fn.decoders.image_slice(encoded, start=first, end=last, axes=(0, 1), **self._decode)
            crop = self._preprocessing.crop
            part = fn.resize(part, size=[crop, crop], interp_type=types.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(self._normalised(part, flip), index)
        return pipeline

    def evaluation(self, capacity: int, answer: Callable[[Any], tuple[Any, ...]], side: int) -> Pipeline:
        """Decode, resample what falls on the resized image's central `side` x `side` pixels, normalise."""
        whole = self._preprocessing.resize
        first = round((whole - side) / 2)  # as torchvision's center_crop rounds
        with self._pipeline(capacity) as pipeline:
            encoded, index = fn.external_source(
                answer, num_outputs=2, batch=True, batch_info=True, dtype=[types.UINT8, types.INT64], ndim=[1, 0]
            )
            image = fn.decoders.image(encoded, **self._decode)
            image = fn.resize(
                image,
                size=[side, side],
                roi_start=[first / whole] * 2,
                roi_end=[(first + side) / whole] * 2,
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
        """Return (x / 255 - mean) / std, height x width x channels."""
        return fn.crop_mirror_normalize(
            images,
            mirror=flip,
            mean=[255 * value for value in self._preprocessing.mean],
            std=[255 * value for value in self._preprocessing.std],
            dtype=self._dtype,
            output_layout="HWC",
        )


def _source_window(window: Any, size: Any, whole: int) -> tuple[Any, Any]:
    """First and one past the last (row, column): `sampling.source_window` as a graph of 32-bit integers.

    It holds for images of up to two million pixels a side, resized to 512.
    """
    start, length = window[0:2], window[2:4]
    first = nvidia.dali.math.min((2 * start * size + whole) // (2 * whole), size - 1)
    last = nvidia.dali.math.max((2 * (start + length) * size + whole) // (2 * whole), first + 1)
    return first, last


def _reason(error: RuntimeError) -> str:
    """Return what DALI's message of twenty lines says."""
    text = str(error).split("encountered:")[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no message"
