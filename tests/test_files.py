import errno
import fcntl
import os
from pathlib import Path

import pytest

from gsda_fast.errors import UsageError, UsageWarning
from gsda_fast.files import FolderLock, atomic_file, is_path_below, is_plain_name, new_file


def test_an_atomic_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """In a folder from somebody else the temporary file's name may lead to a file of the user's."""
    precious = tmp_path / "thesis.tex"
    precious.write_text("precious")
    (tmp_path / "pack").mkdir()
    for name in (".pack.json.tmp", "shard"):
        (tmp_path / "pack" / name).symlink_to(precious)
    with atomic_file(tmp_path / "pack" / "pack.json") as file:
        file.write(b"{}")
    new_file(tmp_path / "pack" / "shard").close()
    assert precious.read_text() == "precious"
    assert (tmp_path / "pack" / "pack.json").read_bytes() == b"{}"


def test_a_held_folder_is_refused_to_the_next_and_free_after_it(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as lock:
        assert lock.held
        with pytest.raises(UsageError, match=rf"--output: found {tmp_path}, in use by process {os.getpid()} on "):
            FolderLock(tmp_path)
    FolderLock(tmp_path).release()


def test_another_users_lock_file_is_locked_by_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, holder = os.open, FolderLock(tmp_path)

    def theirs(path: object, flags: int, *more: int, **kinds: object) -> int:
        if flags & os.O_RDWR and str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *more, **kinds)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", theirs)
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        FolderLock(tmp_path)
    holder.release()
    other = FolderLock(tmp_path)
    assert other.held
    with pytest.raises(UsageError, match="in use by"):
        FolderLock(tmp_path)
    other.release()


def test_a_lock_file_that_cannot_be_opened_at_all_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").touch()

    def refused(path: object, *_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UsageError, match=r"which another user may be using: \.lock in it is theirs"):
        FolderLock(tmp_path, "--pack")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_no_lock_can_be_had_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def without(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.warns(UsageWarning, match="cannot be locked .*make sure that no other process writes there"):
        assert not FolderLock(tmp_path).held


def test_a_link_as_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match="which cannot be held"):
        FolderLock(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0b", 3, None])
def test_no_plain_name(name: object) -> None:
    assert not is_plain_name(name)


def test_paths_below_a_folder() -> None:
    assert all(map(is_path_below, ["a", "a/b.jpg", "..a/b", "a\nb/c", "ü/…"]))
    assert not any(map(is_path_below, ["/a", "../a", "a/../b", "a//b", "a/", "", ".", "./a", None]))
