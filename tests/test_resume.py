import io
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_trees import class_tree
from rich.console import Console
from same_state import differences
from saved_run import saved_run

from gsda_fast import resume
from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import Config, parse_config
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.pack import pack
from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.resume import find_start, run_identity
from gsda_fast.train import train
from gsda_fast.training.checkpoint import CheckpointFolder

pytestmark = pytest.mark.filterwarnings("ignore:domain .* found .* images")

QUICK = ("--steps", "6", "--warmup", "2", "--refresh-every", "2", "--log-every", "2", "--batch-size", "8")


def run(*arguments: str) -> str:
    """What a run in this process tells."""
    told = io.StringIO()
    train(parse_config(list(arguments), "train"), Console(file=told, width=80))
    return told.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class First:
    """A run, finished, and the arguments that made it."""

    def __init__(self, few_digits: Path, folder: Path) -> None:
        self.arguments = ("digits", *QUICK, "--data-root", str(few_digits))
        self.folder = folder
        run(*self.arguments, "--output", str(folder))

    def file(self, step: int) -> Path:
        return CheckpointFolder(self.folder / "checkpoints").file(step)

    def state(self, step: int) -> dict[str, Any]:
        return CheckpointFolder(self.folder / "checkpoints").load(step)


@pytest.fixture(scope="module")
def first(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> First:
    return First(few_digits, tmp_path_factory.mktemp("first") / "run")


def last_state(folder: Path) -> dict[str, Any]:
    state, _ = CheckpointFolder(folder / "checkpoints").load_newest()
    assert state is not None
    return {name: value for name, value in state.items() if name not in ("seconds", "training_seconds")}


# --------------------------------------------------------------------------------------------- from a checkpoint's path


def test_a_run_begins_with_the_checkpoint_of_another(first: First, tmp_path: Path) -> None:
    before = files(first.folder)
    told = run(*first.arguments, "--resume", str(first.file(4)), "--output", str(tmp_path / "run"))
    assert f"resuming after step 4 of {first.file(4)}" in told
    assert differences(last_state(tmp_path / "run"), last_state(first.folder)) == []
    assert [line["step"] for line in RunFolder(tmp_path / "run").read_metrics()] == [6]
    assert files(first.folder) == before


def test_of_a_folder_the_newest_sound_checkpoint_is_taken(first: First, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first.folder, copy)
    (copy / "checkpoints" / "step-00000006.pt").write_bytes(b"damaged")
    told = run(*first.arguments, "--resume", str(copy), "--output", str(tmp_path / "run"))
    assert "step-00000006.pt" in told
    assert "resuming after step 4" in told
    assert (copy / "checkpoints" / "step-00000006.pt").read_bytes() == b"damaged"
    assert differences(last_state(tmp_path / "run"), last_state(first.folder)) == []


def test_steps_of_another_seed_are_told_and_a_checkpoint_that_does_not_say(first: First, tmp_path: Path) -> None:
    told = run(*first.arguments, "--seed", "7", "--resume", str(first.file(4)), "--output", str(tmp_path / "run"))
    expected = "these steps were trained with --seed 0, the others will be with --seed 7: no run of either seed"
    assert expected in " ".join(told.split())
    state = first.state(4)
    del state["identity"]["--seed"], state["identity"]["--method"]
    CheckpointFolder(tmp_path / "old").save(4, state)
    told = run(
        *first.arguments, "--resume", str(tmp_path / "old" / "step-00000004.pt"), "--output", str(tmp_path / "2")
    )
    assert "the checkpoint does not say with which seed and method its steps were trained" in " ".join(told.split())


def test_more_steps_of_the_same_run(first: First, tmp_path: Path) -> None:
    run(*first.arguments, "--resume", str(first.folder), "--steps", "8", "--output", str(tmp_path / "run"))
    assert [line["step"] for line in RunFolder(tmp_path / "run").read_metrics()] == [8]
    with pytest.raises(UsageError, match=r"--steps: found 5; expected at least 6, the steps done in "):
        run(*first.arguments, "--resume", str(first.folder), "--steps", "5", "--output", str(tmp_path / "less"))
    assert not (tmp_path / "less").exists()


def test_settings_that_may_change_are_those_of_the_new_run(first: First, tmp_path: Path) -> None:
    changed = ("--steps", "9", "--learning-rate", "0.001", "--weight-decay", "0.002", "--momentum", "0.5")
    # What had no loss scaler goes on with one.
    changed += ("--precision", "fp16")
    told = run(*first.arguments, *changed, "--resume", str(first.folder), "--output", str(tmp_path / "run"))
    assert "learning rate 0.05 " in told  # the backbone's, the largest
    config, source, target = opened(first, *changed)
    trainer = build_trainer(config, source, target)
    trainer.load_state_dict(first.state(6))
    for optimizer in trainer.optimizers.values():
        group = optimizer.param_groups[-1]
        assert (group["initial_lr"], group["weight_decay"], group["momentum"]) == (0.001, 0.002, 0.5)
    trainer.loader.close()
    (line, *_) = RunFolder(tmp_path / "run").read_metrics()
    factor = trainer.schedule.learning_rate_factor(line["step"] - 1)
    assert line["learning_rate"] == pytest.approx(0.05 * factor)


def test_momentum_that_a_checkpoint_lacks_starts_afresh(first: First, tmp_path: Path) -> None:
    run(*first.arguments, "--momentum", "0", "--output", str(tmp_path / "without"))
    run(*first.arguments, "--steps", "9", "--resume", str(tmp_path / "without"), "--output", str(tmp_path / "run"))
    state = last_state(tmp_path / "run")["optimizers"]["discriminators"]["state"]
    assert all(each["momentum_buffer"].abs().sum() > 0 for each in state.values())


def test_an_interrupted_one_goes_on_from_its_own_checkpoints(first: First, tmp_path: Path) -> None:
    origin, output = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(first.folder, origin)
    command = (*first.arguments, "--steps", "10", "--resume", str(origin), "--output", str(output))
    run(*command)
    expected = last_state(output)
    (output / "result.json").unlink()
    CheckpointFolder(output / "checkpoints").file(10).unlink()
    shutil.rmtree(origin)  # no longer needed
    assert "resuming after step 8\n" in run(*command)
    assert differences(last_state(output), expected) == []


@pytest.mark.parametrize(("begun", "now"), [("auto", "PATH"), ("PATH", "auto"), ("PATH", "OTHER")])
def test_where_a_run_began_is_one_of_its_settings(begun: str, now: str, first: First, tmp_path: Path) -> None:
    names = {"auto": "auto", "PATH": str(first.folder), "OTHER": str(first.file(6))}
    output = str(tmp_path / "run")
    run(*first.arguments, "--resume", names[begun], "--output", output)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=re.escape(f"run.resume = {names[begun]} there and {names[now]} here")):
        run(*first.arguments, "--resume", names[now], "--output", output)
    assert files(tmp_path) == before


def nothing(folder: Path) -> Path:
    return folder / "missing"


def no_run(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def no_checkpoint(folder: Path) -> Path:
    run_folder = RunFolder(folder / "begun")
    run_folder.prepare()
    run_folder.write_config({"task": "digits"})
    return run_folder.path


def all_damaged(folder: Path) -> Path:
    run_folder = RunFolder(no_checkpoint(folder))
    (run_folder.checkpoints / "step-00000002.pt").write_bytes(b"x")
    return run_folder.path


def no_checkpoint_file(folder: Path) -> Path:
    torch.save({"step": 1}, folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize(
    "make", [nothing, no_run, no_checkpoint, all_damaged, no_checkpoint_file], ids=lambda make: make.__name__
)
def test_a_path_that_is_none(make: Callable[[Path], Path], first: First, tmp_path: Path) -> None:
    path = make(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=re.escape(str(path))) as error:
        run(*first.arguments, "--resume", str(path), "--output", str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- weights alone


def test_weights_alone_start_a_run_of_other_settings(first: First, tmp_path: Path) -> None:
    options = ("--weights-alone", "--resume", str(first.folder), "--batch-size", "4", "--output", str(tmp_path / "run"))
    told = run(*first.arguments, *options, "--steps", "1", "--warmup", "1", "--learning-rate", "0")
    assert f"starting with the weights of {first.file(6)}, after its step 6" in told
    state, stored = last_state(tmp_path / "run"), first.state(6)
    assert state["step"] == 1
    assert state["images_seen"] == 8
    learnt = [name for name in state["method"] if name.startswith("model.classifier")]
    assert learnt
    for name in learnt:  # at a rate of 0
        assert torch.equal(state["method"][name], stored["method"][name])


def test_discriminators_that_the_weights_lack_start_afresh(first: First, tmp_path: Path) -> None:
    begun = str(tmp_path / "source-only")
    run(*first.arguments, "--method", "source-only", "--output", begun)
    command = (*first.arguments, "--resume", begun, "--output", str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"--method: found gsda; expected source-only, as in .*; start as before"):
        run(*command)
    missing = [name for name in first.state(6)["method"] if name.startswith("discriminators")]
    assert f"; {len(missing)} tensors that it lacks start afresh\n" in run(*command, "--weights-alone")


def test_weights_of_another_shape_are_named(first: First, tmp_path: Path) -> None:
    command = (*first.arguments, "--resume", str(first.folder), "--output", str(tmp_path / "run"))
    expected = r"found .*step-00000006\.pt with the tensor \S+ of shape 128 x \d+; expected 64 x \d+"
    for options in (("--weights-alone",), ()):
        with pytest.raises(UsageError, match=expected):
            run(*command, "--bottleneck-dim", "64", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["auto", "never"])
def test_weights_alone_need_a_path(value: str) -> None:
    with pytest.raises(UsageError, match=f"--weights-alone: found --resume {value}; expected --resume PATH"):
        parse_config(["digits", "--weights-alone", "--resume", value], "train")


# ------------------------------------------------------------------------------------------------------------ identity


def opened(first: First, *options: str) -> tuple[Config, ImageDomain, ImageDomain]:
    return resolve(parse_config([*first.arguments, "--output", str(first.folder), *options], "train"))


def one_file_less(domain: ImageDomain) -> ImageDomain:
    return domain.take(list(range(len(domain) - 1)))


def one_file_renamed(domain: ImageDomain) -> ImageDomain:
    return replace(domain, paths=[*domain.paths[:-1], domain.paths[-1] + "x"])


def one_label_changed(domain: ImageDomain) -> ImageDomain:
    return replace(domain, labels=np.concatenate([domain.labels[:-1], [0]]))


@pytest.mark.parametrize("which", ["--source", "--target"])
@pytest.mark.parametrize("change", [one_file_less, one_file_renamed, one_label_changed], ids=lambda f: f.__name__)
def test_other_files_are_refused(which: str, change: Callable[[ImageDomain], ImageDomain], first: First) -> None:
    config, source, target = opened(first)
    domain = source if which == "--source" else target
    changed = change(domain)
    pair = (changed, target) if which == "--source" else (source, changed)
    with pytest.raises(UsageError) as error:
        find_start(config, RunFolder(first.folder), run_identity(config, *pair, 1))
    assert error.value.what == which
    assert error.value.found == changed.identity
    assert error.value.expected == f"{domain.identity}, as in {first.file(6)}"
    assert f"found {len(changed)} files with digest " in str(error.value)
    assert "--weights-alone" in error.value.remedy


def test_other_processes_are_refused(first: First) -> None:
    config, source, target = opened(first)
    with pytest.raises(UsageError, match="--nproc_per_node: found 4 processes; expected 1 process, as in "):
        find_start(config, RunFolder(first.folder), run_identity(config, source, target, 4))


def test_another_batch_size_is_refused(first: First, tmp_path: Path) -> None:
    command = (*first.arguments, "--batch-size", "4", "--resume", str(first.folder))
    with pytest.raises(UsageError, match="--batch-size: found 4; expected 8, as in "):
        run(*command, "--output", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        (("0", "1", "2", "3", "4", "5", "6", "7", "8", "ten"), "10 with 'ten' as number 10"),
        (("0", "1", "2", "3", "4", "5", "6", "7", "8"), "9 with none as number 10"),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], found: str, first: First) -> None:
    config, source, target = opened(first)
    with pytest.raises(UsageError) as error:
        find_start(config, RunFolder(first.folder), run_identity(config, replace(source, classes=classes), target, 1))
    assert (error.value.what, error.value.found) == ("classes", found)
    assert error.value.expected.startswith("10 with '9' as number 10, as in ")


def test_photos_that_are_turned_now_are_other_images(first: First, tmp_path: Path) -> None:
    config, source, target = opened(first)
    turned = replace(source, orientation="exif")
    before = find_start(config, RunFolder(first.folder), run_identity(config, source, target, 1))
    assert before.own_step == 6
    with pytest.raises(UsageError, match="--orientation: found exif; expected stored, as in "):
        find_start(config, RunFolder(first.folder), run_identity(config, turned, target, 1))
    # What a checkpoint was trained on that is older than the choice.
    older = first.state(6)
    del older["identity"]["--orientation"]
    CheckpointFolder(tmp_path / "older" / "checkpoints").save(6, older)
    assert find_start(config, RunFolder(tmp_path / "older"), run_identity(config, source, target, 1)).own_step == 6
    with pytest.raises(UsageError, match="--orientation: found exif; expected stored, as in "):
        find_start(config, RunFolder(tmp_path / "older"), run_identity(config, turned, target, 1))


def without_orientation(folder: RunFolder) -> None:
    """Make the settings those of a run that is older than the choice."""
    lines = folder.config_path.read_text().splitlines()
    assert 'orientation = "exif"' in lines
    folder.config_path.write_text("\n".join(line for line in lines if not line.startswith("orientation")))


def test_an_older_run_of_photos_goes_on_as_it_began(tmp_path: Path) -> None:
    for name in ("photos", "new"):
        class_tree(tmp_path / name, ["cat", "dog"], per_class=1)
    model = ("--backbone", "resnet18", "--weights", "none", "--bottleneck-dim", "8", "--method", "source-only")
    data = ("--source", "photos", "--target", "new", "--data-root", str(tmp_path))
    command = ("folder", *data, *model, "--steps", "1", "--batch-size", "2", "--workers", "1")
    folder = saved_run(tmp_path / "run", *command)
    without_orientation(RunFolder(folder))
    told = r"other settings \(data.orientation = stored there and exif here\)"
    with pytest.raises(UsageError, match=told):
        run(*command, "--output", str(folder))
    run(*command, "--output", str(folder), "--orientation", "stored")
    assert RunFolder(folder).setting("orientation") == "stored"


def test_an_older_run_without_photos_goes_on_by_the_same_command(first: First, tmp_path: Path) -> None:
    shutil.copytree(first.folder, tmp_path / "run")
    without_orientation(RunFolder(tmp_path / "run"))
    assert "finished already" in run(*first.arguments, "--output", str(tmp_path / "run"))


def test_a_pack_is_no_folder_of_files(first: First, few_digits: Path, tmp_path: Path) -> None:
    _, source, _ = opened(first)
    pack("digits", data_root=few_digits, output=tmp_path / "pack", workers=1)
    config, packed_source, packed_target = opened(first, "--data-root", str(tmp_path / "pack"))
    assert packed_source.paths == source.paths
    with pytest.raises(UsageError, match=r"--source: found \d+ images of a pack with digest .*; expected \d+ files"):
        find_start(config, RunFolder(first.folder), run_identity(config, packed_source, packed_target, 1))


def test_other_versions_are_told(first: First, monkeypatch: pytest.MonkeyPatch) -> None:
    config, source, target = opened(first)
    start = find_start(config, RunFolder(first.folder), run_identity(config, source, target, 1))
    trainer = build_trainer(config, source, target)
    assert start.load_into(trainer) == ["resuming after step 6"]
    now = resume.versions()["torch"]
    monkeypatch.setattr(resume, "versions", lambda: {**start.state["versions"], "torch": "9.9"})  # type: ignore[index]
    expected = f"the checkpoint was written with torch {now}, now 9.9: metrics may differ"
    assert start.load_into(trainer) == ["resuming after step 6", expected]
    trainer.loader.close()
