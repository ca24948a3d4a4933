import math

import pytest

from gsda_fast.training.schedules import Schedule


def test_progress_counts_from_the_end_of_warm_up() -> None:
    schedule = Schedule(steps=800, warmup=300, refresh_every=50)
    assert [schedule.progress(step) for step in (0, 299, 300, 425, 550, 800)] == [0, 0, 0, 0.25, 0.5, 1]
    assert [schedule.warming_up(step) for step in (0, 299, 300, 799)] == [True, True, False, False]


@pytest.mark.parametrize(("steps", "warmup"), [(10, 10), (1, 0), (1, 1)])
def test_a_run_that_is_all_warm_up_or_one_step_has_a_progress(steps: int, warmup: int) -> None:
    schedule = Schedule(steps, warmup, refresh_every=3)
    assert schedule.progress(0) == 0
    assert schedule.progress(steps) == float(steps > warmup)


def test_learning_rate_decays_after_warm_up() -> None:
    schedule = Schedule(steps=200, warmup=100, refresh_every=50)
    assert [schedule.learning_rate_factor(step) for step in (0, 100)] == [1, 1]
    assert schedule.learning_rate_factor(150) == pytest.approx((1 + 10 * 0.5) ** -0.75)
    assert schedule.learning_rate_factor(200) == pytest.approx(11**-0.75)


def test_adversarial_ramp_rises_from_zero_to_one() -> None:
    schedule = Schedule(steps=200, warmup=100, refresh_every=50)
    assert [schedule.adversarial_ramp(step) for step in (0, 100)] == [0, 0]
    assert schedule.adversarial_ramp(110) == pytest.approx(2 / (1 + math.exp(-1)) - 1)
    # The same curve in another form: 2 / (1 + exp(-x)) - 1 = tanh(x / 2).
    assert schedule.adversarial_ramp(200) == pytest.approx(math.tanh(5))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(steps=20, warmup=5, refresh_every=6), [5, 11, 17, 20]),
        (Schedule(steps=20, warmup=0, refresh_every=6), [6, 12, 18, 20]),
        (Schedule(steps=17, warmup=5, refresh_every=6), [5, 11, 17]),
        (Schedule(steps=20, warmup=20, refresh_every=6), [20]),
        (Schedule(steps=20, warmup=0, refresh_every=100), [20]),
        (Schedule(steps=3, warmup=0, refresh_every=1), [1, 2, 3]),
    ],
)
def test_the_target_is_scored_at_the_end_of_warm_up_regularly_and_at_the_end(
    schedule: Schedule, expected: list[int]
) -> None:
    assert [step for step in range(schedule.steps + 1) if schedule.is_evaluated_after(step)] == expected
    for step in range(schedule.steps):
        assert schedule.next_evaluation(step) == min(each for each in expected if each > step)
