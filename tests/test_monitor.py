"""What a run says of the time it will take."""

from types import SimpleNamespace
from typing import Any

from rich.console import Console

from gsda_fast.monitor import ProgressLines


def lines_of(steps: int, warmup: int) -> ProgressLines:
    trainer: Any = SimpleNamespace(schedule=SimpleNamespace(steps=steps, warmup=warmup), step=0, seconds=0.0)
    return ProgressLines(Console(quiet=True), trainer)


def test_time_left_is_said_at_the_second_line_of_warmup_and_of_adaptation() -> None:
    lines = lines_of(steps=10_000, warmup=200)
    assert lines._time_left(50, 90.0) == ""  # the first steps compile
    assert lines._time_left(100, 95.0) == "about 16 min 30 s to go at this rate"
    assert lines._time_left(200, 105.0) == ""
    assert lines._time_left(250, 300.0) == ""
    assert lines._time_left(300, 350.0) == "about 2 h 41 min to go at this rate"
    assert lines._time_left(350, 500.0) == ""


def test_a_short_run_has_nothing_to_announce() -> None:
    lines = lines_of(steps=100, warmup=0)
    assert lines._time_left(20, 5.0) == ""
    assert lines._time_left(40, 10.0) == ""
