"""The task `features`, end to end: training, resuming, two ranks, predicting, exporting, and what does not fit."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from rich.console import Console
from torch.testing import assert_close

from gsda_fast import embed as command
from gsda_fast import predict as prediction
from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import Config, parse_config
from gsda_fast.errors import UsageError
from gsda_fast.export import ExportSettings, export
from gsda_fast.methods import METHODS
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.train import train
from gsda_fast.trained import load_trained

DIM, CLASSES, COUNT = 12, 3, 60


def write(path: Path, seed: int, shift: float, *, views: int = 1, labelled: bool = True, dim: int = DIM) -> None:
    """Clusters around three centres that all files share, moved by `shift`."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, dim)) * 3
    numbers = np.random.default_rng(seed)
    labels = np.arange(COUNT) % CLASSES
    features = centres[labels] + numbers.normal(size=(views, COUNT, dim)) + shift
    arrays = {"labels": np.array(["ant", "bee", "cow"])[labels]} if labelled else {}
    np.savez(path, features=features.astype(np.float16), **arrays)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.npz", 1, 0.0)
    write(tmp_path / "b.npz", 2, 0.6)
    return tmp_path


def config(*options: str, source: str = "a.npz", target: str = "b.npz") -> Config:
    small = ("--steps", "12", "--warmup", "4", "--batch-size", "9", "--refresh-every", "4", "--log-every", "4")
    rest = ("--bottleneck-dim", "48", "--threads", "1", "--checkpoint-seconds", "0", "--device", "cpu")
    return parse_config(["features", "--source", source, "--target", target, *options, *small, *rest], "train")


def metrics(run: Path) -> list[dict[str, Any]]:
    timed = ("images_per_second", "data_wait", "seconds")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_features(folder: Path, method: str) -> None:
    result = train(config("--method", method))
    assert result.accuracy.best is not None
    if method in ("source-only", "dann", "gsda"):
        assert result.accuracy.best > 60  # chance is a third; the clusters are far apart
    assert result.classes == ("ant", "bee", "cow")
    run = folder / "runs" / f"features-a.npz-b.npz-{method}-seed0"
    assert RunFolder(run).read_config()["model"]["input_dim"] == DIM
    trained = load_trained(run)
    rows = torch.from_numpy(np.load(folder / "b.npz")["features"][0]).float()
    with torch.no_grad():
        probabilities = trained.model(rows).logits.softmax(1).numpy()
    np.testing.assert_allclose(probabilities, np.load(run / "predictions.npz")["probabilities"], rtol=1e-4, atol=1e-5)


def test_a_target_without_labels_trains(folder: Path) -> None:
    write(folder / "c.npz", 3, 0.6, labelled=False)
    result = train(config(target="c.npz"))
    assert result.accuracy.last is None


def test_stored_views_take_part_in_training(folder: Path) -> None:
    write(folder / "many.npz", 1, 0.0, views=3)
    for source in ("a.npz", "many.npz"):
        train(config(source=source))
    losses = [
        [line["classification"] for line in metrics(folder / "runs" / f"features-{name}.npz-b.npz-gsda-seed0")]
        for name in ("a", "many")
    ]
    assert losses[0] != losses[1]


def test_a_resumed_run_is_the_same_run(folder: Path) -> None:
    train(config("--output", "whole"))
    stopped = config("--output", "parts")
    source_config, source, target = resolve(stopped)
    trainer = build_trainer(source_config, source, target)
    reports = trainer.run(lambda: None)
    for report in reports:
        if report.step == 8:
            break
    state = trainer.state_dict()
    again = build_trainer(source_config, source, target)
    again.load_state_dict(state)
    for _ in again.run(lambda: None):
        pass
    whole = load_trained(folder / "whole").model.state_dict()
    assert_close(dict(again.method.model.state_dict()), dict(whole), rtol=0, atol=0)


def test_a_file_that_was_replaced_is_named(folder: Path) -> None:
    train(config("--output", "run"))
    (folder / "run" / "result.json").unlink()
    write(folder / "b.npz", 9, 0.6)
    with pytest.raises(UsageError, match=r"--target: found .*rows of features with digest"):
        train(config("--output", "run"))


def test_predictions_of_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config("--output", "run"))
    write(folder / "c.npz", 4, 0.6, labelled=False)
    monkeypatch.setattr(sys, "argv", ["predict", "run", "c.npz"])
    assert prediction.main() == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == [f"row {number}" for number in range(COUNT)]
    right = [row["predicted_class"] == ("ant", "bee", "cow")[number % CLASSES] for number, row in enumerate(rows)]
    assert np.mean(right) > 0.6
    write(folder / "d.npz", 4, 0.6, dim=5)
    monkeypatch.setattr(sys, "argv", ["predict", "run", "d.npz"])
    with pytest.raises(UsageError, match=r"d\.npz: found features of 5 numbers; expected 12"):
        prediction.main()


def test_an_exported_program_takes_rows(folder: Path) -> None:
    train(config("--output", "run", "--hidden", "16"))
    weights, program = export(ExportSettings(Path("run")))
    with safetensors.safe_open(weights, "pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
    assert (facts["backbone"], facts["input_dim"], facts["feature_norm"], facts["hidden"]) == (
        "features",
        DIM,
        "rms",
        16,
    )
    rows = torch.randn(5, DIM)
    network = torch.export.load(program).module()
    with torch.no_grad():
        expected = load_trained(Path("run")).model(rows)
    assert_close(network(rows), tuple(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backbone", "resnet50"), "--backbone: found resnet50; expected features"),
        (("--input-dim", "7"), "--input-dim: found 7; expected 12"),
        (("--weights", "IMAGENET1K_V1"), "--weights: found IMAGENET1K_V1; expected none"),
        (("--loader", "dali"), "--loader: found dali.*(with features|--cache-on-device)"),
        (("--synthetic",), "--synthetic: found the task features"),
        (("--test-crops", "10"), "--test-crops: found 10"),
    ],
)
def test_options_that_make_no_sense_here(folder: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(config(*options), Console(quiet=True))
    assert not (folder / "runs").exists()


def test_files_of_different_sizes(folder: Path) -> None:
    write(folder / "wide.npz", 1, 0.0, dim=DIM + 1)
    with pytest.raises(UsageError, match=r"--target: found wide\.npz, whose features have 13 numbers; expected 12"):
        train(config(target="wide.npz"))


def test_features_of_a_task_in_one_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train pictures --features`: the backbone's features are computed, and the arguments are those of their task."""
    asked: list[command.EmbedSettings] = []
    monkeypatch.setattr(command, "embed", lambda settings, progress: asked.append(settings))
    arguments = ["pictures", "--method", "dann", "--features", "--data-root", "there", "--steps", "5"]
    console = Console(quiet=True)
    expected = ["pictures-features", "--method", "dann", "--steps", "5"]
    assert command.with_features(arguments, console) == expected
    assert asked == [command.EmbedSettings("pictures", data_root=Path("there"))]
    assert command.with_features(["digits", "--steps", "5"], console) == ["digits", "--steps", "5"]
    with pytest.raises(UsageError, match="--features: found the task digits; expected pictures"):
        command.with_features(["digits", "--features"], console)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"found 2 processes.*`python -m gsda_fast\.embed pictures`"):
        command.with_features(["pictures", "--features"], console)
    assert len(asked) == 1
