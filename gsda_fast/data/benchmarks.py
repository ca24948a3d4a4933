"""The one table of benchmarks: domains, layouts, class order, counts, transfer tasks, preprocessings.

A new data set is one new entry in `BENCHMARKS`; nothing else in the package knows a data set by name.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gsda_fast.errors import UsageError

Crops = Literal[1, 10]
"""Crops of a test image over which its probabilities are averaged."""

Orientation = Literal["exif", "stored"]
"""Whether a photo is turned as its EXIF orientation says, or its pixels are used as they are stored."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a training or an evaluation image.

    An image is thought of as resized to a square of `resize` x `resize` pixels (aspect not kept). Training takes
    a random window of that (or its centre, where `random_scale` is None) and resamples it to `crop` x `crop`;
    evaluation takes the centre. Values are scaled to 0..1 and then normalised: ``(x - mean) / std`` for each channel.
    """

    resize: int
    """side of the square resized image, in pixels"""
    crop: int
    """side of the square image that the network sees, in pixels"""
    random_scale: tuple[float, float] | None
    """area of the random training window, as a share of the resized image (least, most); None: the centre crop"""
    flip: bool
    """mirror half of the training images"""
    channels: int
    """3: RGB; 1: grey"""
    mean: tuple[float, ...]
    """one value a channel, on the scale 0..1"""
    std: tuple[float, ...]
    """one value a channel, on the scale 0..1"""

    def with_crop(self, side: int) -> "Preprocessing":
        """Return the same with a crop of `side` x `side` pixels; the resized image grows or shrinks with it."""
        return replace(self, resize=round(self.resize * side / self.crop), crop=side)

    def for_backbone(self, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> "Preprocessing":
        """Return the same with a backbone's crop and normalisation."""
        return replace(self.with_crop(side), mean=mean, std=std)


@dataclass(frozen=True)
class DomainFacts:
    """One domain of a benchmark, and every place where copies of the data set keep it."""

    name: str
    aliases: tuple[str, ...] = ()
    """other names accepted on the command line; the first is the short name used in tables"""
    folders: tuple[str, ...] = ()
    """folders of class folders, relative to the root, tried in order"""
    lists: tuple[tuple[str, str], ...] = ()
    """(list file, folder that its paths start from), relative to the root; tried before `folders`"""
    expected_images: int | None = None
    expected_target_images: int | None = None
    """images of the target classes alone, in partial tasks"""
    may_be_unlabelled: bool = False
    """its owner shipped it without labels: folders that are no classes are then read as one unlabelled set"""

    @property
    def short(self) -> str:
        """The name used in tables: ``A`` for ``amazon``."""
        return self.aliases[0] if self.aliases else self.name


@dataclass(frozen=True)
class Benchmark:
    """Everything that is known about a benchmark before its files are looked at.

    `classes` is the label space in label order, None where the source folder decides. `target_classes` names the
    classes that the target keeps in a partial task; the label space stays that of `classes`.
    """

    name: str
    domains: tuple[DomainFacts, ...]
    classes: tuple[str, ...] | None
    target_classes: tuple[str, ...] | None
    default_source: str | None
    default_target: str | None
    transfer_tasks: tuple[tuple[str, str], ...]
    """(source, target) in the order of the paper's tables"""
    preprocessing: Preprocessing
    roots: tuple[str, ...] = ("",)
    """folders below the data root in which the domains may lie, tried in order"""
    reported_by_class: bool = False
    """its literature reports the accuracy of each class and their mean"""
    built_in: bool = False
    """its images are made from installed packages: there is nothing to fetch"""
    buildable: bool = False
    """`data build` makes it; where no root is named, it is looked for where that puts it"""
    embedded: bool = False
    """its samples are rows of features, in a file for each domain"""

    def orientation(self, asked: Orientation) -> Orientation:
        """Return how its images are read: those that this package makes are upright as they are stored."""
        return "stored" if self.built_in or self.buildable or self.embedded else asked

    @property
    def short_names(self) -> dict[str, str]:
        """Of the domains, by name: `amazon` -> `A`."""
        return {domain.name: domain.short for domain in self.domains}

    def domain(self, name_or_alias: str) -> DomainFacts:
        """Return the domain of that name or alias, in upper or lower case.

        Raises:
            UsageError: the benchmark has no such domain.
        """
        wanted = plain_name(name_or_alias)
        for facts in self.domains:
            if wanted in {plain_name(known) for known in (facts.name, *facts.aliases)}:
                return facts
        known = ", ".join("|".join((facts.name, *facts.aliases)) for facts in self.domains)
        raise UsageError(
            "--source or --target", found=f"'{name_or_alias}'", expected=f"a domain of {self.name}: {known}"
        )


EMBEDDED = "-features"
"""Behind a benchmark's name: the same, on features of its images."""


def plain_name(name: str) -> str:
    """Return the name as compared: copies of the data sets differ in case, spaces, hyphens and underscores.

    An accented letter may be one character or, as archives made on a Mac have it, a letter and its accent.
    """
    return unicodedata.normalize("NFC", name).casefold().replace(" ", "_").replace("-", "_")


def find_benchmark(task: str) -> Benchmark:
    """Return the benchmark of that task name.

    Raises:
        UsageError: there is no such task.
    """
    if task not in BENCHMARKS:
        raise UsageError("TASK", found=f"'{task}'", expected=f"one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[task]


def _pairs(names: dict[str, str], tasks: str) -> tuple[tuple[str, str], ...]:
    """Transfer tasks written as in papers, ``A>W D>W``, with the full domain names."""
    return tuple((names[task.split(">")[0]], names[task.split(">")[1]]) for task in tasks.split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_IMAGENET_PREPROCESSING = Preprocessing(
    resize=256,
    crop=224,
    random_scale=(0.08, 1.0),
    flip=True,
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
# VisDA's literature trains on the centre crop: its source images are rendered around the object.
_VISDA_PREPROCESSING = Preprocessing(
    resize=256,
    crop=224,
    random_scale=None,
    flip=True,
    channels=3,
    mean=_IMAGENET_PREPROCESSING.mean,
    std=_IMAGENET_PREPROCESSING.std,
)
_DIGITS_PREPROCESSING = Preprocessing(
    resize=16, crop=16, random_scale=None, flip=False, channels=1, mean=(0.5,), std=(0.5,)
)

# Rows of features: nothing to crop. The loader knows their size.
_FEATURES_PREPROCESSING = Preprocessing(
    resize=1, crop=1, random_scale=None, flip=False, channels=1, mean=(0.0,), std=(1.0,)
)

# Whole pictures are tested: the builder leaves a margin of its own. Windows of less than a quarter are often all white.
_PICTURES_PREPROCESSING = Preprocessing(
    resize=224,
    crop=224,
    random_scale=(0.25, 1.0),
    flip=True,
    channels=3,
    mean=_IMAGENET_PREPROCESSING.mean,
    std=_IMAGENET_PREPROCESSING.std,
)

_DIGITS_CLASSES = tuple("0123456789")
_DIGITS_DOMAINS = (
    DomainFacts("mnist", ("M",), ("mnist",), (), 2000, 1000),
    DomainFacts("optdigits", ("O",), ("optdigits",), (), 1797, 901),
    DomainFacts("fonts", ("F",), ("fonts",)),  # as many as matplotlib's release has fonts for
)
_DIGITS_TASKS = _pairs({"M": "mnist", "O": "optdigits", "F": "fonts"}, "M>O M>F O>M O>F F>M F>O")

_VISDA_CLASSES = _words("aeroplane bicycle bus car horse knife motorcycle person plant skateboard train truck")

_OFFICE31_CLASSES = _words(
    """
    back_pack bike bike_helmet bookcase bottle calculator desk_chair desk_lamp desktop_computer file_cabinet headphones
    keyboard laptop_computer letter_tray mobile_phone monitor mouse mug paper_notebook pen phone printer projector
    punchers ring_binder ruler scissors speaker stapler tape_dispenser trash_can
    """
)
_OFFICE31_PARTIAL = _words("back_pack bike calculator headphones keyboard laptop_computer monitor mouse mug projector")
_OFFICE31_DOMAINS = (
    DomainFacts("amazon", ("A",), ("amazon/images", "amazon"), (), 2817, 958),
    DomainFacts("webcam", ("W",), ("webcam/images", "webcam"), (), 795, 295),
    DomainFacts("dslr", ("D",), ("dslr/images", "dslr"), (), 498, 157),
)
_OFFICE31_TASKS = _pairs({"A": "amazon", "W": "webcam", "D": "dslr"}, "A>W D>W W>D A>D D>A W>A")
_OFFICE31_ROOTS = (
    "",
    "domain_adaptation_images",
    "office31",
    "office31/domain_adaptation_images",
    "office-31",
    "Office-31",
    "Office31",
)

# Sorted by ASCII (TV before Table), as folder listings sort; the lists of CDAN's code use another order.
_OFFICE_HOME_CLASSES = _words(
    """
    Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer Couch
    Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer Helmet
    Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil
    Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda Speaker Spoon
    TV Table Telephone ToothBrush Toys Trash_Can Webcam
    """
)
_OFFICE_HOME_DOMAINS = (
    DomainFacts("art", ("Ar",), ("Art", "art"), (), 2427, 1089),
    DomainFacts("clipart", ("Cl",), ("Clipart", "clipart"), (), 4365, 1675),
    DomainFacts("product", ("Pr",), ("Product", "product"), (), 4439, 1785),
    DomainFacts(
        "real_world", ("Rw", "RealWorld"), ("Real World", "Real_World", "RealWorld", "real_world"), (), 4357, 1811
    ),
)
_OFFICE_HOME_TASKS = _pairs(
    {"Ar": "art", "Cl": "clipart", "Pr": "product", "Rw": "real_world"},
    "Ar>Cl Ar>Pr Ar>Rw Cl>Ar Cl>Pr Cl>Rw Pr>Ar Pr>Cl Pr>Rw Rw>Ar Rw>Cl Rw>Pr",
)
_OFFICE_HOME_ROOTS = (
    "",
    "OfficeHomeDataset_10072016",
    "office-home",
    "office-home/OfficeHomeDataset_10072016",
    "Office-Home",
    "OfficeHome",
)

# The counts are those of the frozen list that `data build pictures` draws.
_PICTURES_CLASSES = _words("bird bug building fish flower fruit instrument mammal tool vegetable vehicle")
_PICTURES_DOMAINS = (
    DomainFacts("photo", ("P",), ("photo",), (), 347),
    DomainFacts("clipart", ("C",), ("clipart",), (), 593),
    DomainFacts("emoji", ("E",), ("emoji",), (), 998),
    DomainFacts("icon", ("I",), ("icon",), (), 936),
)
_PICTURES_TASKS = _pairs(
    {"P": "photo", "C": "clipart", "E": "emoji", "I": "icon"}, "P>C P>E P>I C>P C>E C>I E>P E>C E>I I>P I>C I>E"
)

_TABLE: Sequence[Benchmark] = (
    Benchmark(
        name="digits",
        domains=_DIGITS_DOMAINS,
        classes=_DIGITS_CLASSES,
        target_classes=None,
        default_source="fonts",
        default_target="optdigits",
        transfer_tasks=_DIGITS_TASKS,
        preprocessing=_DIGITS_PREPROCESSING,
        built_in=True,
    ),
    Benchmark(
        name="digits-partial",
        domains=_DIGITS_DOMAINS,
        classes=_DIGITS_CLASSES,
        target_classes=_DIGITS_CLASSES[:5],
        default_source="fonts",
        default_target="optdigits",
        transfer_tasks=_DIGITS_TASKS,
        preprocessing=_DIGITS_PREPROCESSING,
        built_in=True,
    ),
    Benchmark(
        name="pictures",
        domains=_PICTURES_DOMAINS,
        classes=_PICTURES_CLASSES,
        target_classes=None,
        default_source="clipart",
        default_target="photo",
        transfer_tasks=_PICTURES_TASKS,
        preprocessing=_PICTURES_PREPROCESSING,
        roots=("", "pictures"),
        reported_by_class=True,
        buildable=True,
    ),
    Benchmark(
        name="pictures-features",
        domains=_PICTURES_DOMAINS,
        classes=_PICTURES_CLASSES,
        target_classes=None,
        default_source="clipart",
        default_target="photo",
        transfer_tasks=_PICTURES_TASKS,
        preprocessing=_FEATURES_PREPROCESSING,
        reported_by_class=True,
        embedded=True,
    ),
    # The user's own two files, named by --source and --target; the source's labels are the classes.
    Benchmark(
        name="features",
        domains=(),
        classes=None,
        target_classes=None,
        default_source=None,
        default_target=None,
        transfer_tasks=(),
        preprocessing=_FEATURES_PREPROCESSING,
        embedded=True,
    ),
    Benchmark(
        name="visda",
        domains=(
            DomainFacts(
                "train", (), ("train",), (("train/image_list.txt", "train"), ("image_list/train.txt", "")), 152_397
            ),
            DomainFacts(
                "validation",
                ("val",),
                ("validation",),
                (("validation/image_list.txt", "validation"), ("image_list/validation.txt", "")),
                55_388,
            ),
            DomainFacts(
                "test",
                (),
                ("test",),
                # Its labels were published later, as a list that the owner's instructions put beside the domains.
                (("test/image_list.txt", "test"), ("image_list/test.txt", ""), ("image_list.txt", "test")),
                72_372,
                may_be_unlabelled=True,
            ),
        ),
        classes=_VISDA_CLASSES,
        target_classes=None,
        default_source="train",
        default_target="validation",
        transfer_tasks=(("train", "validation"),),
        preprocessing=_VISDA_PREPROCESSING,
        roots=("", "visda", "visda-2017", "VisDA-2017", "visda2017"),
        reported_by_class=True,
    ),
    Benchmark(
        name="office31",
        domains=_OFFICE31_DOMAINS,
        classes=_OFFICE31_CLASSES,
        target_classes=None,
        default_source="amazon",
        default_target="webcam",
        transfer_tasks=_OFFICE31_TASKS,
        preprocessing=_IMAGENET_PREPROCESSING,
        roots=_OFFICE31_ROOTS,
    ),
    Benchmark(
        name="office31-partial",
        domains=_OFFICE31_DOMAINS,
        classes=_OFFICE31_CLASSES,
        target_classes=_OFFICE31_PARTIAL,
        default_source="amazon",
        default_target="webcam",
        transfer_tasks=_OFFICE31_TASKS,
        preprocessing=_IMAGENET_PREPROCESSING,
        roots=_OFFICE31_ROOTS,
    ),
    Benchmark(
        name="office-home",
        domains=_OFFICE_HOME_DOMAINS,
        classes=_OFFICE_HOME_CLASSES,
        target_classes=None,
        default_source="art",
        default_target="clipart",
        transfer_tasks=_OFFICE_HOME_TASKS,
        preprocessing=_IMAGENET_PREPROCESSING,
        roots=_OFFICE_HOME_ROOTS,
    ),
    Benchmark(
        name="office-home-partial",
        domains=_OFFICE_HOME_DOMAINS,
        classes=_OFFICE_HOME_CLASSES,
        target_classes=_OFFICE_HOME_CLASSES[:25],
        default_source="art",
        default_target="clipart",
        transfer_tasks=_OFFICE_HOME_TASKS,
        preprocessing=_IMAGENET_PREPROCESSING,
        roots=_OFFICE_HOME_ROOTS,
    ),
    # The user's own two folders, named by --source and --target; the source's folders are the classes.
    Benchmark(
        name="folder",
        domains=(),
        classes=None,
        target_classes=None,
        default_source=None,
        default_target=None,
        transfer_tasks=(),
        preprocessing=_IMAGENET_PREPROCESSING,
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}
"""Every task of the command line, by name."""
