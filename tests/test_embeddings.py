import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gsda_fast.data import embeddings
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import open_domain, open_features, open_pair
from gsda_fast.data.embeddings import digest_of_table, read_embeddings, write_table
from gsda_fast.errors import UsageError

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{"features": ROWS, **arrays})
    return path


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["cat", "dog", "cat", "ape"], ("ape", "cat", "dog"), [1, 2, 1, 0]),
        (np.array([b"cat", b"dog", b"cat", b"ape"]), ("ape", "cat", "dog"), [1, 2, 1, 0]),
        ([10, 9, 10, 100], ("9", "10", "100"), [1, 0, 1, 2]),
        (np.array([1, 1, 3, 0], dtype=np.uint8), ("0", "1", "3"), [1, 1, 2, 0]),
        ([0, -1, 2, -1], ("0", "2"), [0, -1, 1, -1]),
        (None, (), [-1, -1, -1, -1]),
    ],
)
def test_labels_are_numbers_or_texts(tmp_path: Path, labels: Any, classes: tuple[str, ...], numbers: list[int]) -> None:
    arrays = {} if labels is None else {"labels": np.asarray(labels)}
    read = read_embeddings(npz(tmp_path / "a.npz", **arrays))
    assert (read.classes, read.labels.tolist(), read.labels.dtype) == (classes, numbers, np.int64)
    np.testing.assert_array_equal(read.rows.values, ROWS[None])
    assert read.names == ["row 0", "row 1", "row 2", "row 3"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_every_floating_type_and_both_shapes(tmp_path: Path, dtype: str) -> None:
    for features in (ROWS, np.stack([ROWS, ROWS + 1])):
        np.save(tmp_path / "a.npy", features.astype(dtype))
        rows = read_embeddings(tmp_path / "a.npy").rows
        np.testing.assert_array_equal(rows.values, features.reshape(-1, 4, 3))
        assert rows.values.dtype == np.dtype(dtype).newbyteorder("=")
        assert (rows.views, rows.dim) == (features.size // 12, 3)


def test_large_files_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_READ_BYTES", 16)
    np.save(tmp_path / "a.npy", ROWS)
    values = read_embeddings(tmp_path / "a.npy").rows.values
    assert isinstance(values.base, np.memmap)
    values[0, 0, 0] = 7  # stays in memory
    assert np.load(tmp_path / "a.npy")[0, 0] == 0


NAN = ROWS.copy()
NAN[2, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": NAN}, "a number that is not finite in row 2"),
        ({"features": np.stack([ROWS, NAN])}, "not finite in row 2 of view 1"),
        ({"features": ROWS.astype(np.int32)}, "features of type int32; expected float16, float32 or float64"),
        ({"features": ROWS[:1]}, "found one sample; expected two or more"),
        ({"features": ROWS[0]}, r"features of shape \(3,\)"),
        ({"features": ROWS[:0]}, r"features of shape \(1, 0, 3\)"),
        ({"labels": np.array([0, 1])}, r"labels of shape \(2,\); expected \(4,\)"),
        ({"labels": np.array([0.0, 1, 2, 3])}, "labels of type float64"),
        ({"labels": np.array([0, 1, 2, -2])}, "found the label -2"),
        ({"labels": np.array([0, "a", None, 1], dtype=object)}, "an array of Python objects"),
        ({"features": ROWS.astype(object)}, "an array of Python objects"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_embeddings(npz(tmp_path / "a.npz", **arrays))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=ROWS, labels=[0])
    with pytest.raises(UsageError, match=r"found the arrays x, labels; expected an array named features"):
        read_embeddings(tmp_path / "other.npz")
    np.save(tmp_path / "objects.npy", ROWS.astype(object))
    with pytest.raises(UsageError, match="Python objects"):
        read_embeddings(tmp_path / "objects.npy")
    for name, content in (("a.npz", b""), ("b.npz", b"PK\x03\x04 cut"), ("c.npy", b"\x93NUMPY"), ("d.npy", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=r"found (a damaged file|an array of Python objects)"):
            read_embeddings(tmp_path / name)
    whole = npz(tmp_path / "e.npz").read_bytes()
    (tmp_path / "e.npz").write_bytes(whole[:-30])
    with pytest.raises(UsageError, match="damaged file"):
        read_embeddings(tmp_path / "e.npz")
    with pytest.raises(UsageError, match=r"found nothing; expected a file of features"):
        read_embeddings(tmp_path / "missing.npz")
    with pytest.raises(UsageError, match=r"a name that ends in '\.csv'; expected \.npz or \.npy"):
        read_embeddings(tmp_path / "a.csv")


def test_a_table_names_rows_and_classes(tmp_path: Path) -> None:
    path, labels = tmp_path / "photo.npy", np.array([1, 0, -1, 1])
    np.save(path, ROWS)
    assert digest_of_table(path) is None
    write_table(path, "abc", ["a", "b", "c", "d"], labels, ("cat", "dog"))
    read = read_embeddings(path)
    assert (read.names, read.classes, read.labels.tolist()) == (["a", "b", "c", "d"], ("cat", "dog"), labels.tolist())
    assert digest_of_table(path) == "abc"
    for change in ({"labels": [0, 1, 2, 0]}, {"names": ["a"]}, {"format": 9}, {"classes": 3}):
        table = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps({**table, **change}))
        with pytest.raises(UsageError, match=r"photo\.json: found .*the table of photo\.npy"):
            read_embeddings(path)
        path.with_suffix(".json").write_text(json.dumps(table))
    path.unlink()
    assert digest_of_table(path) is None


# ----------------------------------------------------------------------------------------------------------- as domains


def test_a_pair_has_the_label_space_of_its_source(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", labels=np.array([5, 7, 7, 9]))
    npz(tmp_path / "b.npz", labels=np.array([9, 5, -1, 9]))
    source, target = open_pair("features", "a.npz", "b.npz", tmp_path)
    assert source.classes == target.classes == ("5", "7", "9")
    assert (source.labels.tolist(), target.labels.tolist()) == ([0, 1, 1, 2], [2, 0, -1, 2])
    assert (source.name, target.name, len(target)) == ("a.npz", "b.npz", 4)
    part = target.take([3, 1])
    assert part.rows is not None
    assert part.rows.index.tolist() == [3, 1]
    unlabelled = open_features(tmp_path / "a.npz", source.classes)
    assert unlabelled.labels.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([0, 0, 0, 0], None, "--source: found .*a.npz with one class; expected two or more"),
        (None, None, "--source: found .*a.npz with 4 of 4 rows without a label"),
        ([0, 1, -1, 1], None, "with 1 of 4 rows without a label"),
        ([0, 1, 2, 1], [0, 1, 2, 3], "b.npz: found labels of 1 classes that the source lacks, such as '3'"),
        (["a", "b", "b", "a"], ["a", "A", "b", "b"], "such as 'A'; expected labels among a, b; remove those rows"),
    ],
)
def test_labels_that_do_not_fit_each_other(tmp_path: Path, source: Any, target: Any, message: str) -> None:
    for name, labels in (("a", source), ("b", target)):
        npz(tmp_path / f"{name}.npz", **({} if labels is None else {"labels": np.array(labels)}))
    with pytest.raises(UsageError, match=message):
        open_pair("features", "a.npz", "b.npz", tmp_path)


def test_a_file_must_be_named(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", labels=np.array([0, 1, 0, 1]))
    with pytest.raises(UsageError, match=r"--target: found nothing; expected a file of features \(.npz or .npy\)"):
        open_pair("features", "a.npz", None, tmp_path)


def test_embeddings_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"`python -m gsda_fast\.embed pictures` makes it"):
        open_domain("pictures-features", "photo")
    root = tmp_path / "gsda_fast" / "pictures-features"
    root.mkdir(parents=True)
    classes = BENCHMARKS["pictures"].classes or ()
    np.save(root / "photo.npy", np.ones((11, 2), dtype=np.float32))
    write_table(root / "photo.npy", "", list("abcdefghijk"), np.arange(11), classes[::-1])
    with pytest.warns(UserWarning, match="found 11 images"):
        domain = open_domain("pictures-features", "photo")
    assert domain.classes == classes
    assert domain.labels.tolist() == list(range(11))[::-1]
