"""What a run says of the time it will take."""

from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from gsda_fast.monitor import ProgressLines


def said_at(seconds_of: dict[int, float], *, steps: int, warmup: int, resumed_after: int = 0) -> dict[int, str]:
    """Take all steps and return what was said after which; `seconds_of`: the time of every step up to that one."""
    trainer: Any = SimpleNamespace(
        schedule=SimpleNamespace(steps=steps, warmup=warmup),
        step=resumed_after,
        seconds=0.0,
        device=torch.device("cpu"),
        on_step=[],
    )
    console, said = Console(quiet=True), {}
    console.print = lambda line, **_: said.update({trainer.step: line})  # type: ignore[method-assign]
    with ProgressLines(console, trainer):
        for step in range(resumed_after + 1, steps + 1):
            trainer.step = step
            trainer.seconds += next(cost for last, cost in seconds_of.items() if step <= last)
            for call in trainer.on_step:
                call()
    return said


def test_time_left_is_said_after_the_first_steps_and_after_the_first_that_adapt() -> None:
    said = said_at({1: 90.0, 200: 0.1, 201: 195.0, 10_000: 1.0}, steps=10_000, warmup=200)
    assert said == {
        15: "about 16 min 38 s to go at the rate of the first steps",
        215: "about 2 h 43 min to go at the rate of the first steps",
    }


def test_a_resumed_run_says_it_of_its_own_first_steps() -> None:
    said = said_at({10_000: 1.0}, steps=10_000, warmup=200, resumed_after=6_000)
    assert said == {6_015: "about 1 h 6 min to go at the rate of the first steps"}


def test_a_short_run_has_nothing_to_announce() -> None:
    assert said_at({100: 0.25}, steps=100, warmup=0) == {}
