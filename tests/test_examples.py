"""Every example runs, and what it prints is what it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def printed(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def percentages(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"([\d.]+) ?%", text)]


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'printed\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


def test_own_loop(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source_only, adapted = percentages(printed("own_loop.py", capsys, monkeypatch))
    assert adapted > source_only + 10


def test_own_embeddings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = printed("own_embeddings.py", capsys, monkeypatch)
    source_only, adapted = percentages(told)
    assert adapted > source_only + 10
    assert "its classes are cat, dog, fox" in told
    assert "{'learning_rate': 0.02}" in told


def test_own_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = printed("own_images.py", capsys, monkeypatch, tmp_path)
    assert f"run: {tmp_path / 'run'}" in told
    assert re.search(r"square/0\.png: (circle|square|triangle) \{'circle': [\d.]+, 'square'", told)
    assert (tmp_path / "run" / "result.json").is_file()


def test_use_export(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = printed("use_export.py", capsys, monkeypatch)
    assert "classes ['0', '1', '2']" in told
    differences = [float(value) for value in re.findall(r"at most (\S+)", told)]
    assert len(differences) == 2
    assert max(differences) < 1e-5
