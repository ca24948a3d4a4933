"""Memory for results and intermediates on a CPU, handed out again as soon as nobody holds it.

The gradients of a hundred million parameters are 400 MB. Taken fresh from the operating system at every step, their
page faults cost as much as half of the matrix work; kept, and on huge pages, they cost nothing.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Smaller ones are the allocator's daily business.
_KEPT_FROM_BYTES = 1 << 18
_ALIGNMENT = 64  # one cache line, which is also the widest vector
_PLAIN = (Tensor, torch.nn.Parameter)  # no fake tensors


class _Pool:
    """Arrays that tensors were made of. The tensors own them: an array with no other owner than the pool is free."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = [np.empty(0, dtype=np.uint8)]
        # What an array counts that the list alone holds.
        self._free_count = sys.getrefcount(self._arrays[0])
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            free = [
                index for index in range(len(self._arrays)) if sys.getrefcount(self._arrays[index]) == self._free_count
            ]
            for index in free:
                if len(self._arrays[index]) == num_bytes:
                    return self._arrays[index]
            # Steady training repeats its sizes and never comes here: sizes that changed must not pile up.
            for index in reversed(free):
                del self._arrays[index]
            # NumPy asks the operating system for huge pages.
            self._arrays.append(np.empty(num_bytes, dtype=np.uint8))
            return self._arrays[-1]


_POOL = _Pool()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor on the device of `like`, of its dtype where none is given.

    Reused memory on a CPU.
    """
    dtype = dtype or like.dtype
    count = math.prod(shape) if like.device.type == "cpu" and type(like) in _PLAIN else 0
    if count * dtype.itemsize < _KEPT_FROM_BYTES:
        return like.new_empty(shape, dtype=dtype)
    array = _POOL.take(count * dtype.itemsize + _ALIGNMENT)
    offset = -array.ctypes.data % _ALIGNMENT
    tensor = torch.frombuffer(array, dtype=dtype, count=count, offset=offset).view(*shape)
    if torch.are_deterministic_algorithms_enabled():
        array.fill(0xFF)  # NaN in every floating dtype: uninitialised memory shows, as that of `torch.empty` does then
    return tensor
