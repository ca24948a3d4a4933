"""Which images, which crops: the sampling plan, a pure function of (seed, step, rank, pseudo-labels).

Nothing here has a state that advances. Sample i of a batch fills the global slot::

    g = (step * world_size + rank) * batch_size + i

and a slot alone decides its image and its augmentation. So a resumed run sees exactly the images that it would have
seen, and two processes with 16 samples each see, together, what one process with 32 sees.

Balanced streams (the source; the target over its pseudo-classes) are cut into blocks of C slots. Each block holds
every class once, in a permuted order; a class hands out its samples pass by pass, each pass a new permutation, so none
is drawn twice before all were drawn once. Unbalanced streams run through one permutation for each epoch.

Random numbers are raw outputs of numpy's Philox bit generator, keyed and counted here: numpy keeps the streams of bit
generators fixed across versions, which it does not promise for the methods of `Generator`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gsda_fast.data.benchmarks import Preprocessing
from gsda_fast.errors import UsageError

IntArray = NDArray[np.int64]

# Streams of random numbers: each is an independent Philox key.
_SOURCE_ORDER, _TARGET_ORDER, _SOURCE_AUGMENTATION, _TARGET_AUGMENTATION = range(4)
_FURTHER_VIEWS = 16  # two for each view of the target after the first: its crop, and its shift and colour
_STORED_VIEWS, _SOURCE_VIEW, _TARGET_VIEWS = range(4096, 4099)  # of embeddings; the last one and those after it
# Inside an order stream, the fourth counter word tells apart what is permuted.
_WITHIN_CLASS, _CLASSES = range(2)

_TRIES = 10  # of torchvision's RandomResizedCrop, before it falls back
_MOST_SHIFT = 2  # pixels of a further view of images that are used whole
_DRAWS = 2 * _TRIES + 4  # area and aspect of each try, row, column, flip, one spare: six Philox counters of four words


def _raw(seed: int, stream: int, counter: tuple[int, int, int, int], number: int) -> NDArray[np.uint64]:
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, stream], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=np.array(counter, dtype=np.uint64))
    return np.asarray(bits.random_raw(number), dtype=np.uint64)


def uniforms(seed: int, stream: int, place: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) that belong to (seed, stream, place)."""
    return _to_unit(_raw(seed, stream, (0, *place, 0), int(np.prod(shape)))).reshape(shape)


def _to_unit(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53)


@dataclass(frozen=True, eq=False)
class Augmentation:
    """Training windows of a batch, in the resized image, and mirroring."""

    window: IntArray
    """(B, 4): top, left, height, width, in pixels of the `resize` x `resize` image"""
    flip: NDArray[np.bool_]
    """(B,): mirror left and right, after cropping"""
    shift: IntArray | None = None
    """(B, 2): whole pixels down and right, after cropping; None: none"""
    colour: NDArray[np.float32] | None = None
    """(B, C, C + 1): matrix and offset of a map of colours in [0, 1]; None: none"""


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """What one process trains on in one step: sample numbers of both domains and their augmentation."""

    source_index: IntArray
    """(B,)"""
    target_index: IntArray
    """(B,)"""
    source_augmentation: Augmentation
    target_augmentation: Augmentation
    further_views: tuple[Augmentation, ...] = ()
    """of the same target samples"""


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """The order of both domains over all steps and processes.

    Args:
        source_labels: (n_s,) class of every source sample, all >= 0. Classes without a sample take no slot.
        num_target: number of target samples n_t.
        preprocessing: sizes of the resized image and of the crop.
        batch_size: samples of each domain in the batch of one process.
        seed: of order and augmentation.
        world_size: number of processes.
        balance_target: once there are pseudo-labels, let every pseudo-class take equally many slots.
        target_views: independent augmentations of each target sample in a batch. The first is that of a plan with one.
        strong_view: change the colours of the last view, which is to be a hard one.
        target_table: (n_t,) pseudo-labels, -1 = not confident and left out; None = not evaluated yet: all train.

    A plan is its arguments: made again from the same ones it gives the same batches, so a checkpoint needs
    `target_table` alone.

    Raises:
        UsageError: the batch size is below 1, a domain is empty, or a source sample has no label.
        ValueError: `target_table` does not hold one entry for each target sample.
    """

    source_labels: IntArray
    num_target: int
    preprocessing: Preprocessing = field(kw_only=True)
    batch_size: int = field(kw_only=True)
    seed: int = field(kw_only=True)
    world_size: int = field(default=1, kw_only=True)
    balance_target: bool = field(default=True, kw_only=True)
    target_views: int = field(default=1, kw_only=True)
    strong_view: bool = field(default=False, kw_only=True)
    target_table: IntArray | None = field(default=None, kw_only=True)
    _source: "_BalancedOrder | _PlainOrder" = field(init=False, repr=False)
    _target: "_BalancedOrder | _PlainOrder" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError("--batch-size", found=str(self.batch_size), expected="1 or more")
        labels = np.asarray(self.source_labels, dtype=np.int64)
        if len(labels) == 0 or self.num_target < 1:
            raise UsageError(
                "data", found=f"{len(labels)} source and {self.num_target} target images", expected="1 or more of each"
            )
        if labels.min() < 0:
            raise UsageError(
                "--source", found=f"{np.sum(labels < 0)} images without a label", expected="a labelled source domain"
            )
        object.__setattr__(self, "source_labels", labels)
        object.__setattr__(self, "_source", _BalancedOrder(self.seed, _SOURCE_ORDER, labels))
        object.__setattr__(self, "_target", self._target_order())

    def _target_order(self) -> "_BalancedOrder | _PlainOrder":
        everything = np.arange(self.num_target)
        if self.target_table is None:
            return _PlainOrder(self.seed, _TARGET_ORDER, everything)
        table = np.asarray(self.target_table, dtype=np.int64)
        if table.shape != (self.num_target,):
            raise ValueError(f"target_table: found shape {table.shape}; expected ({self.num_target},)")
        object.__setattr__(self, "target_table", table)
        if not (table >= 0).any():
            return _PlainOrder(self.seed, _TARGET_ORDER, everything)
        if self.balance_target:
            return _BalancedOrder(self.seed, _TARGET_ORDER, table)
        return _PlainOrder(self.seed, _TARGET_ORDER, np.flatnonzero(table >= 0))

    def with_target(self, pseudo_labels: IntArray) -> "SamplingPlan":
        """Return the same plan with another table of pseudo-labels, (n_t,), -1 = not confident.

        If no sample at all is confident, the whole target trains, as before the first evaluation.
        """
        return replace(self, target_table=pseudo_labels)

    def batch(self, step: int, rank: int = 0) -> BatchPlan:
        """Return the batch of process `rank` at the global step `step`, both counted from 0."""
        slots = self._slots(step, rank)
        return BatchPlan(
            source_index=self._source(slots),
            target_index=self._target(slots),
            source_augmentation=_augmentation(self.seed, _SOURCE_AUGMENTATION, slots, self.preprocessing),
            target_augmentation=_augmentation(self.seed, _TARGET_AUGMENTATION, slots, self.preprocessing),
            further_views=tuple(
                _further_view(
                    self.seed, view, slots, self.preprocessing, self.strong_view and view == self.target_views - 1
                )
                for view in range(1, self.target_views)
            ),
        )

    def _slots(self, step: int, rank: int) -> range:
        first = (step * self.world_size + rank) * self.batch_size
        return range(first, first + self.batch_size)


def view_numbers(
    plan: SamplingPlan, step: int, rank: int, role: Literal["source", "target"], views: int, further: int = 0
) -> IntArray:
    """Choose one of the stored views of each sample of a batch: functions of the plan's seed and the slot.

    Args:
        plan, step, rank: as for `SamplingPlan.batch`. role: which domain. views: of each of its samples.
        further: number of the target's view in the batch, which is drawn independently; 0: the first.

    Returns:
        (B,) from 0 to views - 1.
    """
    slots = plan._slots(step, rank)
    first = slots[0] // 4  # four words a counter
    stream = _SOURCE_VIEW if role == "source" else _TARGET_VIEWS + further
    raw = _raw(plan.seed, stream, (first, 0, 0, 0), (slots[-1] // 4 - first + 1) * 4)
    draws = _to_unit(raw)[slots[0] - 4 * first :][: len(slots)]
    return (draws * views).astype(np.int64)


def stored_augmentation(seed: int, samples: range, preprocessing: Preprocessing) -> Augmentation:
    """Draw the augmentation of views that are computed once and kept.

    Args:
        seed: of the draws. samples: numbers of the pictures, those of view v of n images being v n to (v + 1) n - 1.
        preprocessing: sizes of the resized image and of the crop.
    """
    return _augmentation(seed, _STORED_VIEWS, samples, preprocessing)


class _PlainOrder:
    """One permutation of `members` for each epoch."""

    def __init__(self, seed: int, stream: int, members: IntArray) -> None:
        self._members = members
        self._epoch = _cached(2, lambda epoch: _permutation(seed, stream, (0, epoch), len(members)))

    def __call__(self, slots: range) -> IntArray:
        drawn = np.empty(len(slots), dtype=np.int64)
        filled = 0
        while filled < len(slots):
            epoch, place = divmod(slots[filled], len(self._members))
            part = self._epoch(epoch)[place : place + len(slots) - filled]
            drawn[filled : filled + len(part)] = self._members[part]
            filled += len(part)
        return drawn


class _BalancedOrder:
    """Blocks that hold each class with a sample once; inside a class, a permutation of its samples for each pass."""

    def __init__(self, seed: int, stream: int, labels: IntArray) -> None:
        self._seed, self._stream = seed, stream
        by_class = np.argsort(labels, kind="stable")
        by_class = by_class[labels[by_class] >= 0]
        self._classes, starts = np.unique(labels[by_class], return_index=True)
        self._members = np.split(by_class, starts[1:])

        def one_pass(position: int, number: int) -> IntArray:
            members = self._members[position]
            return members[_permutation(seed, stream, (int(self._classes[position]), number), len(members))]

        # A batch may reach from one pass of a class into the next.
        self._pass = _cached(2 * len(self._classes) + 2, one_pass)

    def __call__(self, slots: range) -> IntArray:
        num_classes = len(self._classes)
        first_block, last_block = slots[0] // num_classes, slots[-1] // num_classes
        # A block's row of random words starts at a counter of its own: four words a counter.
        counters = -(-num_classes // 4)
        raw = _raw(
            self._seed,
            self._stream,
            (first_block * counters, 0, 0, _CLASSES),
            (last_block - first_block + 1) * counters * 4,
        )
        order = np.argsort(raw.reshape(-1, counters * 4)[:, :num_classes], axis=1, kind="stable").reshape(-1).tolist()
        offset = first_block * num_classes
        drawn = np.empty(len(slots), dtype=np.int64)
        for i, slot in enumerate(slots):
            position = order[slot - offset]
            number, place = divmod(slot // num_classes, len(self._members[position]))
            drawn[i] = self._pass(position, number)[place]
        return drawn


def _cached(size: int, function: Callable[..., IntArray]) -> Callable[..., IntArray]:
    # Permutations are functions of their arguments: forgetting one costs time, never correctness.
    return lru_cache(maxsize=size)(function)


def _permutation(seed: int, stream: int, place: tuple[int, int], length: int) -> IntArray:
    return np.argsort(_raw(seed, stream, (0, *place, _WITHIN_CLASS), length), kind="stable")


def _augmentation(seed: int, stream: int, slots: range, preprocessing: Preprocessing) -> Augmentation:
    side, count = preprocessing.resize, len(slots)
    if preprocessing.random_scale is None and not preprocessing.flip:
        return Augmentation(_centre_windows(preprocessing, count), np.zeros(count, dtype=np.bool_))
    raw = _raw(seed, stream, (slots[0] * (_DRAWS // 4), 0, 0, 0), count * _DRAWS)
    draws = _to_unit(raw).reshape(count, _DRAWS)
    flip = draws[:, 2 * _TRIES + 2] < 0.5 if preprocessing.flip else np.zeros(count, dtype=np.bool_)
    if preprocessing.random_scale is None:
        return Augmentation(_centre_windows(preprocessing, count), flip)
    return Augmentation(random_windows(draws[:, : 2 * _TRIES + 2], side, preprocessing.random_scale), flip)


def _further_view(seed: int, view: int, slots: range, preprocessing: Preprocessing, strong: bool) -> Augmentation:
    """Draw a crop of the same distribution; for images that are used whole a shift; colours for a strong view."""
    drawn = _augmentation(seed, _FURTHER_VIEWS + 2 * view, slots, preprocessing)
    counters = 3
    raw = _raw(seed, _FURTHER_VIEWS + 2 * view + 1, (slots[0] * counters, 0, 0, 0), 4 * counters * len(slots))
    draws = _to_unit(raw).reshape(len(slots), 4 * counters)
    if preprocessing.random_scale is None:
        reach = 2 * _MOST_SHIFT + 1
        drawn = replace(drawn, shift=np.floor(draws[:, :2] * reach).astype(np.int64) - _MOST_SHIFT)
    return replace(drawn, colour=colour_maps(draws[:, 2:7], preprocessing.channels)) if strong else drawn


def colour_maps(draws: NDArray[np.float64], channels: int) -> NDArray[np.float32]:
    """Map of colours: brightness, contrast and saturation between 0.6 and 1.4 times, a fifth without colour.

    Contrast is about middle grey, so that a map is one matrix and one offset, whatever the image.

    Args:
        draws: (B, 5) uniform in [0, 1): brightness, contrast, saturation, hue, grey. channels: 1 or 3.

    Returns:
        (B, channels, channels + 1): matrix and offset, for colours in [0, 1].
    """
    brightness, contrast, saturation = (0.6 + 0.8 * draws[:, i, None, None] for i in range(3))
    identity = np.eye(channels)[None]
    mixing = np.broadcast_to(identity, (len(draws), channels, channels))
    if channels == 3:
        grey = np.broadcast_to(np.array([0.299, 0.587, 0.114]), (3, 3))[None]  # the luma of ITU-R BT.601
        saturation = np.where(draws[:, 4, None, None] < 0.2, 0.0, saturation)
        mixing = (saturation * identity + (1 - saturation) * grey) @ _hue_rotations(0.2 * np.pi * (draws[:, 3] - 0.5))
    matrix = brightness * contrast * mixing
    offset = np.broadcast_to(0.5 * (1 - contrast), (len(draws), channels, 1))
    return np.concatenate([matrix, offset], axis=2).astype(np.float32)


def _hue_rotations(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rotations about the grey axis, (B, 3, 3), by Rodrigues' formula."""
    axis = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / np.sqrt(3)
    sine, cosine = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return np.asarray(np.eye(3) + sine * axis + (1 - cosine) * (axis @ axis))


def _centre_windows(preprocessing: Preprocessing, count: int) -> IntArray:
    margin = (preprocessing.resize - preprocessing.crop) // 2
    return np.tile(np.array([margin, margin, preprocessing.crop, preprocessing.crop], dtype=np.int64), (count, 1))


def random_windows(draws: NDArray[np.float64], side: int, scale: tuple[float, float]) -> IntArray:
    """Return windows with the distribution of torchvision's `RandomResizedCrop` on a square image, aspect 3/4 to 4/3.

    Ten tries of (area, aspect); the first that fits is placed uniformly; if none fits, the whole (square) image.

    Args:
        draws: (B, 22) uniform in [0, 1): ten areas, ten aspects, row, column.
        side: of the resized image, in pixels.
        scale: least and most area, as a share of the resized image.

    Returns:
        (B, 4): top, left, height, width.
    """
    area = side * side * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    log_ratio = np.log(4 / 3) * (2 * draws[:, _TRIES : 2 * _TRIES] - 1)
    widths = np.rint(np.sqrt(area * np.exp(log_ratio)))
    heights = np.rint(np.sqrt(area * np.exp(-log_ratio)))
    fits = (widths > 0) & (widths <= side) & (heights > 0) & (heights <= side)
    chosen = np.argmax(fits, axis=1)
    rows = np.arange(len(draws))
    found = fits[rows, chosen]
    height = np.where(found, heights[rows, chosen], side)
    width = np.where(found, widths[rows, chosen], side)
    top = np.floor(draws[:, 2 * _TRIES] * (side - height + 1))
    left = np.floor(draws[:, 2 * _TRIES + 1] * (side - width + 1))
    return np.stack([top, left, height, width], axis=1).astype(np.int64)


def source_window(window: IntArray, height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Return a window of the resized image in the pixels of an image of `height` x `width`: top, left, height, width.

    Edges are rounded to whole pixels (halves up) and the window keeps at least one pixel. Both loaders use this.
    """
    top, left, tall, wide = (int(value) for value in window)
    first_row = min((2 * top * height + side) // (2 * side), height - 1)
    first_column = min((2 * left * width + side) // (2 * side), width - 1)
    last_row = max((2 * (top + tall) * height + side) // (2 * side), first_row + 1)
    last_column = max((2 * (left + wide) * width + side) // (2 * side), first_column + 1)
    return first_row, first_column, last_row - first_row, last_column - first_column
