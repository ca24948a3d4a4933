"""What every loader gives: the batch of a training step, and the protocol that the training loop relies on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gsda_fast.data.benchmarks import Crops
from gsda_fast.data.sampling import IntArray, SamplingPlan

Role = Literal["source", "target"]


def samples_in_batch(images: int, crops: Crops) -> int:
    """Return samples whose crops together make up a test batch of about that many images."""
    return max(1, images // crops)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`, without waiting for the transfer.

    Page-locked memory of torch's own outlasts it.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Batch:
    """One training step of one process. All tensors are on the training device.

    Images are normalised, of the loader's dtype (float32 by default), in channels_last memory format. The
    target's labels are no part of a batch.
    """

    source_images: Tensor
    """(B, C, H, W)"""
    source_labels: Tensor
    """(B,) int64"""
    target_images: Tensor
    """(B, C, H, W)"""
    source_index: Tensor
    """(B,) int64: sample numbers in the source domain"""
    target_index: Tensor
    """(B,) int64: sample numbers in the target domain"""
    further_views: tuple[Tensor, ...] = ()
    """(B, C, H, W) each: the target's images once more, augmented independently"""


class Loader(Protocol):
    """Turns a sampling plan into batches. The plan and the steps say everything, but for files that failed."""

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(full path, what is wrong) of every file that failed so far and was borne with.

        In training another sample of its class has taken its place, and `Batch` has that one's number; in an
        evaluation an image of the mean colour.
        """
        ...

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        """One batch for each step, under one plan: the steps between two evaluations of the target.

        On a GPU, whatever reads a batch is queued, on the current stream, before the next one is asked for; what is
        wanted longer is copied. So it is with the batches of `evaluate`.

        Raises:
            UsageError: while iterating, if more files cannot be read than are borne with; the message names one.
        """
        ...

    def evaluate(
        self, domain: Role, samples: IntArray | None = None, crops: Crops = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (n * crops, C, H, W), index (n,) int64) of `samples`, or of the whole domain, as tested.

        Each sample comes exactly once, in the order given, the last partial batch included. A process that evaluates
        its share of a domain passes ``np.arange(rank, len(domain), world_size)``. A test image is the centre of
        a resized one; with 10 crops, its corners and its centre and then the mirror images of these, in turn.
        """
        ...

    def close(self) -> None:
        """Give threads and memory back."""
        ...
