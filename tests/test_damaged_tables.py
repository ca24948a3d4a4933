"""Every table that is read from disk, damaged or made up: the project's own error, and nothing done before it."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_trees import class_tree

from gsda_fast.config import config_from_dict, preset
from gsda_fast.data import verify as verify_module
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import open_domain, open_pair
from gsda_fast.data.embeddings import digest_of_table, read_embeddings
from gsda_fast.data.pack import pack
from gsda_fast.data.verify import unreadable_files
from gsda_fast.errors import TrainingError, UsageError
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.results.tables import transfer_table
from gsda_fast.training.checkpoint import DamagedCheckpoint, network_problem, read_checkpoint, training_problem

OWN = (UsageError, TrainingError, DamagedCheckpoint)
FUZZ = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
    database=None,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tree(tmp_path_factory.mktemp("data") / "photos", ["cat", "dog"]).parent


@pytest.fixture(scope="module")
def whole(photos: Path) -> Path:
    return pack("folder", "photos", "photos", photos, output=photos / "pack")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([10**40, -1, 2**63, 1.5, float("nan"), {}, []]),
    st.sampled_from(["", "..", "/etc/passwd", "../../x", "a\0b", "x.npy"]),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["file", "images", "paths", "classes", "step"]), st.integers(0, 3), max_size=2),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested tables and lists."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inside for place in places(each, (*at, key)))]


@st.composite
def altered(draw: st.DrawFn, good: Any) -> Any:
    """The same with one or two values exchanged for others, or taken out, or with one added."""
    table = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(places(table)))
        if not place:
            return draw(ODD)
        holder = table
        for key in place[:-1]:
            holder = holder[key]
        what = draw(st.integers(0, 3))
        if what == 0:
            del holder[place[-1]]
        elif what == 1 and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = draw(ODD)
        else:
            holder[place[-1]] = draw(ODD)
    return table


@st.composite
def broken(draw: st.DrawFn, good: bytes) -> bytes:
    """The same bytes with some changed, cut, or something else altogether."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return draw(st.sampled_from([bytes(data), bytes(data), b"[" * 100_000, b"\xff\xfe", b""]))


def untouched(root: Path, action: Callable[[], object]) -> bool:
    """Whether an action ends well or with an error of the project's own, and leaves a file of the user's alone."""
    precious = root / "precious.npy"
    precious.write_text("precious")
    with contextlib.suppress(*OWN):
        action()
    return precious.read_text() == "precious"


SHARD = {"file": "photos-00000.npy", "images": 4, "sha256": "0" * 64, "made_from": "1" * 64}
PATHS = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"]
ENTRY = {"classes": ["cat", "dog"], "paths": PATHS, "labels": [0, 0, 1, 1]}
TABLE = {"format": 1, "side": 256, "channels": 3, "domains": {"photos": {**ENTRY, "shards": [SHARD]}}}
LINES = [
    {**TABLE, "domains": {}, "replaced": ["photos-00000.npy"]},
    {"domain": "photos", **ENTRY},
    {"domain": "photos", "shard": SHARD},
]


@FUZZ
@given(table=altered(TABLE))
def test_the_table_of_a_pack(tmp_path: Path, photos: Path, table: Any) -> None:
    folder = tmp_path / "pack"
    folder.mkdir(exist_ok=True)
    (folder / "pack.json").write_text(json.dumps(table))
    assert untouched(tmp_path, lambda: open_pair("folder", "photos", "photos", folder))


@FUZZ
@given(lines=altered(LINES), torn=st.booleans())
def test_the_table_of_an_unfinished_pack(tmp_path: Path, photos: Path, lines: Any, torn: bool) -> None:
    folder = tmp_path / "pack"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    text = "\n".join(map(json.dumps, lines if isinstance(lines, list) else [lines]))
    (folder / "pack.partial.json").write_text(text + ("" if torn else "\n"))
    assert untouched(tmp_path, lambda: pack("folder", "photos", "photos", photos, output=folder, workers=1))


@FUZZ
@given(content=broken(json.dumps(TABLE).encode()))
def test_bytes_in_the_place_of_a_table(tmp_path: Path, photos: Path, content: bytes) -> None:
    folder = tmp_path / "pack"
    folder.mkdir(exist_ok=True)
    (folder / "pack.json").write_bytes(content)
    assert untouched(tmp_path, lambda: open_pair("folder", "photos", "photos", folder))


@pytest.mark.parametrize("name", ["pack.json", "pack.partial.json"])
@pytest.mark.parametrize("reach", ["../precious.npy", "{root}/precious.npy", "sub/x.npy", ".hidden.npy", "notes.txt"])
def test_names_in_a_table_reach_nothing_outside(tmp_path: Path, photos: Path, name: str, reach: str) -> None:
    reach = reach.format(root=tmp_path)
    folder = tmp_path / "pack"
    folder.mkdir()
    (tmp_path / "precious.npy").write_text("precious")
    (folder / "notes.txt").write_text("mine")
    for table in (
        {**TABLE, "replaced": [reach]},
        {**TABLE, "domains": {"x": {**ENTRY, "shards": [{**SHARD, "file": reach}]}}},
    ):
        (folder / name).write_text(json.dumps(table) + "\n")
        with pytest.raises(UsageError, match="expected the table of a pack"):
            pack("folder", "photos", "photos", photos, output=folder)
    assert (tmp_path / "precious.npy").read_text() == "precious"
    assert (folder / "notes.txt").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------- lists of images


@FUZZ
@given(content=broken(b"".join(b"c%d/0.jpg %d\n" % (label, label) for label in range(12))))
def test_a_list_of_images(tmp_path: Path, content: bytes) -> None:
    classes = BENCHMARKS["visda"].classes or ()
    if not (tmp_path / "train").exists():
        class_tree(tmp_path / "train", [f"c{label}" for label in range(len(classes))], per_class=1)
    (tmp_path / "train" / "image_list.txt").write_bytes(content)
    assert untouched(tmp_path, lambda: open_domain("visda", "train", tmp_path))


@pytest.mark.parametrize("path", ["../../private/a.jpg", "/etc/passwd", "c0/../../../a.jpg", "..", "."])
def test_a_list_of_images_reaches_nothing_outside(tmp_path: Path, path: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "image_list.txt").write_text(f"{path} 0\n")
    with pytest.raises(UsageError, match=r"image_list.txt, line 1: found .*; expected a path below"):
        open_domain("visda", "train", tmp_path)


# ----------------------------------------------------------------------------------------------- what was verified


REMEMBERED = b'{"digest": "00", "unreadable": [["/etc/passwd", "x"]], "misnamed": [], "turned": 0, "halved": 0}\n'


@FUZZ
@given(content=broken(REMEMBERED))
def test_what_is_remembered_of_a_check(photos: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    source, _ = open_pair("folder", "photos", "photos", photos)
    unreadable_files(source)
    memory = verify_module._Memory(source)._file
    memory.write_bytes(content)
    assert unreadable_files(source) == []


# -------------------------------------------------------------------------------------------------------- embeddings


def arrays(save: Callable[..., None], **values: np.ndarray) -> bytes:
    memory = BytesIO()
    save(memory, **values)
    return memory.getvalue()


ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
EMBEDDED = {
    "format": 1,
    "digest": "0" * 64,
    "names": ["a", "b", "c", "d"],
    "labels": [0, 0, 1, -1],
    "classes": ["x", "y"],
}


@FUZZ
@given(table=altered(EMBEDDED))
def test_the_table_of_embeddings(tmp_path: Path, table: Any) -> None:
    path = tmp_path / "photos.npy"
    np.save(path, ROWS)
    path.with_suffix(".json").write_text(json.dumps(table))
    digest_of_table(path)
    with contextlib.suppress(*OWN):
        read = read_embeddings(path)
        assert (len(read), len(read.names)) == (4, 4)
        assert read.labels.max() < len(read.classes)


@FUZZ
@given(content=broken(json.dumps(EMBEDDED).encode()))
def test_bytes_in_the_place_of_the_table_of_embeddings(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photos.npy"
    np.save(path, ROWS)
    path.with_suffix(".json").write_bytes(content)
    digest_of_table(path)
    with contextlib.suppress(*OWN):
        read_embeddings(path)


@FUZZ
@given(
    content=st.one_of(
        broken(arrays(np.savez, features=ROWS, labels=np.arange(4))),
        broken(arrays(np.savez_compressed, features=ROWS, labels=np.array(["a", "b", "a", "b"]))),
        broken(arrays(lambda memory, features: np.save(memory, features), features=ROWS)),
    ),
    suffix=st.sampled_from([".npz", ".npy"]),
)
def test_bytes_in_the_place_of_embeddings(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(*OWN):
        read_embeddings(path)


# ------------------------------------------------------------------------------------------------------ what a run left


RESULT = {
    **{"task": "folder", "source": "s", "target": "t", "method": "gsda", "seed": 0, "steps": 3},
    **{"accuracy": {"last": 50.0, "best": 60.0, "label_free": None}, "mean_per_class": {"last": 50.0}},
    **{"per_class": [1.0, None], "classes": ["a", "b"], "images_per_second": 9.5, "seconds": 3.0},
    **{"label_free_by": {"entropy": {"accuracy": 50.0}}, "unreadable_files": 0},
}


@FUZZ
@given(table=altered(RESULT))
def test_the_result_of_a_run(tmp_path: Path, table: Any) -> None:
    run = RunFolder(tmp_path)
    run.result_path.write_text(json.dumps(table))
    with contextlib.suppress(*OWN):
        result = run.read_result()
        assert result is not None
        transfer_table([result], metric="accuracy")


@FUZZ
@given(lines=altered([{"step": step, "classification": 0.5, "accuracy": None} for step in (1, 2, 3)]))
def test_the_metrics_of_a_run(tmp_path: Path, lines: Any) -> None:
    run = RunFolder(tmp_path)
    run.metrics_path.write_text(
        "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [0]))
    )
    with contextlib.suppress(*OWN):
        steps = [record["step"] for record in run.read_metrics()]
        assert steps == sorted(set(steps))
        run.truncate_metrics(2)


@FUZZ
@given(content=broken(json.dumps({"versions": {"torch": "2"}}).encode()))
def test_bytes_in_the_place_of_a_runs_json(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    for file in (run.environment_path, run.metrics_path, run.result_path):
        file.write_bytes(content)
    for read in (run.read_environment, run.read_metrics, run.read_result):
        with contextlib.suppress(*OWN):
            read()


PROBABILITIES = np.full((4, 2), 0.5, np.float32)


@FUZZ
@given(
    content=st.one_of(
        broken(arrays(np.savez, labels=np.arange(4) % 2, probabilities=PROBABILITIES)),
        broken(arrays(np.savez_compressed, source_labels=np.arange(4), target_labels=np.arange(4), source_final=ROWS)),
    )
)
def test_bytes_in_the_place_of_a_runs_arrays(tmp_path: Path, content: bytes) -> None:
    run = RunFolder(tmp_path)
    for file in (run.predictions_path, run.features_path):
        file.write_bytes(content)
    for read in (run.read_predictions, run.read_features):
        with contextlib.suppress(*OWN):
            read()


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ({"labels": np.array([0, 2]), "probabilities": PROBABILITIES[:2]}, "labels up to 2"),
        ({"labels": np.array([0]), "probabilities": PROBABILITIES}, "1 labels"),
        ({"labels": np.array([0.5]), "probabilities": PROBABILITIES}, "labels of type float64"),
        ({"labels": np.array([0])}, "no array probabilities"),
        (
            {"labels": np.array([{}], dtype=object), "probabilities": PROBABILITIES},
            "a damaged file .*pickle",
        ),
    ],
)
def test_predictions_that_do_not_fit(tmp_path: Path, stored: dict[str, np.ndarray], found: str) -> None:
    run = RunFolder(tmp_path)
    np.savez(run.predictions_path, **stored)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"predictions\.npz: found .*{found}.*; expected arrays as a run writes them"):
        run.read_predictions()


# ---------------------------------------------------------------------------------------------------------- settings


SETTINGS = json.loads(json.dumps(preset("digits").to_dict(), default=str))


@FUZZ
@given(changed=altered(SETTINGS))
def test_the_settings_of_a_run(changed: Any) -> None:
    if isinstance(changed, dict):
        with contextlib.suppress(*OWN):
            config_from_dict(changed, "config.toml").validate()


@FUZZ
@given(content=broken(b'task = "digits"\n[run]\nsteps = 3\n[data]\nsource = "fonts"\n'))
def test_bytes_in_the_place_of_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with contextlib.suppress(*OWN):
        config_from_dict(RunFolder(tmp_path).read_config(), "config.toml")


# -------------------------------------------------------------------------------------------------------- checkpoints


def sealed(payload: bytes) -> bytes:
    return payload + b"gsda-sha256:" + hashlib.sha256(payload).digest()


def saved(state: Any) -> bytes:
    memory = BytesIO()
    torch.save(state, memory)
    return memory.getvalue()


STATE: dict[str, Any] = {
    **{"step": 3, "classes": ["a", "b"], "optimizers": {}, "scaler": {}, "history": {}, "identity": {}, "versions": {}},
    **{"target_table": None, "pending": None, "ranks": [], "images_seen": 9, "training_seconds": 1.0, "seconds": 2.0},
}
METHOD = {"model.weight": torch.zeros(2, 3)}


@FUZZ
@given(state=altered(STATE))
def test_the_content_of_a_checkpoint(tmp_path: Path, state: Any) -> None:
    file = tmp_path / "step-00000003.pt"
    file.write_bytes(sealed(saved({**state, "method": METHOD} if isinstance(state, dict) else state)))
    for check in (network_problem, training_problem):
        with contextlib.suppress(*OWN):
            read_checkpoint(file, check=check)


@FUZZ
@given(payload=broken(saved({**STATE, "method": METHOD})))
def test_bytes_under_a_right_digest(tmp_path: Path, payload: bytes) -> None:
    file = tmp_path / "step-00000003.pt"
    file.write_bytes(sealed(payload))
    with contextlib.suppress(*OWN):
        read_checkpoint(file, check=training_problem)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (Evil(), "it holds more than tensors and plain values"),
        ([1, 2], "list, no table"),
        ({**STATE, "method": {"w": torch.full((2,), torch.nan)}}, "numbers in 'w' that are not finite"),
        ({**STATE, "method": {"w": torch.zeros(1).expand(10**12)}}, "'w', which is no tensor of numbers"),
        ({**STATE, "method": {"w": "text"}}, "'w', which is no tensor of numbers"),
        ({**STATE, "method": METHOD, "step": -1}, "no step"),
        ({**STATE, "method": METHOD, "target_table": torch.zeros(2)}, "pseudo-labels that are none"),
        ({name: value for name, value in STATE.items() if name != "identity"} | {"method": METHOD}, "no identity"),
    ],
)
def test_a_checkpoint_from_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "step-00000003.pt"
    file.write_bytes(sealed(saved(state)))
    with pytest.raises(DamagedCheckpoint, match=told):
        read_checkpoint(file, check=training_problem)
    assert os.listdir(tmp_path) == [file.name]
