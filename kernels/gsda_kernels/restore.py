"""Taking back what turns out not to count, where the device alone knows whether it does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gsda_kernels import backends


@torch.no_grad()
def restore_where(flag: Tensor, tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Writes each copy over its tensor if `flag` is not 0; a GPU is not waited for.

    An undo that is hardly ever needed should cost nothing: Triton's kernel looks at the flag first, and moves no byte
    where it is 0. Without Triton a GPU reads and writes everything, either way.

    Args:
        flag: 0-d float32, on the device of the tensors.
        tensors, copies: pairwise of one shape, dtype and memory layout, without gaps.
    """
    device = flag.device
    if backends.get("triton").unavailable(device) is None:
        # Here, since Triton is imported at the first call that needs it.
        from gsda_kernels.triton.restore import restore

        for tensor, copy in zip(tensors, copies):
            restore(flag, tensor, copy)
    elif device.type == "cpu":
        if bool(flag):
            torch._foreach_copy_(list(tensors), list(copies))
    else:
        for tensor, copy in zip(tensors, copies):
            torch.where(flag != 0, copy, tensor, out=tensor)
