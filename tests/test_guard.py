import pytest
import torch
from torch import Tensor, nn

from gsda_fast.errors import TrainingError
from gsda_fast.training.guard import Guard, not_finite


class LateGuard(Guard):
    """Reads its flag as on a GPU, from copies that are made now and then, with the host's memory in their place."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._device = torch.device("cuda")

    def _start_copy(self) -> None:
        self._copy = torch.stack([self._stopped, self._wishes]), None


def step(guard: Guard, number: int, value: float = 1.0, gradient: float = 1.0, scaled: bool = False) -> Tensor:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, gradient, 1.0])
    terms = {"classification": torch.tensor(value), "entropy": torch.tensor(1.0)}
    guard.begin()
    indicators = guard.indicators(torch.tensor(2.0), terms)
    skip = guard.check("encoder", terms, indicators, not_finite([parameter]), scaled=scaled)
    guard.end(number)
    return skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_term_is_named_with_its_step(bad: float) -> None:
    guard = Guard(torch.device("cpu"))
    assert step(guard, 0) == 0
    with pytest.raises(TrainingError, match=r"^step 2: classification not finite"):
        step(guard, 1, value=bad)


def test_a_bad_gradient_is_named_where_all_terms_are_finite() -> None:
    with pytest.raises(TrainingError, match=r"^step 8: gradient norm of the encoder not finite"):
        step(Guard(torch.device("cpu")), 7, gradient=float("nan"))


def test_scaled_gradients_skip_but_do_not_stop() -> None:
    guard = Guard(torch.device("cpu"))
    assert step(guard, 0, gradient=float("inf"), scaled=True) == 1
    assert step(guard, 1, scaled=True) == 0
    guard.require_finite()


@pytest.mark.parametrize("first_bad", range(10))
def test_without_waiting_the_host_sees_it_within_ten_steps(first_bad: int) -> None:
    guard = LateGuard()
    for number in range(first_bad):
        assert step(guard, number) == 0

    def ten_more() -> None:
        for number in range(first_bad, first_bad + 11):
            # From the bad step on nothing moves, long before the host knows.
            assert step(guard, number, value=float("nan") if number == first_bad else 1.0) == 1

    with pytest.raises(TrainingError, match=rf"^step {first_bad + 1}: classification not finite"):
        ten_more()


def test_a_checkpoint_is_never_written_after_it() -> None:
    guard = LateGuard()
    step(guard, 0, value=float("nan"))
    with pytest.raises(TrainingError, match="step 1: classification"):
        guard.require_finite()


def test_the_wish_to_stop_is_known_at_once_where_asking_costs_nothing() -> None:
    guard = Guard(torch.device("cpu"))
    step(guard, 0)
    assert not guard.stop
    guard.ask_to_stop()
    assert not guard.stop  # the other ranks do not know of it yet
    assert step(guard, 1) == 0  # and it keeps nobody from moving
    assert guard.stop


@pytest.mark.parametrize("asked_before", range(10))
def test_without_waiting_the_wish_to_stop_is_known_within_ten_steps(asked_before: int) -> None:
    guard = LateGuard()
    known = []
    for number in range(asked_before + 10):
        if number == asked_before:
            guard.ask_to_stop()
        step(guard, number)
        known.append(guard.stop)
    assert not any(known[:asked_before])
    assert known[-1]


def test_at_a_log_step_the_wish_to_stop_is_known() -> None:
    guard = LateGuard()
    guard.ask_to_stop()
    step(guard, 0)
    guard.require_finite()
    assert guard.stop
