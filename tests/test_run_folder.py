import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gsda_fast.errors import UsageError
from gsda_fast.files import atomic_file
from gsda_fast.results.records import RunResult, Selection
from gsda_fast.results.run_folder import RunFolder, flat_settings

RESULT = RunResult(
    task="digits",
    source="mnist",
    target="fonts",
    method="gsda",
    seed=3,
    steps=800,
    accuracy=Selection(last=80.0, best=82.5, label_free=81.0),
    mean_per_class=Selection(last=70.0, best=None, label_free=71.0),
    per_class=(100.0, None, 60.0),
    classes=("a", "b", "ü"),
    images_per_second=None,
    seconds=12.5,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.prepare()
    return folder


def test_file_names_are_the_public_ones(run: RunFolder) -> None:
    run.write_config({"steps": 1})
    run.write_environment("cpu")
    run.append_metrics(1, {"classification": 1.0})
    run.write_result(RESULT)
    run.write_predictions(np.zeros(1), np.ones((1, 1)))
    run.write_features(
        "final", np.zeros((1, 2)), np.zeros((1, 2)), source_labels=np.zeros(1), target_labels=np.zeros(1)
    )
    expected = {"config.toml", "environment.json", "metrics.jsonl", "result.json", "predictions.npz", "features.npz"}
    assert {path.name for path in run.path.iterdir()} == expected | {"checkpoints"}
    assert (run.report_path.name, run.plot_path("accuracy").name) == ("report.html", "accuracy.png")
    assert run.tensorboard.name == "tensorboard"


def test_default_name() -> None:
    assert (
        RunFolder.default_name("digits", "mnist", "fonts", "source-only", 0) == "digits-mnist-fonts-source-only-seed0"
    )
    assert RunFolder.default_name("folder", "a/b", "Real World", "gsda", 12) == "folder-a_b-Real_World-gsda-seed12"


def test_prepare_keeps_what_is_there_and_leaves_no_other_file(run: RunFolder) -> None:
    run.append_metrics(1, {})
    run.prepare()
    assert run.read_metrics() == [{"step": 1}]
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_prepare_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^--output: found .*file/run.* expected a folder"):
        RunFolder(tmp_path / "file" / "run").prepare()
    with pytest.raises(UsageError, match="--output"):
        RunFolder(tmp_path / "file").prepare()


def test_existing_names_what_is_missing(tmp_path: Path, run: RunFolder) -> None:
    with pytest.raises(UsageError, match="found nothing"):
        RunFolder.existing(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="found a file"):
        RunFolder.existing(tmp_path / "file")
    with pytest.raises(UsageError, match=r"neither config\.toml"):
        RunFolder.existing(run.path)
    run.append_metrics(1, {})
    assert RunFolder.existing(run.path).path == run.path


def test_clear_removes_the_files_that_runs_have_and_the_folders_that_this_empties(run: RunFolder) -> None:
    own = [run.trace_path, run.plot_path("loss_entropy"), run.exported / "model.pt2"]
    own += [run.tensorboard / "events.out.tfevents.1.host.2.0", run.exported / "model.safetensors", run.config_path]
    others = [run.path / "holiday.png", run.path / "loss_entropy_of_mine.png", run.tensorboard / "notes.md"]
    for file in (*own, *others):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    run.append_metrics(10, {"entropy": 0.5})
    run.clear()
    assert {file for file in run.path.rglob("*") if file.is_file()} == set(others)
    assert {folder.name for folder in run.path.iterdir() if folder.is_dir()} == {"checkpoints", "tensorboard"}
    run.append_metrics(5, {})


def test_a_folder_that_is_half_cleared_is_still_a_runs(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_config({"steps": 1})
    run.write_result(RESULT)
    run.plot_path("accuracy").write_text("")
    original = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        original(self, missing_ok=missing_ok)
        if self == run.plot_path("accuracy"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        run.clear()
    assert (run.begun, run.finished) == (True, False)


def test_config_round_trip_leaves_out_none(run: RunFolder) -> None:
    assert run.read_config() == {}
    config = {
        "task": "digits",
        "root": Path("a/b"),
        "data": {"workers": 0, "list": None},
        "levels": ("x", "y"),
        "z": None,
    }
    run.write_config(config)
    assert run.read_config() == {"task": "digits", "root": "a/b", "data": {"workers": 0}, "levels": ["x", "y"]}
    assert (run.setting("workers"), run.setting("task"), run.setting("list"), run.setting("ta")) == (
        0,
        "digits",
        None,
        None,
    )
    assert run.changed_settings(config, {}) == {}


def test_changed_settings_names_them(run: RunFolder) -> None:
    run.write_config({"steps": 5, "data": {"workers": 2, "root": None}, "old": True})
    asked = {"steps": 6, "data": {"workers": 2, "root": Path("x")}, "old": None}
    changed = {"steps": (5, 6), "data.root": (None, "x"), "old": (True, None)}
    assert run.changed_settings(asked, {"data.root": None}) == changed
    assert run.changed_settings(asked, {"steps": 6}) == changed


def test_settings_that_are_not_stored_have_their_defaults(run: RunFolder) -> None:
    run.write_config({"data": {"workers": 2}})
    asked = {"steps": 6, "data": {"workers": 2, "root": Path("x")}}
    assert run.changed_settings(asked, {"steps": 6, "data.root": Path("x")}) == {}
    assert run.changed_settings(asked, {"steps": 5, "data.root": None}) == {"steps": (5, 6), "data.root": (None, "x")}


def test_broken_config_is_a_usage_error(run: RunFolder) -> None:
    run.config_path.write_text("steps = ")
    with pytest.raises(UsageError, match=r"config\.toml: found no TOML"):
        run.read_config()


def test_flat_settings() -> None:
    assert flat_settings({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_environment(run: RunFolder) -> None:
    assert run.read_environment() == {}
    run.write_environment("a device")
    environment = run.read_environment()
    assert environment["device"] == "a device"
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(environment["versions"]) == {"python", "gsda_fast", "torch", "torchvision", "triton", "numpy"}
    assert Path(sys.orig_argv[0]).name in environment["command_line"]


def test_git_revision_is_that_of_the_checkout(run: RunFolder) -> None:
    checkout = Path(__file__).parents[1]
    asked = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    run.write_environment("cpu")
    revision = run.read_environment()["git_revision"]
    if asked.returncode != 0:
        assert revision is None
    elif revision is not None:  # None too where the installed package is not the checkout's
        assert revision.removesuffix("-dirty") == asked.stdout.strip()


def test_metrics_round_trip(run: RunFolder) -> None:
    assert run.read_metrics() == []
    run.append_metrics(10, {"a": 1.5, "b": torch.tensor(2.0), "c": np.float32(0.5), "d": np.int64(4)})
    run.append_metrics(20, {"a": math.nan, "b": -math.inf, "c": torch.tensor(math.inf)})
    assert run.read_metrics() == [
        {"step": 10, "a": 1.5, "b": 2.0, "c": 0.5, "d": 4},
        {"step": 20, "a": None, "b": None, "c": None},
    ]
    # Python's reader would accept NaN; the file must be JSON to any other.
    assert "NaN" not in run.metrics_path.read_text()


@pytest.mark.parametrize("reopened", [False, True])
def test_metrics_step_must_increase(run: RunFolder, reopened: bool) -> None:
    run.append_metrics(10, {})
    writer = RunFolder(run.path) if reopened else run
    for step in (10, 9):
        with pytest.raises(ValueError, match=f"step: found {step} after 10"):
            writer.append_metrics(step, {})
    writer.append_metrics(11, {})
    assert [record["step"] for record in run.read_metrics()] == [10, 11]


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (19, [10]), (20, [10, 20]), (99, [10, 20, 30]), (None, [10, 20, 30])]
)
def test_truncate_metrics(run: RunFolder, step: int | None, kept: list[int]) -> None:
    for written in (10, 20, 30):
        run.append_metrics(written, {"value": written / 7})
    before = run.metrics_path.read_bytes().splitlines()
    run.truncate_metrics(step)
    assert [record["step"] for record in run.read_metrics()] == kept
    assert run.metrics_path.read_bytes().splitlines() == before[: len(kept)]
    next_step = (kept[-1] if kept else 0) + 1
    run.append_metrics(next_step, {})
    assert run.read_metrics()[-1] == {"step": next_step}


def test_truncate_without_metrics_makes_no_file(run: RunFolder) -> None:
    run.truncate_metrics(5)
    assert not run.metrics_path.exists()


@pytest.mark.parametrize("torn", [b'{"step": 20, "cla', b'{"step": 20}', b"\0\0\0\n", b"{}\n"])
def test_torn_last_line_is_dropped(run: RunFolder, torn: bytes) -> None:
    run.append_metrics(10, {"a": 1})
    with run.metrics_path.open("ab") as file:
        file.write(torn)
    resumed = RunFolder(run.path)
    assert resumed.read_metrics() == [{"step": 10, "a": 1}]
    resumed.append_metrics(20, {"a": 2})
    assert resumed.read_metrics() == [{"step": 10, "a": 1}, {"step": 20, "a": 2}]


@pytest.mark.parametrize(
    "line",
    [
        *("nonsense", "[1]", '{"accuracy": 1}', '{"step": "2"}', '{"step": true}', '{"step": 1}', '{"step": -1}'),
        *('{"step": 2, "accuracy": "high"}', '{"step": 2, "accuracy": [1]}', "[" * 100_000),
    ],
)
def test_broken_line_in_the_middle_is_a_usage_error(run: RunFolder, line: str) -> None:
    run.metrics_path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2: found .*; expected a JSON object of numbers"):
        run.read_metrics()


def test_result_round_trip_marks_the_run_finished(run: RunFolder) -> None:
    assert run.read_result() is None
    assert not run.finished
    run.write_result(RESULT)
    assert run.finished
    assert run.read_result() == RESULT
    stored = json.loads(run.result_path.read_text(encoding="utf-8"))
    assert stored["accuracy"] == {"last": 80.0, "best": 82.5, "label_free": 81.0}
    assert stored["label_free_criterion"] == "mutual_information"
    assert stored["per_class"] == [100.0, None, 60.0]


@pytest.mark.parametrize("content", ["{", "[]", '{"task": "digits"}'])
def test_broken_result_is_a_usage_error(run: RunFolder, content: str) -> None:
    run.result_path.write_text(content)
    with pytest.raises(UsageError, match=r"result\.json: found"):
        run.read_result()


def test_result_of_a_later_version_can_be_read(run: RunFolder) -> None:
    run.write_result(RESULT)
    stored = json.loads(run.result_path.read_text()) | {"of_a_later_version": 10}
    run.result_path.write_text(json.dumps(stored))
    assert run.read_result() == RESULT


def test_result_of_an_earlier_version_was_tested_on_the_centre_crop(run: RunFolder) -> None:
    run.write_result(replace(RESULT, test_crops=10))
    assert run.read_result() == replace(RESULT, test_crops=10)
    stored = json.loads(run.result_path.read_text())
    del stored["test_crops"]
    run.result_path.write_text(json.dumps(stored))
    assert run.read_result() == RESULT


def test_predictions_round_trip(run: RunFolder) -> None:
    assert run.read_predictions() is None
    probabilities = np.array([[0.25, 0.75], [1.0, 0.0]], dtype=np.float64)
    run.write_predictions(np.array([1, -1], dtype=np.int32), probabilities)
    stored = run.read_predictions()
    assert stored is not None
    assert (stored.labels.dtype, stored.probabilities.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(stored.labels, [1, -1])
    np.testing.assert_array_equal(stored.probabilities, probabilities)


def test_features_of_both_moments_are_kept(run: RunFolder) -> None:
    assert run.read_features() is None
    generator = np.random.default_rng(0)
    labels = {"source_labels": np.array([0, 1, 2]), "target_labels": np.array([2, -1])}
    warmup = generator.normal(size=(3, 4)), generator.normal(size=(2, 4))
    final = generator.normal(size=(3, 4)), generator.normal(size=(2, 4))
    run.write_features("warmup", *warmup, **labels)
    half = run.read_features()
    assert half is not None
    assert half.source_final is None
    run.write_features("final", *final, **labels)
    both = run.read_features()
    assert both is not None
    with np.load(run.features_path) as arrays:
        assert set(arrays) == {
            "source_warmup", "target_warmup", "source_final", "target_final", "source_labels", "target_labels"
        }  # fmt: skip
    for stored, written in zip(
        (both.source_warmup, both.target_warmup, both.source_final, both.target_final), warmup + final
    ):
        np.testing.assert_array_equal(stored, written.astype(np.float32))
    np.testing.assert_array_equal(both.target_labels, [2, -1])


def test_writing_the_same_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        run = RunFolder(tmp_path / name)
        run.prepare()
        run.write_predictions(np.array([0]), np.array([[1.0, 0.0]]))
        run.write_result(RESULT)
        contents.append((run.predictions_path.read_bytes(), run.result_path.read_bytes()))
    assert contents[0] == contents[1]


def test_atomic_file_keeps_the_old_content_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"new, ha")
            file.flush()
            assert path.read_bytes() == b"old"
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_kill_during_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from gsda_fast.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)])
    assert killed.returncode == -9
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_is_on_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("rename"), replace(self, to))[1])
    with atomic_file(tmp_path / "file") as file:
        file.write(b"content")
    assert order == ["fsync", "rename", "fsync"]
