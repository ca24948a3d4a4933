import math
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from gsda_fast.results import alignment
from gsda_fast.results.alignment import late_mismatch, proxy_a_distance, relative_mismatch

RECORDS: list[dict[str, Any]] = [
    {"step": 10, "classification": 2.0},
    {"step": 20, "classification": None, "accuracy": 50.0},
    {"step": 30, "classification": 1.0, "synchronization": 0.5, "gradient_norm_domain": 2.0},
    {
        "step": 40,
        "synchronization": 0.5,
        "gradient_norm_domain": 2.0,
        "gradient_norm_group": 1.0,
        "gradient_norm_class": 3.0,
    },
    {
        "step": 50,
        "synchronization": 0.0,
        "gradient_norm_domain": 0.0,
        "gradient_norm_group": 0.0,
        "gradient_norm_class": 0.0,
    },
]


def test_relative_mismatch_by_hand() -> None:
    steps, values = relative_mismatch(RECORDS)
    np.testing.assert_array_equal(steps, [40, 50])
    np.testing.assert_array_equal(values, [3 * 0.5 / (2 + 1 + 3), math.nan])
    steps, values = relative_mismatch(RECORDS[:2])
    assert (steps.shape, values.shape) == ((0,), (0,))


def measured(step: int, synchronization: float | None) -> dict[str, Any]:
    return {"step": step, "synchronization": synchronization} | dict.fromkeys(
        ("gradient_norm_domain", "gradient_norm_group", "gradient_norm_class"), 1.0
    )


def test_late_mismatch_is_the_mean_over_the_last_half_after_warmup() -> None:
    # Warm-up to 100, so the last half begins after step 200: 0.4 and 0.6 count, null does not.
    records = [measured(150, 9.0), measured(200, 9.0), measured(201, 0.4), measured(250, None), measured(300, 0.6)]
    assert late_mismatch(records, warmup=100, steps=300) == pytest.approx(0.5)
    assert late_mismatch(records, warmup=0, steps=300) == pytest.approx((9.0 + 0.4 + 0.6) / 3)


def test_late_mismatch_of_a_method_without_the_three_levels() -> None:
    assert late_mismatch([{"step": 300, "classification": 1.0}], warmup=0, steps=300) is None
    assert late_mismatch([], warmup=0, steps=300) is None


def test_proxy_a_distance_of_equal_and_of_separate_domains() -> None:
    generator = np.random.default_rng(0)
    source, target = generator.normal(size=(300, 8)), generator.normal(size=(300, 8))
    equal = proxy_a_distance(source, target)
    assert equal is not None
    assert abs(equal) < 0.3
    assert proxy_a_distance(source, target + 5) == pytest.approx(2.0)
    # One standard deviation apart along one axis: the best linear error is Phi(-1/2) = 0.3085.
    shifted = proxy_a_distance(source, target + np.eye(8)[0])
    assert shifted is not None
    assert shifted == pytest.approx(2 * (1 - 2 * 0.3085), abs=0.2)


def test_proxy_a_distance_uses_as_many_samples_of_both() -> None:
    generator = np.random.default_rng(0)
    # A classifier that always says the larger domain would be right in 98 percent.
    unequal = proxy_a_distance(generator.normal(size=(20, 4)), generator.normal(size=(1000, 4)))
    assert unequal is not None
    assert unequal < 0.8


def test_proxy_a_distance_without_features() -> None:
    features = np.ones((4, 3))
    assert proxy_a_distance(features, features) is None
    assert proxy_a_distance(np.full((9, 3), np.nan), np.ones((9, 3))) is None


def test_a_distance_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*_: object, **__: object) -> np.ndarray:
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return np.ones(5)

    monkeypatch.setattr(alignment, "cross_val_score", spy)
    with threadpool_limits(2):
        proxy_a_distance(np.zeros((10, 2)), np.ones((10, 2)))
    assert set(seen) == {1}
