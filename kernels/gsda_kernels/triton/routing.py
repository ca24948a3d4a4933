"""Which pairs of a sample and a discriminator do work, sorted by discriminator, found on the device in one launch.

The host never learns how many there are: buffers and grids are sized by upper bounds known from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The active pairs, as mixture-of-experts kernels list their tokens.

    Attributes:
        offsets: (K + 2,) int32. The pairs of discriminator k are offsets[k] up to offsets[k + 1], cut at the bound on
            pairs; the last entry is the number of active pairs before the cut.
        sample: (max_pairs,) int32, the sample of each pair; undefined from offsets[K] on.
        position: (N, K) int32, the pair of each sample and discriminator; -1 for none.
        tiles: (T, 2) int32, (discriminator, first pair) of every tile of pairs; discriminator -1 for none.
    """

    offsets: Tensor
    sample: Tensor
    position: Tensor
    tiles: Tensor

    @property
    def num_tiles(self) -> int:
        return self.tiles.shape[0]

    @staticmethod
    def empty(like: Tensor, num_samples: int, num_discriminators: int, max_pairs: int, block_pairs: int) -> Routing:
        """Uninitialised, on the device of `like`, with T the most tiles that `max_pairs` pairs can need."""
        num_tiles = most_tiles(num_samples, num_discriminators, max_pairs, block_pairs)
        shapes = ((num_discriminators + 2,), (max_pairs,), (num_samples, num_discriminators), (num_tiles, 2))
        return Routing(*(like.new_empty(shape, dtype=torch.int32) for shape in shapes))


def most_tiles(num_samples: int, num_discriminators: int, max_pairs: int, block_pairs: int) -> int:
    """Return the most tiles that `max_pairs` pairs can need.

    The last one of each discriminator may be a part of one.
    """
    return min(
        triton.cdiv(max_pairs, block_pairs) + num_discriminators,
        num_discriminators * triton.cdiv(num_samples, block_pairs),
    )


def route(weight: Tensor, routing: Routing, block_pairs: int) -> None:
    """Fill `routing` from weight (N, K), float32, contiguous."""
    num_samples, num_discriminators = weight.shape
    block_discriminators = max(16, triton.next_power_of_2(num_discriminators))
    route_kernel[(num_discriminators,)](
        weight,
        routing.offsets,
        routing.sample,
        routing.position,
        routing.tiles,
        num_samples,
        num_discriminators,
        routing.sample.shape[0],
        routing.num_tiles,
        BLOCK_PAIRS=block_pairs,
        BLOCK_SAMPLES=min(triton.next_power_of_2(num_samples), max(1, 8192 // block_discriminators)),
        BLOCK_DISCRIMINATORS=block_discriminators,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["num_samples", "num_discriminators", "max_pairs", "num_tiles"])
def route_kernel(
    weight: tl.tensor,
    offsets: tl.tensor,
    sample: tl.tensor,
    position: tl.tensor,
    tiles: tl.tensor,
    num_samples: int,
    num_discriminators: int,
    max_pairs: int,
    num_tiles: int,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_DISCRIMINATORS: tl.constexpr,
) -> None:
    """List the pairs with weight[n, k] != 0 by discriminator, then by sample.

    Grid (K,): program k counts the pairs of all discriminators, a few reads each, so that it knows where its own begin
    without waiting for another program, and then stores its own.

    weight: (N, K) float32. offsets: (K + 2,) int32. sample: (max_pairs,) int32. position: (N, K) int32.
    tiles: (T, 2) int32.
    """
    own = tl.program_id(0)
    discriminators = tl.arange(0, BLOCK_DISCRIMINATORS)
    counts = tl.zeros([BLOCK_DISCRIMINATORS], tl.int32)
    for first in range(0, num_samples, BLOCK_SAMPLES):
        samples = first + tl.arange(0, BLOCK_SAMPLES)
        values = tl.load(
            weight + samples[:, None].to(tl.int64) * num_discriminators + discriminators[None, :],
            mask=(samples < num_samples)[:, None] & (discriminators < num_discriminators)[None, :],
            other=0.0,
        )
        counts += tl.sum((values != 0).to(tl.int32), 0)
    ends = tl.cumsum(counts, 0)
    begins = tl.minimum(ends - counts, max_pairs)
    num_own_tiles = (tl.minimum(ends, max_pairs) - begins + BLOCK_PAIRS - 1) // BLOCK_PAIRS
    is_own = discriminators == own
    begin = tl.sum(tl.where(is_own, begins, 0), 0)
    end = tl.minimum(tl.sum(tl.where(is_own, ends, 0), 0), max_pairs)
    tl.store(offsets + own, begin)

    first_tile = tl.sum(tl.where(discriminators < own, num_own_tiles, 0), 0)
    last_tile = first_tile + (end - begin + BLOCK_PAIRS - 1) // BLOCK_PAIRS
    for first in range(first_tile, last_tile, 16):
        tile = first + tl.arange(0, 16)
        tl.store(tiles + 2 * tile, own, mask=tile < last_tile)
        tl.store(tiles + 2 * tile + 1, begin + (tile - first_tile) * BLOCK_PAIRS, mask=tile < last_tile)
    if own == num_discriminators - 1:
        tl.store(offsets + num_discriminators, end)
        tl.store(offsets + num_discriminators + 1, tl.sum(counts, 0))
        for first in range(last_tile, num_tiles, 16):
            tile = first + tl.arange(0, 16)
            tl.store(tiles + 2 * tile, -1, mask=tile < num_tiles)

    next_pair = begin
    for first in range(0, num_samples, BLOCK_SAMPLES):
        samples = first + tl.arange(0, BLOCK_SAMPLES)
        valid = samples < num_samples
        cell = samples.to(tl.int64) * num_discriminators + own
        active = (tl.load(weight + cell, mask=valid, other=0.0) != 0).to(tl.int32)
        pairs = next_pair + tl.cumsum(active, 0) - active
        kept = (active != 0) & (pairs < max_pairs)
        tl.store(sample + pairs, samples, mask=kept)
        tl.store(position + cell, tl.where(kept, pairs, -1), mask=valid)
        next_pair += tl.sum(active, 0)
