import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clouds import clouds
from rich.console import Console
from test_trainer import SCORED, build

from gsda_fast import run as run_module
from gsda_fast.config import configure, parse_config
from gsda_fast.run import Run
from gsda_fast.train import train
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.stopping import StopRequest


class Clock:
    """Seconds that pass where they are told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Folder(CheckpointFolder):
    """Keeps a record of what it was asked to save, and takes a while for it."""

    def __init__(self, path: Path, clock: Clock, fails: tuple[int, ...] = ()) -> None:
        super().__init__(path)
        self.clock, self.fails = clock, fails
        self.asked: list[int] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.asked.append(step)
        self.clock.now += 30
        if step in self.fails:
            raise OSError(28, "No space left on device")


def saved(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
    *,
    between: float,
    fails: tuple[int, ...] = (),
) -> list[int]:
    """The steps at which a run asked for a checkpoint, its evaluations `between` seconds apart."""
    clock = Clock()
    checkpoints = Folder(folder / "checkpoints", clock, fails)
    monkeypatch.setattr(run_module, "time", clock)
    monkeypatch.setattr(run_module, "CheckpointFolder", lambda path: checkpoints)
    monkeypatch.setattr(run_module, "build_trainer", lambda *_: build())
    options = ("--synthetic", "--checkpoint-seconds", str(seconds), "--output", str(folder))
    config = parse_config(["digits", *options], "train")
    with Run.open(config, Ranks(), StopRequest(), Console(file=io.StringIO())) as run:
        trainer = run.build_trainer()
        assert trainer is not None
        for report in trainer.run(on_evaluation=run.checkpoint_if_due):
            clock.now += between if report.evaluation else 0
    return checkpoints.asked


@pytest.mark.parametrize(
    ("seconds", "between", "expected"),
    [
        (0, 0, SCORED),
        (60, 60, SCORED),
        # Their own time does not count: a disk that takes as long as that would be written to all the time.
        (60, 30, [SCORED[1], SCORED[3], SCORED[4]]),
        (60, 1, SCORED[-1:]),  # the last one, whatever the time
    ],
)
def test_checkpoints_are_that_far_apart(
    seconds: int, between: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved(tmp_path, monkeypatch, seconds, between=between) == expected


def test_after_a_failure_the_next_attempt_waits_as_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three failures end a run, which a full disk must not do within a second."""
    asked = saved(tmp_path, monkeypatch, 60, between=30, fails=(SCORED[1],))
    assert asked == [SCORED[1], SCORED[3], SCORED[4]]


@pytest.mark.parametrize(("hidden", "ends"), [(256, ", less with a smaller --hidden-dim"), (1, "")])
def test_a_run_says_how_large_its_network_and_its_checkpoints_are(hidden: int, ends: str, tmp_path: Path) -> None:
    rows, labels = clouds(40, 0, 0, [0, 1])
    np.savez(tmp_path / "s.npz", features=rows, labels=labels)
    places = {"source": "s.npz", "target": "s.npz", "data_root": tmp_path, "output": tmp_path / "run"}
    config = configure(
        "features", **places, steps=4, warmup=1, refresh_every=1, batch_size=4, bottleneck_dim=512, hidden_dim=hidden
    )
    written = io.StringIO()
    train(config, Console(file=written, width=200))
    told = re.search(
        r"network ([\d.]+) M parameters, gsda ([\d.]+) M .* takes about ([\d.]+) MiB(.*)", written.getvalue()
    )
    assert told is not None
    assert told[4] == ends
    assert float(told[1]) == round((6 * 512 + 512 + 512 * 2 + 2) / 1e6, 2)
    file = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda each: each.stat().st_size)
    assert float(told[3]) == pytest.approx(file.stat().st_size / 2**20, rel=0.1, abs=0.05)


def test_a_terminal_is_told_that_the_data_is_being_opened(tmp_path: Path) -> None:
    written = io.StringIO()
    config = configure("digits", synthetic=True, steps=1, warmup=0, batch_size=4, output=tmp_path / "run")
    train(config, Console(file=written, force_terminal=True))
    assert written.getvalue().index("opening the data") < written.getvalue().index("checkpoint takes")
