"""The page on tiles of several heights: its bytes by hand, and which launches it compiles."""

from collections import Counter
from pathlib import Path

import pytest

import gsda_kernels as gk

pytest.importorskip("triton")
if gk.available_backends("cpu")["triton"] is None:
    pytest.skip("TRITON_INTERPRET is set: such a process cannot compile", allow_module_level=True)

from benchmarks import tiles
from benchmarks.cross_compile import Launch
from benchmarks.static_report import CHIPS, Report

SUMS = {f"weight_gradient {layer}{moves}" for layer in (1, 2) for moves in ("", ", moves")}


def test_bytes_by_hand() -> None:
    """VisDA, 128 + 128: 2560 pairs, 52 tiles of 64 rows or 34 of 128, W2 in half precision."""
    rows = [line.split("|") for line in tiles.bytes_table("mixed", (64, 128))]
    found = {row[2].strip(): row for row in rows if row[1].strip() == "visda, 128 + 128"}
    for height, count in (("64", 52), ("128", 34)):
        padded = count * int(height)
        read = count * 1024 * 1024 * 2 + padded * 1024 * 2 * 8 + 2 * 2560 * 1024 * 2
        assert float(found[height][3]) == pytest.approx(padded / 2560, abs=0.005)
        assert float(found[height][5]) == round(read / 1e6)
    assert float(found["64"][-2]) == 1.0
    assert float(found["128"][-2]) == pytest.approx(float(found["128"][-3]) / float(found["64"][-3]), abs=0.01)


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that a step of training launches, on every chip, with the rows that the page says."""
    seen: list[tuple[str, int, int]] = []

    def report(name: str, launch: Launch, capability: int, folder: Path) -> Report:
        height = launch.options["BLOCK_ROWS"]
        seen.append((name, height, capability))
        # Weights of a launch over pairs are the copies: as narrow as the features.
        assert name not in tiles.OVER_PAIRS or len({arg.dtype.itemsize for arg in launch.args[:2]}) == 1
        return Report(name, f"{height}", 8, 3, 100, 0, 0, 2, 10, 0.5, Counter())

    monkeypatch.setattr(tiles, "report", report)
    output = tmp_path / "tiles.md"
    assert tiles.main(["--output", str(output)]) == 0
    over_pairs = {(kernel, height, chip) for kernel in tiles.OVER_PAIRS for height in tiles.HEIGHTS for chip in CHIPS}
    assert len(seen) == len(set(seen))
    assert set(seen) == over_pairs | {(kernel, 64, chip) for kernel in SUMS for chip in CHIPS}
    text = output.read_text()
    assert text.splitlines()[0].endswith("model, not measured")
    assert "| second_layer | 256 | 8, 3 | 100 / 100 / 100 | 0 / 0 / 0 |" in text
