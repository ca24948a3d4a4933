"""The suite of every benchmark: from its command, on a small tree in its own layout, to tables beside the paper's."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_trees import TASKS
from rich.console import Console
from table_cells import squeezed

from gsda_fast import suite as command
from gsda_fast import suite_runs
from gsda_fast.config import Config, preset
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.errors import TrainingError
from gsda_fast.methods.gsda import PRESETS as GSDA_PRESETS
from gsda_fast.results.paper import published_row
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:domain .* published"),
    pytest.mark.filterwarnings("ignore:domain .* found .* images"),
]

METHODS = ("source-only", "gsda")
TRANSFER_TASKS = {
    "visda": ("train->validation",),
    "office31": ("A->W", "W->A"),
    "office31-partial": ("A->W",),
    "office-home": ("Rw->Ar",),
    "office-home-partial": ("Rw->Ar",),
    "folder": ("photos->sketches",),
}
COMPARED = ("visda", "office31", "office-home")
"""The tasks of the paper's tables."""
SMALL = (
    "--seeds", "0", "--loader", "torch", "--workers", "1", "--device", "cpu", "--steps", "3", "--batch-size", "6",
    "--refresh-every", "2", "--confidence-threshold", "0", "--backbone", "resnet18", "--weights", "none",
    "--bottleneck-dim", "8", "--hidden-dim", "8", "--learning-rate", "0.001",
)  # fmt: skip


def in_this_process(configs: list[Config], jobs: int, console: Console) -> list[RunResult | TrainingError]:
    return [train(config, Console(quiet=True)) for config in configs]


@pytest.fixture
def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the suite's command for a task, with images of 32x32 pixels instead of 224x224; returns its folder."""

    def run(task: str, *options: str) -> Path:
        TASKS[task][0](tmp_path / "data")
        preprocessing = replace(BENCHMARKS[task].preprocessing, resize=40, crop=32)
        monkeypatch.setitem(BENCHMARKS, task, replace(BENCHMARKS[task], preprocessing=preprocessing))
        monkeypatch.setattr(suite_runs, "_run_all", in_this_process)
        monkeypatch.setattr(sys, "argv", [
            "suite", task, "--methods", *METHODS, "--tasks", *TRANSFER_TASKS[task],
            "--data-root", str(tmp_path / "data"), "--output", str(tmp_path / "suite"), *SMALL, *options,
        ])  # fmt: skip
        command.main()
        return tmp_path / "suite"

    return run


def results(folder: Path) -> dict[str, list[RunResult]]:
    """The outcomes of each method, by the names of their folders."""
    found = {
        method: [RunFolder(path).read_result() for path in sorted(folder.glob(f"*-{method}-seed0"))]
        for method in METHODS
    }
    return {method: [result for result in of if result is not None] for method, of in found.items()}


def cells(table: dict[str, Any], label: str, kind: str = "ours") -> dict[str, float | None] | None:
    """A row of a table in table.json, by column; None if there is none."""
    rows = [row for row in table["rows"] if (row["label"], row["kind"]) == (label, kind)]
    return {name: cell["mean"] for name, cell in zip(table["columns"], rows[0]["cells"])} if rows else None


# The others have nothing that these two lack, and take as long again.
@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=[] if task in ("visda", "office31") else [pytest.mark.slow]) for task in TRANSFER_TASKS],
)
def test_suite_from_its_command_to_its_tables(task: str, run_suite: Any) -> None:
    folder = run_suite(task, "--report")
    found = results(folder)
    assert [len(of) for of in found.values()] == [len(TRANSFER_TASKS[task])] * 2

    tables = {table["choice"]: table for table in json.loads((folder / "table.json").read_text())}
    assert list(tables) == ["last", "label_free", "best"]
    for choice, table in tables.items():
        for method in METHODS:
            ours, paper = cells(table, method), cells(table, method, "paper")
            difference = cells(table, method, "difference")
            assert ours is not None
            assert (paper is None) == (difference is None) == (task not in COMPARED)
            accuracies = [getattr(result.accuracy, choice) for result in found[method]]
            overall = "overall" if task == "visda" else "avg" if len(accuracies) > 1 else table["columns"][0]
            assert ours[overall] == pytest.approx(sum(accuracies) / len(accuracies))
            if paper is None or difference is None:
                continue
            published = published_row(task, method)
            assert published is not None
            assert any(value is not None for value in difference.values())
            for column, value in difference.items():
                if paper[column] is None:
                    assert value is None
                else:
                    assert value == pytest.approx((ours[column] or 0) - (paper[column] or 0))
                if column in published.values:
                    assert paper[column] == published.values[column]

    markdown = squeezed((folder / "table.md").read_text())
    assert markdown.count("| gsda |") == 3
    assert ("| paper: GSDA, Table" in markdown) == (task in COMPARED)
    assert "upper bound" in markdown
    with (folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["method"] for line in lines} == set(METHODS)
    assert {line["kind"] for line in lines} == ({"ours", "paper", "difference"} if task in COMPARED else {"ours"})
    assert (folder / "report.html").is_file()

    assert_presets_are_stored(task, folder)
    if task == "visda":
        assert_visdas_table_has_the_classes_and_both_averages(folder)


def assert_presets_are_stored(task: str, folder: Path) -> None:
    given = {option.removeprefix("--").replace("-", "_") for option in SMALL if option.startswith("--")}
    given |= {"method", "source", "target", "data_root", "output", "seed"}
    # What the preset leaves to the machine is stored as it was chosen.
    automatic = {"auto", 0, None}
    stored = {
        method: [RunFolder(path).read_config() for path in folder.glob(f"*-{method}-seed0")] for method in METHODS
    }
    for method, of_method in stored.items():
        assert len(of_method) == len(TRANSFER_TASKS[task])
        settings_of = preset(task, method).to_dict()
        for of_run in of_method:
            assert of_run["task"] == task
            assert of_run["run"]["method"] == method
            for section, settings in settings_of.items():
                for name, value in settings.items() if section != "task" else ():
                    if name not in given and not isinstance(value, dict) and value not in automatic:
                        assert of_run[section][name] == value, name
    if task in GSDA_PRESETS:
        paper = GSDA_PRESETS[task]["method"]
        for of_run in stored["gsda"]:
            assert {name: of_run["method"][name] for name in ("alpha", "beta", "groups")} == paper


def assert_visdas_table_has_the_classes_and_both_averages(folder: Path) -> None:
    last = json.loads((folder / "table.json").read_text())[0]
    classes = BENCHMARKS["visda"].classes
    assert classes is not None
    assert last["columns"] == [*classes, "mean per class", "overall"]
    for method, (result,) in results(folder).items():
        ours = cells(last, method)
        assert ours is not None
        assert [ours[name] for name in classes] == list(result.per_class)
        assert ours["mean per class"] == result.mean_per_class.last
        assert ours["overall"] == result.accuracy.last
    paper = cells(last, "gsda", "paper")
    assert paper is not None
    assert paper["mean per class"] == pytest.approx(82.5, abs=0.05)
    assert paper["overall"] == 81.5
