"""Tile sizes and launch parameters of the products: a pure function of shapes. Nothing is tuned at first call.

The values stand in table.py, which benchmarks/tune_triton.py writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from gsda_kernels.triton.table import TABLE

KINDS = ("half", "mixed", "tf32", "float32")
SHAPE_CLASSES = ("small", "medium", "large", "unaligned")
ANY_CHIP = "any"


class Key(NamedTuple):
    """What a row of the table is for.

    Attributes:
        chip: ``sm_90`` and the like, or ``any``, whose rows stand in where a chip has none of its own.
        kind: of the operands: ``half`` (bfloat16, float16), ``mixed`` (those, with float32 parameters), ``tf32``,
            ``float32``.
        shape_class: see `shape_class`.
    """

    chip: str
    kind: str
    shape_class: str


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

    @property
    def update(self) -> Product:
        """The tiles of `weight` where they move parameters: narrower, with two or three more tensors in registers.

        For sm_90 and mixed operands with half-precision copies 64 x 64 in 8 warps would take 102 registers, two
        programs to a multiprocessor; 64 x 32 in 4 warps takes 88, and five of them keep each other's loads in flight.
        """
        width, warps = self.weight.block_columns, self.weight.num_warps
        return replace(
            self.weight,
            block_columns=min(width, max(32, width // 4)),
            num_warps=max(4, warps // 2) if width >= 128 else warps,
        )


Rows = Mapping[tuple[str, str, str], Mapping[str, tuple[int, int, int, int, int]]]


def configure(
    num_samples: int,
    dim: int,
    hidden: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    precision: str,
    chip: str | None = None,
    table: Rows = TABLE,
) -> Configuration:
    """Return the configuration for one shape class, operand kind and chip.

    Args:
        num_samples: bounds the pairs of one discriminator. dim, hidden: D and H.
        dtype: of the features and of the products. parameter_dtype: of the weights as they are stored.
        precision: ``ieee`` or ``tf32``, for float32 products.
        chip: ``sm_90`` and the like; None where there is none to ask.
    """
    kind, size = operand_kind(dtype, parameter_dtype, precision), shape_class(num_samples, dim, hidden)
    found = look_up(Key(chip or ANY_CHIP, kind, size), table)
    widest = max(dim, hidden)
    return Configuration(
        _fit(found.layer, hidden, widest), _fit(found.jacobian, dim, hidden), _fit(found.weight, widest, num_samples)
    )


def look_up(key: Key, table: Rows = TABLE) -> Configuration:
    """Return the chip's own row of the table, else the row for any chip."""
    row = table[key if key in table else key._replace(chip=ANY_CHIP)]
    return Configuration(**{product: Product(*numbers) for product, numbers in row.items()})


def operand_kind(dtype: torch.dtype, parameter_dtype: torch.dtype, precision: str) -> str:
    """Return how many bytes the operands take, and which units multiply them."""
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "float32"
    return "mixed" if parameter_dtype.itemsize > dtype.itemsize else "half"


def shape_class(num_samples: int, dim: int, hidden: int) -> str:
    """Return what decides which tiles are fast.

    A class has a pair with every target sample and with its own few of the source's. In a ``small`` batch that fits a
    tile of 64 rows: reading the weights is the cost then, so many programs keep loads in flight. Beyond, a second or
    third tile of 64 rows would be nearly empty and read all weights again: half-precision tiles have 128 rows there.
    Rows that start anywhere (``unaligned``) are loaded one element at a time, an address each.
    """
    if dim % 16 != 0 or hidden % 16 != 0:
        return "unaligned"
    if num_samples <= 96:
        return "small"
    return "medium" if num_samples <= 512 else "large"


def _fit(product: Product, columns: int, inner: int) -> Product:
    """No tile wider, and no iteration longer, than what it covers."""
    return replace(
        product,
        block_columns=min(product.block_columns, _power_of_two(columns)),
        block_inner=min(product.block_inner, _power_of_two(inner)),
    )


def _power_of_two(size: int) -> int:
    """Return the power of two from `size` up, and at least what a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())
