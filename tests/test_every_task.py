"""Every task trains a few steps on a small tree in its own layout, with both loaders, which see the same samples."""

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from benchmark_trees import TASKS
from rich.console import Console
from same_state import differences

from gsda_fast import assemble
from gsda_fast.config import parse_config, preset
from gsda_fast.data.batches import Batch, Loader
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.loaders import open_loader
from gsda_fast.data.pack import pack
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.errors import FileWarning, UsageError, UsageWarning
from gsda_fast.evaluate import EvaluateSettings, evaluate
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.train import train
from gsda_fast.trained import load_trained
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.update import StepOutcome

pytestmark = [
    pytest.mark.skipif(find_spec("nvidia") is None or find_spec("nvidia.dali") is None, reason="DALI is not installed"),
    pytest.mark.filterwarnings("ignore:domain .* published"),
]

SampleIds = list[tuple[list[int], list[int]]]


class Recorder:
    """A loader that notes which samples it gave, and may stop before a step as if the process had been ended."""

    def __init__(self, loader: Loader, seen: SampleIds, stop_at: int | None) -> None:
        self._loader, self._seen, self._stop_at = loader, seen, stop_at

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        for step, batch in zip(steps, self._loader.train(plan, steps, rank)):
            if step == self._stop_at:
                raise KeyboardInterrupt
            self._seen.append((batch.source_index.tolist(), batch.target_index.tolist()))
            yield batch


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 32x32 pixels instead of 224x224, for the time's sake."""
    for task in TASKS:
        benchmark = BENCHMARKS[task]
        preprocessing = replace(benchmark.preprocessing, resize=40, crop=32)
        monkeypatch.setitem(BENCHMARKS, task, replace(benchmark, preprocessing=preprocessing))


@pytest.fixture
def run(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SampleIds]:
    """Trains; returns the samples seen."""

    # Nothing is as sure as 1, so all of the target trains: pixels that differ by a level could change pseudo-labels.
    def trained(
        task: str,
        loader: str,
        *options: str,
        output: str = "",
        stop_at: int | None = None,
        threshold: str = "1",
        root: Path | None = None,
        told: io.StringIO | None = None,
    ) -> SampleIds:
        seen: SampleIds = []
        _, source, target = TASKS[task]
        monkeypatch.setattr(
            assemble, "open_loader", lambda *args, **kinds: Recorder(open_loader(*args, **kinds), seen, stop_at)
        )
        arguments = [task, "--source", source, "--target", target, "--data-root", str(root or tmp_path / task)]
        arguments += ["--loader", loader, "--workers", "1", "--output", str(tmp_path / (output or f"run-{loader}"))]
        arguments += ["--steps", "4", "--batch-size", "6", "--refresh-every", "2", "--confidence-threshold", threshold]
        arguments += [
            "--backbone",
            "shufflenet_v2_x0_5",
            "--weights",
            "none",
            "--bottleneck-dim",
            "8",
            "--hidden-dim",
            "8",
        ]
        arguments += [
            "--learning-rate",
            "0.001",
            "--device",
            "cpu",
            "--log-every",
            "1",
            "--checkpoint-seconds",
            "0",
            *options,
        ]
        train(parse_config(arguments, "train"), Console(file=told or io.StringIO()))
        return seen

    return trained


@pytest.mark.parametrize("task", TASKS)
def test_task_trains_with_both_loaders_on_the_same_samples(
    task: str, run: Callable[..., SampleIds], tmp_path: Path
) -> None:
    TASKS[task][0](tmp_path / task)
    ids = {loader: run(task, loader) for loader in ("dali", "torch")}
    assert ids["dali"] == ids["torch"]
    assert len(ids["dali"]) == 4
    for loader in ids:
        folder = RunFolder.existing(tmp_path / f"run-{loader}")
        assert folder.read_config()["data"]["loader"] == loader
        result = folder.read_result()
        assert result is not None
        assert result.steps == 4


def predictions(folder: Path) -> np.ndarray:
    with np.load(folder / "predictions.npz") as content:
        return np.concatenate([content[name].reshape(-1).astype(np.float64) for name in sorted(content)])


def test_resumed_run_is_the_same_run_with_dali(run: Callable[..., SampleIds], tmp_path: Path) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    whole = run("folder", "dali", output="whole", threshold="0")
    with pytest.raises(KeyboardInterrupt):
        run("folder", "dali", output="broken", stop_at=3, threshold="0")
    # After the scoring at step 2, in the middle of an epoch of the source.
    assert run("folder", "dali", output="broken", threshold="0") == whole[2:]
    np.testing.assert_array_equal(predictions(tmp_path / "whole"), predictions(tmp_path / "broken"))


def test_resuming_with_another_loader_or_other_data_is_refused(run: Callable[..., SampleIds], tmp_path: Path) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    with pytest.raises(KeyboardInterrupt):
        run("folder", "dali", output="run", stop_at=3)
    with pytest.raises(UsageError, match=r"with other settings \(data.loader = dali there and torch here\)"):
        run("folder", "torch", output="run")
    with pytest.raises(UsageError, match=r"data.loader = dali there and torch here"):
        run("folder", "auto", output="run")
    packed = pack("folder", "photos", "sketches", tmp_path / "folder", output=tmp_path / "pack")
    with pytest.raises(UsageError, match=rf"data.data_root = .*folder there and {packed} here"):
        run("folder", "auto", output="run", root=packed)


def test_a_run_whose_images_lie_at_another_place_goes_on(run: Callable[..., SampleIds], tmp_path: Path) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    whole = run("folder", "torch", output="whole", threshold="0")
    with pytest.raises(KeyboardInterrupt):
        run("folder", "torch", output="broken", stop_at=3, threshold="0")
    moved = tmp_path / "of the next job"
    (tmp_path / "folder").rename(moved)
    image = next(path for path in sorted((moved / "photos").rglob("*")) if path.is_file())
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    with pytest.raises(UsageError, match=r"with other settings \(data.data_root = .*folder there and .*next job here"):
        run("folder", "torch", output="broken", threshold="0", root=moved)
    image.write_bytes(content)
    assert run("folder", "torch", output="broken", threshold="0", root=moved) == whole[2:]
    np.testing.assert_array_equal(predictions(tmp_path / "whole"), predictions(tmp_path / "broken"))
    assert RunFolder(tmp_path / "broken").setting("data_root") == str(moved)


def test_pack_behind_the_environment_variable_is_other_data_too(
    run: Callable[..., SampleIds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    packed = pack("folder", "photos", "sketches", tmp_path / "folder", output=tmp_path / "pack")
    arguments = ["folder", "--source", "photos", "--target", "sketches", "--output", str(tmp_path / "run")]
    configs = []
    for root in (tmp_path / "folder", packed):
        monkeypatch.setenv("GSDA_DATA", str(root))
        configs.append(assemble.resolve(parse_config(arguments, "train"))[0])
    assert [config.data.data_root for config in configs] == [None, packed]


def test_training_from_a_pack_sees_the_same_samples(run: Callable[..., SampleIds], tmp_path: Path) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    packed = pack("folder", "photos", "sketches", tmp_path / "folder", output=tmp_path / "pack")
    raw = run("folder", "torch")
    assert run("folder", "auto", output="packed", root=packed) == raw
    assert run("folder", "auto", "--cache-on-device", output="cached", root=packed) == raw


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_ten_crops_change_the_figures_and_nothing_that_trains(
    run: Callable[..., SampleIds], tmp_path: Path, loader: str
) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    ids = [
        # A network whose first features depend on the crop beyond rounding.
        run("folder", loader, "--test-crops", crops, "--backbone", "resnet18", output=f"{crops} crops", threshold="0")
        for crops in ("1", "10")
    ]
    assert ids[0] == ids[1]
    folders = [RunFolder(tmp_path / f"{crops} crops") for crops in (1, 10)]
    states = [CheckpointFolder(folder.checkpoints).load(4) for folder in folders]
    for part in ("method", "optimizers", "target_table"):
        assert differences(states[0][part], states[1][part]) == []
    results = [folder.read_result() for folder in folders]
    assert [result.test_crops for result in results if result is not None] == [1, 10]
    kept = [predictions(folder.path) for folder in folders]
    assert np.abs(kept[0] - kept[1]).max() > 1e-4

    # An evaluation of the one run as the other was tested gives the other's figures.
    for folder, crops, expected in ((folders[0], 10, results[1]), (folders[1], None, results[1])):
        _, figures, _ = evaluate(EvaluateSettings(folder.path, test_crops=crops))
        assert expected is not None
        assert (figures.accuracy, figures.per_class) == (expected.accuracy.last, expected.per_class)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_smaller_images_are_those_of_training_and_of_testing(
    run: Callable[..., SampleIds], tmp_path: Path, loader: str
) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    run("folder", loader, "--crop", "16")
    folder = RunFolder(tmp_path / f"run-{loader}")
    trained = load_trained(folder.path)
    assert (trained.preprocessing.crop, trained.preprocessing.resize) == (16, 20)  # of 32 and 40
    trainer = assemble.build_trainer(*assemble.resolve(trained.config))
    batch = next(trainer.loader.train(trainer.plan, range(1)))
    assert batch.source_images.shape == batch.target_images.shape == (6, 3, 16, 16)
    trainer.loader.close()
    _, figures, _ = evaluate(EvaluateSettings(folder.path))
    result = folder.read_result()
    assert result is not None
    assert figures.accuracy == result.accuracy.last


@pytest.mark.parametrize(
    ("task", "found"), [("digits", "24, for lenet"), ("features", "24, for features"), ("digits", "8, for lenet")]
)
def test_a_network_of_one_size_refuses_another(task: str, found: str) -> None:
    config = preset(task)
    crop = int(found.split(",")[0])
    with pytest.raises(UsageError, match=f"--crop: found {found}; expected 0: it takes inputs of one size"):
        assemble.preprocessing_of(replace(config, data=replace(config.data, crop=crop)))


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.filterwarnings("ignore:.*no such file any more; another sample of its class")
def test_folder_that_vanishes_in_mid_run_is_named_and_nothing_is_lost(
    run: Callable[..., SampleIds], tmp_path: Path, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    whole = run("folder", loader, output="whole")
    vanishing, gone = tmp_path / "folder" / "photos" / "cat", tmp_path / "gone"
    train_step = assemble.Trainer._train_step

    def lose_the_folder(trainer: assemble.Trainer, step: int, batch: Batch) -> StepOutcome:
        if step == 1:
            vanishing.rename(gone)
        return train_step(trainer, step, batch)

    monkeypatch.setattr(assemble.Trainer, "_train_step", lose_the_folder)
    with pytest.raises(UsageError, match=r"photos: found no readable image of the class of .*cat/frame_000\d.jpg"):
        run("folder", loader, output="broken")
    monkeypatch.setattr(assemble.Trainer, "_train_step", train_step)
    gone.rename(vanishing)
    assert run("folder", loader, output="broken") == whole[2:]
    np.testing.assert_array_equal(predictions(tmp_path / "whole"), predictions(tmp_path / "broken"))


def test_files_are_looked_at_before_the_training(run: Callable[..., SampleIds], tmp_path: Path) -> None:
    TASKS["folder"][0](tmp_path / "folder")
    bad = tmp_path / "folder" / "photos" / "dog" / "frame_0003.jpg"
    shutil.copy(bad, tmp_path / "good.jpg")
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(UsageError, match=rf"data: found 1 unreadable files: {bad} \(.*truncated"):
        run("folder", "torch")
    assert not (tmp_path / "run-torch" / "checkpoints").exists()
    with pytest.warns(FileWarning, match=rf"{bad}: .*truncated.*; another sample of its class takes its place"):
        assert len(run("folder", "torch", "--no-verify")) == 4
    (tmp_path / "bad.txt").write_text(f"{bad}\n")
    seen = run("folder", "torch", "--quarantine", str(tmp_path / "bad.txt"), output="rest")
    assert max(sample for source, _ in seen for sample in source) <= 10


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_files_that_fail_on_the_way_are_counted_and_named_at_the_end(
    run: Callable[..., SampleIds], tmp_path: Path, loader: str
) -> None:
    """Also those of before an interruption, which are mended since, and those of an evaluation."""
    TASKS["folder"][0](tmp_path / "folder")
    mended = tmp_path / "folder" / "photos" / "dog" / "frame_0003.jpg"
    sound = mended.read_bytes()
    mended.write_bytes(b"\0" * len(sound))  # of the same size, since the run would be refused
    with pytest.warns(FileWarning, match="another sample of its class"), pytest.raises(KeyboardInterrupt):
        run("folder", loader, "--no-verify", output="run", stop_at=3)
    mended.write_bytes(sound)
    bad = min((tmp_path / "folder" / "sketches").rglob("*.png"))
    good = bad.read_bytes()
    bad.write_bytes(good[:-20] + bytes(20))
    told = io.StringIO()
    with pytest.warns(FileWarning, match=f"{bad}: a .* PNG"):
        run("folder", loader, "--no-verify", output="run", told=told)
    line = " ".join(told.getvalue().split("warning: 2 files")[1].split())
    name = bad.relative_to(tmp_path / "folder" / "sketches")
    first, second = line.split("; ")[:2]
    assert first.startswith("could not be read, and others took their places: photos: dog/frame_0003.jpg (")
    assert second.startswith(f"sketches: {name} (a ")
    folder = RunFolder(tmp_path / "run")
    result = folder.read_result()
    assert result is not None
    assert result.unreadable_files == 2
    with pytest.warns(UsageWarning) as warned:
        evaluate(EvaluateSettings(folder.path))
    lines = [str(each.message) for each in warned if issubclass(each.category, UsageWarning)]
    assert [line.startswith(f"{bad}: a ") for line in lines] == [True, False]
    assert lines[0].endswith("its place, in an evaluation an image of the mean colour")
    assert lines[1].startswith(f"1 of {len(result_labels(folder))} files could not be read")


def result_labels(folder: RunFolder) -> np.ndarray:
    found = folder.read_predictions()
    assert found is not None
    return found.labels
