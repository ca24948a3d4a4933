import csv
import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import class_tree, natural_image, save, save_turned
from PIL import Image
from rich.console import Console
from saved_run import saved_run
from torchvision.transforms.v2 import functional as transforms

from gsda_fast import predict as command
from gsda_fast.commands import run_command
from gsda_fast.config import parse_config
from gsda_fast.data.domains import open_images
from gsda_fast.data.torch_loader import read_resized
from gsda_fast.predict import predict
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.train import train
from gsda_fast.trained import load_trained

pytestmark = pytest.mark.filterwarnings("ignore:domain .* found .* images")


@pytest.fixture(scope="module")
def digits(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    steps = ("--steps", "6", "--warmup", "0", "--refresh-every", "3", "--batch-size", "8")
    arguments = ["digits", "--data-root", str(few_digits), *steps, "--output", str(folder)]
    train(parse_config(arguments, "train"), Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def own_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interrupted run on a data set that is gone: only the run knows the classes."""
    root = tmp_path_factory.mktemp("own")
    classes = ("old town", "bicycle")
    class_tree(root / "data" / "drawn", classes)
    class_tree(root / "data" / "photo", classes)
    model = ("--backbone", "resnet18", "--weights", "none", "--bottleneck-dim", "8", "--hidden-dim", "8")
    domains = ("--source", "drawn", "--target", "photo", "--data-root", str(root / "data"))
    saved_run(root / "run", "folder", *domains, *model)
    shutil.rmtree(root / "data")
    return root / "run"


class Called:
    """Exit code, rows, and what was told of the command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["predict", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                run_command(command.main)
        written = capsys.readouterr()
        self.code, self.out, self.told = end.value.code, written.out, written.err
        self.rows = list(csv.DictReader(io.StringIO(written.out)))


def probabilities(rows: list[dict[str, str]], classes: list[str]) -> np.ndarray:
    return np.array([[float(row[name]) for name in classes] for row in rows])


def test_the_target_gets_the_probabilities_of_the_runs_own_evaluation(
    digits: Path, few_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = few_digits / "optdigits"
    called = Called(capsys, digits, target)
    assert called.code == 0
    assert [row["file"] for row in called.rows] == sorted(str(f.relative_to(target)) for f in target.rglob("*.png"))
    expected = RunFolder(digits).read_predictions()
    assert expected is not None
    found = probabilities(called.rows, list("0123456789"))
    np.testing.assert_allclose(found, expected.probabilities, rtol=2e-5, atol=1e-9)
    assert [row["predicted_class"] for row in called.rows] == [str(label) for label in found.argmax(1)]
    assert [float(row["confidence"]) for row in called.rows] == found.max(1).tolist()
    assert len({row["predicted_class"] for row in called.rows}) > 1


def test_an_older_checkpoint_and_small_batches(
    digits: Path, few_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = few_digits / "optdigits"
    newest, older = (Called(capsys, digits, folder, "--checkpoint", step).out for step in (6, 3))
    assert newest != older
    names = list("0123456789")
    one_by_one = Called(capsys, digits, folder, "--checkpoint", 3, "--batch-size", 7).rows
    whole = list(csv.DictReader(io.StringIO(older)))
    np.testing.assert_allclose(probabilities(one_by_one, names), probabilities(whole, names), rtol=1e-4)


def test_any_size_and_format_anywhere_below_the_folder_without_the_data_set(
    own_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "deep" / "down" / "wide, with comma.JPG", width=90, height=20)
    save(tmp_path / "images" / "small.bmp", width=7, height=9)
    save(tmp_path / "images" / "paletted.gif", seed=1)
    Image.fromarray(np.full((12, 30), 40000, np.uint16)).save(tmp_path / "images" / "grey16.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    called = Called(capsys, own_classes, tmp_path / "images", "--output", tmp_path / "found.csv")
    assert (called.code, called.out, called.told) == (0, "", "")
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["deep/down/wide, with comma.JPG", "grey16.png", "paletted.gif", "small.bmp"]
    assert [row["file"] for row in rows] == names
    assert list(rows[0]) == ["file", "predicted_class", "confidence", "bicycle", "old town"]
    np.testing.assert_allclose(probabilities(rows, ["bicycle", "old town"]).sum(1), 1, rtol=1e-5)


def test_photos_are_turned_as_in_the_run(own_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1, 9):
        path = tmp_path / "photos" / f"{number}.webp"
        path.parent.mkdir(exist_ok=True)
        save_turned(path, natural_image(4, 90, 60), number, lossless=True)
    found = probabilities(Called(capsys, own_classes, tmp_path / "photos").rows, ["bicycle", "old town"])
    assert (found == found[0]).all()  # the same pixels, however the camera was held
    one = Called(capsys, own_classes, tmp_path / "photos" / "6.webp").rows
    assert (probabilities(one, ["bicycle", "old town"]) == found[0]).all()

    older = tmp_path / "older"
    shutil.copytree(own_classes, older)
    settings = (older / "config.toml").read_text()
    (older / "config.toml").write_text(settings.replace('orientation = "exif"', 'orientation = "stored"'))
    stored = probabilities(Called(capsys, older, tmp_path / "photos").rows, ["bicycle", "old town"])
    assert len({tuple(row) for row in stored.tolist()}) == 8
    assert (stored[0] == found[0]).all()


def test_ten_crops_where_the_run_is_tested_so(own_classes: Path, tmp_path: Path) -> None:
    save(tmp_path / "images" / "wide.jpg", width=90, height=20)
    trained = load_trained(own_classes)
    images = open_images(tmp_path / "images", trained.classes)
    ((_, centre),) = predict(trained, images)
    frame = read_resized(images, 0, trained.preprocessing)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (trained.preprocessing.mean, trained.preprocessing.std))
    batch = torch.stack([(crop / 255 - mean) / std for crop in transforms.ten_crop(frame, [224, 224])])
    with torch.no_grad():
        expected = trained.model(batch).logits.softmax(1).mean(0)
    config = replace(trained.config, data=replace(trained.config.data, test_crops=10))
    ((_, ten),) = predict(replace(trained, config=config), images)
    torch.testing.assert_close(ten, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(centre, expected, rtol=1e-4, atol=1e-6)


def test_colour_images_of_any_size_go_into_a_run_of_grey_ones(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).convert("RGB").save(tmp_path / "b.png")
    Image.fromarray(grey).resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "c.png")
    rows = Called(capsys, digits, tmp_path).rows
    found = probabilities(rows, list("0123456789"))
    np.testing.assert_allclose(found[1], found[0], rtol=0.05, atol=0.01)
    assert found.shape == (3, 10)


def test_unreadable_files_are_named_and_left_out(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes(good.read_bytes()[:-30])
    (tmp_path / "text.jpg").write_text("no image")
    called = Called(capsys, digits, tmp_path, "--output", tmp_path / "found.csv")
    assert called.code == 1
    torn, text = sorted(called.told.splitlines(), reverse=True)
    assert torn.startswith(f"warning: {tmp_path / 'torn.png'}: a truncated PNG")
    assert text.startswith(f"warning: {tmp_path / 'text.jpg'}: 8 bytes that are no image")
    assert [line.split(",")[0] for line in (tmp_path / "found.csv").read_text().splitlines()] == ["file", "good.png"]
    good.unlink()
    assert Called(capsys, digits, tmp_path).code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("RUN", "missing"), "missing: found nothing; expected a folder of images"),
        (("RUN", "EMPTY"), "EMPTY: found no image; expected at least one file"),
        (("EMPTY", "IMAGES"), "expected the folder of a run"),
        (("RUN", "IMAGES", "--checkpoint", "4"), "--checkpoint: found 4; expected one of 3, 6"),
        (("RUN", "IMAGES", "--batch-size", "0"), "--batch-size: found 0; expected a whole number >= 1"),
        (("RUN", "IMAGES", "--output", "missing/a.csv"), "--output: found missing/a.csv (No such file"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    told: str,
    digits: Path,
    few_digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": digits, "EMPTY": tmp_path, "IMAGES": few_digits / "optdigits"}
    called = Called(capsys, *(places.get(each, each) for each in arguments))
    assert called.code == 2
    assert told.replace("EMPTY", str(tmp_path)) in called.told
    assert len(called.told.splitlines()) == 1


def test_a_reader_that_has_seen_enough(digits: Path, few_digits: Path) -> None:
    script = '"$0" -m gsda_fast.predict "$1" "$2" | true; echo ${PIPESTATUS[0]}'
    arguments = [sys.executable, str(digits), str(few_digits)]
    ended = subprocess.run(["bash", "-c", script, *arguments], capture_output=True, text=True)
    assert (ended.stdout.split(), ended.stderr) == (["141"], "")


def test_one_image_file(digits: Path, few_digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = sorted((few_digits / "optdigits").rglob("*.png"))[3]
    one = Called(capsys, digits, image)
    assert one.code == 0
    assert [row["file"] for row in one.rows] == [image.name]
    among_others = Called(capsys, digits, image.parent)
    expected = next(row for row in among_others.rows if row["file"] == image.name)
    assert float(one.rows[0]["confidence"]) == pytest.approx(float(expected["confidence"]), rel=1e-4)
    text = digits / "config.toml"
    refused = Called(capsys, digits, text)
    assert refused.code == 2
    assert f"{text}: found a file of another kind (.toml); expected one of " in refused.told
