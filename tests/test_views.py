"""Further views of the target: drawn in the plan, made alike by every loader."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import class_tree

from gsda_fast.data.benchmarks import find_benchmark
from gsda_fast.data.dali_loader import DaliLoader
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.sampling import SamplingPlan, colour_maps
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.data.views import recoloured, shifted

PREPROCESSING = replace(find_benchmark("office31").preprocessing, resize=40, crop=32)
LABELS = np.arange(12) % 3


def plan(views: int = 2, strong: bool = False, **changes: object) -> SamplingPlan:
    return SamplingPlan(
        LABELS, 12, preprocessing=PREPROCESSING, batch_size=4, seed=3, target_views=views, strong_view=strong, **changes
    )


def test_the_first_view_is_that_of_a_plan_without_further_ones() -> None:
    one, two = plan(1).batch(5), plan(2).batch(5)
    assert not one.further_views
    assert np.array_equal(one.target_index, two.target_index)
    assert np.array_equal(one.target_augmentation.window, two.target_augmentation.window)
    assert np.array_equal(one.source_augmentation.window, two.source_augmentation.window)


def test_views_are_drawn_independently_and_again_alike() -> None:
    first, again = plan(3).batch(2), plan(3).batch(2)
    windows = [first.target_augmentation.window, *(view.window for view in first.further_views)]
    assert len(windows) == 3
    assert not any(np.array_equal(windows[a], windows[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    for view, same in zip(first.further_views, again.further_views):
        assert np.array_equal(view.window, same.window)


def test_two_ranks_draw_what_one_draws() -> None:
    whole = SamplingPlan(LABELS, 12, preprocessing=PREPROCESSING, batch_size=8, seed=3, target_views=2).batch(4)
    parts = [plan(world_size=2).batch(4, rank) for rank in (0, 1)]
    assert np.array_equal(whole.further_views[0].window, np.concatenate([p.further_views[0].window for p in parts]))


def test_images_that_are_used_whole_are_shifted_instead() -> None:
    digits = find_benchmark("digits").preprocessing
    batch = SamplingPlan(LABELS, 12, preprocessing=digits, batch_size=200, seed=0, target_views=2).batch(0)
    shift = batch.further_views[0].shift
    assert shift is not None
    assert set(np.unique(shift)) == {-2, -1, 0, 1, 2}
    assert batch.target_augmentation.shift is None


def test_shifted_repeats_the_border() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    moved = shifted(image, torch.tensor([[1, -1]]))  # down, left
    assert moved.view(3, 3).tolist() == [[1, 2, 2], [1, 2, 2], [4, 5, 5]]


def test_colour_maps_leave_a_grey_pixel_grey_and_can_remove_colour() -> None:
    maps = torch.from_numpy(colour_maps(np.random.default_rng(0).random((50, 5)), 3)).double()
    grey = torch.full((3,), 0.5, dtype=torch.float64)
    mapped = maps[:, :, :3] @ grey + maps[:, :, 3]
    assert torch.allclose(mapped, mapped[:, :1].expand(-1, 3), atol=1e-6)
    draws = np.array([[0.5, 0.5, 0.9, 0.5, 0.1]])
    (without,) = torch.from_numpy(colour_maps(draws, 3)).double()
    colour = without[:, :3] @ torch.tensor([0.9, 0.1, 0.3], dtype=torch.float64) + without[:, 3]
    assert torch.allclose(colour, colour[:1].expand(3), atol=1e-6)


def test_recoloured_works_on_pixels_and_not_on_normalised_values() -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    pixels = torch.rand(2, 3, 5, 5)
    colour = torch.cat([0.5 * torch.eye(3), torch.full((3, 1), 0.7)], dim=1).expand(2, -1, -1)
    found = recoloured((pixels - mean) / std, colour, PREPROCESSING)
    assert torch.allclose(found * std + mean, (0.5 * pixels + 0.7).clamp(0, 1), atol=1e-6)


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageDomain, ImageDomain]:
    root: Path = tmp_path_factory.mktemp("views")
    for domain in ("source", "target"):
        class_tree(root / domain, [f"class{number}" for number in range(3)], per_class=4)
    return open_pair("folder", "source", "target", root, None)


@pytest.mark.parametrize("cached", [False, True])
def test_a_loader_gives_every_view_of_the_plan(domains: tuple[ImageDomain, ImageDomain], cached: bool) -> None:
    loader = TorchLoader(*domains, PREPROCESSING, batch_size=4, device=torch.device("cpu"), cache_on_device=cached)
    (batch,) = loader.train(plan(3, strong=True), range(1, 2))
    (plain,) = loader.train(plan(1), range(1, 2))
    loader.close()
    assert torch.equal(batch.target_images, plain.target_images)
    assert [view.shape for view in batch.further_views] == [batch.target_images.shape] * 2
    assert not torch.equal(batch.target_images, batch.further_views[0])
    assert not torch.equal(*batch.further_views)


def test_dali_gives_the_same_views(domains: tuple[ImageDomain, ImageDomain]) -> None:
    loaders = [
        TorchLoader(*domains, PREPROCESSING, batch_size=4, device=torch.device("cpu")),
        DaliLoader(*domains, PREPROCESSING, batch_size=4, device=torch.device("cpu")),
    ]
    batches = [list(loader.train(plan(3, strong=True), range(2, 4))) for loader in loaders]
    for loader in loaders:
        loader.close()
    for of_torch, of_dali in zip(*batches):
        for view, same in zip(of_torch.further_views, of_dali.further_views):
            # Edges are resampled differently, by up to eight levels of 255 (docs/data.md).
            assert (view - same).abs().mean() < 0.02
