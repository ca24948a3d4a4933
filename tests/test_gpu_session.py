"""The session on a GPU, rehearsed on a CPU as far as that goes: what is measured, in which files, and how it fails."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_session


def test_rows_hold_every_player_and_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "_on_a_cpu", lambda run: {"eager_ms": float(len(run()))})
    rows = list(gpu_session._rows(["digits"], ["float32"], device="cpu"))
    assert {row["player"]: row["eager_ms"] for row in rows} == {
        "discriminator step": 6.0,
        "encoder step": 1.0,
        "both players": 7.0,
    }
    assert [row for row in rows if "failed" in row] == []
    assert {"strong autograd baseline", "torch"} <= {row["contender"] for row in rows}
    # Against the first contender, in float32.
    assert all(row["error"] < 1e-4 for row in rows)


def test_a_contender_that_fails_is_a_row_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(run: object) -> dict[str, float]:
        raise torch.cuda.OutOfMemoryError("no more")

    monkeypatch.setattr(gpu_session, "_on_a_cpu", out_of_memory)
    rows = list(gpu_session._rows(["digits"], ["float32"], device="cpu"))
    assert len(rows) > 5
    assert all("no more" in row["failed"] for row in rows)


def test_a_failure_of_the_kernels_is_the_exit_status() -> None:
    good = [{"contender": "triton", "eager_ms": 1.0}, {"contender": "reference loop", "failed": "no memory"}]
    assert gpu_session.exit_status(good) == 0
    assert gpu_session.exit_status([*good, {"contender": "triton", "failed": "no such instruction"}]) == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("def test_a(): pass", 0),
        ("def test_a(): assert False", 1),
        ("def test_a(): pass\ndef test_b(): pytest.skip('no such package')", 1),
        ("pytest.importorskip('no_such_package')", 1),
    ],
    ids=["passed", "failed", "a skipped test", "a skipped file"],
)
def test_a_skipped_test_is_not_a_passed_one(
    body: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_few.py").write_text(f"import pytest  # mark.gpu\n{body}\ndef test_c(): pass\n")
    monkeypatch.setattr(gpu_session, "REPOSITORY", tmp_path)
    found = gpu_session.run_tests(tmp_path / "tests.txt", [])
    assert bool(found) == bool(status)
    assert ("1 skipped, so that not everything is known to pass" in (tmp_path / "tests.txt").read_text()) == (
        "skip" in body
    )


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py"])
    assert gpu_session.main() == 2
    assert capsys.readouterr().err.startswith("error: found no CUDA device; expected one")


WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name in {}:
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Without())
"""


def test_a_rehearsal_without_training_s_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine for the kernels alone: it says what is missing, and everything else holds together."""
    find, absent = importlib.util.find_spec, ("tyro", "tomli_w", "msgspec", "hypothesis", "mlxtend", "nvidia")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    # pytest runs in a process of its own, and would import the packages of its plugins past any other finder.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(absent))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--rehearse", "--output", str(tmp_path)])
    assert gpu_session.main() == 0
    said = capsys.readouterr().out
    assert "missing: tyro, tomli_w, msgspec; training's GPU tests and step.json need them, the kernels do not" in said
    assert "tests collected: True" in said
    assert "test_triton_gpu.py" in (tmp_path / "tests.txt").read_text()
    assert len(json.loads((tmp_path / "head.json").read_text())) > 5


def test_a_rehearsal_that_fails_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_session, "_pytest", lambda arguments, report: 0)
    row = {"contender": "torch", "player": "encoder step"}
    for rows, status in (([row], 0), ([row, {**row, "failed": "a\nno memory"}], 1)):
        monkeypatch.setattr(gpu_session, "_rows", lambda shapes, dtypes, device, rows=rows: iter(rows))
        assert gpu_session.rehearse(tmp_path) == status


def test_after_its_minutes_it_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert not gpu_session.Clock().is_over("nothing")
    assert not capsys.readouterr().out
    assert gpu_session.Clock(0).is_over("step: go on with --only step")
    assert capsys.readouterr().out == "time is over; left: step: go on with --only step\n"


@pytest.mark.slow
def test_the_training_step_is_timed_into_a_file(tmp_path: Path) -> None:
    options = ["--device=cpu", "--task=digits", "--batch-size=4", "--steps=2"]
    options += ["-k", "test_step and fp32 and eager and (source-only or gsda)"]
    assert gpu_session.time_training_steps(tmp_path, options) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert len(found["benchmarks"]) == 2
    assert all(each["extra_info"]["images_per_second"] > 0 for each in found["benchmarks"])
    assert found["machine_info"]["torch"] == torch.__version__
    assert found["commit_info"]["id"]
    assert "2 passed" in (tmp_path / "step.txt").read_text()
