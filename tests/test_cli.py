"""`gsda COMMAND` is `python -m gsda_fast.COMMAND`, and every command says which version it is."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

import gsda_fast
from gsda_fast import cli
from gsda_fast.commands import program, run_command
from gsda_fast.config import COMMON_OPTIONS, TASKS

ROOT = Path(__file__).resolve().parents[1]


class Called:
    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/gsda", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        written = capsys.readouterr()
        self.code, self.out, self.told = end.value.code, written.out, written.err


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_without_a_command_all_are_listed(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(capsys, monkeypatch, *arguments)
    assert called.code == 0
    assert all(re.search(rf"^  {name} +\S", called.out, re.M) for name in cli.COMMANDS)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(capsys, monkeypatch, "trian", "digits")
    assert called.code == 2
    assert called.told.startswith("error: gsda: found 'trian'; expected a command: train, evaluate, ")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_the_command_as_it_was_called(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(capsys, monkeypatch, command, "--help")
    assert called.code == 0
    assert f"usage: gsda {command}" in called.out
    assert "python -m" not in called.out.partition("\n")[0]


@pytest.mark.parametrize(
    "command",
    [
        ("train", "digits"), ("suite", "digits"), ("evaluate",), ("predict",), ("export",), ("report",), ("embed",),
        ("data", "verify"), ("data", "pack"), ("data", "build"),
    ],
)  # fmt: skip
def test_help_has_no_python_in_it(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(capsys, monkeypatch, *command, "--help")
    assert called.code == 0
    assert not re.search(r"None|\(default: \)|Literal", called.out)


def test_the_help_of_training_begins_with_what_people_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Called(capsys, monkeypatch, "train", "digits", "--help").out
    assert told.index("Most often used:") < told.index("run options")
    assert {option for option in COMMON_OPTIONS if not re.search(rf"^\W+{option} ", told, re.M)} == set()


def test_positional_arguments_have_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for command, shown in {
        "suite": "TASK",
        "evaluate": "RUN",
        "predict": r"RUN FOLDER\|FILE",
        "export": "RUN",
        "embed": r"TASK\|FOLDER",
    }.items():
        usage = Called(capsys, monkeypatch, command, "--help").out.partition("\n")[0]
        assert re.match(rf"usage: gsda {command} \[-h\] .*{shown}", usage)


def test_what_may_be_left_out_is_still_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(capsys, monkeypatch, "evaluate", "nowhere", "--test-crops", "3")
    assert called.code == 2
    assert "--test-crops" in called.told
    assert called.told.count("nowhere") == 0
    assert "found nothing" in Called(capsys, monkeypatch, "evaluate", "nowhere", "--test-crops", "10").told


def test_help_without_a_task_names_the_tasks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(capsys, monkeypatch, "train", "--help")
    assert all(task in called.out for task in TASKS)


@pytest.mark.parametrize("arguments", [("--version",), *((command, "--version") for command in cli.COMMANDS)])
def test_every_command_says_its_version(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = Called(capsys, monkeypatch, *arguments)
    assert (called.code, called.out) == (0, f"gsda-fast {gsda_fast.__version__}\n")


def test_arguments_reach_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(capsys, monkeypatch, "train", "digits", "--steps", "0")
    assert called.code == 2
    assert "--steps: found 0; expected a whole number >= 1" in called.told
    assert "gsda data" in Called(capsys, monkeypatch, "data", "nothing").told


def test_a_hint_is_what_the_user_would_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GSDA_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    called = Called(capsys, monkeypatch, "train", "pictures")
    assert called.code == 2
    assert "`gsda data build pictures` makes it" in called.told


def test_a_module_is_called_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/gsda_fast/train.py", "--version"])
    assert program("train") == "python -m gsda_fast.train"
    with pytest.raises(SystemExit):
        run_command(lambda: pytest.fail("ran"))


def test_all_modules_with_a_command_are_there() -> None:
    for command in cli.COMMANDS:
        module = importlib.import_module(f"gsda_fast.{'data.__main__' if command == 'data' else command}")
        assert callable(module.main)
    own = {path.stem for path in (ROOT / "gsda_fast").glob("*.py") if "run_command(" in path.read_text()}
    assert own - {"cli", "commands"} == cli.COMMANDS.keys() - {"data"}


def test_the_packages_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"gsda": "gsda_fast.cli:main"}
    stated = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert stated is not None
    assert stated[1] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    for package in ("gsda_fast", "kernels/gsda_kernels"):
        assert (ROOT / package / "py.typed").is_file()
