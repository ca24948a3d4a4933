import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from image_trees import class_tree
from rich.console import Console
from saved_run import saved_run

from gsda_fast import evaluate as command
from gsda_fast.commands import run_command
from gsda_fast.config import parse_config
from gsda_fast.data.pack import pack
from gsda_fast.errors import UsageError
from gsda_fast.evaluate import EvaluateSettings, evaluate
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.train import train
from gsda_fast.trained import for_evaluation

pytestmark = pytest.mark.filterwarnings("ignore:domain .* found .* images")


@pytest.fixture(scope="module")
def result(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    steps = ("--steps", "9", "--warmup", "3", "--refresh-every", "3", "--batch-size", "16")
    arguments = ["digits", "--data-root", str(few_digits), *steps, "--output", str(folder)]
    return folder, train(parse_config(arguments, "train"), Console(file=io.StringIO()))


def expected_size(folder: Path) -> int:
    stored = RunFolder(folder).read_predictions()
    assert stored is not None
    return len(stored.labels)


def test_the_newest_checkpoint_has_the_accuracy_of_the_result(result: tuple[Path, RunResult]) -> None:
    folder, expected = result
    scored: list[tuple[str, int, int]] = []
    step, figures, classes = evaluate(EvaluateSettings(folder), lambda *done: scored.append(done))
    assert step == 9
    assert scored[-1] == ("target", expected_size(folder), expected_size(folder))
    assert figures.accuracy == expected.accuracy.last
    assert figures.mean_per_class == expected.mean_per_class.last
    assert figures.per_class == expected.per_class
    assert classes == expected.classes


def test_an_older_checkpoint_has_the_accuracy_of_its_step(result: tuple[Path, RunResult]) -> None:
    folder, _ = result
    recorded = {line["step"]: line.get("accuracy") for line in RunFolder(folder).read_metrics()}
    step, figures, _ = evaluate(EvaluateSettings(folder, checkpoint=6))
    assert step == 6
    assert figures.accuracy == recorded[6]
    assert recorded[6] != recorded[9]


def test_evaluating_changes_nothing(result: tuple[Path, RunResult]) -> None:
    folder, _ = result
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    evaluate(EvaluateSettings(folder))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_command_prints_a_table(
    result: tuple[Path, RunResult], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = result
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder)])
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    assert end.value.code == 0
    written = capsys.readouterr().out
    assert written.splitlines()[0] == f"{folder}, after step 9"
    for name, value in [("overall", expected.accuracy.last), *zip(expected.classes, expected.per_class)]:
        (line,) = [line for line in written.splitlines() if line[1:].split("│")[0].strip() == name]
        assert f"{value:.2f} %" in line


def test_ten_crops_of_images_that_are_used_whole(result: tuple[Path, RunResult]) -> None:
    with pytest.raises(UsageError, match="--test-crops: found 10, for images that are used whole"):
        evaluate(EvaluateSettings(result[0], test_crops=10))


def test_a_run_of_a_gpu_is_evaluated_here(result: tuple[Path, RunResult], few_digits: Path, tmp_path: Path) -> None:
    """Its device, precision, backend, loader and optimizer cannot run on this machine, and its data lies elsewhere."""
    folder, expected = result
    shutil.copytree(folder / "checkpoints", tmp_path / "run" / "checkpoints")
    text = (folder / "config.toml").read_text()
    elsewhere = {
        'device = "cpu"': 'device = "cuda"',
        'backend = "torch"': 'backend = "triton"',
        'backend = "native"': 'backend = "triton"',
        'loader = "torch"': 'loader = "dali"',
        'optimizer = "auto"': 'optimizer = "apex"',
        'precision = "fp32"': 'precision = "fp16"',
        f'data_root = "{few_digits}"': 'data_root = "/of/another/machine"',
    }
    for here, there in elsewhere.items():
        text = text.replace(here, there)
    (tmp_path / "run" / "config.toml").write_text(text)
    assert sum(there in text for there in set(elsewhere.values())) == 6
    if not torch.cuda.is_available():
        _, figures, _ = evaluate(EvaluateSettings(tmp_path / "run", data_root=few_digits))
        assert figures.per_class == expected.per_class
        with pytest.raises(UsageError, match="--device: found cuda"):
            evaluate(EvaluateSettings(folder, device="cuda"))


def without_dali(few_digits: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setitem(sys.modules, "nvidia.dali", None)
    return few_digits


def from_a_pack(few_digits: Path, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    return pack("digits", data_root=few_digits, output=folder / "pack", workers=1)


@pytest.mark.parametrize("data", [without_dali, from_a_pack])
def test_a_run_with_dali_is_evaluated_where_dali_cannot_serve(
    data: Callable[[Path, Path, pytest.MonkeyPatch], Path],
    result: tuple[Path, RunResult],
    few_digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is of the same kind, and `evaluate` has no option to choose another loader."""
    folder, expected = result
    shutil.copytree(folder, tmp_path / "run")
    text = (folder / "config.toml").read_text().replace('loader = "torch"', 'loader = "dali"')
    assert 'loader = "dali"' in text
    (tmp_path / "run" / "config.toml").write_text(text)
    root = data(few_digits, tmp_path, monkeypatch)
    _, figures, _ = evaluate(EvaluateSettings(tmp_path / "run", device="cpu", data_root=root))
    assert figures.per_class == expected.per_class


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("loader", "here"), [("torch", "torch"), ("dali", "auto")])
def test_the_torch_loader_stays_on_every_device(
    device: Literal["cpu", "cuda"], loader: Literal["torch", "dali"], here: str
) -> None:
    config = parse_config(["digits"], "train")
    config = replace(config, run=replace(config.run, device=device), data=replace(config.data, loader=loader))
    assert for_evaluation(config, "cpu").data.loader == here


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_checkpoints_that_are_not_there_or_damaged(
    result: tuple[Path, RunResult], few_digits: Path, tmp_path: Path
) -> None:
    folder, _ = result
    with pytest.raises(UsageError, match="--checkpoint: found 5; expected one of 6, 9"):
        evaluate(EvaluateSettings(folder, checkpoint=5))
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "config.toml").write_bytes((folder / "config.toml").read_bytes())
    with pytest.raises(UsageError, match="found no checkpoint"):
        evaluate(EvaluateSettings(copy))
    file = copy / "checkpoints" / "step-00000009.pt"
    file.write_bytes((folder / "checkpoints" / "step-00000009.pt").read_bytes())
    damaged(file)
    with pytest.raises(UsageError, match=r"--checkpoint: found .*step-00000009\.pt.*; expected an undamaged file"):
        evaluate(EvaluateSettings(copy))


@pytest.fixture(scope="module")
def own_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on folders of the classes cat and dog."""
    root = tmp_path_factory.mktemp("own")
    for domain in ("drawn", "photo"):
        class_tree(root / "data" / domain, ("cat", "dog"), per_class=1)
    model = ("--backbone", "resnet18", "--weights", "none", "--bottleneck-dim", "8", "--hidden-dim", "8")
    domains = ("--source", "drawn", "--target", "photo", "--data-root", str(root / "data"))
    return saved_run(root / "run", "folder", *domains, *model)


@pytest.mark.parametrize(
    ("classes", "found", "expected"),
    [
        (("bird", "cat", "dog"), "3 with 'bird' as number 1", "2 with 'cat' as number 1"),
        (("cat", "dog", "zebra"), "3 with 'zebra' as number 3", "2 with none as number 3"),
        (("dog", "zebra"), "2 with 'dog' as number 1", "2 with 'cat' as number 1"),  # as many: the network would fit
    ],
)
def test_data_with_other_classes_are_refused(
    classes: tuple[str, ...], found: str, expected: str, own_classes: Path, tmp_path: Path
) -> None:
    for domain in ("drawn", "photo"):
        class_tree(tmp_path / domain, classes, per_class=1)
    with pytest.raises(UsageError) as error:
        evaluate(EvaluateSettings(own_classes, data_root=tmp_path))
    assert error.value.what == "classes"
    assert error.value.found == f"{found} in {tmp_path / 'drawn'}"
    assert error.value.expected == f"{expected}, as in {own_classes}"


def test_a_target_may_lack_classes_and_labels(own_classes: Path, tmp_path: Path) -> None:
    class_tree(tmp_path / "drawn", ("cat", "dog"), per_class=1)
    class_tree(tmp_path / "photo", ("dog",), per_class=1)
    _, figures, classes = evaluate(EvaluateSettings(own_classes, data_root=tmp_path))
    assert classes == ("cat", "dog")
    assert figures.per_class[0] is None
    (tmp_path / "photo" / "dog" / "frame_0001.jpg").rename(tmp_path / "photo" / "flat.jpg")
    (tmp_path / "photo" / "dog").rmdir()
    _, figures, _ = evaluate(EvaluateSettings(own_classes, data_root=tmp_path))
    assert figures.accuracy is None


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="expected the folder of a run"):
            evaluate(EvaluateSettings(folder))
