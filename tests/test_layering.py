"""The plan of the house: an import goes down a floor or stays on its own, and no two files import each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top. A module stands where the longest prefix of its name is listed.
FLOORS = [
    ["gsda_fast.suite"],
    [
        *("gsda_fast.train", "gsda_fast.evaluate", "gsda_fast.predict", "gsda_fast.export", "gsda_fast.embed"),
        "gsda_fast.data.__main__",
    ],
    [
        *("gsda_fast.run", "gsda_fast.assemble", "gsda_fast.trained", "gsda_fast.monitor", "gsda_fast.resume"),
        "gsda_fast.config",
    ],
    ["gsda_fast.training", "gsda_fast.methods", "gsda_fast.report"],
    [
        *("gsda_fast.losses", "gsda_fast.data", "gsda_fast.results", "gsda_fast.model"),
        *("gsda_fast.efficientnet_lite", "gsda_kernels"),
    ],
    ["gsda_fast.commands"],
    ["gsda_fast.files"],
    ["gsda_fast.errors"],
]
# What a wing may import of this project; its own modules always, `errors` in gsda_fast.
WINGS = {
    "gsda_kernels": set(),
    "gsda_fast.data": set(),
    "gsda_fast.results": {"gsda_fast.data"},
    "gsda_fast.losses": set(),
    "gsda_fast.model": {"gsda_fast.efficientnet_lite"},
    "gsda_fast.efficientnet_lite": set(),
    "gsda_fast.commands": set(),
    "gsda_fast.errors": set(),
    "gsda_fast.files": set(),
    "gsda_fast.methods": {"gsda_fast.losses", "gsda_fast.model", "gsda_fast.data.batches", "gsda_kernels"},
}


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


def floor(module: str) -> int:
    return next(number for number, places in enumerate(FLOORS) if any(inside(module, place) for place in places))


def wing(module: str) -> str:
    return next(place for places in FLOORS for place in places if inside(module, place))


def test_every_module_has_a_floor() -> None:
    assert len(MODULES) > 35
    strangers = [name for name in MODULES if not any(inside(name, place) for places in FLOORS for place in places)]
    assert strangers == ["gsda_fast"]  # its public names, imported by nobody here
    assert not [name for name, imported in IMPORTS.items() if "gsda_fast" in imported]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "gsda_fast"])
def test_no_import_goes_up(module: str) -> None:
    assert [each for each in IMPORTS[module] if floor(each) < floor(module)] == []


@pytest.mark.parametrize("place", WINGS)
def test_a_wing_imports_only_what_it_may(place: str) -> None:
    allowed = {place, *WINGS[place]} | ({"gsda_fast.errors", "gsda_fast.files"} if place != "gsda_kernels" else set())
    members = [name for name in MODULES if name != "gsda_fast" and wing(name) == place]
    assert members
    strangers = {
        f"{name} -> {each}" for name in members for each in IMPORTS[name] if not any(inside(each, a) for a in allowed)
    }
    assert strangers == set()


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
    assert (floor("gsda_fast.suite"), floor("gsda_fast.data.digits"), wing("gsda_fast.train")) == (
        0,
        4,
        "gsda_fast.train",
    )
