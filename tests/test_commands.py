import errno
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import pytest
import tyro
from image_trees import refuse
from rich.table import Table

from gsda_fast.commands import parse_command_line, run_command
from gsda_fast.console import echo, plain_console, spreadsheet_text
from gsda_fast.errors import FileWarning, UsageError, UsageWarning, visible
from gsda_fast.results.run_folder import RunFolder


@dataclass(frozen=True)
class Options:
    """Trains."""

    task: Annotated[Literal["digits", "visda"], tyro.conf.Positional]
    """The task."""
    steps: int = 5
    """Number of steps."""
    backend: Literal["auto", "torch", "reference", "native", "triton"] = "auto"
    """What computes the adversarial terms."""


def parse(*arguments: str) -> Callable[[], Options]:
    return lambda: tyro.cli(Options, args=arguments)


def test_good_options_pass() -> None:
    assert parse_command_line(parse("visda", "--steps", "7")) == Options("visda", 7)


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print("[raw] photos/:key:.png", highlight=False)
    assert capsys.readouterr().out == "[raw] photos/:key:.png\n"


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (("digits", "--stesp", "3"), ["Unrecognized options", "--stesp"]),
        (("digits", "--backend", "cuda"), ["'cuda'", "--backend", "'triton'"]),
        (("digits", "--steps", "many"), ["--steps", "'many'"]),
        (("digits", "--steps"), ["Missing value", "--steps"]),
        (("office",), ["'office'", "'digits'"]),
        ((), ["Missing", "{digits,visda}"]),
    ],
)
def test_a_mistake_is_named_by_tyro(
    arguments: tuple[str, ...], mentioned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command_line(parse(*arguments))
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    for words in mentioned:
        assert words in captured.err


def test_help_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_command_line(parse("--help"))
    assert end.value.code in (0, None)
    assert "Number of steps" in capsys.readouterr().out


@dataclass(frozen=True)
class Checked:
    steps: int = 5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError("--steps", found=str(self.steps), expected="1 or more")


@dataclass(frozen=True)
class Nested:
    training: tyro.conf.OmitArgPrefixes[Checked]


@pytest.mark.parametrize("options", [Checked, Nested])
def test_usage_error_of_the_options_stays_itself(options: type) -> None:
    with pytest.raises(UsageError, match=r"^--steps: found 0; expected 1 or more$"):
        parse_command_line(lambda: tyro.cli(options, args=["--steps", "0"]))


def test_warning_on_standard_error_survives(capsys: pytest.CaptureFixture[str]) -> None:
    def parse_with_warning() -> int:
        print("a warning", file=sys.stderr)
        return 1

    assert parse_command_line(parse_with_warning) == 1
    assert capsys.readouterr().err == "a warning\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_exit_code(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: returned)
    assert end.value.code == code


def test_usage_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> NoReturn:
        raise UsageError("--steps", found="0", expected="1 or\n  more", remedy="ask for one")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --steps: found 0; expected 1 or more; ask for one\n"


def test_folder_without_permission_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: RunFolder.existing(tmp_path / "runs" / "first"))  # type: ignore[arg-type, return-value]
    assert end.value.code == 2
    told = f"error: {tmp_path / 'runs' / 'first'}: found Permission denied; expected permission to use it\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("rank", "lines"), [("0", ["warning: domain amazon: found 31 images"]), ("1", [])])
def test_warning_is_one_line_of_the_first_process(
    rank: str, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            run_command(lambda: warnings.warn("domain amazon: found 31 images", UsageWarning, stacklevel=1))
    assert capsys.readouterr().err.splitlines() == lines


def test_warning_of_another_package_keeps_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, file, line, *_: print(f"{file}: {message}", file=sys.stderr)
        with pytest.raises(SystemExit):
            run_command(lambda: warnings.warn("old", DeprecationWarning, stacklevel=1))
    assert capsys.readouterr().err.strip() == f"{__file__}: old"


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_a_stop_in_good_order_changes_nothing(number: signal.Signals) -> None:
    program = f"""
import atexit, os
from gsda_fast.commands import run_command
from gsda_fast.errors import Stopped

def main():
    raise Stopped("stopped")

atexit.register(os.kill, os.getpid(), {int(number)})
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


def test_defect_keeps_its_traceback() -> None:
    def main() -> NoReturn:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_command(main)


def test_refusal_that_names_no_file_keeps_its_traceback() -> None:
    def main() -> NoReturn:
        raise PermissionError(1, "Operation not permitted")

    with pytest.raises(PermissionError):
        run_command(main)


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\nb", "\x9b31m", "a\u2028b", "\u202egpj", "\udce9", "\x7f"])
def test_what_a_terminal_would_obey_is_shown_as_escapes(capsys: pytest.CaptureFixture[str], text: str) -> None:
    table = Table(text.replace("\n", ""), title=text.replace("\n", ""))
    table.add_row(text.replace("\n", ""))
    console = plain_console()
    console.print(table)
    console.print(text.replace("\n", ""), soft_wrap=True)
    echo(text)
    with pytest.raises(SystemExit):
        run_command(lambda: refuse_it(text))
    captured = capsys.readouterr()
    shown = captured.out.replace("\n", "") + captured.err.replace("\n", "")
    assert all(character.isprintable() for character in shown)
    assert visible(text).startswith("\\") or visible(text).startswith("a\\")
    assert visible("größe 漢字 \u00a0") == "größe 漢字 \u00a0"


def refuse_it(text: str) -> NoReturn:
    raise UsageError(text, found=f"'{text}'", expected=text, remedy=text)


@pytest.mark.parametrize("arguments", [["--output", ""], ["--output="], ["digits", "--data-root", "", "--steps", "3"]])
def test_an_option_with_nothing_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as end:
        run_command(lambda: pytest.fail("the command was run"))
    assert end.value.code == 2
    assert "found an empty text; expected a value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [(errno.EROFS, 2), (errno.ENOTDIR, 2), (errno.EACCES, 2), (errno.ENOSPC, 1), (errno.EIO, 1), (errno.EDQUOT, 1)],
)
def test_a_disk_that_refuses_is_one_line(code: int, exit_code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> NoReturn:
        raise OSError(code, "the reason", "/data/x\x1b.npy")

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == exit_code
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("error: /data/x\\x1b.npy: ")


def test_a_table_with_a_closed_pipe_ends_with_141() -> None:
    endless = "[plain_console().print('x' * 99) for _ in range(9999)]"
    program = f"from gsda_fast.commands import *; from gsda_fast.console import *\nrun_command(lambda: {endless})"
    command = f'"{sys.executable}" -c "{program}" | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("141", "")


def test_a_terminal_that_is_not_utf8_gets_escapes() -> None:
    both = "(plain_console().print('größe'), echo('größe'))[0]"
    program = f"from gsda_fast.commands import *; from gsda_fast.console import *\nrun_command(lambda: {both})"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout == 2 * "gr\\xf6\\xdfe\n"
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "shown"), [("=1+1", "'=1+1"), ("@x", "'@x"), ("-a.jpg", "'-a.jpg"), ("a=b", "a=b")])
def test_no_name_is_a_formula(name: str, shown: str) -> None:
    assert spreadsheet_text(name) == shown


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_one_process_has_met_is_told_by_it(
    rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            run_command(lambda: warnings.warn("a.jpg: gone", FileWarning, stacklevel=1))
    assert capsys.readouterr().err == "warning: a.jpg: gone\n"
