"""All images of both domains as resized images of uint8 on the device; each process of a run keeps its own.

VisDA's take 41 GB. A run of several GPUs whose memory is too small for that does without.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from gsda_fast.data.batches import Role, to_device
from gsda_fast.data.benchmarks import Preprocessing
from gsda_fast.data.sampling import IntArray
from gsda_fast.errors import UsageError

_AT_ONCE = 256  # images on their way to the device


class ImageCache:
    """Resized images on the device, by domain and sample number.

    Args:
        sizes: samples of the source and of the target.
        preprocessing: of the images.
        device: where they are kept.
        decode: gives the resized images of some samples of a domain, (n, C, resize, resize) uint8.

    Raises:
        UsageError: raised by `decode`, or they do not fit on the device.
    """

    def __init__(
        self,
        sizes: Mapping[Role, int],
        preprocessing: Preprocessing,
        device: torch.device,
        decode: Callable[[Role, IntArray], Tensor],
    ) -> None:
        self._device = device
        self._first: dict[Role, int] = {"source": 0, "target": sizes["source"]}
        shape = (sum(sizes.values()), preprocessing.resize, preprocessing.resize, preprocessing.channels)
        _require_memory(shape, device)
        self._images = torch.empty(shape, dtype=torch.uint8, device=device)
        for role, size in sizes.items():
            first = self._first[role]
            for start in range(0, size, _AT_ONCE):
                images = decode(role, np.arange(start, min(start + _AT_ONCE, size)))
                self._images[first + start : first + start + len(images)] = images.permute(0, 2, 3, 1)

    def samples(self, role: Role, samples: IntArray) -> Tensor:
        """Return the resized images of these samples of a domain, (n, C, resize, resize) uint8."""
        rows = to_device(torch.from_numpy(self._first[role] + samples), self._device)
        return self._images[rows].permute(0, 3, 1, 2)


def _require_memory(shape: tuple[int, int, int, int], device: torch.device) -> None:
    if device.type != "cuda":
        return
    needed, free = int(np.prod(shape)), torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise UsageError(
            "--cache-on-device",
            found=f"{shape[0]} images, {needed / 2**30:.1f} GiB",
            expected=f"at most the {free / 2**30:.1f} GiB that are free on {device}",
            remedy="leave the option out",
        )
