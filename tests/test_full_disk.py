"""A disk that runs full, as far as a process can make one for itself: the kernel refuses to let its files grow."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_train import Quick, outcome, run, signal_at

from gsda_fast.errors import TrainingError
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.checkpoint import CheckpointFolder

pytestmark = pytest.mark.filterwarnings("ignore:domain .* found .* images")


@pytest.fixture(scope="module")
def quick(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Quick:
    return Quick(few_digits, tmp_path_factory.mktemp("runs") / "quick")


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a write gets as far as that, the next one fails."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # as Python does
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_in(patch: pytest.MonkeyPatch, cls: type, method: str, when: Callable[..., int | None]) -> None:
    """Calls of a method find a full disk where `when` says at which size."""
    original = getattr(cls, method)

    def maybe_full(*arguments: Any, **kinds: Any) -> Any:
        size = when(*arguments)
        if size is None:
            return original(*arguments, **kinds)
        with files_end_at(size):
            return original(*arguments, **kinds)

    patch.setattr(cls, method, maybe_full)


def full_at(*steps: int) -> Callable[..., int | None]:
    return lambda folder, step, state: 10_000 if step in steps else None


@pytest.mark.parametrize("size", [0, 10_000])
def test_a_save_that_fails_leaves_what_there_was(size: int, quick: Quick, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    state = CheckpointFolder(quick.folder / "checkpoints").load(12)
    folder.save(1, {**state, "step": 1})
    with files_end_at(size), pytest.raises(OSError, match="File too large"):
        folder.save(2, {**state, "step": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001.pt"]
    folder.load(1)


def test_a_checkpoint_that_finds_no_room_is_told_and_the_run_goes_on(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    full_in(monkeypatch, CheckpointFolder, "save", full_at(7, 10))
    _, told = run(*quick.settings, "--output", str(folder))
    warnings = [line for line in told.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        f"warning: step {step}: no checkpoint could be written to {folder / 'checkpoints'} (File too large), the "
        "checkpoint of step 4 stays the last one; training goes on"
        for step in (7, 10)
    ]
    assert outcome(folder) == quick.outcome
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["step-00000004.pt", "step-00000012.pt"]


def test_the_third_in_a_row_ends_the_run_which_goes_on_when_there_is_room(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_in(patch, CheckpointFolder, "save", full_at(7, 10, 12))
        with pytest.raises(TrainingError) as error:
            run(*quick.settings, "--output", str(folder))
    assert str(error.value).startswith(f"step 12: no checkpoint could be written to {folder / 'checkpoints'} (File too")
    assert "the checkpoint of step 4 stays the last one, for the third time in a row; free some" in str(error.value)
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["step-00000004.pt"]
    _, told = run(*quick.settings, "--output", str(folder))
    assert "resuming after step 4" in told
    assert outcome(folder) == quick.outcome


def test_stopping_without_room_is_a_failure(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_in(patch, CheckpointFolder, "save", full_at(6))
        signal_at(patch, 5)
        with pytest.raises(TrainingError, match=r"stopped after step 6, but no checkpoint could be written .* step 4"):
            run(*quick.settings, "--output", str(folder))
    run(*quick.settings, "--output", str(folder))
    assert outcome(folder) == quick.outcome


@pytest.mark.parametrize("room", [0, 10])
def test_lines_of_metrics_wait_for_room(
    room: int, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def when(run_folder: RunFolder, step: int, values: Any) -> int | None:
        return run_folder.metrics_path.stat().st_size + room if step in (6, 10) else None

    full_in(monkeypatch, RunFolder, "append_metrics", when)
    _, told = run(*quick.settings, "--output", str(folder))
    warning = f"warning: {folder / 'metrics.jsonl'}: File too large; trying again with the next line"
    assert told.splitlines().count(warning) == 2
    assert outcome(folder) == quick.outcome


def test_a_checkpoint_waits_for_the_lines_before_it(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that goes on from it would never write them."""
    folder = tmp_path / "run"

    def when(run_folder: RunFolder) -> int | None:
        full = run_folder._last_step in (8, 10)
        return run_folder.metrics_path.stat().st_size + 10 if full else None

    with monkeypatch.context() as patch:
        full_in(patch, RunFolder, "_write_lines", when)
        _, told = run(*quick.settings, "--output", str(folder))
    assert "step 10: no checkpoint could be written" in told
    assert outcome(folder) == quick.outcome
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["step-00000007.pt", "step-00000012.pt"]


@pytest.mark.parametrize("method", ["write_config", "write_predictions", "write_result"])
def test_a_run_without_room_for_its_other_files_ends_with_one_line_and_goes_on(
    method: str, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_in(patch, RunFolder, method, lambda *_: 10)
        with pytest.raises(
            TrainingError, match=r"cannot be written \(File too large\); free some space, then the same"
        ):
            run(*quick.settings, "--output", str(folder))
    assert not list(folder.rglob("*.tmp"))
    _, told = run(*quick.settings, "--output", str(folder))
    assert ("resuming after step 12" in told) == (method != "write_config")
    assert outcome(folder) == quick.outcome


def test_features_without_room_keep_the_checkpoint_waiting(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "run", []

    def when(*_: Any) -> int | None:
        calls.append(1)
        return 10_000 if len(calls) == 1 else None

    full_in(monkeypatch, RunFolder, "write_features", when)
    _, told = run(*quick.settings, "--output", str(folder))
    assert "step 4: no checkpoint could be written" in told
    assert "there is none before it" in told
    assert outcome(folder) == quick.outcome


def test_tensorboard_without_room_is_no_matter(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for method in ("add_scalar", "close", "__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(SummaryWriter, method, full)
            run(*quick.settings, "--output", str(tmp_path / method))
        assert outcome(tmp_path / method) == quick.outcome
