"""Tile sizes and launch parameters of the products: a pure function of shapes, so that nothing is tuned at first call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What one block may hold on the chips with the least shared memory (compute capability 8.6, 8.9, 12.0).
SHARED_MEMORY = 101376


@dataclass(frozen=True)
class Product:
    """How one kind of product is cut into tiles.

    Attributes:
        block_rows, block_columns: the tile of the result that one program owns at a time.
        block_inner: how much of the contracted dimension one iteration takes.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Configuration:
    """Attributes:
    layer: results of (pairs, H). jacobian: of (pairs, D); the same block_rows. weight: of (H, D) and (H, H).
    """

    layer: Product
    jacobian: Product
    weight: Product

    @property
    def block_pairs(self) -> int:
        return self.layer.block_rows


def configure(num_samples: int, dim: int, hidden: int, dtype: torch.dtype, precision: str) -> Configuration:
    """The configuration for one shape class.

    Args:
        num_samples: bounds the pairs of one discriminator. dim, hidden: D and H.
        dtype: of the products' operands. precision: ``ieee`` or ``tf32``, for float32 operands.
    """
    if dtype == torch.float32 and precision == "ieee":
        # Without tensor cores a tile lives in registers: small ones, or it spills.
        layer = jacobian = weight = Product(64, 64, 16, num_warps=8, num_stages=3)
    elif num_samples <= 96:
        # One or two tiles to a discriminator: reading the weights is the cost, so many programs keep loads in flight.
        layer = weight = Product(64, 64, 64, num_warps=4, num_stages=4)
        jacobian = Product(64, 32, 64, num_warps=4, num_stages=4)
    elif num_samples <= 512:
        layer = weight = Product(64, 128, 64, num_warps=4, num_stages=3)
        jacobian = Product(64, 64, 64, num_warps=4, num_stages=4)
    else:
        layer = weight = Product(128, 128, 64, num_warps=8, num_stages=3)
        jacobian = Product(128, 64, 64, num_warps=8, num_stages=3)
    return Configuration(
        _fit(layer, num_samples, hidden, max(dim, hidden), dtype),
        _fit(jacobian, num_samples, dim, hidden, dtype),
        _fit(weight, hidden, max(dim, hidden), num_samples, dtype),
    )


def _fit(product: Product, rows: int, columns: int, inner: int, dtype: torch.dtype) -> Product:
    """No tile wider than what it covers; operands of four bytes in half as many."""
    block_rows = max(64, min(product.block_rows, _power_of_two(rows)))
    return Product(
        block_rows,
        min(product.block_columns, _power_of_two(columns)),
        min(product.block_inner * 2 // max(dtype.itemsize, 2), _power_of_two(inner)),
        product.num_warps,
        product.num_stages,
    )


def _power_of_two(size: int) -> int:
    """The power of two from `size` up, and at least what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())
