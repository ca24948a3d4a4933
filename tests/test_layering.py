"""The plan of the house: an import goes down a floor or stays in its wing, and no two files import each other."""

import ast
import dataclasses
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from gsda_fast.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]

# From the top. A module stands where the longest prefix of its name is listed: a place is a file, or a folder and all
# that is in it.
FLOORS = [
    ["gsda_fast.train", "gsda_fast.evaluate", "gsda_fast.predict", "gsda_fast.export", "gsda_fast.suite",
     "gsda_fast.suite_options", "gsda_fast.suite_runs", "gsda_fast.slurm",
     "gsda_fast.embed", "gsda_fast.data.__main__", "gsda_fast.api", "gsda_fast.sklearn", "gsda_fast.cli"],
    ["gsda_fast.run", "gsda_fast.assemble", "gsda_fast.trained", "gsda_fast.resume", "gsda_fast.monitor",
     "gsda_fast.config"],
    ["gsda_fast.training", "gsda_fast.methods", "gsda_fast.report"],
    ["gsda_fast.losses", "gsda_fast.data", "gsda_fast.results", "gsda_fast.model",
     "gsda_fast.efficientnet_lite"],
    ["gsda_fast.files", "gsda_fast.console", "gsda_fast.commands", "gsda_fast.errors",
     "gsda_fast.options", "gsda_fast.version", "gsda_kernels"],
]  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for name, folder in (("gsda_fast", ROOT / "gsda_fast"), ("gsda_kernels", ROOT / "kernels" / "gsda_kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(source: str, known: set[str]) -> set[str]:
    """The modules of this project that a source file imports, wherever in it: a late import is an import."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            assert node.module is not None
            # `from package import name`: the name may be a module itself.
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in below}
    return {name for name in found if name.partition(".")[0] in ("gsda_fast", "gsda_kernels")}


IMPORTS = {name: imports_of(path.read_text(), set(MODULES)) for name, path in MODULES.items()}


def inside(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def place_of(module: str) -> str:
    """The wing of a module: its longest place in the list."""
    found = [place for places in FLOORS for place in places if inside(module, place)]
    return max(found, key=len)


def floor(module: str) -> int:
    return next(number for number, places in enumerate(FLOORS) if place_of(module) in places)


def test_every_module_has_a_floor() -> None:
    assert len(MODULES) > 35
    strangers = [name for name in MODULES if not any(inside(name, place) for places in FLOORS for place in places)]
    assert strangers == ["gsda_fast"]  # its public names, imported by nobody here
    assert not [name for name, imported in IMPORTS.items() if "gsda_fast" in imported]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "gsda_fast"])
def test_no_import_goes_up(module: str) -> None:
    assert [each for each in IMPORTS[module] if floor(each) < floor(module)] == []


@pytest.mark.parametrize("place", ["gsda_fast.training", "gsda_fast.methods", "gsda_fast.losses", "gsda_kernels"])
def test_the_engine_has_never_heard_of_a_configuration_or_a_command(place: str) -> None:
    members = [name for name in MODULES if inside(name, place)]
    assert members
    above = {place for places in FLOORS[:2] for place in places} | {"gsda_fast.commands", "gsda_fast.report"}
    strangers = {f"{name} -> {each}" for name in members for each in IMPORTS[name] if place_of(each) in above}
    assert strangers == set()
    assert "Config" not in {
        node.id
        for name in members
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, ast.Name)
    }


def test_losses_and_kernels_are_for_anyone() -> None:
    """Pure functions of tensors: they import nothing else of this project."""
    for place in ("gsda_fast.losses", "gsda_kernels"):
        strangers = {
            each for name in MODULES if inside(name, place) for each in IMPORTS[name] if not inside(each, place)
        }
        assert strangers - {"gsda_kernels"} == set()


def options_named(source: str, options: set[str]) -> set[str]:
    """Options of methods that a source names: as an attribute of something named `method` or `settings`, or whole as a
    string. A method of an object that is called, such as `dict.update`, is none."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & options
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner in ("method", "settings", "adversarial"):
                found |= {node.attr} & options
    return found


OPTIONS = {field.name for entry in METHODS.values() for field in dataclasses.fields(entry.settings)}

HOMONYMS = {"gsda_fast.predict": {"confidence"}, "gsda_fast.results.records": {"ramp"}}
"""Columns of predict's table and of the metrics, which are no options."""


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("gsda_fast.")])
def test_no_file_but_a_methods_own_names_its_options(module: str) -> None:
    if inside(module, "gsda_fast.methods"):
        pytest.skip("its own")
    assert options_named(MODULES[module].read_text(), OPTIONS) - HOMONYMS.get(module, set()) == set()


def test_an_option_that_is_named_is_found() -> None:
    source = "a = config.method.beta; b = settings.alpha; c = 'groups'; d = f(alpha=1); e = {}.update(x); f = 'a beta'"
    assert options_named(source, OPTIONS) == {"beta", "alpha", "groups"}


def test_no_two_files_import_each_other() -> None:
    graph = {name: imported & set(MODULES) - {name} for name, imported in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_are_found_wherever_they_stand() -> None:
    """The test above would notice: each form of an import, at the top of a file and inside a function."""
    known = {"gsda_fast.train", "gsda_fast.data.digits"}
    source = """
import torch, gsda_kernels.pairs
from gsda_fast.data import digits, benchmarks
def late():
    from gsda_fast.train import train
"""
    expected = {"gsda_kernels.pairs", "gsda_fast.data.digits", "gsda_fast.data", "gsda_fast.train"}
    assert imports_of(source, known) == expected
    assert (floor("gsda_fast.suite"), floor("gsda_fast.data.digits"), floor("gsda_fast.data.__main__")) == (0, 3, 0)
    assert place_of("gsda_fast.training.trainer") == "gsda_fast.training"
