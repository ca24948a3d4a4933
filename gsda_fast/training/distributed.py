"""Several processes as one: who this one is, what is averaged over all of them, what all of them must agree on.

There is no DDP wrapper. A wrapper averages gradients during its one backward pass, and a step here has two (one for
the discriminators, one for the encoder); the second would stay local without a word. Gradients of the players that move
are averaged by one all-reduce instead, after their backward pass.

Everything is a plain call on one process, so that the code around it knows no case of its own for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from msgspec import Meta
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from gsda_fast.errors import Stopped, TrainingError, UsageError

T = TypeVar("T")
Shared = UsageError | TrainingError | Stopped
_SHARED = (UsageError, TrainingError, Stopped)
"""What ends all ranks alike, once one of them has found it."""

_SIGN_EVERY = 5.0
"""Seconds between two signs of life of a process that others wait for; less where they give up sooner."""

_ANSWER_WITHIN = 5.0
"""Seconds for the store to answer where nothing but a line of text depends on it."""
_LONGEST_PAUSE = 1.0
"""Seconds between two looks at whether all ranks are done."""

_ALONE_FROM = 1 << 20
"""Elements from which a gradient is averaged on its own: copying it would take longer than one more all-reduce."""


@dataclass(frozen=True)
class DistributedSettings:
    """Several processes, as torchrun starts them."""

    scale_learning_rate: bool = False
    """Multiply the learning rates by the number of processes."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over the batches of all processes (GPUs only); otherwise each normalizes its own batch."""
    divide_discriminators: Literal["auto", "on", "off"] = "auto"
    """Let each process own a share of the discriminators, with their momentum and update, where otherwise all of them
    have all; auto: where there are as many discriminators as processes, and no fp16."""
    timeout: Annotated[int, Meta(ge=1)] = 600
    """Seconds after which a process that waits for another one gives up."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. Without arguments: this one alone.

    Attributes:
        rank: number of this process, from 0. world_size: number of processes. local_rank: number on this machine,
            which is the number of its GPU. timeout: seconds after which one that waits for another gives up.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    timeout: int = DistributedSettings.timeout

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over ranks, detached; `tensor` is left as it is. Traceable by torch.compile.

        For L_syn (`synchronization_loss`): a plain all-reduce inside a loss would scale its gradient by 1/world_size,
        so the mean carries no gradient at all and the caller applies the sign pattern to its own sums.
        """
        if not self.several:
            return tensor.detach()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, (n, ...) -> (world_size * n, ...), in rank order, on every rank.

        A function of the result has the value of the whole batch. Each rank's gradient is that of its own rows, times
        the number of ranks: the mean over ranks of the parameters' gradients is exactly the whole batch's.

        Args:
            rows: (n, ...), as many on every rank.
        """
        if not self.several:
            return rows
        gathered: Tensor = _GatheredRows.apply(rows, self)
        return gathered

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, all of one shape, in rank order, detached."""
        if not self.several:
            return [tensor.detach()]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return parts

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum over ranks of what each of them has for this one.

        Args:
            parts: one for each rank, in rank order, contiguous and of one shape.
        """
        if not self.several:
            return parts[0]
        total = torch.empty_like(parts[0])
        dist.reduce_scatter(total, list(parts))
        return total

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, detached."""
        return self.mean(tensor) * self.world_size

    def max(self, value: float, device: torch.device) -> float:
        """Return the largest value of a host number over the ranks."""
        if not self.several:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    @torch.no_grad()
    def mean_gradients(self, parameters: Sequence[nn.Parameter], extra: Tensor | None = None) -> Tensor | None:
        """Average the gradients of `parameters` over the ranks, in place: large ones where they are, the others by one
        all-reduce for each dtype.

        Args:
            parameters: those that move now; the same on every rank, as are those among them that have a gradient.
            extra: (n,) numbers to be averaged on the same way.

        Returns:
            The mean of `extra`.
        """
        if not self.several:
            return extra
        gradients = [_in_memory_order(parameter.grad) for parameter in parameters if parameter.grad is not None]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            if gradient.numel() < _ALONE_FROM:
                by_dtype.setdefault(gradient.dtype, []).append(gradient)
                continue
            dist.all_reduce(gradient)
            gradient /= self.world_size
        if extra is not None:
            extra = extra.clone()
            by_dtype.setdefault(extra.dtype, []).append(extra)
        for pieces in by_dtype.values():
            flat = torch.cat(pieces)
            dist.all_reduce(flat)
            flat /= self.world_size
            torch._foreach_copy_(pieces, list(flat.split([piece.numel() for piece in pieces])))
        return extra

    @torch.no_grad()
    def mean_buffers(self, module: nn.Module) -> None:
        """Average floating buffers (BatchNorm's running statistics), which each rank has gathered from its batches."""
        if not self.several:
            return
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.mean(buffer))

    def shard(self, count: int) -> list[int]:
        """Return this rank's share of `count` samples, every world_size-th one; equally many on each rank.

        The last ranks begin again at the first samples where `count` does not divide.
        """
        longest = -(-count // self.world_size)
        return [each % count for each in range(self.rank, longest * self.world_size, self.world_size)]

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows of all ranks' shares in the order of the samples, (count, ...), on every rank.

        Args:
            rows: (len(shard(count)), ...), this rank's.
        """
        if not self.several:
            return rows
        # Sample i is row i // world_size of rank i % world_size.
        return torch.stack(self.all_gather(rows), dim=1).flatten(0, 1)[:count]

    def gather_objects(self, value: T) -> list[T]:
        """Return the value of every rank, on every rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_rank_zero(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank, the only one that calls it; it may take longer than the
        timeout.

        Raises:
            UsageError, TrainingError, Stopped: raised by `make`; every rank raises it, the first one prints it.
        """
        made = self.on_all_ranks(lambda: make() if self.first else None)
        if not self.several:
            return cast(T, made)
        result: list[Any] = [made]
        dist.broadcast_object_list(result, src=0)
        value: T = result[0]
        return value

    def on_all_ranks(self, make: Callable[[], T]) -> T:
        """Return what `make` returns here, if no rank fails: a mistake that one rank finds ends all of them, printed
        once.

        It may take longer than the timeout, on any of them.

        Raises:
            UsageError, TrainingError, Stopped: the one of the lowest rank.
        """
        if not self.several:
            return make()
        value: T | None = None
        failure: Shared | None = None
        with self._giving_signs_of_life():
            try:
                value = make()
            except _SHARED as error:
                failure = error
        self._wait_until_all_are_done()
        failures = [each for each in self.gather_objects(failure) if each is not None]
        if failures:
            raise self._shared(failures[0])
        return cast(T, value)

    @contextmanager
    def _giving_signs_of_life(self) -> Iterator[None]:
        """Count up in the store, which is no collective, so that the body may use these itself.

        A thread of its own does it: the work stays in the calling one, the only one that signals can interrupt.
        """
        store, done = dist.distributed_c10d._get_default_store(), threading.Event()

        def give_signs() -> None:
            # Where the store has gone with its process, the main thread finds that out for itself.
            with contextlib.suppress(RuntimeError):
                while not done.wait(min(_SIGN_EVERY, self.timeout / 4)):
                    store.add("signs of life", 1)

        thread = threading.Thread(target=give_signs, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(_ANSWER_WITHIN)  # for ever, where the process that holds the store is stopped

    def _wait_until_all_are_done(self) -> None:
        """Return once every rank has called this as often as this one: a collective after it waits for nobody's work.

        It would give up after the timeout, whether the others are at work or dead. This gives up where for so long
        no rank at work has given a sign of life.
        """
        store = dist.distributed_c10d._get_default_store()
        add = partial(_add, store, within=self.timeout)
        # Nobody begins another round before all have ended this one.
        rounds = -(-add("done", 1) // self.world_size)
        signs, heard, pause = -1, time.monotonic(), 0.001
        while add("done", 0) < rounds * self.world_size:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            latest = add("signs of life", 0)
            if latest != signs:
                signs, heard = latest, time.monotonic()
            elif time.monotonic() - heard > self.timeout:
                raise dist.DistStoreError("no sign of life")

    def once_per_machine(self, make: Callable[[], object]) -> None:
        """Call `make` on one rank of each machine, on the first machine before all others; every rank waits for it.

        For what lands in a cache: on a disk that all machines share it is found there after the first call, on disks
        of their own each machine has it once.

        Raises:
            UsageError: raised by `make`; every rank raises it, the first one prints it.
        """
        for mine in (self.first, self.local_rank == 0 and not self.first):
            self.on_all_ranks(lambda mine=mine: make() if mine else None)  # type: ignore[misc]

    def require_equal(self, values: Mapping[str, Any]) -> None:
        """Check that all ranks train the same thing.

        Args:
            values: plain values by name; all of them must be equal on all ranks.

        Raises:
            UsageError: the first one that is not.
        """
        everywhere = self.gather_objects(dict(values))
        for name, value in everywhere[0].items():
            for rank, other in enumerate(everywhere):
                if other[name] != value:
                    raise self._shared(
                        UsageError(
                            name,
                            found=f"{value} in process 0 and {other[name]} in process {rank}",
                            expected="the same in every process",
                            remedy="start all of them with the same options, data and versions",
                        )
                    )

    def _shared(self, error: Shared) -> Shared:
        error.reported_elsewhere = not self.first
        return error


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(rows)
        return torch.cat(ranks.all_gather(rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        start = ctx.ranks.rank * ctx.count
        return ctx.ranks.world_size * gradients[0][start : start + ctx.count], None


@contextmanager
def join(device_type: str, timeout: int) -> Iterator[Ranks]:
    """Join the processes that torchrun started for the length of the block; this one alone without torchrun.

    NCCL connects GPUs, gloo CPUs.

    Args:
        device_type: "cuda" or "cpu". timeout: seconds that a process waits for another one.

    Raises:
        UsageError: more processes on this machine than GPUs.
        TrainingError: another process ended, or did not answer in time.
    """
    rank, world_size = rank_of_environment(), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    ranks = Ranks(rank, world_size, int(os.environ.get("LOCAL_RANK", "0")), timeout)
    if device_type == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > torch.cuda.device_count():
            raise ranks._shared(
                UsageError(
                    "--nproc_per_node",
                    found=f"{here} processes on a machine with {torch.cuda.device_count()} GPUs",
                    expected="one for each GPU",
                    remedy="start fewer, or train with --device cpu",
                )
            )
        torch.cuda.set_device(ranks.local_rank)
    try:
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            store=_store(rank, world_size, timedelta(seconds=timeout)),
            rank=rank,
            world_size=world_size,
            device_id=torch.device("cuda", ranks.local_rank) if device_type == "cuda" else None,
        )
        yield ranks
    except Stopped:
        # All ranks together. NCCL would complain of a group that nobody takes apart.
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        lost = TrainingError(
            f"process {rank} of {world_size} lost another one, which ended or did not answer for {timeout} s "
            f"({_first_line(error)}); the same command goes on from the last checkpoint"
        )
        lost.reported_elsewhere = not _first_to_fail(rank)
        raise lost from error
    # Not after a failure: taking a group apart waits for all of its processes.
    dist.destroy_process_group()


def _store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the store through which the processes find each other, of this attempt alone.

    torchrun's own store outlives the processes. Where torchrun starts them again, the addresses of the dead ones are in
    it still, and would be taken for those of the living. Machines can count their attempts differently; one cannot.
    """
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def rank_of_environment() -> int:
    """Return the number that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def mean_of_buffers(of_ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what `Ranks.mean_buffers` would come to, from the buffers of all ranks."""
    first, *others = of_ranks
    if all(torch.equal(first[name], each[name]) for each in others for name in first):
        return dict(first)
    return {name: torch.stack([each[name] for each in of_ranks]).mean(dim=0) for name in first}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes: equal if and only if the tensors are."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements as they lie in memory, (numel,), without a copy, whatever the memory format.

    A gradient has the strides of its parameter, on every rank alike, so that elements meet their like.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    assert span == tensor.numel(), "a gradient is dense"
    return tensor.as_strided((tensor.numel(),), (1,))


def _add(store: dist.Store, key: str, amount: int, within: float) -> int:
    """Add to a counter of the store and return it. A store whose process is stopped would never answer.

    Raises:
        DistStoreError: no answer within so many seconds. RuntimeError: the store has gone with its process.
    """
    answer: Future[int] = Future()

    def ask() -> None:
        try:
            answer.set_result(store.add(key, amount))
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="store", daemon=True).start()
    try:
        return answer.result(within)
    except TimeoutError as error:
        raise dist.DistStoreError(f"the store did not answer for {within:g} s") from error


def _first_to_fail(rank: int) -> bool:
    """Return whether no other process has asked this before: one error is enough for the user."""
    try:
        return _add(dist.distributed_c10d._get_default_store(), "failed", 1, _ANSWER_WITHIN) == 1
    except dist.DistStoreError:
        # The first process holds the store and does not answer. The second one speaks.
        return rank == 1
    except (RuntimeError, ValueError):
        # The store has gone with its process, or the group never came to be.
        return True


def _is_lost_connection(error: RuntimeError) -> bool:
    # gloo raises a plain RuntimeError that names its own source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
