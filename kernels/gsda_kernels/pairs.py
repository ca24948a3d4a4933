"""Which (sample, discriminator) pairs do work, and in which order: the layouts that the closed form runs on.

Both layouts describe pairs as blocks. A block shares the parameters it multiplies with, so that its products are
single calls; the closed form is written once, for the (n, D) blocks of one layout and the (K, N, D) block of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this many multiply-adds for one pair (D*H + H*H), a call's fixed cost outweighs the work it would save: all
# discriminators then go through one batched product. Measured on one CPU core.
_BATCHED_BELOW = 1 << 16


@dataclass(frozen=True)
class Block:
    """Pairs that share parameters.

    Attributes:
        discriminator: index into the stacked parameters: one number, or a full slice for all of them.
        span: where the block's pairs lie in the (max_pairs, ...) buffers.
        shape: () + (n,) of one discriminator, or (K, N).
        rows: (n,) sample of each pair; None where every sample takes part in its own order.
        weight: the pairs' weights. sign: 1 - 2 * label of each pair, so that sigmoid(sign * z) = |sigmoid(z) - label|.
    """

    discriminator: int | slice
    span: slice
    shape: tuple[int, ...]
    rows: Tensor | None
    weight: Tensor
    sign: Tensor

    def view(self, buffer: Tensor) -> Tensor:
        """Return the block's part of a buffer of pairs, (max_pairs, ...) -> shape + (...)."""
        return buffer[self.span].view(*self.shape, *buffer.shape[1:])

    def gather(self, features: Tensor) -> Tensor:
        """Return (N, D) -> (n, D), or (N, D) itself, which broadcasts over (K, N, D)."""
        return features if self.rows is None else features[self.rows]

    def scatter_add(self, out: Tensor, factor: Tensor, values: Tensor) -> None:
        """Add each pair's `factor` (shape) times its row of `values` (shape + (D,)) to its sample's row of `out`."""
        if self.rows is None:
            # A product for each sample, which sums over the discriminators without the (K, N, D) of all summands.
            by_sample = values.transpose(0, 1).to(factor.dtype)
            out.add_(torch.bmm(factor.t().unsqueeze(1), by_sample).squeeze(1))
        else:
            out.index_add_(0, self.rows, factor.unsqueeze(-1) * values)


def is_batched(features: Tensor, w1: Tensor) -> bool:
    """Return whether all pairs go through one batched product: small matrices, or routing would wait for a device."""
    _, hidden, dim = w1.shape
    return features.device.type != "cpu" or dim * hidden + hidden * hidden < _BATCHED_BELOW


def num_buffer_rows(features: Tensor, w1: Tensor, max_pairs: int) -> int:
    """Return rows of the buffers of pairs, known from shapes alone."""
    return w1.shape[0] * features.shape[0] if is_batched(features, w1) else max_pairs


def blocks(features: Tensor, w1: Tensor, weight: Tensor, label: Tensor, max_pairs: int) -> Iterator[Block]:
    """Yield the blocks that cover every pair with a non-zero weight, at most the first `max_pairs` of them.

    A discriminator without pairs has an empty block: its gradients are sums over nothing.

    Args:
        features: (N, D). w1: (K, H, D). weight: (N, K). label: (N,).
    """
    sign = 1 - 2 * label
    if is_batched(features, w1):
        shape = (w1.shape[0], features.shape[0])
        yield Block(slice(None), slice(None), shape, None, weight.t(), sign.expand(shape))
        return
    by_discriminator = weight.t()
    discriminators, rows = by_discriminator.nonzero()[:max_pairs].unbind(1)
    counts = torch.bincount(discriminators, minlength=w1.shape[0]).tolist()
    pair_weight, pair_sign = by_discriminator[discriminators, rows], sign[rows]
    start = 0
    for k, count in enumerate(counts):
        span = slice(start, start + count)
        start += count
        yield Block(k, span, (count,), rows[span], pair_weight[span], pair_sign[span])


def nan_beyond(weight: Tensor, max_pairs: int) -> Tensor:
    """Return 0-d: NaN where more than `max_pairs` pairs are active, else 1. A factor, so that gradients turn NaN as
    well.
    """
    return torch.where(torch.count_nonzero(weight) > max_pairs, torch.nan, 1.0).to(weight.dtype)
