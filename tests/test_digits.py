import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsda_fast.data import digits
from gsda_fast.errors import UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits.build(tmp_path_factory.mktemp("digits") / "set")


def test_counts_and_form(root: Path) -> None:
    counts = {domain: len(list((root / domain).rglob("*.png"))) for domain in digits.DOMAINS}
    assert counts == {"mnist": 2000, "optdigits": 1797, "fonts": 100 * len(digits.digit_fonts())}
    assert counts["fonts"] > 1500
    for domain in digits.DOMAINS:
        assert sorted(path.name for path in (root / domain).iterdir()) == list("0123456789")
        image = Image.open(root / domain / "7" / "0000.png")
        assert (image.mode, image.size) == ("L", (16, 16))


@pytest.mark.parametrize("domain", digits.DOMAINS)
def test_white_ink_that_fills_the_box(root: Path, domain: str) -> None:
    mean = np.mean([np.asarray(Image.open(path)) for path in (root / domain / "0").iterdir()], axis=0)
    assert mean[:, [0, -1]].max() < 40  # left and right of a zero: background
    assert mean[7:9, 7:9].max() < 110  # and its inside
    assert mean[:, :].max() > 140
    ink = np.flatnonzero(mean.max(axis=1) > 60)
    assert ink[-1] - ink[0] >= 11  # of 16 rows


def test_symbol_fonts_are_left_out() -> None:
    names = {path.stem for path in digits.digit_fonts()}
    assert not names & {"cmex10", "cmsy10", "STIXNonUni", "LastResortHE-Regular"}
    assert {"DejaVuSans", "STIXGeneral", "cmr10"} <= names


def test_every_variant_of_a_glyph_differs(root: Path) -> None:
    variants = [(root / "fonts" / "5" / f"{number:04d}.png").read_bytes() for number in range(10)]
    assert len(set(variants)) == 10


def test_fonts_are_the_same_when_made_again(root: Path) -> None:
    again: dict[int, list[bytes]] = {digit: [] for digit in range(10)}
    for digit, image in digits._fonts():
        again[digit].append(image.tobytes())
    for digit, images in again.items():
        files = sorted((root / "fonts" / str(digit)).iterdir())
        assert [Image.open(path).tobytes() for path in files] == images


def test_builders_at_the_same_time_agree_and_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_inside = threading.Barrier(2, timeout=30)

    def few() -> Iterator[tuple[int, Image.Image]]:
        both_inside.wait()
        return iter([(digit, Image.new("L", (16, 16), digit)) for digit in range(10)])

    for name in ("_mnist", "_optdigits", "_fonts"):
        monkeypatch.setattr(digits, name, few)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(digits.build, [tmp_path / "set"] * 2)) == [tmp_path / "set"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list((tmp_path / "set").rglob("*.png"))) == 30


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no digits today")

    monkeypatch.setattr(digits, "_optdigits", broken)
    with pytest.raises(RuntimeError, match="no digits today"):
        digits.build(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_written_once(root: Path) -> None:
    before = (root / "mnist" / "0" / "0000.png").stat().st_mtime_ns
    assert digits.build(root) == root
    assert (root / "mnist" / "0" / "0000.png").stat().st_mtime_ns == before


def test_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    folder = digits.default_cache()
    assert folder.parent == Path("/some/cache/gsda_fast")
    assert folder.name.startswith("digits-v1-")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert digits.default_cache() == Path.home() / ".cache/gsda_fast" / folder.name


def test_other_packages_have_a_cache_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digits.default_cache()
    monkeypatch.setattr(digits, "version", lambda name: "1.2" if name == "pillow" else version(name))
    assert digits.default_cache() != before


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"digits cache: found .*file, which cannot be written"):
        digits.build(tmp_path / "file" / "set")
