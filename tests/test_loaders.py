from pathlib import Path

import pytest
import torch
from image_trees import class_tree

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.loaders import DataSettings, Loader, open_loader
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.errors import UsageError

RECIPE = BENCHMARKS["folder"].recipe


@pytest.fixture
def pair(tmp_path: Path) -> tuple[ImageDomain, ImageDomain]:
    class_tree(tmp_path / "photos", ["cat", "dog"])
    class_tree(tmp_path / "sketches", ["dog"])
    return open_pair("folder", "photos", "sketches", tmp_path)


def opened(settings: DataSettings, pair: tuple[ImageDomain, ImageDomain]) -> Loader:
    return open_loader(settings, *pair, RECIPE, batch_size=4, device=torch.device("cpu"))


@pytest.mark.parametrize("settings", [DataSettings(), DataSettings(loader="torch", workers=1, cache_on_device=True)])
def test_from_settings_to_batches(settings: DataSettings, pair: tuple[ImageDomain, ImageDomain]) -> None:
    loader = opened(settings, pair)
    assert isinstance(loader, TorchLoader)
    plan = SamplingPlan(pair[0].labels, len(pair[1]), recipe=RECIPE, batch_size=4, seed=0)
    (batch,) = loader.train(plan, range(1))
    assert batch.source_images.shape == batch.target_images.shape == (4, 3, 224, 224)
    assert sorted(batch.source_labels.tolist()) == [0, 0, 1, 1]
    ((images, index),) = loader.evaluate("target")
    assert (images.shape, index.tolist()) == ((2, 3, 224, 224), [0, 1])
    loader.close()


def test_loader_that_is_not_there(pair: tuple[ImageDomain, ImageDomain]) -> None:
    with pytest.raises(UsageError, match="--loader: found 'dali'; expected auto or torch"):
        opened(DataSettings(loader="dali"), pair)


def test_negative_workers(pair: tuple[ImageDomain, ImageDomain]) -> None:
    with pytest.raises(UsageError, match="--workers: found -1"):
        opened(DataSettings(workers=-1), pair)
