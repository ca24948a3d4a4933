"""Adaptation in one call from Python: folders, arrays of images or embeddings in, an adapted classifier out."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from gsda_fast.config import configure
from gsda_fast.console import plain_console, progress_bars
from gsda_fast.data.domains import UNKNOWN, ImageDomain, open_images
from gsda_fast.data.embeddings import SUFFIXES, rows_in_memory
from gsda_fast.errors import UsageError
from gsda_fast.export import ExportSettings, export
from gsda_fast.files import atomic_file, is_plain_name
from gsda_fast.model import FEATURES
from gsda_fast.predict import open_samples, predict
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.train import train
from gsda_fast.trained import TrainedModel, load_trained, require_row_size

_DATA = "data"  # below the run's folder: arrays that were given
_EXPECTED = (
    "a folder of class folders, an .npz or .npy file of features, an array of images (n, height, width, 1 or 3) uint8 "
    "or of features (n, size) floating point, or a pair (array, labels)"
)

Kind = Literal["images", "features"]


class Adapted:
    """A classifier that was adapted to a target domain, and the run that made it.

    Where `adapt` was given no `output`, the run's folder lives as long as this object.

    Attributes:
        run: the run's folder. result: what `result.json` says.
        classes: (r,), in the order of the probabilities' columns: numbers where the source's labels were given as an
            array of numbers, texts otherwise.
    """

    def __init__(self, run: Path, result: RunResult, classes: NDArray[Any], target: _Samples, console: Console) -> None:
        self.run, self.result, self.classes = run, result, classes
        self._target, self._console = target, console

    @property
    def accuracy(self) -> float | None:
        """On the target after the last step, percent, nothing chosen; None where the target has no labels."""
        return self.result.accuracy.last

    @cached_property
    def trained(self) -> TrainedModel:
        """Encoder and classifier, in evaluation mode, on the device of the run if it is here."""
        return load_trained(self.run, device="auto")

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """(n, r): of the target's classes, in the order in which its samples were given or lie in their folder."""
        stored = RunFolder(self.run).read_predictions()
        assert stored is not None, "the run has finished"
        return stored.probabilities[self._target.order]

    def predict_proba(self, samples: Any) -> NDArray[np.float32]:
        """Return class probabilities, (n, r).

        Args:
            samples: as for `adapt`, without labels; an image file, too. A folder's images are sorted by their path.

        Raises:
            UsageError: samples of another kind or size than the run's, or a file that cannot be read.
        """
        model = self.trained.config.model
        kind: Kind = "features" if model.backbone == FEATURES else "images"
        given = _Samples.of("samples", samples)
        if given.kind != kind:
            raise UsageError("samples", found=given.kind, expected=f"{kind}, as the run was trained on")
        if given.path is not None:
            return _probabilities(self.trained, open_samples(self.trained, given.path), self._console)
        if kind == "features":
            return embedded_probabilities(self.trained, given.values, self._console)
        with tempfile.TemporaryDirectory() as folder:
            given.write_images(Path(folder))
            return _probabilities(self.trained, open_images(Path(folder), self.trained.classes), self._console)

    def predict(self, samples: Any) -> NDArray[Any]:
        """Return the most probable class of each sample, (n,), as `classes` has it. Arguments: `predict_proba`."""
        return self.classes[self.predict_proba(samples).argmax(axis=1)]

    def report(self, points: int = 1000) -> Path:
        """Draw the run's page of plots and tables, and return its path.

        Args:
            points: samples of each domain in a t-SNE plot, at most.
        """
        from gsda_fast.results.page import write_page  # with it come the libraries that draw

        return write_page([RunFolder(self.run)], self.run, points=points)

    def export(self, output: Path | str | None = None) -> list[Path]:
        """Write safetensors and a `torch.export` program, which load without this project, and return their paths.

        Args:
            output: a folder; `export` in the run's if None.
        """
        return export(ExportSettings(self.run, output=None if output is None else Path(output)))


def console_for(progress: bool) -> Console:
    """Return standard error where progress is to be shown, and a silent console otherwise."""
    return plain_console(stderr=True) if progress else Console(quiet=True)


def embedded_probabilities(trained: TrainedModel, features: NDArray[Any], console: Console) -> NDArray[np.float32]:
    """Return class probabilities, (n, r), of rows in memory.

    Args:
        trained: of a run on features. features: (n, D) floating point. console: where a bar is shown.

    Raises:
        UsageError: rows of another size or type, or a number that is not finite.
    """
    rows = rows_in_memory("samples", features)
    require_row_size("samples", rows.dim, trained.config.model)
    names = [f"row {number}" for number in range(len(rows.index))]
    unknown = np.full(len(names), UNKNOWN, dtype=np.int64)
    domain = ImageDomain("samples", Path(), names, unknown, trained.classes, rows=rows)
    return _probabilities(trained, domain, console)


def _probabilities(trained: TrainedModel, samples: ImageDomain, console: Console) -> NDArray[np.float32]:
    rows = []
    with progress_bars(console) as progress:
        for _, row in predict(trained, samples):
            rows.append(row)
            progress("predict", len(rows), len(samples))
    return torch.stack(rows).numpy()


def adapt(
    source: Any,
    target: Any,
    method: str = "gsda",
    *,
    output: Path | str | None = None,
    progress: bool = True,
    **options: Any,
) -> Adapted:
    """Train on a labelled source and an unlabelled target, and return the adapted classifier.

    It is the same run as `python -m gsda_fast.train folder` or `features`: same presets, files and figures.

    Args:
        source: a folder of class folders; a pair (images, labels) or (features, labels); an .npz file with both.
            Images are (n, height, width, 1 or 3) uint8, features (n, size) or (views, n, size) floating point, labels
            (n,) whole numbers or texts.
        target: the same; labels may be missing, or -1 for some, and serve for figures alone.
        method: see `gsda_fast.methods.METHODS`.
        output: the run's folder, which also keeps the arrays; the same call resumes an interrupted run there. None: a
            temporary one.
        progress: show lines and bars on standard error, now and in later predictions.
        options: those of the command line in snake_case, such as `steps=700, seed=1, backbone="resnet18"`.

    Raises:
        UsageError: an option or data that do not fit. TrainingError: a run that cannot go on.
        Stopped: SIGTERM or SIGINT asked for it (in the main thread).
    """
    for name in ("source", "target", "data_root"):
        if name in options:
            raise UsageError(name, found="an option", expected="data, as the arguments source and target")
    own, other = _Samples.of("source", source), _Samples.of("target", target)
    if own.kind != other.kind:
        raise UsageError("target", found=other.kind, expected=f"{own.kind}, as the source")
    if own.path is None and own.labels is None:
        raise UsageError("source", found="an array without labels", expected="a pair (array, labels)")
    task = "features" if own.kind == "features" else "folder"
    configure(task, method, **options)  # a mistake is told before anything is written
    console = console_for(progress)
    temporary = None if output is not None else Path(tempfile.mkdtemp(prefix="gsda-"))
    try:
        run = temporary if temporary is not None else Path(str(output))
        places = [each.stored(run / _DATA) for each in (own, other)]
        root = Path(os.path.commonpath([place.parent for place in places]))
        names = {role: str(place.relative_to(root)) for role, place in zip(("source", "target"), places)}
        config = configure(task, method, **names, data_root=root, output=run, **options)
        with _process_kept():
            result = train(config, console)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    adapted = Adapted(run, result, own.classes_as_given(result.classes), other, console)
    if temporary is not None:
        weakref.finalize(adapted, shutil.rmtree, temporary, ignore_errors=True)
    return adapted


@dataclass(frozen=True, eq=False)
class _Samples:
    """Samples as they were given: a path, or an array and perhaps labels."""

    role: str
    kind: Kind
    path: Path | None = None
    array: NDArray[Any] | None = None
    labels: NDArray[Any] | None = None

    @classmethod
    def of(cls, role: str, given: Any) -> _Samples:
        """Look at what the user gave.

        Raises:
            UsageError: it is nothing of what `adapt` takes.
        """
        if isinstance(given, str | os.PathLike):
            path = Path(given).absolute()
            if path.suffix in SUFFIXES and not path.is_dir():
                return cls(role, "features", path)
            if not path.exists():
                raise UsageError(role, found=f"{path}, which does not exist", expected=_EXPECTED)
            return cls(role, "images", path)
        pair = isinstance(given, tuple) and len(given) == 2
        array, labels = _array(role, given[0] if pair else given), _array(role, given[1]) if pair else None
        of_images = array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] in (1, 3)
        of_features = array.dtype.kind == "f" and array.ndim in (2, 3)
        if not (of_images or of_features) or 0 in array.shape:
            raise UsageError(role, found=f"an array of shape {array.shape} and type {array.dtype}", expected=_EXPECTED)
        count = len(array) if of_images else array.shape[-2]
        if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iuU"):
            found = f"labels of shape {labels.shape} and type {labels.dtype}"
            raise UsageError(role, found=found, expected=f"({count},) whole numbers or texts, one for each sample")
        return cls(role, "images" if of_images else "features", None, array, labels)

    @property
    def values(self) -> NDArray[Any]:
        assert self.array is not None
        return self.array

    @property
    def order(self) -> NDArray[np.int64] | slice:
        """Where each sample stands among those of the run: in class folders, images are sorted by class."""
        if self.path is not None or self.kind == "features" or self.labels is None:
            return slice(None)
        return np.argsort(np.argsort([self._file(i) for i in range(len(self.values))]))

    def classes_as_given(self, names: Sequence[str]) -> NDArray[Any]:
        """Return the run's classes in the type of the labels."""
        if self.labels is None or self.labels.dtype.kind == "U":
            return np.array(names)
        return np.array(list(map(int, names)), dtype=self.labels.dtype)

    def stored(self, folder: Path) -> Path:
        """Return where the samples lie on the disk, below `folder` where they were an array.

        The name tells the content: the same array is not written again, and another one is another domain.
        """
        if self.path is not None:
            return self.path
        labels = self.labels
        found = hashlib.sha256(repr((self.values.shape, self.values.dtype.str)).encode())
        found.update(np.ascontiguousarray(self.values).data)
        found.update(b"" if labels is None else repr((labels.dtype.str, labels.tolist())).encode())
        place = folder.absolute() / f"{self.role}-{found.hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "features":
            place = place.with_suffix(".npz")
            if not place.is_file():
                written = io.BytesIO()
                arrays: dict[str, Any] = {} if labels is None else {"labels": labels}
                np.savez(written, features=self.values, **arrays)
                with atomic_file(place) as file:
                    file.write(written.getbuffer())
        elif not place.is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                self.write_images(Path(partial) / place.name)
                (Path(partial) / place.name).rename(place)
        return place

    def write_images(self, folder: Path) -> None:
        """Write PNG files, in class folders where there are labels, numbered in the order of the array."""
        for number, pixels in enumerate(self.values):
            path = folder / self._file(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path, compress_level=1)

    def _file(self, number: int) -> str:
        name = f"{number:08d}.png"
        if self.labels is None:
            return name
        label = str(self.labels[number])
        if not is_plain_name(label) or label.startswith((".", "__")) or label == str(UNKNOWN):
            expected = "labels that can be the name of a folder; leave them out where some are missing"
            raise UsageError(self.role, found=f"the label '{label}' of an image", expected=expected)
        return f"{label}/{name}"


def _array(role: str, given: Any) -> NDArray[Any]:
    try:
        return np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given)
    except (ValueError, TypeError) as error:
        raise UsageError(role, found=f"{type(given).__name__} ({error})", expected=_EXPECTED) from error


@contextmanager
def _process_kept() -> Iterator[None]:
    """Leave random generators and PyTorch's number of threads as they were: they are the caller's."""
    threads, devices = torch.get_num_threads(), range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            np.random.set_state(states[0])  # noqa: NPY002
            random.setstate(states[1])
