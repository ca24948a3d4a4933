"""What an import brings along, and what the package offers without it."""

import subprocess
import sys

import pytest

import gsda_fast

HEAVY = ("torchmetrics", "torchvision", "pandas", "matplotlib", "sklearn", "scipy", "tensorboard", "torch._dynamo")


def loaded_after(statement: str) -> set[str]:
    """The modules of a fresh interpreter after a statement."""
    told = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True).stdout.split())


@pytest.fixture(scope="module")
def after_train() -> set[str]:
    return loaded_after("import gsda_fast.train, gsda_fast.api")


@pytest.mark.parametrize("module", HEAVY)
def test_training_imports_nothing_that_it_may_not_need(after_train: set[str], module: str) -> None:
    assert "gsda_fast.training.trainer" in after_train
    assert module not in after_train


@pytest.mark.parametrize(
    "arguments", ["train", "evaluate", "predict", "export", "report", "suite digits", "embed", "data", "data verify"]
)
def test_help_does_not_wait_for_torch(arguments: str) -> None:
    """`train TASK --help` alone needs it: it lists the options of a method, which stand in the method's file."""
    command, *rest = arguments.split()
    module = "gsda_fast.data.__main__" if command == "data" else f"gsda_fast.{command}"
    loaded = loaded_after(
        f"import contextlib, io, sys\nsys.argv = ['', *{rest}, '--help']\n"
        f"with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    import {module} as command; command.main()"
    )
    assert module in loaded
    assert "torch" not in loaded


def test_a_heavy_import_would_be_noticed() -> None:
    assert "matplotlib" in loaded_after("import matplotlib")


def test_the_package_itself_imports_no_torch() -> None:
    loaded = loaded_after("import gsda_fast; gsda_fast.__version__")
    assert "gsda_fast" in loaded
    assert "torch" not in loaded


def test_every_public_name_is_there_when_it_is_asked_for() -> None:
    assert set(gsda_fast.__all__) <= set(dir(gsda_fast))
    for name in gsda_fast.__all__:
        assert getattr(gsda_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gsda_fast.nothing
