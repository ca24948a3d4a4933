"""The table of configurations: what tensor cores and shared memory ask of it, for every shape class."""

import itertools

import pytest
import torch

from gsda_kernels.triton.configs import Configuration, configure

DTYPES = [
    (torch.bfloat16, torch.bfloat16, "ieee"),
    (torch.float16, torch.float32, "ieee"),
    (torch.float32, torch.float32, "tf32"),
    (torch.float32, torch.float32, "ieee"),
]
SIZES = list(itertools.product([1, 72, 256, 1024], [1, 100, 256, 2048], [1, 32, 1024]))


def _all(dtype: torch.dtype, parameter_dtype: torch.dtype, precision: str) -> list[Configuration]:
    return [configure(n, d, h, dtype, parameter_dtype, precision) for n, d, h in SIZES]


@pytest.mark.parametrize(("dtype", "parameter_dtype", "precision"), DTYPES, ids=str)
def test_tiles(dtype: torch.dtype, parameter_dtype: torch.dtype, precision: str) -> None:
    for config in _all(dtype, parameter_dtype, precision):
        assert config.jacobian.block_rows == config.layer.block_rows == config.block_pairs
        for product in (config.layer, config.jacobian, config.weight, config.update):
            blocks = (product.block_rows, product.block_columns, product.block_inner)
            assert all(block & (block - 1) == 0 for block in blocks)
            # Tensor cores: warp groups take 64 rows, and nothing takes an inner size below 16.
            assert product.block_rows >= 64
            assert min(blocks) >= 16


def test_no_tile_wider_than_its_matrix() -> None:
    digits = configure(128, 128, 32, torch.bfloat16, torch.bfloat16, "ieee")
    assert digits.layer.block_columns == 32
    assert digits.jacobian.block_columns == 64
    tiny = configure(2, 3, 5, torch.float32, torch.float32, "ieee")
    assert (tiny.layer.block_columns, tiny.jacobian.block_inner, tiny.weight.block_inner) == (16, 16, 16)


@pytest.mark.parametrize(
    ("num_samples", "rows"), [(72, 64), (96, 64), (97, 128), (128, 128), (256, 128), (512, 128), (1024, 128)]
)
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32], ids=["half", "mixed"])
def test_tiles_are_as_high_as_a_class_has_pairs(num_samples: int, rows: int, parameter_dtype: torch.dtype) -> None:
    config = configure(num_samples, 256, 1024, torch.bfloat16, parameter_dtype, "ieee")
    assert config.block_pairs == rows


def test_shape_classes_differ() -> None:
    classes = {configure(n, 256, 1024, torch.bfloat16, torch.bfloat16, "ieee") for n in (72, 256, 1024)}
    assert len(classes) == 3
