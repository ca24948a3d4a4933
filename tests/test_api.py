"""Adaptation from Python: it is the command's run, whatever form the data comes in."""

import gc
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clouds import clouds
from image_trees import class_tree, natural_image

import gsda_fast
from gsda_fast.config import configure, parse_config
from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunFolder

SHORT: dict[str, Any] = {"steps": 40, "warmup": 20, "refresh_every": 20, "batch_size": 16, "hidden_dim": 8}
SMALL_NETWORK: dict[str, Any] = {
    **{"backbone": "resnet18", "weights": "none", "bottleneck_dim": 8, "hidden_dim": 8},
    **{"steps": 2, "warmup": 1, "refresh_every": 1, "batch_size": 2},
}


@pytest.fixture(scope="module")
def numbers() -> gsda_fast.Adapted:
    return gsda_fast.adapt(clouds(90, 0, 0, [2, 10, 7]), clouds(60, 0.3, 1, [2, 10, 7]), progress=False, **SHORT)


def test_embeddings_with_labels(numbers: gsda_fast.Adapted) -> None:
    rows, labels = clouds(60, 0.3, 1, [2, 10, 7])
    assert numbers.classes.tolist() == [2, 7, 10]
    assert numbers.probabilities.shape == (60, 3)
    predicted = numbers.predict(rows)
    assert predicted.dtype == labels.dtype
    assert numbers.accuracy == pytest.approx(100 * (predicted == labels).mean())
    assert numbers.accuracy > 90
    np.testing.assert_allclose(numbers.predict_proba(rows), numbers.probabilities, atol=1e-6)
    np.testing.assert_allclose(numbers.predict_proba(rows[:1].astype(np.float64)), numbers.probabilities[:1], atol=1e-6)


def test_a_temporary_run_lives_as_long_as_its_result() -> None:
    adapted = gsda_fast.adapt(clouds(30, 0, 0, [0, 1]), clouds(20, 0, 1, [0, 1])[0], progress=False, **SHORT)
    folder = adapted.run
    assert (folder / "result.json").is_file()
    assert adapted.accuracy is None
    del adapted
    gc.collect()
    assert not folder.exists()


def test_it_is_the_commands_own_run(tmp_path: Path) -> None:
    source, target = clouds(40, 0, 0, ["a", "b"]), clouds(30, 0, 1, ["a", "b"])
    for name, (rows, labels) in {"s": source, "t": target}.items():
        np.savez(tmp_path / f"{name}.npz", features=rows, labels=labels)
    options = ("--steps=40", "--warmup=20", "--refresh-every=20", "--batch-size=16", "--hidden-dim=8")
    places = ("--data-root", str(tmp_path), "--source=s.npz", "--target=t.npz", "--output", str(tmp_path / "command"))
    gsda_fast.train(parse_config(["features", *options, *places], "train"))
    of_files = gsda_fast.adapt(
        tmp_path / "s.npz", str(tmp_path / "t.npz"), progress=False, output=tmp_path / "run", **SHORT
    )
    of_arrays = gsda_fast.adapt(source, target, progress=False, **SHORT)
    expected = RunFolder(tmp_path / "command").read_predictions()
    assert expected is not None
    for adapted in (of_files, of_arrays):
        np.testing.assert_array_equal(adapted.probabilities, expected.probabilities)
        assert adapted.classes.tolist() == ["a", "b"]


def test_the_same_call_goes_on_and_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = clouds(30, 0, 0, [0, 1]), clouds(20, 0, 1, [0, 1])
    first = gsda_fast.adapt(source, target, output=tmp_path / "run", progress=False, **SHORT)
    stored = {path.name for path in (tmp_path / "run" / "data").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("gsda_fast.run.Run.build_trainer", lambda _: pytest.fail("trained again"))
        again = gsda_fast.adapt(source, target, output=tmp_path / "run", **SHORT)
    assert "finished already" in capsys.readouterr().err
    assert again.accuracy == first.accuracy
    assert {path.name for path in (tmp_path / "run" / "data").iterdir()} == stored
    with pytest.raises(UsageError, match=r"--output: found .*data\.target"):
        gsda_fast.adapt(source, clouds(20, 0, 2, [0, 1]), output=tmp_path / "run", progress=False, **SHORT)


def test_the_callers_process_stays_as_it_was() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)  # the run has one
    try:
        gsda_fast.adapt(clouds(30, 0, 0, [0, 1]), clouds(20, 0, 1, [0, 1]), progress=False, **SHORT)
        assert torch.get_num_threads() == threads + 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == before[2]


def images(count: int, seed: int) -> np.ndarray:
    return np.stack([np.asarray(natural_image(seed + number)) for number in range(count)])


def test_arrays_of_images_keep_their_order(tmp_path: Path) -> None:
    labels = np.array(["tree", "car", "tree", "car", "car"])
    pixels = images(5, 50)
    adapted = gsda_fast.adapt(
        (images(4, 0), np.array(["tree", "car", "car", "tree"])),
        (pixels, labels),
        "source-only",
        output=tmp_path / "run",
        progress=False,
        **{name: value for name, value in SMALL_NETWORK.items() if name != "hidden_dim"},
    )
    assert adapted.classes.tolist() == ["car", "tree"]
    np.testing.assert_allclose(adapted.predict_proba(pixels), adapted.probabilities, atol=1e-5)
    assert not np.allclose(adapted.probabilities[0], adapted.probabilities[1], atol=1e-4)
    assert adapted.accuracy == pytest.approx(100 * (adapted.predict(pixels) == labels).mean())
    grey = adapted.predict_proba(pixels[..., :1])
    assert not np.allclose(grey, adapted.probabilities, atol=1e-4)


def test_folders_a_report_and_an_export(tmp_path: Path) -> None:
    source, target = class_tree(tmp_path / "drawn", ("car", "tree")), class_tree(tmp_path / "photo", ("car", "tree"))
    adapted = gsda_fast.adapt(source, str(target), progress=False, **SMALL_NETWORK)
    assert adapted.result.source == "drawn"
    assert adapted.predict_proba(target).shape == (4, 2)
    np.testing.assert_allclose(adapted.predict_proba(target), adapted.probabilities, atol=1e-5)
    one = adapted.predict(target / "car" / "frame_0001.jpg")
    assert one.tolist() == adapted.predict(target)[:1].tolist()
    assert adapted.report().name == "report.html"
    assert [path.parent.name for path in adapted.export(tmp_path / "out")] == ["out", "out"]


GOOD = clouds(30, 0, 0, [0, 1])


@pytest.mark.parametrize(
    ("source", "target", "options", "told"),
    [
        (GOOD[0], GOOD, {}, r"source: found an array without labels"),
        (GOOD, np.zeros((3, 4, 4, 2), np.uint8), {}, r"target: found an array of shape \(3, 4, 4, 2\) and type uint8"),
        (GOOD, np.zeros((3, 4, 4, 3), np.uint8), {}, r"target: found images; expected features, as the source"),
        (GOOD, (GOOD[0], GOOD[1][:3]), {}, r"target: found labels of shape \(3,\)"),
        (GOOD, (GOOD[0], GOOD[0][:, 0]), {}, r"target: found labels of shape \(30,\) and type float32"),
        (GOOD, "nowhere", {}, r"target: found .*nowhere, which does not exist"),
        (GOOD, "nowhere.npz", {}, r"nowhere\.npz: found nothing"),
        (GOOD, GOOD[0] * math.nan, {}, r"found a number that is not finite in row 0"),
        (GOOD, GOOD[0][:, :5], {}, r"whose features have 5 numbers; expected 6"),
        (GOOD, GOOD, {"method": "gsdaa"}, r"--method: found 'gsdaa'"),
        (GOOD, GOOD, {"steps": 0}, r"--steps: found 0; expected a whole number >= 1"),
        (GOOD, GOOD, {"data_root": "x"}, r"data_root: found an option"),
    ],
)
def test_a_mistake_is_one_line(source: Any, target: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        gsda_fast.adapt(source, target, progress=False, **{**SHORT, **options})


def test_labels_that_cannot_name_a_folder_are_refused(tmp_path: Path) -> None:
    pixels = images(2, 0)
    for label in ("a/b", "..", "-1"):
        with pytest.raises(UsageError, match="can be the name of a folder"):
            gsda_fast.adapt((pixels, ["x", label]), pixels, output=tmp_path / "run", progress=False, **SMALL_NETWORK)


def test_samples_of_another_kind_are_refused(numbers: gsda_fast.Adapted) -> None:
    with pytest.raises(UsageError, match="samples: found images; expected features"):
        numbers.predict(np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(UsageError, match="samples: found features of 5 numbers; expected 6"):
        numbers.predict(np.zeros((1, 5)))


def test_a_failed_call_leaves_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UsageError):
        gsda_fast.adapt(GOOD, GOOD[0][:, :5], progress=False, **SHORT)
    assert os.listdir(tmp_path) == []


def test_a_configuration_is_trained_from_python(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", features=GOOD[0], labels=GOOD[1])
    domains = {"source": "s.npz", "target": "s.npz", "data_root": tmp_path}
    result = gsda_fast.train(configure("features", "dann", output=tmp_path / "run", **domains, **SHORT))
    assert result.method == "dann"
    assert gsda_fast.load_trained(str(tmp_path / "run")).classes == ("0", "1")
