import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import class_tree, natural_image, save_turned
from rich.console import Console
from torch.testing import assert_close

from gsda_fast import embed as command
from gsda_fast import model as model_module
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import open_folder
from gsda_fast.data.embeddings import read_embeddings
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.embed import EmbedSettings, embed
from gsda_fast.errors import FolderInUse, TrainingError, UsageError
from gsda_fast.files import FolderLock
from gsda_fast.model import ModelSettings, build_backbone


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbedSettings:
    """A folder of six images, and a backbone small enough for a test."""
    class_tree(tmp_path / "photos", ("cat", "dog"), per_class=3)
    torch.manual_seed(0)
    backbone, dim = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(147, 5)), 5
    monkeypatch.setattr(model_module, "build_backbone", lambda model: (backbone, dim))
    return EmbedSettings(str(tmp_path / "photos"), "resnet18", "none", output=tmp_path / "out", batch_size=2)


def test_rows_are_the_backbones_features_of_the_evaluation_images(settings: EmbedSettings) -> None:
    (path,) = embed(settings)
    assert path.name == "photos.npy"
    read, domain = read_embeddings(path), open_folder(Path(settings.what))
    assert (read.names, read.classes, read.labels.tolist()) == (domain.paths, ("cat", "dog"), [0, 0, 0, 1, 1, 1])
    loader = TorchLoader(domain, domain, BENCHMARKS["folder"].preprocessing, batch_size=6, device=torch.device("cpu"))
    ((images, _),) = loader.evaluate("source")
    backbone, _ = model_module.build_backbone(ModelSettings())
    with torch.no_grad():
        assert_close(torch.from_numpy(read.rows.values[0]), backbone(images), rtol=1e-5, atol=1e-5)


def test_features_of_images_alone_are_written_where_they_were_asked_for(
    settings: EmbedSettings, tmp_path: Path
) -> None:
    cats, output = Path(settings.what) / "cat", tmp_path / "out"
    assert embed(replace(settings, what=str(cats), output=output)) == [output / "cat.npy"]
    assert (read_embeddings(output / "cat.npy").labels == -1).all()
    assert sorted(path.suffix for path in cats.iterdir()) == [".jpg"] * 3


def test_augmented_views_differ_and_are_the_same_again(settings: EmbedSettings, tmp_path: Path) -> None:
    first = read_embeddings(embed(replace(settings, views=2))[0]).rows.values
    again = read_embeddings(embed(replace(settings, views=2, output=tmp_path / "b", batch_size=5))[0]).rows.values
    assert first.shape == (3, 6, 5)
    assert_close(first, again, rtol=1e-5, atol=1e-5)
    assert_close(first[0], read_embeddings(embed(replace(settings, output=tmp_path / "c"))[0]).rows.values[0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(first[a] - first[b]).max(axis=1) > 1e-4).all()


def test_what_is_there_is_kept_until_something_changes(settings: EmbedSettings) -> None:
    (path,) = embed(settings)
    before = path.stat().st_mtime_ns
    assert embed(settings) == [path]
    assert path.stat().st_mtime_ns == before
    image = next(Path(settings.what).rglob("*.png"), None) or next(Path(settings.what).rglob("*.jp*g"))
    os.utime(image, ns=(1, 1))
    embed(settings)
    assert path.stat().st_mtime_ns != before


def test_photos_are_turned_where_they_are_to_be(settings: EmbedSettings) -> None:
    folder = Path(settings.what) / "cat"
    for number in range(1, 9):
        save_turned(folder / f"{number}.png", natural_image(4, 90, 60), number)
    (path,) = embed(settings)
    rows = read_embeddings(path).rows.values[0, :8]
    assert_close(rows, rows[:1].repeat(8, axis=0), rtol=1e-5, atol=1e-5)
    embed(replace(settings, orientation="stored"))  # other rows in the same file
    stored = read_embeddings(path).rows.values[0, :8]
    assert_close(stored[0], rows[0], rtol=1e-5, atol=1e-5)
    assert (np.abs(stored[1:] - stored[0]).max(axis=1) > 1e-4).all()


def test_an_interrupted_call_goes_on(settings: EmbedSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = embed(replace(settings, output=settings.output.parent / "whole"))  # type: ignore[union-attr]
    monkeypatch.setattr(command, "_SAVED_EVERY", 1)
    seen: list[int] = []

    def stop(name: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(settings, stop)
    assert settings.output is not None
    assert not list(settings.output.glob("photos.*"))
    rest: list[int] = []
    (path,) = embed(settings, lambda name, done, total: rest.append(done))
    assert (seen, rest) == ([2, 4], [4, 6])  # the second batch had not been noted
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(settings.output)) == [".lock", "photos.json", "photos.npy"]


def stopped(settings: EmbedSettings, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a call that was interrupted after two samples of six."""
    monkeypatch.setattr(command, "_SAVED_EVERY", 1)
    assert settings.output is not None

    def stop(name: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(settings, stop)
    return settings.output


@pytest.mark.parametrize("done", [7, -1, 0, 10**40, 2.0, True, "2", None])
def test_notes_of_an_interrupted_call_that_are_none_begin_it_again(
    settings: EmbedSettings, monkeypatch: pytest.MonkeyPatch, done: object
) -> None:
    (whole,) = embed(replace(settings, output=Path(settings.what).parent / "whole"))
    journal = stopped(settings, monkeypatch) / ".photos.npy.done"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"done": done}))
    seen: list[int] = []
    (path,) = embed(settings, lambda name, done, total: seen.append(done))
    assert seen == [2, 4, 6]
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kind", ["cut", "another shape", "a link"])
def test_rows_that_are_not_those_of_the_interrupted_call_are_not_gone_on_with(
    settings: EmbedSettings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (whole,) = embed(replace(settings, output=Path(settings.what).parent / "whole"))
    partial = stopped(settings, monkeypatch) / ".photos.npy.partial"
    precious = Path(settings.what).parent / "precious"
    content = b"" if kind == "another shape" else partial.read_bytes()
    precious.write_bytes(content)
    if kind == "cut":
        os.truncate(partial, len(content) - 4)
    elif kind == "another shape":
        np.save(partial.with_suffix(".npy"), np.zeros((1, 5, 6), np.float32))
        partial.with_suffix(".npy").replace(partial)
    else:
        partial.unlink()
        partial.symlink_to(precious)
    (path,) = embed(settings)
    assert path.read_bytes() == whole.read_bytes()
    assert precious.read_bytes() == content


def test_a_folder_is_held_while_rows_are_written(settings: EmbedSettings) -> None:
    refused = []

    def second(name: str, done: int, total: int) -> None:
        with pytest.raises(FolderInUse, match=r"--output: found .*out, in use by process"):
            embed(settings)
        refused.append(done)

    (path,) = embed(settings, second)
    assert refused == [2, 4, 6]
    with FolderLock(path.parent):  # what is there can be used all the same
        assert embed(settings) == [path]


def test_a_disk_that_is_full_is_one_line_and_the_same_call_goes_on(
    settings: EmbedSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(TrainingError, match=r"out cannot be written \(No space left on device\); free some space"):
            embed(settings)
    assert len(read_embeddings(embed(settings)[0])) == 6


def test_a_folder_without_classes_is_unlabelled(settings: EmbedSettings) -> None:
    (path,) = embed(replace(settings, what=str(Path(settings.what) / "cat")))
    read = read_embeddings(path)
    assert (path.stem, read.classes, read.labels.tolist()) == ("cat", (), [-1, -1, -1])


def test_domains_of_a_task(tmp_path: Path, settings: EmbedSettings) -> None:
    classes = BENCHMARKS["pictures"].classes or ()
    for name in ("photo", "icon"):
        class_tree(tmp_path / "pictures" / name, classes, per_class=1)
    task = replace(settings, what="pictures", domains=("photo", "I"), data_root=tmp_path / "pictures")
    with pytest.warns(UserWarning, match="found 11 images"):
        paths = embed(task)
    assert [path.name for path in paths] == ["photo.npy", "icon.npy"]
    table = json.loads(paths[1].with_suffix(".json").read_text())
    assert table["classes"] == list(classes)
    assert command._default_output(replace(task, output=None)).name == "pictures-features"


def test_what_cannot_be_embedded(settings: EmbedSettings) -> None:
    for change, message in (
        ({"what": "nowhere"}, r"TASK\|FOLDER: found 'nowhere'; expected a folder of images, or one of .*pictures"),
        ({"what": "digits"}, "found digits; expected a task whose samples are colour images"),
        ({"backbone": "lenet"}, "--backbone: found lenet; expected a network for colour images"),
        ({"backbone": "features"}, "--backbone: found features"),
        ({"views": -1}, "a negative number"),
    ):
        with pytest.raises(UsageError, match=message):
            embed(replace(settings, **change))  # type: ignore[arg-type]


def test_the_command_names_the_files(settings: EmbedSettings, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [settings.what, "--backbone", "resnet18", "--weights", "none", "--output", str(settings.output)]
    command.run(arguments, Console())
    assert "photos.npy" in capsys.readouterr().out.replace("\n", "")


def test_backbones_have_flat_features() -> None:
    backbone, dim = build_backbone(ModelSettings("resnet18", "none"))
    assert backbone.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, dim)
