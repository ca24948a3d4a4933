from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_trees import class_tree

from gsda_fast.data.domains import open_pair
from gsda_fast.data.pack import pack
from gsda_fast.data.quarantine import list_line, read_list
from gsda_fast.data.verify import check_files, verify, write_quarantine
from gsda_fast.errors import UsageError, UsageWarning

# All but what no file name can hold.
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(names=st.lists(NAMES, max_size=5))
def test_a_line_is_a_path_whatever_its_name_holds(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    listed = tmp_path_factory.mktemp("lists") / "bad.txt"
    paths = [f"/data/{name}" for name in names]
    listed.write_bytes(b"".join(map(list_line, paths)))
    assert read_list(listed) == paths
    assert listed.read_bytes().count(b"\n") == len(paths)


@pytest.mark.parametrize("content", [b'"/unfinished\n', b"/a\0b\n", b"\xff\n", b'"\\ud8zz"\n', b"[" * 100_000])
def test_a_list_that_is_none(tmp_path: Path, content: bytes) -> None:
    listed = tmp_path / "bad.txt"
    listed.write_bytes(content)
    if content.startswith(b"["):  # a path as good as any other
        assert read_list(listed) == [content.decode()]
        return
    with pytest.raises(UsageError, match=r"--quarantine: found .*; expected .*a list that `data verify --quarantine`"):
        read_list(listed)


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\u2028b.jpg", "a\x85b.jpg", " a.jpg", '"a".jpg', "a\x1b[31m.jpg"])
def test_files_with_odd_names_are_left_out(tmp_path: Path, name: str) -> None:
    class_tree(tmp_path / "photos", ["cat", "dog"])
    (tmp_path / "photos" / "cat" / name).write_bytes(b"junk")
    listed = tmp_path / "bad.txt"
    assert write_quarantine(listed, verify("folder", "photos", "photos", tmp_path)) == 1
    assert write_quarantine(listed, verify("folder", "photos", "photos", tmp_path)) == 1
    source, _ = open_pair("folder", "photos", "photos", tmp_path, listed)
    assert f"cat/{name}" not in source.paths
    assert len(source) == 4


def test_entries_that_match_nothing_are_told(tmp_path: Path) -> None:
    class_tree(tmp_path / "photos", ["cat", "dog"])
    listed = tmp_path / "bad.txt"
    listed.write_text(f"{tmp_path}/photos/cat/frame_0001.jpg\n{tmp_path}/photos/cat/gone.jpg\n/elsewhere/x.jpg\n")
    with pytest.warns(UsageWarning, match=r"1 of 3 entries are no images here: .*gone.jpg"):
        open_pair("folder", "photos", "photos", tmp_path, listed)
    listed.write_text("/elsewhere/x.jpg\n")
    with pytest.warns(UsageWarning, match="1 of 1 entries are no images here: /elsewhere/x.jpg"):
        open_pair("folder", "photos", "photos", tmp_path, listed)


def test_a_shard_on_the_list_takes_its_samples_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pack", "packed_images"):
        monkeypatch.setattr(f"gsda_fast.data.{module}.SHARD_IMAGES", 3)
    class_tree(tmp_path / "photos", ["cat", "dog"], per_class=4)
    packed = pack("folder", "photos", "photos", tmp_path, output=tmp_path / "pack")
    (packed / "photos-00001.npy").write_bytes(b"junk")
    findings = verify("folder", "photos", "photos", packed)
    listed = tmp_path / "bad.txt"
    assert write_quarantine(listed, findings) == 1
    source, _ = open_pair("folder", "photos", "photos", packed, listed)
    assert source.paths == [f"cat/frame_000{i}.jpg" for i in (1, 2, 3)] + [f"dog/frame_000{i}.jpg" for i in (3, 4)]
    assert check_files(source).unreadable == []
    assert source.packed is not None
    assert source.packed[4].shape == (256, 256, 3)
