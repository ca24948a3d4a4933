"""Frames that several processes divide among their devices; the exchange over gloo is tested in test_distributed.py."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Barrier
from typing import TypeVar

import numpy as np
import pytest
import torch
from image_trees import class_tree
from torch import Tensor

from gsda_fast.data import frame_cache
from gsda_fast.data.batches import Batch, Role
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.frame_cache import ALONE, FrameCache
from gsda_fast.data.sampling import IntArray, SamplingPlan
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.errors import UsageError

PHOTOS = replace(BENCHMARKS["office31"].recipe, resize=32, crop=24)
CPU = torch.device("cpu")
WORLDS = (2, 3)

Pair = tuple[ImageDomain, ImageDomain]
Result = TypeVar("Result")


@dataclass
class Table:
    """Where threads that stand for processes put down what they exchange."""

    world_size: int
    given: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.given, self.barrier = [[] for _ in range(self.world_size)], Barrier(self.world_size, timeout=60)


@dataclass
class Thread:
    table: Table
    rank: int
    exchanges: int = 0

    @property
    def world_size(self) -> int:
        return self.table.world_size

    def exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self.exchanges += 1
        self.table.given[self.rank] = list(rows.split(send))
        self.table.barrier.wait()
        received = [given[self.rank] for given in self.table.given]
        self.table.barrier.wait()
        assert [len(part) for part in received] == receive
        return torch.cat(received)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("photos")
    class_tree(root / "photos", ["cat", "dog", "horse"], per_class=5)
    class_tree(root / "sketches", ["cat", "horse"], per_class=7, suffix=".png")
    return open_pair("folder", "photos", "sketches", root)


@contextmanager
def opened(pair: Pair, **changes: object) -> Iterator[TorchLoader]:
    arguments = {"batch_size": 4, "device": CPU, "workers": 1, "cache_on_device": True} | changes
    loader = TorchLoader(*pair, PHOTOS, **arguments)  # type: ignore[arg-type]
    yield loader
    loader.close()


def on_each(world_size: int, call: Callable[[Thread], Result]) -> list[Result]:
    """What `call` returns in each of several threads that stand for processes."""
    table = Table(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(call, [Thread(table, rank) for rank in range(world_size)]))


def plan_for(pair: Pair, batch_size: int, world_size: int) -> SamplingPlan:
    return SamplingPlan(
        pair[0].labels, len(pair[1]), recipe=PHOTOS, batch_size=batch_size, seed=3, world_size=world_size
    )


@pytest.mark.parametrize("world_size", WORLDS)
def test_batches_are_those_of_a_process_that_holds_everything(pair: Pair, world_size: int) -> None:
    plan = plan_for(pair, 5, world_size)

    def train(thread: Thread) -> list[Batch]:
        with opened(pair, peers=thread) as loader:
            batches = list(loader.train(plan, range(4), thread.rank))
        assert thread.exchanges == 4  # one for both domains
        return batches

    ranks = on_each(world_size, train)
    with opened(pair) as loader:
        expected = [list(loader.train(plan, range(4), rank)) for rank in range(world_size)]
    for found, whole in zip(ranks, expected, strict=True):
        for batch, other in zip(found, whole, strict=True):
            for name in Batch.__dataclass_fields__:
                assert torch.equal(getattr(batch, name), getattr(other, name))
            assert batch.source_images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("world_size", WORLDS)
def test_evaluation_is_that_of_a_process_that_holds_everything(pair: Pair, world_size: int) -> None:
    def evaluate(thread: Thread) -> list[tuple[list[int], Tensor]]:
        with opened(pair, peers=thread) as loader:
            # Of the 14 samples the last ranks begin again at the first ones, so that all have equally many.
            share = np.arange(thread.rank, -(-14 // world_size) * world_size, world_size) % 14
            found = [(index.tolist(), images) for images, index in loader.evaluate("target", share)]
            found += [(index.tolist(), images) for images, index in loader.evaluate("source", np.array([7, 2, 11]))]
        assert thread.exchanges == 0
        return found

    with opened(pair) as loader:
        for found in on_each(world_size, evaluate):
            for number, (index, images) in enumerate(found):
                role: Role = "target" if number < len(found) - 1 else "source"
                (expected, _) = next(iter(loader.evaluate(role, np.array(index))))
                assert torch.equal(images, expected)


@pytest.mark.parametrize("world_size", WORLDS)
def test_each_process_decodes_and_keeps_its_part_alone(world_size: int) -> None:
    sizes: dict[Role, int] = {"source": 13, "target": 7}

    def fill(thread: Thread) -> tuple[list[tuple[Role, int]], int]:
        decoded: list[tuple[Role, int]] = []

        def decode(role: Role, samples: IntArray) -> Tensor:
            decoded.extend((role, sample) for sample in samples.tolist())
            return torch.zeros(len(samples), 3, 32, 32, dtype=torch.uint8)

        cache = FrameCache(sizes, PHOTOS, CPU, decode, thread)
        assert not cache.samples("source", np.arange(thread.rank, 13, world_size)).any()
        return decoded, cache._frames.nbytes

    found = on_each(world_size, fill)
    everything = [(role, sample) for role, size in sizes.items() for sample in range(size)]
    assert sorted(each for decoded, _ in found for each in decoded) == sorted(everything)
    for _, kept in found:
        assert kept == 3 * 32 * 32 * (-(-13 // world_size) + -(-7 // world_size))


def test_frames_that_do_not_fit_are_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """VisDA on a GPU with 24 GiB: by one process it is refused, by two it is not."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 24 * 2**30))
    recipe, sizes = BENCHMARKS["visda"].recipe, {"source": 152_397, "target": 55_388}
    gpu = torch.device("cuda", 0)

    def decode(role: Role, samples: IntArray) -> Tensor:
        pytest.fail("decoded")

    with pytest.raises(UsageError, match=r"--cache-on-device: found 207785 images, 38.0 GiB; .* 24.0 GiB .*processes"):
        FrameCache(sizes, recipe, gpu, decode, ALONE)  # type: ignore[arg-type]
    shape = (103_893, recipe.resize, recipe.resize, recipe.channels)
    frame_cache._require_memory(shape, gpu)
