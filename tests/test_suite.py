import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gsda_fast import suite as command
from gsda_fast.commands import run_command
from gsda_fast.config import PRESETS, Config, parse_config
from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunFolder, RunResult
from gsda_fast.suite import SuiteSettings, run_suite
from gsda_fast.train import train

pytestmark = pytest.mark.filterwarnings("ignore:domain .* found .* images")


def base(few_digits: Path) -> Config:
    steps = ("--steps", "4", "--warmup", "2", "--batch-size", "8")
    return parse_config(["digits", "--data-root", str(few_digits), *steps], "suite")


def in_this_process(configs: list[Config], jobs: int, console: Console) -> list[RunResult]:
    return [train(config, Console(quiet=True)) for config in configs]


TWO_METHODS = SuiteSettings("digits", methods=("source-only", "gsda"), seeds=(3,), tasks=("F->O",), jobs=1)
RUNS = ("digits-fonts-optdigits-source-only-seed3", "digits-fonts-optdigits-gsda-seed3")


def with_output(settings: SuiteSettings, output: Path, **changes: Any) -> SuiteSettings:
    return SuiteSettings(**{**vars(settings), "output": output, **changes})


def test_a_suite_trains_each_run_and_writes_tables_and_goes_on(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, output = io.StringIO(), tmp_path / "suite"
    folder = run_suite(with_output(TWO_METHODS, output), {"": base(few_digits)}, Console(file=told, width=200))
    assert folder == output
    assert {path.name for path in output.iterdir()} == {*RUNS, "table.md", "table.csv", "table.json"}
    results = [RunFolder(output / name).read_result() for name in RUNS]
    accuracy = {result.method: result.accuracy.last for result in results if result is not None}
    assert set(accuracy) == {"source-only", "gsda"}
    assert all(result is not None and (result.seed, result.steps) == (3, 4) for result in results)

    json.loads((output / "table.json").read_text())
    csv_text, markdown = (output / "table.csv").read_text(), (output / "table.md").read_text()
    assert len(list(csv.reader(io.StringIO(csv_text)))) > 2
    for method, value in accuracy.items():
        assert value is not None
        assert any(method in line and f"{value:.1f}" in line for line in markdown.splitlines())
        assert any(method in line and f"{value:.1f}" in line for line in told.getvalue().splitlines())

    # With a third method, what has finished is not trained again.
    finished = {name: (output / name / "result.json").read_bytes() for name in RUNS}
    monkeypatch.setattr(command, "_run_all", in_this_process)
    wider = with_output(TWO_METHODS, output, methods=("source-only", "dann", "gsda"))
    run_suite(wider, {"": base(few_digits)}, Console(file=io.StringIO()))
    assert {name: (output / name / "result.json").read_bytes() for name in RUNS} == finished
    assert "dann" in (output / "table.md").read_text()


def test_a_mistake_that_a_run_finds_comes_out_of_its_process(few_digits: Path, tmp_path: Path) -> None:
    config = parse_config(["digits", "--data-root", str(few_digits), "--groups", "11"], "suite")
    with pytest.raises(UsageError, match="--groups: found 11; expected 1 to 10"):
        run_suite(with_output(TWO_METHODS, tmp_path / "suite"), {"": config}, Console(file=io.StringIO()))
    assert not (tmp_path / "suite").exists()


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The runs that a suite would have started."""
    seen: list[Config] = []

    def keep(configs: list[Config], jobs: int, console: Console) -> list[RunResult]:
        seen.extend(configs)
        return []

    monkeypatch.setattr(command, "_run_all", keep)
    monkeypatch.setattr(command, "_write_tables", lambda *_: None)
    return seen


def test_a_suite_is_every_task_method_and_seed(planned: list[Config]) -> None:
    base_config = PRESETS["digits"]
    run_suite(SuiteSettings("digits"), {"": base_config}, Console(file=io.StringIO()))
    assert len(planned) == 6 * 7 * 3
    assert len({config.run.output for config in planned}) == len(planned)
    first = planned[0]
    assert (first.data.source, first.data.target, first.run.method, first.run.seed) == (
        "mnist",
        "optdigits",
        "source-only",
        0,
    )
    assert first.run.output == Path("runs/suite-digits/digits-mnist-optdigits-source-only-seed0")
    assert {config.adversarial for config in planned} == {base_config.adversarial}


def test_transfer_tasks_of_ones_own_folders(planned: list[Config]) -> None:
    settings = SuiteSettings("folder", methods=("gsda",), seeds=(0,), tasks=("photos -> sketches",))
    run_suite(settings, {"": PRESETS["folder"]}, Console(file=io.StringIO()))
    assert [(config.data.source, config.data.target) for config in planned] == [("photos", "sketches")]


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["digit"], ["TASK", "'digit'"]),
        (["digits", "--tasks", "F-O"], ["--tasks", "'F-O'", "SOURCE->TARGET"]),
        (["digits", "--tasks", "F->usps"], ["usps", "optdigits"]),
        (["digits", "--tasks", "F->O", "fonts->optdigits"], ["--tasks", "twice"]),
        (["digits", "--methods", "gsda", "gdsa"], ["--method", "'gdsa'"]),
        (["digits", "--methods", "gsda", "gsda"], ["--methods", "twice"]),
        (["digits", "--methods"], ["--methods"]),
        (["digits", "--seeds", "-1"], ["--seed", "found -1"]),
        (["digits", "--seeds"], ["--seeds"]),
        (["digits", "--jobs", "-1"], ["--jobs", "found -1"]),
        (["digits", "--steps", "0"], ["--steps", "found 0"]),
        (["digits", "--stesp", "5"], ["--stesp"]),
        (["digits", "--method", "gsda"], ["--method", "--methods"]),
        (["digits", "--seed=5"], ["--seed", "--seeds"]),
        (["digits", "--target", "mnist"], ["--target", "--tasks"]),
        (["folder"], ["--tasks", "SOURCE->TARGET"]),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    arguments: list[str],
    mentioned: list[str],
    tmp_path: Path,
    planned: list[Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["suite", *arguments, "--output", str(tmp_path / "suite")])
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    written = capsys.readouterr()
    assert end.value.code == 2
    assert written.out == ""
    (line,) = written.err.splitlines()
    assert line.startswith("error: ")
    for part in mentioned:
        assert part in line
    assert planned == []
    assert list(tmp_path.iterdir()) == []
