"""Files that fail in the middle of a run, alike in both loaders."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_trees import class_tree

from gsda_fast.data import decoding
from gsda_fast.data.batches import Loader
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.data.substitutes import Substitutes
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.errors import FileWarning, UsageError

PHOTOS = replace(BENCHMARKS["office31"].preprocessing, resize=64, crop=48)
CPU = torch.device("cpu")
KINDS = ["torch", "dali"]

Pair = tuple[ImageDomain, ImageDomain]

pytestmark = pytest.mark.filterwarnings("ignore::gsda_fast.errors.FileWarning")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    class_tree(tmp_path / "photos", ["cat", "dog"], per_class=4)
    class_tree(tmp_path / "new", ["cat", "dog"], per_class=3, suffix=".png")
    return open_pair("folder", "photos", "new", tmp_path)


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, pair: Pair) -> Iterator[Loader]:
    loader = open_kind(request.param, pair, most_failed=3)
    yield loader
    loader.close()


def open_kind(kind: str, pair: Pair, **more: Any) -> Loader:
    arguments: dict[str, Any] = {"batch_size": 4, "device": CPU, "workers": 1, **more}
    if kind == "torch":
        return TorchLoader(*pair, PHOTOS, **arguments)
    if importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    from gsda_fast.data.dali_loader import DaliLoader

    return DaliLoader(*pair, PHOTOS, **arguments)


def plan_for(pair: Pair, **more: Any) -> SamplingPlan:
    return SamplingPlan(pair[0].labels, len(pair[1]), preprocessing=PHOTOS, batch_size=4, seed=0, **more)


def jpeg_that_only_a_decoder_refuses(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[data.index(b"\xff\xdb") + 4] = 3
    Path(path).write_bytes(data)


def pipe(path: str) -> None:
    os.unlink(path)
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [os.unlink, pipe, jpeg_that_only_a_decoder_refuses])
def test_another_of_its_class_takes_its_place(pair: Pair, opened: Loader, spoil: Any) -> None:
    source = pair[0]
    sound = list(opened.train(plan_for(pair), range(6)))
    spoil(source.file(1))  # the second of four cats
    batches = list(opened.train(plan_for(pair), range(6)))
    assert len(batches) == 6
    for before, after in zip(sound, batches, strict=True):
        expected = torch.where(before.source_index == 1, 2, before.source_index)
        assert after.source_index.tolist() == expected.tolist()
        assert torch.equal(after.source_labels, before.source_labels)
        unchanged = before.source_index != 1
        assert torch.equal(after.source_images[unchanged], before.source_images[unchanged])
        assert torch.equal(after.target_images, before.target_images)
    assert [path for path, _ in opened.failed] == [source.file(1)]
    # It stays so, and nothing more is said.
    with warnings.catch_warnings():
        warnings.simplefilter("error", FileWarning)
        again = list(opened.train(plan_for(pair), range(6)))
    assert [batch.source_index.tolist() for batch in again] == [batch.source_index.tolist() for batch in batches]


def test_in_the_target_pseudo_labels_say_what_is_alike(pair: Pair, opened: Loader) -> None:
    os.unlink(pair[1].file(0))
    plan = plan_for(pair).with_target(np.array([1, 0, 0, 0, 1, 1]))  # not its own labels, three of each
    seen = [sample for batch in opened.train(plan, range(9)) for sample in batch.target_index.tolist()]
    sound = [sample for step in range(9) for sample in plan.batch(step).target_index.tolist()]
    assert 0 in sound
    assert seen == [4 if sample == 0 else sample for sample in sound]


def test_in_an_evaluation_it_is_the_mean_colour(pair: Pair, opened: Loader) -> None:
    sound = {int(i): image for images, index in opened.evaluate("target") for i, image in zip(index, images.clone())}
    Path(pair[1].file(4)).write_bytes(b"junk")
    seen = {int(i): image for images, index in opened.evaluate("target") for i, image in zip(index, images.clone())}
    assert list(seen) == list(range(6))
    assert seen[4].abs().max() < 0.02
    assert all(torch.equal(seen[i], sound[i]) for i in range(6) if i != 4)
    assert [path for path, _ in opened.failed] == [pair[1].file(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_an_end_to_it(pair: Pair, kind: str) -> None:
    opened = open_kind(kind, pair, most_failed=1)
    for sample in (0, 5):
        os.unlink(pair[0].file(sample))
    with pytest.raises(UsageError, match=r"data: found more than 1 files that failed since the run began, .*no such"):
        list(opened.train(plan_for(pair), range(9)))
    opened.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_a_readable_image(pair: Pair, kind: str) -> None:
    opened = open_kind(kind, pair, most_failed=9)
    for sample in range(4):
        os.unlink(pair[0].file(sample))
    with pytest.raises(UsageError, match=r"found no readable image of the class of .*cat/frame"):
        list(opened.train(plan_for(pair), range(9)))
    opened.close()


def test_a_failure_is_told_once(pair: Pair) -> None:
    substitutes = Substitutes({"source": pair[0], "target": pair[1]}, 5)
    error = UsageError("photo.jpg", found="a folder", expected="a readable image")
    with pytest.warns(FileWarning, match=r"photo.jpg: a folder; another sample of its class takes its place"):
        substitutes.note("source", 3, error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        substitutes.note("source", 3, error)
    assert substitutes.of("source", 3, pair[0].labels) == 0  # the class goes round
    assert substitutes.failed == [(pair[0].file(3), "a folder")]


def test_a_file_is_read_once_an_image(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks cost is counted: one reading, one decoding, no second look."""
    opened = open_kind("torch", pair)
    counts = {"_read_file": 0, "_decode": 0, "_require_whole_pixels": 0}

    def counting(name: str) -> None:
        original = getattr(decoding, name)

        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(decoding, name, counted)

    for name in counts:
        counting(name)
    list(opened.train(plan_for(pair), range(5)))
    opened.close()
    assert counts == {"_read_file": 40, "_decode": 40, "_require_whole_pixels": 0}
