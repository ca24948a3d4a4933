"""docs/methods.md: every method has its heading, every option of a method its name there."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from gsda_fast.methods import METHODS
from gsda_fast.methods.terms import TERMS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "methods.md").read_text()
HEADINGS = {name for line in re.findall(r"^### (.*)$", PAGE, re.MULTILINE) for name in re.split(r", | and ", line)}


def test_every_method_has_its_heading_and_no_other_has() -> None:
    assert set(METHODS) == HEADINGS


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_named(name: str) -> None:
    options = {field.name.replace("_", "-") for field in dataclasses.fields(METHODS[name].settings)}
    assert {each for each in options if f"`{each}`" not in PAGE} == set()


def test_every_term_is_in_the_table() -> None:
    assert {name for name in TERMS if f"| `{name}` |" not in PAGE} == set()


def test_a_method_file_of_more_than_a_hundred_lines_has_a_reason() -> None:
    files = {Path(inspect.getfile(entry.method)) for entry in METHODS.values()}
    long = {file.name for file in files if len(file.read_text().splitlines()) > 100}
    reasons = re.findall(r"^\| `(\w+\.py)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    assert long == set(reasons)
