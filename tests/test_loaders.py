import sys
import types
from pathlib import Path

import pytest
import torch
from image_trees import class_tree

from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.loaders import DataSettings, Loader, open_loader, require_room, resolve_loader
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.errors import UsageError

PREPROCESSING = BENCHMARKS["folder"].preprocessing


@pytest.fixture
def pair(tmp_path: Path) -> tuple[ImageDomain, ImageDomain]:
    class_tree(tmp_path / "photos", ["cat", "dog"])
    class_tree(tmp_path / "sketches", ["dog"])
    return open_pair("folder", "photos", "sketches", tmp_path)


def opened(settings: DataSettings, pair: tuple[ImageDomain, ImageDomain]) -> Loader:
    return open_loader(settings, *pair, PREPROCESSING, batch_size=4, device=torch.device("cpu"))


@pytest.mark.parametrize("settings", [DataSettings(), DataSettings(loader="torch", workers=1, cache_on_device=True)])
def test_from_settings_to_batches(settings: DataSettings, pair: tuple[ImageDomain, ImageDomain]) -> None:
    loader = opened(settings, pair)
    assert isinstance(loader, TorchLoader)
    plan = SamplingPlan(pair[0].labels, len(pair[1]), preprocessing=PREPROCESSING, batch_size=4, seed=0)
    (batch,) = loader.train(plan, range(1))
    assert batch.source_images.shape == batch.target_images.shape == (4, 3, 224, 224)
    assert sorted(batch.source_labels.tolist()) == [0, 0, 1, 1]
    ((images, index),) = loader.evaluate("target")
    assert (images.shape, index.tolist()) == ((2, 3, 224, 224), [0, 1])
    loader.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "cached", "dali"])
def test_images_of_less_precision_are_the_float32_ones_rounded_once(
    pair: tuple[ImageDomain, ImageDomain], name: str, dtype: torch.dtype
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    settings = DataSettings(loader="dali" if name == "dali" else "torch", cache_on_device=name == "cached", workers=1)
    plan = SamplingPlan(pair[0].labels, len(pair[1]), preprocessing=PREPROCESSING, batch_size=4, seed=0)
    found = []
    for each in (torch.float32, dtype):
        loader = open_loader(settings, *pair, PREPROCESSING, batch_size=4, device=torch.device("cpu"), dtype=each)
        batches = list(loader.train(plan, range(2)))
        images = [image for batch in batches for image in (batch.source_images, batch.target_images)]
        images += [part for part, _ in loader.evaluate("target")]
        assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)
        found.append(images)
        loader.close()
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == dtype
        assert torch.equal(exact.to(dtype), rounded)


def test_loader_that_does_not_exist(pair: tuple[ImageDomain, ImageDomain]) -> None:
    with pytest.raises(UsageError, match="--loader: found 'pillow'; expected auto, dali or torch"):
        opened(DataSettings(loader="pillow"), pair)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "device", "name"),
    [
        (DataSettings(), "cpu", "torch"),
        (DataSettings(), "cuda", "dali"),
        (DataSettings(cache_on_device=True), "cuda", "torch"),
        (DataSettings(loader="torch"), "cuda", "torch"),
        (DataSettings(loader="dali"), "cpu", "dali"),
    ],
)
def test_automatic_choice(
    settings: DataSettings,
    device: str,
    name: str,
    pair: tuple[ImageDomain, ImageDomain],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", types.ModuleType("nvidia.dali"))
    assert resolve_loader(settings, *pair, torch.device(device)) == name


def test_without_dali_auto_falls_to_torch_and_dali_says_how_to_install_it(
    pair: tuple[ImageDomain, ImageDomain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert resolve_loader(DataSettings(), *pair, torch.device("cuda")) == "torch"
    with pytest.raises(UsageError, match=r"--loader: found dali, which cannot be imported .*; python -m pip install"):
        opened(DataSettings(loader="dali"), pair)


def test_dali_with_what_it_cannot_do(pair: tuple[ImageDomain, ImageDomain], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", types.ModuleType("nvidia.dali"))
    with pytest.raises(UsageError, match="--loader: found dali together with --cache-on-device"):
        opened(DataSettings(loader="dali", cache_on_device=True), pair)


def test_ten_crops_need_room(pair: tuple[ImageDomain, ImageDomain]) -> None:
    require_room(10, PREPROCESSING)
    require_room(1, BENCHMARKS["digits"].preprocessing)
    with pytest.raises(
        UsageError, match="--test-crops: found 10, for images that are used whole, 16x16 pixels; expect"
    ):
        require_room(10, BENCHMARKS["digits"].preprocessing)


def test_negative_workers(pair: tuple[ImageDomain, ImageDomain]) -> None:
    with pytest.raises(UsageError, match="--workers: found -1"):
        opened(DataSettings(workers=-1), pair)
