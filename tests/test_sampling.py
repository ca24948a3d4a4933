import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from gsda_fast.data import sampling
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.sampling import SamplingPlan, random_windows, source_window, uniforms
from gsda_fast.errors import UsageError

DIGITS, PHOTOS, VISDA = (BENCHMARKS[name].preprocessing for name in ("digits", "office31", "visda"))
# Very unequal classes, one absent (4), in no order.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 5], [3, 40, 7, 100, 11]))


def plan_for(**changes: object) -> SamplingPlan:
    arguments: dict[str, object] = {"preprocessing": PHOTOS, "batch_size": 16, "seed": 0} | changes
    return SamplingPlan(LABELS, 90, **arguments)  # type: ignore[arg-type]


def source_stream(plan: SamplingPlan, steps: int) -> np.ndarray:
    return np.concatenate([plan.batch(step).source_index for step in range(steps)])


def target_stream(plan: SamplingPlan, steps: int) -> np.ndarray:
    return np.concatenate([plan.batch(step).target_index for step in range(steps)])


def same(first: object, second: object) -> bool:
    """Whether two plans of batches are equal in every array."""
    if dataclasses.is_dataclass(first):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first))
    return np.array_equal(first, second)  # type: ignore[arg-type]


def test_source_classes_appear_equally_often() -> None:
    drawn = LABELS[source_stream(plan_for(), 50)]  # 800 slots: 160 blocks of the 5 classes present
    assert np.bincount(drawn).tolist() == [160, 160, 160, 160, 0, 160]
    assert all(sorted(block) == [0, 1, 2, 3, 5] for block in drawn.reshape(-1, 5).tolist())


def test_order_of_the_classes_varies_from_block_to_block() -> None:
    blocks = LABELS[source_stream(plan_for(), 50)].reshape(-1, 5)
    assert len({tuple(block) for block in blocks.tolist()}) > 60
    first = np.bincount(blocks[:, 0], minlength=6)
    assert first[[0, 1, 2, 3, 5]].min() > 15  # 32 expected


def test_no_sample_comes_twice_before_all_of_its_class_came_once() -> None:
    stream = source_stream(plan_for(), 500)
    for label in (0, 1, 2, 3, 5):
        members = np.flatnonzero(label == LABELS)
        drawn = stream[LABELS[stream] == label]
        passes = drawn[: len(drawn) // len(members) * len(members)].reshape(-1, len(members))
        assert len(passes) > 5
        assert (np.sort(passes, axis=1) == members).all()
        assert label == 0 or not np.array_equal(passes[0], passes[1])


def test_target_runs_through_whole_epochs_before_the_first_scoring() -> None:
    epochs = target_stream(plan_for(batch_size=15), 30).reshape(5, 90)
    assert (np.sort(epochs, axis=1) == np.arange(90)).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_target_after_scoring_is_confident_and_balanced() -> None:
    table = np.full(90, -1)
    table[:40], table[40:42], table[50:60] = 0, 3, 7
    drawn = target_stream(plan_for(batch_size=12).with_target(table), 30)
    assert (table[drawn] >= 0).all()
    assert np.bincount(table[drawn])[[0, 3, 7]].tolist() == [120, 120, 120]
    assert set(drawn) == set(np.flatnonzero(table >= 0))


def test_target_after_scoring_without_balance() -> None:
    table = np.where(np.arange(90) < 60, np.arange(90) % 3, -1)
    epochs = target_stream(plan_for(batch_size=12, balance_target=False).with_target(table), 20).reshape(4, 60)
    assert (np.sort(epochs, axis=1) == np.arange(60)).all()


def test_no_confident_sample_means_all_of_the_target() -> None:
    plan = plan_for()
    assert same(plan.with_target(np.full(90, -1)).batch(7), plan.batch(7))


def test_refreshing_the_target_leaves_the_source_and_the_augmentation_alone() -> None:
    before, after = plan_for().batch(9), plan_for().with_target(np.arange(90) % 3).batch(9)
    assert not np.array_equal(before.target_index, after.target_index)
    assert np.array_equal(before.source_index, after.source_index)
    assert same(before.source_augmentation, after.source_augmentation)
    assert same(before.target_augmentation, after.target_augmentation)


@pytest.mark.parametrize("table", [None, np.arange(90) % 4 - 1])
def test_two_ranks_of_16_are_one_rank_of_32(table: np.ndarray | None) -> None:
    one = plan_for(batch_size=32, target_table=table)
    two = plan_for(batch_size=16, world_size=2, target_table=table)
    for step in (0, 1, 5, 1000):
        whole, halves = one.batch(step), [two.batch(step, rank) for rank in (0, 1)]
        for name in ("source_index", "target_index"):
            assert np.array_equal(getattr(whole, name), np.concatenate([getattr(half, name) for half in halves]))
        for name in ("source_augmentation", "target_augmentation"):
            for part in ("window", "flip"):
                joined = np.concatenate([getattr(getattr(half, name), part) for half in halves])
                assert np.array_equal(getattr(getattr(whole, name), part), joined)


def test_a_batch_depends_on_nothing_that_was_asked_before() -> None:
    table = np.arange(90) % 4 - 1
    used = plan_for(target_table=table)
    for step in range(300):
        used.batch(step)
    assert same(used.batch(17), plan_for(target_table=table).batch(17))


def test_seeds_and_domains_are_independent() -> None:
    labels = np.zeros(64, dtype=np.int64)
    zero, one = (SamplingPlan(labels, 64, preprocessing=PHOTOS, batch_size=64, seed=seed) for seed in (0, 1))
    batch = zero.batch(0)
    assert not np.array_equal(batch.source_index, one.batch(0).source_index)
    assert not np.array_equal(batch.target_index, one.batch(0).target_index)
    assert not np.array_equal(batch.source_index, batch.target_index)
    assert not np.array_equal(batch.source_augmentation.window, batch.target_augmentation.window)
    assert not np.array_equal(batch.source_augmentation.window, one.batch(0).source_augmentation.window)


def test_the_streams_are_frozen() -> None:
    # A change here changes every recorded run: numpy promises these numbers, and so does the plan.
    batch = plan_for(batch_size=4, target_table=np.arange(90) % 4 - 1).batch(3)
    assert batch.source_index.tolist() == [143, 44, 138, 44]
    assert batch.target_index.tolist() == [10, 61, 23, 83]
    assert batch.source_augmentation.window[0].tolist() == [0, 13, 247, 204]


def test_windows_have_the_distribution_of_torchvision() -> None:
    count = 4000
    ours = random_windows(uniforms(5, 99, (0, 0), (count, 22)), 256, (0.08, 1.0))
    torch.manual_seed(0)
    image = torch.empty(3, 256, 256)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= 256).all()
    for ours_column, their_column in zip(ours.T, theirs.T, strict=True):
        # Two-sample Kolmogorov-Smirnov distance; 0.043 is its 0.1 % point for these sizes.
        values = np.union1d(ours_column, their_column)
        distance = np.abs(
            np.searchsorted(np.sort(ours_column), values, side="right")
            - np.searchsorted(np.sort(their_column), values, side="right")
        )
        assert distance.max() / count < 0.043


def test_window_that_never_fits_is_the_whole_frame() -> None:
    draws = np.concatenate([np.full((1, 10), 0.999), np.zeros((1, 10)), np.full((1, 2), 0.5)], axis=1)
    assert random_windows(draws, 256, (0.08, 1.0)).tolist() == [[0, 0, 256, 256]]


def test_recipes_without_random_windows() -> None:
    digits, visda = plan_for(preprocessing=DIGITS).batch(0), plan_for(preprocessing=VISDA, batch_size=400).batch(0)
    assert (digits.source_augmentation.window == [0, 0, 16, 16]).all()
    assert not digits.source_augmentation.flip.any()
    assert (visda.source_augmentation.window == [16, 16, 224, 224]).all()
    assert 150 < visda.source_augmentation.flip.sum() < 250


@pytest.mark.parametrize(
    ("window", "size", "expected"),
    [
        ((0, 0, 256, 256), (375, 500), (0, 0, 375, 500)),
        ((64, 128, 128, 64), (512, 512), (128, 256, 256, 128)),
        ((16, 16, 224, 224), (100, 33), (6, 2, 88, 29)),
        ((100, 200, 30, 30), (1, 2), (0, 1, 1, 1)),  # never less than a pixel, never outside
        ((255, 255, 1, 1), (3, 3), (2, 2, 1, 1)),
    ],
)
def test_window_in_source_pixels(
    window: tuple[int, ...], size: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert source_window(np.array(window), *size, 256) == expected


def test_source_windows_stay_inside() -> None:
    windows = random_windows(uniforms(5, 98, (0, 0), (300, 22)), 256, (0.001, 1.0))
    for window in windows:
        for height, width in ((1, 1), (7, 300), (333, 2), (255, 257)):
            top, left, tall, wide = source_window(window, height, width, 256)
            assert top >= 0
            assert left >= 0
            assert tall >= 1
            assert wide >= 1
            assert top + tall <= height
            assert left + wide <= width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "--batch-size: found 0; expected 1 or more"),
        ({"target_table": np.zeros(3)}, r"target_table: found shape \(3,\); expected \(90,\)"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for(**arguments)


def test_source_without_labels_or_images() -> None:
    with pytest.raises(UsageError, match="--source: found 1 images without a label"):
        SamplingPlan(np.array([0, -1]), 5, preprocessing=DIGITS, batch_size=4, seed=0)
    with pytest.raises(UsageError, match="found 0 source and 5 target images"):
        SamplingPlan(np.array([], dtype=np.int64), 5, preprocessing=DIGITS, batch_size=4, seed=0)


def test_a_batch_of_64_and_64_draws_no_more_than_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: random words and permutations, so that a busy machine finds what a quiet one finds."""
    plan = plan_for(batch_size=64).with_target(np.arange(90) % 10)
    words: list[int] = []
    raw = sampling._raw

    def counting(seed: int, stream: int, counter: tuple[int, int, int, int], number: int) -> np.ndarray:
        words.append(number)
        return raw(seed, stream, counter, number)

    monkeypatch.setattr(sampling, "_raw", counting)
    for step in range(200):
        plan.batch(step)
    # In each step two blocks of classes and two of augmentations. The rest are permutations inside a class: one for
    # each pass over its samples. Of the source's 5 classes, 2560 slots each, that is 2560 / size passes; of the
    # target's 10 pseudo-classes of 9 samples, 1280 slots each, 143.
    sizes = [3, 40, 7, 100, 11]
    passes = sum(-(-2560 // size) for size in sizes) + 10 * 143
    assert len(words) <= 4 * 200 + passes
    augmentation = 200 * 2 * 64 * sampling._DRAWS
    classes = 200 * (14 * 8 + 8 * 12)
    inside = sum(-(-2560 // size) * size for size in sizes) + 10 * 143 * 9
    assert augmentation < sum(words) <= augmentation + classes + inside
