"""The tables of measurements are what the documents' commands make of the raw files beside them."""

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import loader_summary, summary, training_summary

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (summary, "head-cpu"),
        (loader_summary, "loaders-cpu"),
        (loader_summary, "data-wait-cpu"),
        (training_summary, "training-digits-cpu"),
        (training_summary, "training-resnet50-cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_table_follows_from_the_raw_file(module: ModuleType, name: str, tmp_path: Path) -> None:
    raw = Path(shutil.copy(RESULTS / f"{name}.json", tmp_path))
    module.main([str(raw)])
    assert raw.with_suffix(".md").read_text() == (RESULTS / f"{name}.md").read_text()
