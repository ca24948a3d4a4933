from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gsda_fast.data.batches import Role
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.embeddings import Rows
from gsda_fast.data.feature_loader import FeatureLoader
from gsda_fast.data.sampling import SamplingPlan, view_numbers
from gsda_fast.errors import UsageError

CPU = torch.device("cpu")


def domain(values: np.ndarray, classes: int = 3) -> ImageDomain:
    count = values.shape[1]
    rows = Rows(values, np.arange(count), "")
    names = [str(number) for number in range(count)]
    return ImageDomain("d", Path(), names, np.arange(count) % classes, tuple("abc")[:classes], rows=rows)


def plan(source: ImageDomain, target: ImageDomain, batch: int = 4, world_size: int = 1) -> SamplingPlan:
    preprocessing = BENCHMARKS["features"].preprocessing
    return SamplingPlan(
        source.labels, len(target), preprocessing=preprocessing, batch_size=batch, seed=5, world_size=world_size
    )


def values(count: int, views: int = 1, dim: int = 3, dtype: str = "float32") -> np.ndarray:
    """Numbers that tell view, row and column."""
    view, row, column = np.meshgrid(np.arange(views), np.arange(count), np.arange(dim), indexing="ij")
    return (1000.0 * view + 10 * row + column).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("on_device", [True, False])
def test_batches_are_the_plans_rows_in_float32(dtype: str, on_device: bool) -> None:
    source, target = domain(values(7, dtype=dtype)), domain(values(9, dtype=dtype) + 500)
    loader = FeatureLoader(source, target, batch_size=4, device=CPU, on_device=on_device)
    wanted = plan(source, target)
    batches = list(loader.train(wanted, range(3, 6)))
    assert len(batches) == 3
    for step, batch in zip(range(3, 6), batches):
        expected = wanted.batch(step)
        assert batch.source_index.tolist() == expected.source_index.tolist()
        assert batch.source_labels.tolist() == source.labels[expected.source_index].tolist()
        assert batch.source_images.dtype == torch.float32
        assert_close(batch.source_images.double().numpy(), values(7)[0, expected.source_index].astype("float64"))
        assert_close(batch.target_images.double().numpy(), values(9)[0, expected.target_index].astype("float64") + 500)


@pytest.mark.parametrize("samples", [None, [8, 1, 1, 0, 5]])
def test_evaluation_gives_each_sample_once_in_its_first_view(samples: list[int] | None) -> None:
    target = domain(values(9, views=3)).take([0, 2, 4, 6, 8, 1, 3, 5, 7])
    loader = FeatureLoader(target, target, batch_size=4, device=CPU)
    chosen = None if samples is None else np.array(samples)
    rows, index = (torch.cat(parts) for parts in zip(*loader.evaluate("target", chosen)))
    order = np.array([0, 2, 4, 6, 8, 1, 3, 5, 7])
    assert index.tolist() == (samples or list(range(9)))
    assert_close(rows.numpy(), values(9)[0, order[index.numpy()]])
    assert max(len(part) for part, _ in loader.evaluate("source")) == 4


def test_training_takes_every_view_and_evaluation_the_first() -> None:
    source, target = domain(values(5, views=3)), domain(values(6, views=2))
    loader = FeatureLoader(source, target, batch_size=4, device=CPU)
    batches = list(loader.train(plan(source, target), range(60)))
    assert_close(
        torch.cat([batch.source_images[:, 0] % 1000 for batch in batches]),
        torch.cat([10.0 * batch.source_index for batch in batches]),
    )
    for role, views in (("source", 3), ("target", 2)):
        seen = torch.cat([getattr(batch, f"{role}_images")[:, 0] // 1000 for batch in batches])
        shares = torch.bincount(seen.long(), minlength=views) / len(seen)
        assert_close(shares, torch.full((views,), 1 / views), rtol=0, atol=0.12)


@pytest.mark.parametrize("role", ["source", "target"])
def test_two_ranks_see_the_views_of_one(role: Role) -> None:
    source, target = domain(values(5)), domain(values(6))
    whole, halves = plan(source, target, batch=6), plan(source, target, batch=3, world_size=2)
    for step in range(20):
        one = view_numbers(whole, step, 0, role, 4)
        two = [view_numbers(halves, step, rank, role, 4) for rank in (0, 1)]
        assert one.tolist() == np.concatenate(two).tolist()
    assert view_numbers(whole, 3, 0, "source", 100).tolist() != view_numbers(whole, 3, 0, "target", 100).tolist()


def test_rows_of_different_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--target: found d, whose features have 4 numbers; expected 3, as in d"):
        FeatureLoader(domain(values(4)), domain(values(4, dim=4)), batch_size=4, device=CPU)
