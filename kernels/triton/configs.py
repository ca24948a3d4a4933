"""Tile sizes and launch parameters of the products: a pure function of shapes. Nothing is tuned at first call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


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
    """The three kinds of products.

    Attributes:
        layer: results of (pairs, H). jacobian: of (pairs, D), with the same block_rows. weight: of (H, D) and (H, H).
    """

    layer: Product
    jacobian: Product
    weight: Product

    @property
    def block_pairs(self) -> int:
        return self.layer.block_rows


def configure(
    num_samples: int, dim: int, hidden: int, dtype: torch.dtype, parameter_dtype: torch.dtype, precision: str
) -> Configuration:
    """The configuration for one shape class.

    Args:
        num_samples: bounds the pairs of one discriminator. dim, hidden: D and H.
        dtype: of the features and of the products. parameter_dtype: of the weights as they are stored.
        precision: ``ieee`` or ``tf32``, for float32 products.
    """
    # An iteration takes as many bytes in every dtype.
    unaligned = dim % 16 != 0 or hidden % 16 != 0
    wide = parameter_dtype.itemsize > 2
    inner, warps = (32, 8) if wide else (64, 4)
    weight = Product(64, 128, inner, warps, num_stages=2)
    if dtype == torch.float32 and precision == "ieee":
        # Without tensor cores a tile lives in registers: small ones, or it spills.
        layer = jacobian = weight = Product(64, 32 if unaligned else 64, 16, num_warps=8, num_stages=3)
    elif unaligned:
        # Rows that start anywhere are loaded one element at a time, an address each.
        layer = jacobian = weight = Product(64, 32, 32, num_warps=8, num_stages=2)
    elif num_samples <= 96:
        # One or two tiles to a discriminator: reading the weights is the cost, so many programs keep loads in flight.
        layer = Product(64, 64, inner, num_warps=4, num_stages=4)
        jacobian = Product(64, 32, inner, num_warps=4, num_stages=4)
    elif num_samples <= 512:
        layer = Product(64, 128, inner, warps, num_stages=3)
        jacobian = Product(64, 64, inner, num_warps=4, num_stages=4)
    else:
        layer = Product(128, 64 if wide else 128, inner, num_warps=8, num_stages=3)
        jacobian = Product(128, 64, inner, num_warps=8, num_stages=3)
        weight = weight if wide else Product(128, 128, inner, num_warps=8, num_stages=3)
    widest = max(dim, hidden)
    return Configuration(_fit(layer, hidden, widest), _fit(jacobian, dim, hidden), _fit(weight, widest, num_samples))


def _fit(product: Product, columns: int, inner: int) -> Product:
    """No tile wider, and no iteration longer, than what it covers."""
    return replace(
        product,
        block_columns=min(product.block_columns, _power_of_two(columns)),
        block_inner=min(product.block_inner, _power_of_two(inner)),
    )


def _power_of_two(size: int) -> int:
    """The power of two from `size` up, and at least what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())
