import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from image_trees import natural_image, save_turned
from rich.console import Console
from safetensors import safe_open
from saved_run import saved_run

from gsda_fast import export as command
from gsda_fast.commands import run_command
from gsda_fast.data.domains import open_images
from gsda_fast.errors import UsageError
from gsda_fast.export import ExportSettings, export
from gsda_fast.predict import predict
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.trained import load_trained

DOCS = Path(__file__).resolve().parents[1] / "docs" / "training.md"
CLASSES = 31


@pytest.fixture(scope="module", params=["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a benchmark, exported; its parameters are where training starts."""
    run = tmp_path_factory.mktemp("runs") / "office31"
    model = ("--backbone", request.param, "--weights", "none", "--hidden-dim", "8")
    saved_run(run, "office31", "--synthetic", "--method", "dann", *model)
    files = export(ExportSettings(run))
    assert files == [run / "export" / "model.safetensors", run / "export" / "model.pt2"]
    assert sorted(path.name for path in (run / "export").iterdir()) == ["model.pt2", "model.safetensors"]
    return run


def differences(found: Sequence[torch.Tensor], own: Sequence[torch.Tensor]) -> list[float]:
    """The largest one of features and of logits, as a share of the largest number there."""
    assert len(found) == len(own) == 2
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, own, strict=True)]


def elsewhere(folder: Path, script: str) -> str:
    """What a script prints that runs in `folder`, in a process where importing this project fails."""
    barrier = "import sys; sys.modules['gsda_fast'] = sys.modules['gsda_kernels'] = None\n"
    ended = subprocess.run([sys.executable, "-c", barrier + script], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_the_programs_of_the_docs_give_the_same_numbers_without_this_project(exported: Path) -> None:
    folder = exported / "export"
    (program,) = [text for text in snippets() if "model.pt2" in text]
    (rebuild,) = [text for text in snippets() if "model.safetensors" in text]
    (folder / "photos").mkdir()
    save_turned(folder / "photos" / "photo.jpg", natural_image(0, 300, 280), 6)
    images = torch.randn(3, 3, 224, 224)
    torch.save(images, folder / "images.pt")
    script = f"""{rebuild}
images = torch.load("images.pt")
with torch.no_grad():
    features = network[:2](images)
    rebuilt = features, network[2](features)
{program.replace("photo.jpg", "photos/photo.jpg")}
with torch.no_grad():
    torch.save([rebuilt, model(images), model(images[:1])], "found.pt")
"""
    name, confidence = elsewhere(folder, script).split()
    rebuilt, run, one = torch.load(folder / "found.pt")
    trained = load_trained(exported)
    with torch.no_grad():
        own = trained.model(images)
    assert [tuple(each.shape) for each in run] == [(3, 256), (3, CLASSES)]
    # Another memory format has other rounding.
    assert max(differences(rebuilt, own) + differences(run, own)) < 1e-5
    assert max(differences(one, [each[:1] for each in own])) < 1e-5

    ((_, probabilities),) = predict(trained, open_images(folder / "photos", trained.classes))
    assert name == trained.classes[int(probabilities.argmax())]
    assert float(confidence) == pytest.approx(float(probabilities.max()), rel=1e-4)


def test_facts_and_names_in_the_files(exported: Path) -> None:
    extra: dict[str, Any] = {"facts.json": ""}
    torch.export.load(exported / "export" / "model.pt2", extra_files=extra)
    with safe_open(exported / "export" / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        names = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert facts == json.loads(extra["facts.json"])
    assert (names, dtypes) == ({"backbone", "bottleneck", "classifier"}, {torch.float32, torch.int64})
    classes = facts.pop("classes")
    assert (len(classes), classes[0], classes[-1]) == (CLASSES, "back_pack", "trash_can")
    assert facts == {
        "task": "office31",
        "source": "synthetic-source",
        "target": "synthetic-target",
        "method": "dann",
        "seed": 0,
        "step": 0,
        "backbone": RunFolder(exported).setting("backbone"),
        "output_layer": "fc",
        "orientation": "exif",
        "bottleneck_dim": 256,
        "bottleneck_activation": "none",
        "resize": 256,
        "crop": 224,
        "channels": 3,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def test_lenet_and_a_run_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program is float32 whatever the products of training were; an activation of the bottleneck is part of it."""
    run = saved_run(tmp_path / "run", "digits", "--synthetic", "--precision", "bf16")
    terminal = io.StringIO()
    monkeypatch.setattr(command, "plain_console", lambda: Console(file=terminal, force_terminal=True))
    monkeypatch.setattr(sys, "argv", ["export", str(run), "--checkpoint", "0", "--output", str(tmp_path / "there")])
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    assert (end.value.code, capsys.readouterr().err) == (0, "")
    assert "exporting" in terminal.getvalue()
    program = torch.export.load(tmp_path / "there" / "model.pt2").module()
    images = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        features, logits = program(images)
    assert features.dtype == logits.dtype == torch.float32
    assert features.min() == 0
    trained = load_trained(run)
    assert trained.model.autocast_dtype == torch.bfloat16
    trained.model.autocast_dtype = None
    with torch.no_grad():
        assert max(differences((features, logits), trained.model(images))) < 1e-5


def test_mistakes(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--output: found .*file \(.*\); expected a folder to write"):
        export(ExportSettings(exported, output=tmp_path / "file"))
    with pytest.raises(UsageError, match="--checkpoint: found 7; expected one of 0"):
        export(ExportSettings(exported, checkpoint=7))


def test_one_changed_filter_would_be_noticed(exported: Path) -> None:
    """The negative control of the comparisons above."""
    images = torch.randn(1, 3, 224, 224)
    trained = load_trained(exported)
    with torch.no_grad():
        own = trained.model(images)
        next(trained.model.parameters())[0] *= 1.01
        assert min(differences(trained.model(images), own)) > 1e-5
