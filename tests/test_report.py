import io
import subprocess
import sys
from pathlib import Path

import pytest
from fabricated_runs import fabricated_run
from rich.console import Console

from gsda_fast import report
from gsda_fast.commands import run_command
from gsda_fast.errors import UsageError
from gsda_fast.report import ReportOptions, main
from gsda_fast.results.run_folder import RunFolder


def make_run(path: Path) -> RunFolder:
    run = RunFolder(path)
    run.prepare()
    run.write_config({"task": "digits", "source": "mnist", "target": "fonts", "method": path.name, "seed": 0})
    run.append_metrics(1, {"classification": 1.0})
    return run


def test_command_writes_the_page_and_names_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "gsda")
    command = [sys.executable, "-m", "gsda_fast.report", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"report: {run.report_path}\n"
    assert "<h1>digits: mnist → fonts</h1>" in run.report_path.read_text(encoding="utf-8")


def test_a_terminal_is_told_that_the_page_is_being_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(report, "plain_console", lambda: Console(file=terminal, force_terminal=True))
    monkeypatch.setattr(sys, "argv", ["report", str(make_run(tmp_path / "gsda").path)])
    main()
    assert "drawing the page" in terminal.getvalue()


def test_folder_that_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path}: found neither config.toml")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_several_runs_are_compared_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "runs" / name) for name in ("source-only", "gsda")]
    monkeypatch.setattr(sys, "argv", ["report", *(str(run.path) for run in runs)])
    main()
    page = tmp_path / "runs" / "report" / "report.html"
    assert capsys.readouterr().out == f"report: {page}\n"
    text = page.read_text(encoding="utf-8")
    assert "<strong>source-only has not finished.</strong>" in text
    assert "<strong>gsda has not finished.</strong>" in text


def test_many_runs_are_grouped_by_their_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        fabricated_run(tmp_path, method, seed=seed, accuracy=60.0 + seed)
        for method in ("source-only", "a method of ours")
        for seed in range(7)
    ]
    monkeypatch.setattr(sys, "argv", ["report", *(str(run.path) for run in runs)])
    main()
    page = tmp_path / "report" / "report.html"
    assert capsys.readouterr().out == f"report: {page}\n"
    text = page.read_text(encoding="utf-8")
    assert "digits: 2 methods, M → F, 7 seeds" in text
    assert "63.0 <small>± 2.2</small>" in text


def test_output_and_points_are_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "gsda")
    monkeypatch.setattr(sys, "argv", ["report", str(run.path), "--output", str(tmp_path / "out"), "--points", "10"])
    main()
    assert (tmp_path / "out" / "report.html").is_file()
    assert not run.report_path.exists()


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="RUN: found none"):
        ReportOptions(())
    with pytest.raises(UsageError, match="--points: found 1"):
        ReportOptions((Path("x"),), points=1)
