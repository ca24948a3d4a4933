import errno
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from image_trees import class_tree, refuse, save

from gsda_fast.data import digits
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.data.domains import open_images, open_pair
from gsda_fast.errors import UsageError

OFFICE31 = BENCHMARKS["office31"].classes or ()
VISDA = BENCHMARKS["visda"].classes or ()

pytestmark = pytest.mark.filterwarnings("ignore:domain .* published")


def touch_tree(root: Path, classes: tuple[str, ...] | list[str], per_class: int = 1, suffix: str = ".jpg") -> Path:
    """Empty files: the readers open no image."""
    for name in classes:
        for number in range(per_class):
            path = root / name / f"{number:04d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def office31(root: Path, layout: str = "{}/images") -> Path:
    for domain in ("amazon", "webcam", "dslr"):
        touch_tree(root / layout.format(domain), OFFICE31)
    return root


def visda(root: Path, list_lines: dict[str, list[str]] | None = None) -> Path:
    for domain in ("train", "validation"):
        touch_tree(root / domain, VISDA, suffix=".png")
        if list_lines is not None:
            (root / domain / "image_list.txt").write_text("\n".join(list_lines[domain]) + "\n")
    return root


@pytest.mark.parametrize(
    "layout",
    ["{}/images", "{}", "domain_adaptation_images/{}/images", "office31/{}/images"],
)
def test_layouts_of_office31_give_the_same_samples(tmp_path: Path, layout: str) -> None:
    source, target = open_pair("office31", "A", "webcam", office31(tmp_path, layout))
    assert (source.name, target.name) == ("amazon", "webcam")
    assert source.classes == target.classes == OFFICE31
    assert source.paths == [f"{name}/0000.jpg" for name in OFFICE31]
    assert source.labels.tolist() == list(range(31))
    assert source.labels.dtype == np.int64
    assert os.path.isfile(source.file(3))


@pytest.mark.parametrize("folder", ["Real World", "Real_World", "RealWorld", "real_world"])
def test_layouts_of_office_home(tmp_path: Path, folder: str) -> None:
    classes = BENCHMARKS["office-home"].classes or ()
    root = tmp_path / "OfficeHomeDataset_10072016"
    touch_tree(root / folder, list(classes))
    touch_tree(root / "Art", [name.lower() for name in classes])  # a copy that lost the mixed case
    source, target = open_pair("office-home", "Rw", "Ar", tmp_path)
    assert source.labels.tolist() == sorted(target.labels.tolist()) == list(range(65))
    tv = target.paths.index("tv/0000.jpg")
    assert target.classes[target.labels[tv]] == "TV"


def test_partial_target_keeps_the_label_space(tmp_path: Path) -> None:
    source, target = open_pair("office31-partial", "A", "D", office31(tmp_path))
    assert source.num_classes == target.num_classes == 31
    assert target.labels.tolist() == [0, 1, 5, 10, 11, 12, 15, 16, 17, 22]


def test_list_files_and_folders_give_the_same_samples(tmp_path: Path) -> None:
    plain, _ = open_pair("visda", data_root=visda(tmp_path / "plain"))
    lines = [f"{name}/0000.png {label}" for label, name in enumerate(VISDA)]
    listed, target = open_pair(
        "visda", data_root=visda(tmp_path / "listed", {"train": lines[::-1], "validation": lines})
    )
    assert listed.paths == plain.paths
    assert listed.labels.tolist() == plain.labels.tolist() == target.labels.tolist() == list(range(12))


def test_list_files_beside_the_domains_and_paths_with_spaces(tmp_path: Path) -> None:
    visda(tmp_path)
    save(tmp_path / "train" / "my cars" / "a red car 7.png")
    (tmp_path / "image_list").mkdir()
    for domain in ("train", "validation"):
        lines = [f"{domain}/{name}/0000.png {label}" for label, name in enumerate(VISDA)]
        extra = ["train/my cars/a red car 7.png 3"] if domain == "train" else []
        (tmp_path / "image_list" / f"{domain}.txt").write_text("\n".join(lines + extra))
    source, _ = open_pair("visda", data_root=tmp_path)
    assert source.labels[source.paths.index("train/my cars/a red car 7.png")] == 3
    assert len(source) == 13


def test_unlabelled_list_and_unlabelled_folders_of_the_visda_test_domain(tmp_path: Path) -> None:
    touch_tree(visda(tmp_path) / "test", ["trunk00", "trunk01"], per_class=2)
    _, folders = open_pair("visda", target="test", data_root=tmp_path)
    (tmp_path / "test" / "image_list.txt").write_text("trunk00/0000.jpg\ntrunk01/0001.jpg\n")
    _, listed = open_pair("visda", target="test", data_root=tmp_path)
    assert folders.labels.tolist() == [-1] * 4
    assert (listed.paths, listed.labels.tolist()) == (["trunk00/0000.jpg", "trunk01/0001.jpg"], [-1, -1])
    assert not listed.labelled


def test_labels_of_the_visda_test_domain_as_published_beside_the_domains(tmp_path: Path) -> None:
    touch_tree(visda(tmp_path) / "test", ["trunk01", "trunk20"], per_class=6)
    images = sorted((tmp_path / "test").glob("*/*.jpg"))
    lines = [f"{image.relative_to(tmp_path / 'test')} {11 - label}" for label, image in enumerate(images)]
    (tmp_path / "image_list.txt").write_text("\n".join(reversed(lines)) + "\n")
    _, target = open_pair("visda", target="test", data_root=tmp_path)
    assert target.labels.tolist() == list(range(11, -1, -1))
    assert [target.file(i) for i in range(12)] == [str(image) for image in images]
    assert open_pair("visda", data_root=tmp_path)[1].labels.tolist() == sorted(range(12))


def test_count_that_differs_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"amazon: found 31 images in .*, published 2817"):
        open_pair("office31", data_root=office31(tmp_path))


def test_data_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSDA_DATA", str(office31(tmp_path)))
    assert len(open_pair("office31")[0]) == 31
    monkeypatch.delenv("GSDA_DATA")
    with pytest.raises(UsageError, match=r"--data-root: found neither the option nor .* GSDA_DATA"):
        open_pair("office31")


def test_the_target_of_partial_digits_lacks_half_of_the_classes(few_digits: Path) -> None:
    source, target = open_pair("digits-partial", data_root=few_digits)
    whole_source, whole_target = open_pair("digits", data_root=few_digits)
    assert source.paths == whole_source.paths
    assert target.classes == source.classes == tuple("0123456789")
    assert target.paths == [path for path in whole_target.paths if path[0] in "01234"]
    assert set(target.labels.tolist()) == set(range(5))


@pytest.mark.parametrize("domain", ["mnist", "optdigits"])
def test_partial_digits_have_the_published_number_of_images(domain: str) -> None:
    _, target = open_pair("digits-partial", "fonts", domain)
    assert len(target) == BENCHMARKS["digits-partial"].domain(domain).expected_target_images


def test_digits_need_no_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GSDA_DATA", str(tmp_path / "other data"))
    for domain in digits.DOMAINS:
        touch_tree(digits.default_cache() / domain, list("0123456789"), suffix=".png")
    for task in ("digits", "digits-partial"):
        source, target = open_pair(task)
        assert (source.name, target.name) == ("fonts", "optdigits")
    assert source.classes == tuple("0123456789")
    assert source.labels.tolist() == list(range(10))


# ------------------------------------------------------------------------------------------------------- own folders


def test_own_folders_match_classes_by_name(tmp_path: Path) -> None:
    class_tree(tmp_path / "photos", ["cat", "dog", "horse"])
    class_tree(tmp_path / "sketches", ["horse", "cat"])
    source, target = open_pair("folder", "photos", "sketches", tmp_path)
    assert source.classes == target.classes == ("cat", "dog", "horse")
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert target.labels.tolist() == [0, 0, 2, 2]


def test_accents_match_however_they_are_written(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Bücher") for form in ("NFC", "NFD"))
    class_tree(tmp_path / "photos", [decomposed, "cat"])
    class_tree(tmp_path / "sketches", [composed])
    _, target = open_pair("folder", "photos", "sketches", tmp_path)
    assert [target.classes[label] for label in target.labels.tolist()] == [decomposed] * 2


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".Trash-1000", "__MACOSX", "@eaDir"])
def test_folders_of_programs_hold_no_samples_at_any_depth(tmp_path: Path, name: str) -> None:
    touch_tree(tmp_path / "photos", ["cat", "dog", "dog/small", name, f"cat/{name}", f"dog/small/{name}/deeper"])
    source, _ = open_pair("folder", "photos", "photos", tmp_path)
    assert source.paths == ["cat/0000.jpg", "dog/0000.jpg", "dog/small/0000.jpg"]
    assert open_images(tmp_path / "photos", ("cat", "dog")).paths == source.paths


@pytest.mark.parametrize("leads_to", [".", "..", "../..", "small", "small/back"])
def test_links_that_lead_back_add_no_images(tmp_path: Path, leads_to: str) -> None:
    touch_tree(tmp_path / "photos", ["cat", "cat/small", "dog"])
    (tmp_path / "photos" / "cat" / "small" / "back").symlink_to("..")
    # `small` once more by another name, as any other folder would be; what leads back from there is left out as well.
    again = ["cat/link/0000.jpg"] if leads_to == "small" else []
    (tmp_path / "photos" / "cat" / "link").symlink_to(leads_to)
    source, _ = open_pair("folder", "photos", "photos", tmp_path)
    assert source.paths == ["cat/0000.jpg", *again, "cat/small/0000.jpg", "dog/0000.jpg"]


def test_link_that_leads_back_is_no_class(tmp_path: Path) -> None:
    touch_tree(tmp_path / "photos", ["cat", "dog"])
    (tmp_path / "photos" / "latest").symlink_to(".")
    with pytest.raises(UsageError, match="photos/latest: found no image"):
        open_pair("folder", "photos", "photos", tmp_path)


def test_two_links_in_a_circle_end(tmp_path: Path) -> None:
    touch_tree(tmp_path / "photos", ["cat", "dog"])
    touch_tree(tmp_path / "disk", ["one", "two"])
    (tmp_path / "photos" / "cat" / "link").symlink_to(tmp_path / "disk" / "one")
    (tmp_path / "disk" / "one" / "back").symlink_to(tmp_path / "photos" / "cat")
    (tmp_path / "disk" / "one" / "next").symlink_to(tmp_path / "disk" / "two")
    source, _ = open_pair("folder", "photos", "photos", tmp_path)
    assert source.paths == ["cat/0000.jpg", "cat/link/0000.jpg", "cat/link/next/0000.jpg", "dog/0000.jpg"]


def test_own_flat_target_is_unlabelled(tmp_path: Path) -> None:
    class_tree(tmp_path / "photos", ["cat", "dog"])
    save(tmp_path / "new" / "b.png")
    save(tmp_path / "new" / "a.jpg")
    (tmp_path / "new" / "notes.txt").touch()
    _, target = open_pair("folder", "photos", "new", tmp_path)
    assert (target.paths, target.labels.tolist()) == (["a.jpg", "b.png"], [-1, -1])
    assert not target.labelled


# --------------------------------------------------------------------------------------------------------- bad input


def test_root_that_is_missing_empty_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere, which does not exist"):
        open_pair("office31", data_root=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="which is empty"):
        open_pair("office31", data_root=tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="which is a file"):
        open_pair("office31", data_root=tmp_path / "file")


@pytest.mark.parametrize("private", ["", "data", "data/photos", "data/photos/cat", "data/photos/cat/deep", "data/new"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_own_folder_that_cannot_be_read_is_named(
    tmp_path: Path, private: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch_tree(tmp_path / "data" / "photos", ["cat", "cat/deep", "dog"])
    touch_tree(tmp_path / "data" / "new", ["cat"])
    refuse(monkeypatch, tmp_path / private, code)
    with pytest.raises(
        UsageError, match=rf"^{tmp_path / private}\S*: found {os.strerror(code)}; expected .* can be read"
    ):
        open_pair("folder", "photos", "new", tmp_path / "data")


@pytest.mark.parametrize("private", ["", "train", "train/bus"])
@pytest.mark.parametrize("listed", [False, True])
def test_folder_of_a_benchmark_that_cannot_be_read_is_named(
    tmp_path: Path, private: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{name}/0000.png {label}" for label, name in enumerate(VISDA)]
    visda(tmp_path, {"train": lines, "validation": lines} if listed else None)
    refuse(monkeypatch, tmp_path / private)
    with pytest.raises(UsageError, match=rf"^{tmp_path / private}\S*: found Permission denied; expected"):
        open_pair("visda", data_root=tmp_path)


@pytest.mark.parametrize("private", ["", "images", "images/deep"])
def test_folder_of_images_that_cannot_be_read_is_named(
    tmp_path: Path, private: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch_tree(tmp_path / "images", [".", "deep"])
    refuse(monkeypatch, tmp_path / private)
    with pytest.raises(UsageError, match=rf"^{tmp_path / private}\S*: found Permission denied; expected"):
        open_images(tmp_path / "images", ("cat", "dog"))


def test_root_without_the_domain_says_what_is_there(tmp_path: Path) -> None:
    touch_tree(tmp_path / "amazon", OFFICE31)
    with pytest.raises(
        UsageError, match=r"which holds amazon; expected the domain webcam of office31: webcam/images or"
    ):
        open_pair("office31", data_root=tmp_path)


def test_unknown_domain(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'caltech'; expected a domain of office31"):
        open_pair("office31", "caltech", data_root=office31(tmp_path))


def test_classes_that_do_not_fit(tmp_path: Path) -> None:
    touch_tree(office31(tmp_path) / "amazon" / "images", ["zebra"])
    with pytest.raises(UsageError, match="domain amazon: found the folders zebra in"):
        open_pair("office31", data_root=tmp_path)


def test_class_that_is_missing(tmp_path: Path) -> None:
    (office31(tmp_path) / "webcam" / "images" / "mug" / "0000.jpg").unlink()
    (tmp_path / "webcam" / "images" / "mug").rmdir()
    with pytest.raises(UsageError, match=r"domain webcam: found .* without images of mug; expected images of all 31"):
        open_pair("office31", data_root=tmp_path)


def test_domain_folder_without_class_folders(tmp_path: Path) -> None:
    for folder in ("train", "validation"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UsageError, match=r"domain train: found .*train without class folders"):
        open_pair("visda", data_root=tmp_path)


def test_class_folder_without_an_image(tmp_path: Path) -> None:
    (office31(tmp_path) / "amazon" / "images" / "mug" / "0000.jpg").rename(tmp_path / "elsewhere.txt")
    with pytest.raises(UsageError, match="amazon/images/mug: found no image"):
        open_pair("office31", data_root=tmp_path)


def test_class_folders_that_differ_in_case_alone(tmp_path: Path) -> None:
    touch_tree(office31(tmp_path) / "amazon" / "images", ["Mug"])
    with pytest.raises(UsageError, match="the folders 'Mug' and 'mug'"):
        open_pair("office31", data_root=tmp_path)


def test_files_whose_names_differ_in_case_alone_are_all_there(tmp_path: Path) -> None:
    for name in ("frame.jpg", "Frame.jpg", "frame.JPG"):
        (office31(tmp_path) / "webcam" / "images" / "mug" / name).touch()
    if len(list((tmp_path / "webcam" / "images" / "mug").iterdir())) < 4:
        pytest.skip("a file system that holds no such names")
    _, target = open_pair("office31", data_root=tmp_path)
    names = [path for path in target.paths if path.startswith("mug/")]
    assert names == ["mug/0000.jpg", "mug/Frame.jpg", "mug/frame.JPG", "mug/frame.jpg"]


@pytest.mark.parametrize("label", [12, -1])
def test_list_label_out_of_range(tmp_path: Path, label: int) -> None:
    lines = [f"{name}/0000.png {label}" for label, name in enumerate(VISDA)]
    bad = [*lines[:4], f"horse/0000.png {label}"]
    with pytest.raises(
        UsageError, match=rf"image_list.txt, line 5: found label {label} .*; expected a label from 0 to 11"
    ):
        open_pair("visda", data_root=visda(tmp_path, {"train": bad, "validation": lines}))


@pytest.mark.parametrize("ending", ["--5", "-", "5-", "\u0663"])
def test_what_is_no_number_belongs_to_the_name_of_a_listed_file(tmp_path: Path, ending: str) -> None:
    lines = [f"{name}/0000.png {label}" for label, name in enumerate(VISDA)]
    bad = [*lines, f"bus/0000.png {ending}"]
    with pytest.raises(UsageError, match=rf"1 listed files that are missing from .*train: bus/0000.png {ending};"):
        open_pair("visda", data_root=visda(tmp_path, {"train": bad, "validation": lines}))


def test_listed_file_that_is_missing(tmp_path: Path) -> None:
    lines = [f"{name}/0000.png {label}" for label, name in enumerate(VISDA)]
    bad = [*lines, "bus/gone.png 2", "nowhere/x.png 0"]
    with pytest.raises(UsageError, match=r"2 listed files that are missing from .*train: bus/gone.png, nowhere/x.png"):
        open_pair("visda", data_root=visda(tmp_path, {"train": bad, "validation": lines}))


def test_list_that_is_empty_or_no_text(tmp_path: Path) -> None:
    lines = [f"{name}/0000.png {label}" for label, name in enumerate(VISDA)]
    visda(tmp_path, {"train": [""], "validation": lines})
    with pytest.raises(UsageError, match=r"image_list.txt: found no image"):
        open_pair("visda", data_root=tmp_path)
    (tmp_path / "train" / "image_list.txt").write_bytes(b"aeroplane/\xff.png 0\n")
    with pytest.raises(UsageError, match="bytes that are not UTF-8 at offset 10"):
        open_pair("visda", data_root=tmp_path)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(office31(tmp_path) / "amazon" / "images" / "mug")
    try:
        for name in (b"caf\xe9.jpg", b"th\xe9.jpg", "ça.jpg".encode()):
            open(os.path.join(folder, name), "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(UsageError, match=r"2 names that are not UTF-8: b'mug/caf\\xe9.jpg', b'mug/th\\xe9.jpg'"):
        open_pair("office31", data_root=tmp_path)


def test_own_target_with_a_class_the_source_lacks(tmp_path: Path) -> None:
    touch_tree(tmp_path / "photos", ["cat", "dog"])
    touch_tree(tmp_path / "sketches", ["cat", "horse"])
    with pytest.raises(UsageError, match="--target: found the classes horse, which the source lacks"):
        open_pair("folder", "photos", "sketches", tmp_path)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (None, "photos", "--source: found nothing"),
        ("photos", None, "--target: found nothing"),
        ("photos", "nowhere", "--target: found .*nowhere, which is no folder"),
        ("flat", "photos", "--source: found .*flat with 0 class folders"),
        ("photos", "mixed", "--target: found .*mixed with 1 images beside the folders cat"),
        ("photos", "empty", "empty: found no image"),
        ("hollow", "photos", "hollow/bird: found no image"),
    ],
)
def test_own_folders_that_do_not_fit(tmp_path: Path, source: str | None, target: str | None, message: str) -> None:
    touch_tree(tmp_path / "photos", ["cat", "dog"])
    touch_tree(tmp_path / "hollow", ["cat", "dog"])
    (tmp_path / "hollow" / "bird").mkdir()
    touch_tree(tmp_path / "mixed", ["cat"])
    (tmp_path / "mixed" / "a.jpg").touch()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=message):
        open_pair("folder", source, target, tmp_path)
