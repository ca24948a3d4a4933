"""A copy that a flag on the device allows or forbids."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gsda_kernels.triton.device import on_device

_BLOCK = 8192


def restore(flag: Tensor, tensor: Tensor, copy: Tensor) -> None:
    """See `gsda_kernels.restore.restore_where`, for one tensor."""
    assert tensor.stride() == copy.stride(), "a copy lies in memory as its tensor does"
    assert 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) == tensor.numel()
    with on_device(tensor.device):
        restore_kernel[(triton.cdiv(tensor.numel(), _BLOCK),)](
            flag, tensor, copy, tensor.numel(), BLOCK=_BLOCK, num_warps=8
        )


@triton.jit
def restore_kernel(flag: tl.tensor, tensor: tl.tensor, copy: tl.tensor, size: int, BLOCK: tl.constexpr) -> None:
    """tensor = copy where flag is not 0.

    Grid (size / BLOCK,). flag: 0-d float32. tensor, copy: `size` elements of one dtype, in the order of memory.
    """
    if tl.load(flag) == 0:
        return
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cells < size
    tl.store(tensor + cells, tl.load(copy + cells, mask=mask, other=0.0), mask=mask)
