"""All images of both domains as frames of uint8 on the devices of the run's processes, each of which holds its part.

Of W processes, process r holds the frames of samples r, r + W, r + 2W and on, so that VisDA's 41 GB are 5.1 GB a GPU on
eight. The plan tells every process what each of them needs for a step: it sends what others lack, and gets what it
lacks, in one exchange without a question before it. What a batch holds does not depend on W.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gsda_fast.data.batches import Role, to_device
from gsda_fast.data.benchmarks import ImageRecipe
from gsda_fast.data.sampling import IntArray, SamplingPlan
from gsda_fast.errors import UsageError

_AT_ONCE = 256  # frames on their way to the device


class Peers(Protocol):
    """The processes of a run, as seen by one of them."""

    @property
    def rank(self) -> int:
        """The number of this process."""
        ...

    @property
    def world_size(self) -> int:
        """The number of processes."""
        ...

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Gives each process its part of `rows` and returns what all processes give to this one.

        Args:
            rows: (sum(send), ...), those for process 0 first.
            send: rows for each process. receive: rows from each process.

        Returns:
            (sum(receive), ...), those of process 0 first.
        """
        ...


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    world_size: int = 1

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """See `Peers.exchange`."""
        assert send == receive == [len(rows)]
        return rows


ALONE: Peers = _Alone()
"""A process without any others."""


class FrameCache:
    """Frames on the device, by domain and sample number.

    Args:
        sizes: samples of the source and of the target.
        recipe: of the frames.
        device: where they are kept.
        decode: gives the frames of some samples of a domain, (n, C, resize, resize) uint8.
        peers: the processes that divide the frames among themselves.

    Raises:
        UsageError: raised by `decode`, or this process's part does not fit on the device.
    """

    def __init__(
        self,
        sizes: Mapping[Role, int],
        recipe: ImageRecipe,
        device: torch.device,
        decode: Callable[[Role, IntArray], Tensor],
        peers: Peers,
    ) -> None:
        self._device, self._decode, self._peers = device, decode, peers
        # Frames are numbered through both domains, and the target's begin at a multiple of the number of processes:
        # frame i is row i // W of process i % W, as sample i of a domain is one of process i % W.
        rows = {role: -(-size // peers.world_size) for role, size in sizes.items()}
        self._first: dict[Role, int] = {"source": 0, "target": rows["source"] * peers.world_size}
        shape = (sum(rows.values()), recipe.resize, recipe.resize, recipe.channels)
        _require_memory(shape, device)
        self._frames = torch.empty(shape, dtype=torch.uint8, device=device)
        for role, size in sizes.items():
            row = self._first[role] // peers.world_size
            own = np.arange(peers.rank, size, peers.world_size)
            for start in range(0, len(own), _AT_ONCE):
                frames = decode(role, own[start : start + _AT_ONCE])
                self._frames[row + start : row + start + len(frames)] = frames.permute(0, 2, 3, 1)

    def batch(self, plan: SamplingPlan, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """The source's and the target's frames of process `rank` at a step, each (B, C, resize, resize) uint8.

        All processes call it, each for itself, at the same steps.
        """
        source, target = plan.samples_of_all(step)
        needed = np.concatenate([source, self._first["target"] + target], axis=1)
        frames = self._rows(needed[rank]) if self._peers.world_size == 1 else self._exchanged(needed)
        frames = frames.permute(0, 3, 1, 2)
        return frames[: plan.batch_size], frames[plan.batch_size :]

    def _exchanged(self, needed: IntArray) -> Tensor:
        """This process's frames, (n, resize, resize, C), of those that all processes need, (world_size, n)."""
        rank, world_size = self._peers.rank, self._peers.world_size
        held = [numbers[numbers % world_size == rank] // world_size for numbers in needed]
        holder = needed[rank] % world_size
        received = self._peers.exchange(
            self._rows(np.concatenate(held)),
            send=[len(rows) for rows in held],
            receive=np.bincount(holder, minlength=world_size).tolist(),
        )
        # They come by holder, and from each in the order of the batch: in that of a stable sort.
        place = np.argsort(np.argsort(holder, kind="stable"))
        return received[to_device(torch.from_numpy(place), self._device)]

    def samples(self, role: Role, samples: IntArray) -> Tensor:
        """The frames of these samples of a domain, (n, C, resize, resize) uint8.

        Those that other processes hold are decoded anew: the processes do not meet here.
        """
        world_size = self._peers.world_size
        frames = self._rows((self._first[role] + samples) // world_size).permute(0, 3, 1, 2)
        elsewhere = np.flatnonzero(samples % world_size != self._peers.rank)
        if len(elsewhere):
            decoded = self._decode(role, samples[elsewhere])
            frames[to_device(torch.from_numpy(elsewhere), self._device)] = to_device(decoded, self._device)
        return frames

    def _rows(self, rows: IntArray) -> Tensor:
        return self._frames[to_device(torch.from_numpy(rows), self._device)]


def _require_memory(shape: tuple[int, int, int, int], device: torch.device) -> None:
    if device.type != "cuda":
        return
    needed, free = int(np.prod(shape)), torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise UsageError(
            "--cache-on-device",
            found=f"{shape[0]} images, {needed / 2**30:.1f} GiB",
            expected=f"at most the {free / 2**30:.1f} GiB that are free on {device}",
            remedy="leave the option out, or start more processes, which divide the images among their GPUs",
        )
