"""docs/methods.md: every method has its heading, every option of a method its name there."""

import dataclasses
import re
from pathlib import Path

import pytest

from gsda_fast.methods import METHODS
from gsda_fast.methods.terms import TERMS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text()
HEADINGS = {name for line in re.findall(r"^### (.*)$", PAGE, re.MULTILINE) for name in re.split(r", | and ", line)}


def test_every_method_has_its_heading_and_no_other_has() -> None:
    assert set(METHODS) == HEADINGS


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_named(name: str) -> None:
    options = {field.name.replace("_", "-") for field in dataclasses.fields(METHODS[name].settings)}
    assert {each for each in options if f"`{each}`" not in PAGE} == set()


def test_every_term_is_in_the_table() -> None:
    assert {name for name in TERMS if f"| `{name}` |" not in PAGE} == set()
