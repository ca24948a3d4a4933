"""kill -9 at any step and at any point inside a save, then the same command again: the same run, bit for bit."""

import json
import shutil
import signal
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_runs import Order, run
from same_state import differences

from gsda_fast.training.checkpoint import CheckpointFolder

STEPS = ("--steps", "8", "--warmup", "2", "--refresh-every", "2", "--log-every", "1", "--batch-size", "8")
TIMES = ("seconds", "images_per_second", "data_wait", "training_seconds")


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves behind, the whole state after its last step included, but for times and rates."""

    def timeless(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in TIMES}

    state, damage = CheckpointFolder(folder / "checkpoints").load_newest()
    assert state is not None
    assert damage == []
    config = tomllib.loads((folder / "config.toml").read_text())
    del config["run"]["output"]
    return {
        "files": sorted(file.name for file in folder.iterdir()),
        "checkpoints": sorted(file.name for file in (folder / "checkpoints").iterdir()),
        "state": timeless(state),
        "metrics": [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "result": timeless(json.loads((folder / "result.json").read_text())),
        "predictions": dict(np.load(folder / "predictions.npz")),
        "features": dict(np.load(folder / "features.npz")),
        "config": config,
    }


class Runs:
    """Runs in processes of their own, and one that nobody killed."""

    def __init__(self, few_digits: Path, folder: Path) -> None:
        self.arguments = ["digits", *STEPS, "--data-root", str(few_digits)]
        self.folder = folder
        log = folder / "moments.txt"
        (code,) = self.run([self.order("whole", log=str(log))])
        assert code == 0
        self.moments = log.read_text().splitlines()
        self.expected = outcome(folder / "whole")

    def order(self, name: str, kill_at: int = 0, log: str = "") -> Order:
        return Order(self.arguments, str(self.folder / name), kill_at, log)

    def run(self, orders: list[Order]) -> list[int]:
        """Exit codes, one for each."""
        codes = [run(order) for order in orders]
        assert 1 not in codes, "see the standard error"
        return codes

    def wrong(self, moments: list[int], kills: int = 1) -> dict[str, list[str]]:
        """Which runs came to another end after a kill at these moments (and again, at as many after each start).

        Args:
            moments: counted from 0. kills: in a row, each at the same number of moments after the start.
        """
        names = {moment: f"killed-{moment}-{kills}" for moment in moments}
        orders = [
            order
            for moment, name in names.items()
            for order in [self.order(name, moment + 1)] * kills + [self.order(name)]
        ]
        codes = self.run(orders)
        found = {}
        for place, (moment, name) in enumerate(names.items()):
            first, *_, last = codes[place * (kills + 1) : (place + 1) * (kills + 1)]
            assert (first, last) == (-signal.SIGKILL, 0), (self.moments[moment], codes)
            different = differences(outcome(self.folder / name), self.expected)
            if different:
                found[f"{moment}: {self.moments[moment]}"] = different
            shutil.rmtree(self.folder / name)
        return found


@pytest.fixture(scope="module")
def runs(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(few_digits, tmp_path_factory.mktemp("killed"))


def test_the_moments_are_those_of_a_whole_run(runs: Runs) -> None:
    kinds = {moment.partition(" ")[0] for moment in runs.moments}
    assert kinds == {"mkdir", "open", "write", "flush", "close", "fsync", "replace", "unlink", "step"}
    assert [moment for moment in runs.moments if moment.startswith("step")] == [f"step {n}" for n in range(1, 9)]
    saves = [moment for moment in runs.moments if moment.startswith("replace .step-")]
    assert saves == [f"replace .step-0000000{n}.pt.tmp" for n in (2, 4, 6, 8)]


def of_third_save(moments: list[str]) -> list[int]:
    """From the report before it to the report after it."""
    return list(range(moments.index("step 6"), moments.index("step 7") + 1))


def some(runs: Runs) -> list[int]:
    """One moment of each kind in a save, the step before, and the removal of the oldest in the last save of all."""
    chosen: dict[str, int] = {}
    for moment in of_third_save(runs.moments):
        chosen.setdefault(runs.moments[moment], moment)
    return [*chosen.values(), runs.moments.index("unlink step-00000004.pt")]


@pytest.mark.filterwarnings("ignore:domain .* found .* images")
def test_a_run_killed_at_a_moment_of_each_kind_ends_as_if_it_had_not_been(runs: Runs) -> None:
    chosen = some(runs)
    assert 8 <= len(chosen) <= 20
    assert runs.wrong(chosen) == {}


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(runs: Runs) -> None:
    """Every step, every point inside one save, and whatever else a run does to its files but for single writes."""
    in_save = set(of_third_save(runs.moments))
    assert len(in_save) > 50
    everything = [m for m, name in enumerate(runs.moments) if m in in_save or not name.startswith("write")]
    assert runs.wrong(everything) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 3])
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(runs: Runs, kills: int) -> None:
    """Each start gets as far as the one before, or to its end: with luck one checkpoint further."""
    after_a_save = [m for m, name in enumerate(runs.moments) if name.startswith("step")][2:]
    assert runs.wrong(after_a_save, kills) == {}


def test_the_comparison_would_notice_a_checkpoint_that_is_not_the_whole_truth(runs: Runs) -> None:
    order = runs.order("forgetful", 1 + runs.moments.index("step 7"))
    assert runs.run([order]) == [-signal.SIGKILL]
    checkpoints = CheckpointFolder(Path(order.output) / "checkpoints")
    state, _ = checkpoints.load_newest()
    assert state is not None
    checkpoints.save(state["step"], {**state, "images_seen": 0})
    assert runs.run([runs.order("forgetful")]) == [0]
    assert differences(outcome(Path(order.output)), runs.expected) == ["state.state.images_seen"]
