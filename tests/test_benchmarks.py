import pytest

from gsda_fast.data.benchmarks import BENCHMARKS, find_benchmark
from gsda_fast.errors import UsageError


def test_tasks_of_the_command_line() -> None:
    assert list(BENCHMARKS) == [
        "digits",
        "digits-partial",
        "pictures",
        "pictures-features",
        "features",
        "visda",
        "office31",
        "office31-partial",
        "office-home",
        "office-home-partial",
        "folder",
    ]


@pytest.mark.parametrize(
    ("task", "classes", "images"),
    [
        ("visda", 12, {"train": 152_397, "validation": 55_388}),
        ("office31", 31, {"amazon": 2817, "webcam": 795, "dslr": 498}),
        ("office-home", 65, {"art": 2427, "clipart": 4365, "product": 4439, "real_world": 4357}),
    ],
)
def test_published_counts(task: str, classes: int, images: dict[str, int]) -> None:
    benchmark = BENCHMARKS[task]
    assert benchmark.classes is not None
    assert len(benchmark.classes) == classes
    assert {name: benchmark.domain(name).expected_images for name in images} == images


@pytest.mark.parametrize("task", ["visda", "office31", "office-home"])
def test_labels_follow_the_ascii_order_of_the_class_names(task: str) -> None:
    classes = BENCHMARKS[task].classes
    assert classes is not None
    assert list(classes) == sorted(set(classes))


def test_label_order_of_office_home_is_not_that_of_cdan() -> None:
    classes = BENCHMARKS["office-home"].classes
    assert classes is not None
    assert (classes[0], classes[1], classes[24], classes[64]) == ("Alarm_Clock", "Backpack", "Fork", "Webcam")


def test_partial_tasks_keep_the_label_space() -> None:
    office31, office_home = BENCHMARKS["office31-partial"], BENCHMARKS["office-home-partial"]
    digits, of_office31 = BENCHMARKS["digits-partial"], [0, 1, 5, 10, 11, 12, 15, 16, 17, 22]
    for partial, labels in ((office31, of_office31), (office_home, list(range(25))), (digits, list(range(5)))):
        assert partial.classes is not None
        assert partial.target_classes is not None
        assert partial.classes == BENCHMARKS[partial.name.removesuffix("-partial")].classes
        assert [partial.classes.index(name) for name in partial.target_classes] == labels
    assert [office31.domain(name).expected_target_images for name in "AWD"] == [958, 295, 157]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("digits", "M>O M>F O>M O>F F>M F>O"),
        ("office31", "A>W D>W W>D A>D D>A W>A"),
        ("office-home", "Ar>Cl Ar>Pr Ar>Rw Cl>Ar Cl>Pr Cl>Rw Pr>Ar Pr>Cl Pr>Rw Rw>Ar Rw>Cl Rw>Pr"),
    ],
)
def test_transfer_tasks_in_the_order_of_the_paper(task: str, expected: str) -> None:
    benchmark = BENCHMARKS[task]
    short = [f"{benchmark.domain(s).short}>{benchmark.domain(t).short}" for s, t in benchmark.transfer_tasks]
    assert " ".join(short) == expected


def test_default_of_digits() -> None:
    assert (BENCHMARKS["digits"].default_source, BENCHMARKS["digits"].default_target) == ("fonts", "optdigits")


@pytest.mark.parametrize("name", ["Rw", "rw", "Real World", "RealWorld", "real-world", "REAL_WORLD"])
def test_domain_names_and_aliases(name: str) -> None:
    assert BENCHMARKS["office-home"].domain(name).name == "real_world"


def test_no_name_means_two_domains() -> None:
    for benchmark in BENCHMARKS.values():
        names = [name.casefold() for facts in benchmark.domains for name in (facts.name, *facts.aliases)]
        assert len(names) == len(set(names))


def test_unknown_domain_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'caltech'.*amazon\|A, webcam\|W, dslr\|D"):
        BENCHMARKS["office31"].domain("caltech")


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match="'office32'; expected one of digits, digits-partial, pictures, pictures-features"
    ):
        find_benchmark("office32")


@pytest.mark.parametrize("task", list(BENCHMARKS))
def test_recipes_are_consistent(task: str) -> None:
    preprocessing = BENCHMARKS[task].preprocessing
    assert preprocessing.crop <= preprocessing.resize
    assert len(preprocessing.mean) == len(preprocessing.std) == preprocessing.channels
