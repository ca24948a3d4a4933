import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same_state import differences

from gsda_fast.training.checkpoint import CheckpointFolder, DamagedCheckpoint


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "tensors": {"weight": torch.randn(100, 100, generator=generator), "count": torch.tensor(step)},
        "table": None,
        "history": [{"step": step, "accuracy": 12.5}, {"step": step, "accuracy": None}],
        "name": "gsda",
    }


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for step in (50, 100):
        checkpoints.save(step, state(step))
    return checkpoints


def test_a_state_comes_back_as_it_was(folder: CheckpointFolder) -> None:
    assert folder.steps() == [50, 100]
    assert folder.file(100).name == "step-00000100.pt"
    for step in (50, 100):
        assert differences(folder.load(step), state(step)) == []
    newest, damage = folder.load_newest()
    assert newest is not None
    assert newest["step"] == 100
    assert damage == []


def test_files_of_others_are_no_checkpoints(folder: CheckpointFolder) -> None:
    others = [folder.path / name for name in ("step-best.pt", "step-1.pt", "step-one.tmp", "my_other_model.pt")]
    own = [folder.path / name for name in (".step-00000150.pt.tmp", "step-00000020.damaged")]
    for file in (*others, *own):
        file.write_text("")
    assert folder.steps() == [50, 100]
    folder.tidy(50)
    folder.clear()
    assert set(folder.path.iterdir()) == set(others)


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path).load_newest() == (None, [])
    assert CheckpointFolder(tmp_path / "missing").load_newest() == (None, [])


def test_a_step_of_more_than_eight_digits_is_one(folder: CheckpointFolder) -> None:
    folder.save(123_456_789, state(1))
    assert folder.steps() == [100, 123_456_789]


@pytest.mark.parametrize(
    "name",
    [
        *("step-00000100-keep.pt", "step-00000100 (conflicted copy).pt", "step-.pt", "step-best.pt"),
        *("step-100.pt", "step-000000100.pt"),  # not as the folder writes them: `file` would not find them again
    ],
)
def test_files_under_other_names_are_left_alone(name: str, folder: CheckpointFolder) -> None:
    (folder.path / name).write_bytes(b"mine")
    assert folder.steps() == [50, 100]
    newest, damage = folder.load_newest()
    assert newest is not None
    assert (newest["step"], damage) == (100, [])
    folder.save(150, state(150))
    folder.tidy(newest=150)
    assert folder.steps() == [100, 150]
    assert (folder.path / name).read_bytes() == b"mine"


def cut_off(content: bytearray) -> bytes:
    return bytes(content[: len(content) // 2])


def cut_off_by_one(content: bytearray) -> bytes:
    return bytes(content[:-1])


def flip_one_bit(content: bytearray) -> bytes:
    content[len(content) // 2] ^= 4
    return bytes(content)


def flip_in_the_digest(content: bytearray) -> bytes:
    content[-1] ^= 1
    return bytes(content)


def zero_one_page(content: bytearray) -> bytes:
    content[8192:12288] = bytes(4096)
    return bytes(content)


def zero_everything(content: bytearray) -> bytes:
    return bytes(len(content))


def empty(content: bytearray) -> bytes:
    return b""


@pytest.mark.parametrize(
    "damage",
    [cut_off, cut_off_by_one, flip_one_bit, flip_in_the_digest, zero_one_page, zero_everything, empty],
    ids=lambda f: f.__name__,
)
def test_damage_is_noticed_and_the_one_before_is_used(
    damage: Callable[[bytearray], bytes], folder: CheckpointFolder
) -> None:
    file = folder.file(100)
    changed = damage(bytearray(file.read_bytes()))
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    with pytest.raises(DamagedCheckpoint, match=r"step-00000100\.pt"):
        folder.load(100)
    found, lines = folder.load_newest()
    assert differences(found, state(50)) == []
    assert len(lines) == 1
    assert str(file) in lines[0]


def test_damage_anywhere_is_noticed(folder: CheckpointFolder) -> None:
    file = folder.file(100)
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 100):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        zeroed = whole[:place] + bytes(64) + whole[place + 64 :]
        for changed in (bytes(flipped), whole[:place], zeroed[: len(whole)]):
            if changed != whole:
                file.write_bytes(changed)
                with pytest.raises(DamagedCheckpoint):
                    folder.load(100)
    file.write_bytes(whole)
    assert differences(folder.load(100), state(100)) == []


def test_a_file_that_cannot_be_read_is_passed_over(folder: CheckpointFolder) -> None:
    folder.file(100).unlink()
    folder.file(100).mkdir()
    found, lines = folder.load_newest()
    assert differences(found, state(50)) == []
    assert lines == [f"{folder.file(100)}: no regular file"]


def test_what_is_damaged_takes_no_place_among_those_kept(folder: CheckpointFolder) -> None:
    folder.file(100).write_bytes(b"x")
    folder.tidy(newest=50)
    assert sorted(file.name for file in folder.path.iterdir()) == ["step-00000050.pt", "step-00000100.damaged"]
    folder.save(75, state(75))
    assert folder.steps() == [50, 75]


def test_tidying_removes_what_is_half_written_and_nothing_else(folder: CheckpointFolder) -> None:
    (folder.path / ".step-00000150.pt.tmp").write_bytes(b"half")
    (folder.path / "notes.tmp").write_bytes(b"mine")
    folder.tidy(newest=100)
    expected = ["notes.tmp", "step-00000050.pt", "step-00000100.pt"]
    assert sorted(file.name for file in folder.path.iterdir()) == expected


def test_tidying_removes_what_a_kill_in_the_middle_of_a_save_has_left(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "_drop_old", lambda self: None)
        folder.save(150, state(150))
    assert folder.steps() == [50, 100, 150]
    folder.tidy(newest=150)
    assert folder.steps() == [100, 150]


def test_two_are_there_at_every_moment_of_a_save(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def seeing(name: str) -> None:
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, **kinds: (seen.append(folder.steps()), original(*args, **kinds))[1])

    for name in ("fsync", "replace", "unlink"):
        seeing(name)
    folder.save(150, state(150))
    assert seen == [[50, 100], [50, 100], [50, 100, 150], [50, 100, 150]]


def test_all_damaged_is_none_with_a_line_each(folder: CheckpointFolder) -> None:
    for step in folder.steps():
        folder.file(step).write_bytes(b"x")
    found, lines = folder.load_newest()
    assert found is None
    assert len(lines) == 2


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep)
    for step in range(1, 6):
        folder.save(step, {"step": step})
        assert folder.steps() == list(range(max(1, step - keep + 1), step + 1))


@pytest.mark.parametrize("keep", [-1, 0, 1])
def test_fewer_than_two_are_never_enough(keep: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"keep: found {keep}; expected at least 2"):
        CheckpointFolder(tmp_path, keep)


def test_what_a_kill_leaves_behind_is_ignored_and_taken_over(folder: CheckpointFolder) -> None:
    (folder.path / ".step-00000150.pt.tmp").write_bytes(b"half of it")
    assert folder.steps() == [50, 100]
    newest, damage = folder.load_newest()
    assert newest is not None
    assert newest["step"] == 100
    assert damage == []
    folder.save(150, state(150))
    assert sorted(file.name for file in folder.path.iterdir()) == ["step-00000100.pt", "step-00000150.pt"]
    assert differences(folder.load(150), state(150)) == []


def test_a_save_that_fails_leaves_the_old_ones(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        folder.save(150, state(150))
    assert folder.steps() == [50, 100]
    assert differences(folder.load(100), state(100)) == []


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), real_fsync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append("rename"), real_replace(self, to))[1])
    folder.save(150, state(150))
    assert order == ["sync", "rename", "sync"]
