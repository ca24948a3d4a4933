"""What every loader gives: the batch of a training step, and the protocol that the training loop relies on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from gsda_fast.data.sampling import IntArray, SamplingPlan

Role = Literal["source", "target"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One training step of one process. All tensors are on the training device.

    Images are normalised, of the loader's dtype (float32 unless told otherwise), in channels_last memory format. The
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


class Loader(Protocol):
    """Turns a sampling plan into batches. It has no state of its own: the plan and the steps say everything."""

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        """One batch for each step, under one plan: a segment between two refreshes of the pseudo-labels.

        Raises:
            UsageError: while iterating, if a file cannot be read; the message names the file.
        """
        ...

    def evaluate(self, domain: Role, samples: IntArray | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images (n, C, H, W), index (n,) int64) over `samples`, or over the whole domain, with the test transform.

        Each sample comes exactly once, in the order given, the last partial batch included. A process that scores its
        share of a domain passes ``np.arange(rank, len(domain), world_size)``.
        """
        ...

    def close(self) -> None:
        """Gives threads and memory back."""
        ...
