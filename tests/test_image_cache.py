"""All images of both domains on the device: the same batches as without, each image decoded once."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_trees import class_tree
from torch import Tensor

from gsda_fast.data.batches import Role
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import open_pair
from gsda_fast.data.image_cache import ImageCache
from gsda_fast.data.sampling import IntArray
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.errors import UsageError

PHOTOS = replace(BENCHMARKS["office31"].preprocessing, resize=32, crop=24)
CPU = torch.device("cpu")


def test_samples_are_those_of_their_domain_and_each_is_decoded_once() -> None:
    sizes: dict[Role, int] = {"source": 300, "target": 7}
    decoded: Counter[tuple[Role, int]] = Counter()

    def decode(role: Role, samples: IntArray) -> Tensor:
        decoded.update((role, sample) for sample in samples.tolist())
        value = torch.from_numpy(samples % 200 + (50 if role == "target" else 0)).to(torch.uint8)
        return value.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)

    cache = ImageCache(sizes, PHOTOS, CPU, decode)
    assert cache.samples("source", np.array([299, 0, 7]))[:, 0, 0, 0].tolist() == [99, 0, 7]
    assert cache.samples("target", np.array([6, 0]))[:, 0, 0, 0].tolist() == [56, 50]
    assert set(decoded.values()) == {1}
    assert len(decoded) == 307


def test_evaluation_is_that_of_a_loader_without(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("photos")
    for domain in ("photos", "sketches"):
        class_tree(root / domain, ["cat", "dog"], per_class=5)
    pair = open_pair("folder", "photos", "sketches", root)
    loaders = [TorchLoader(*pair, PHOTOS, batch_size=4, device=CPU, cache_on_device=kept) for kept in (True, False)]
    kept, decoded = (list(loader.evaluate("target", np.array([3, 9, 1, 0, 5]))) for loader in loaders)
    for loader in loaders:
        loader.close()
    for (images, index), (same, same_index) in zip(kept, decoded, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(index, same_index)


def test_images_that_do_not_fit_are_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """VisDA on a GPU with 24 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 2**30, 24 * 2**30))
    sizes: dict[Role, int] = {"source": 152_397, "target": 55_388}

    def decode(role: Role, samples: IntArray) -> Tensor:
        pytest.fail("decoded")

    with pytest.raises(UsageError, match=r"--cache-on-device: found 207785 images, 38.0 GiB; .* 24.0 GiB"):
        ImageCache(sizes, BENCHMARKS["visda"].preprocessing, torch.device("cuda", 0), decode)
