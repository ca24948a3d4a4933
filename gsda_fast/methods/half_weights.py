"""Half-precision copies of the discriminators' large matrices, beside the float32 ones that learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


class HalfWeights:
    """Copies of w1 and w2 in half precision, and what says whether they still are copies of them.

    PyTorch counts how often a tensor is written in place. These counts of w1 and w2 are kept beside the copies, with
    where they lie: whoever else writes or replaces a weight makes them invalid. Not counted is what is written through
    ``weight.data``, by PyTorch's fused optimizers, or by kernels that it knows nothing of; who does so calls
    `torch.autograd.graph.increment_version`, as the trainer's updater does.

    Copies belong to a process: neither a checkpoint nor a copied or pickled module has them.

    Attributes:
        copies: of w1 and w2, valid or not; None before the first ones.
    """

    def __init__(self) -> None:
        self.copies: Pair | None = None
        self._made_of: list[tuple[Tensor, int, int]] = []

    def are_valid(self, weights: Pair) -> bool:
        """Return whether there are copies, and nothing but `confirm` has happened to the weights since."""
        return bool(self._made_of) and all(
            weight is known and weight.data_ptr() == place and weight._version == version
            for weight, (known, place, version) in zip(weights, self._made_of)
        )

    def renewed(self, weights: Pair, dtype: torch.dtype) -> Pair:
        """Return valid copies in `dtype`, converted anew if need be.

        They stay where they lie, if they can: a CUDA graph may read them there.
        """
        wanted = [(weight.shape, dtype, weight.device) for weight in weights]
        if self.copies is None or [(each.shape, each.dtype, each.device) for each in self.copies] != wanted:
            w1, w2 = (torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights)
            self.copies, self._made_of = (w1, w2), []
        if not self.are_valid(weights):
            for copy, weight in zip(self.copies, weights):
                copy.copy_(weight.detach())
            self.confirm(weights)
        return self.copies

    def confirm(self, weights: Pair) -> None:
        """Take the copies for those of the weights as they are now: who moved these has moved both."""
        self._made_of = [(weight, weight.data_ptr(), weight._version) for weight in weights]

    def __reduce__(self) -> tuple[Any, ...]:
        return HalfWeights, ()
