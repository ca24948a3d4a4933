"""`python -m gsda_fast.predict RUN FOLDER|FILE`: class probabilities for images or rows of features, as CSV."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import tyro

from gsda_fast.commands import UNSAID, parse_command_line, program, run_command
from gsda_fast.console import plain_console, progress_bars, spreadsheet_text
from gsda_fast.data.domains import ImageDomain, open_features, open_image, open_images
from gsda_fast.errors import UsageError, visible
from gsda_fast.files import atomic_file
from gsda_fast.options import EvaluationOptions

if TYPE_CHECKING:
    from torch import Tensor

    from gsda_fast.data.batches import Loader
    from gsda_fast.trained import TrainedModel

COLUMNS = ("file", "predicted_class", "confidence")
"""What stands before the probabilities, one column for each class by its name. Names are `spreadsheet_text`."""


@dataclass(frozen=True)
class PredictSettings(EvaluationOptions):
    """Write class probabilities of images, or of rows of features, as CSV: a line for each, by its path or row.

    They need no labels, and not the data that the run was trained on.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER|FILE")]
    """Folder of images, which may lie anywhere below it, or one image; a file of features for a run on features."""
    _: KW_ONLY
    output: Annotated[Path | None, UNSAID] = None
    """CSV file to write; standard output if not given."""
    batch_size: int = 256
    """Images in a batch."""


def predict(trained: TrainedModel, images: ImageDomain, batch_size: int = 256) -> Iterator[tuple[str, Tensor]]:
    """Yield (path below the folder, class probabilities (r,) float32 on the CPU) for each image or row, in order.

    An image is read, resized, cropped (ten times where the run is tested so) and normalised as for the run's own
    evaluation.

    Raises:
        UsageError: while iterating, if a file cannot be read; the message names the file.
    """
    # Here and below, so that --help need not wait for PyTorch.
    import torch

    from gsda_fast.data.feature_loader import FeatureLoader
    from gsda_fast.data.torch_loader import TorchLoader

    loader: Loader
    if images.rows is not None:
        loader = FeatureLoader(images, images, batch_size=batch_size, device=trained.device, on_device=False)
    else:
        loader = TorchLoader(images, images, trained.preprocessing, batch_size=batch_size, device=trained.device)
    try:
        crops = trained.config.data.test_crops
        for batch, index in loader.evaluate("target", crops=crops):
            with torch.no_grad():
                probabilities = trained.model(batch).logits.softmax(1).unflatten(0, (-1, crops)).mean(1).cpu()
            yield from zip((images.paths[i] for i in index.tolist()), probabilities)
    finally:
        loader.close()


def open_samples(trained: TrainedModel, place: Path) -> ImageDomain:
    """Return what is to be classified: images below a folder, an image file, or the rows of a file of features.

    Photos are turned, or not, as in the run's training.

    Raises:
        UsageError: it is not there, or not what the run was trained on.
    """
    from gsda_fast.model import FEATURES
    from gsda_fast.trained import require_row_size

    model = trained.config.model
    if model.backbone != FEATURES:
        open_place = open_image if place.is_file() else open_images
        return open_place(place, trained.classes, trained.config.data.orientation)
    rows = open_features(place, trained.classes)
    assert rows.rows is not None
    require_row_size(str(place), rows.rows.dim, model)
    return rows


@contextmanager
def _open(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    try:
        with atomic_file(output) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            yield text
            text.flush()
            text.detach()
    except OSError as error:
        raise UsageError("--output", found=f"{output} ({error.strerror})", expected="a file to write") from error


def main() -> int:
    """Exit code 1 if files could not be read; each of them is named on standard error and left out."""
    settings = parse_command_line(lambda: tyro.cli(PredictSettings, args=sys.argv[1:], prog=program("predict")))
    if settings.batch_size < 1:
        raise UsageError("--batch-size", found=str(settings.batch_size), expected="a whole number >= 1")
    from gsda_fast.data.verify import unreadable_files
    from gsda_fast.trained import load_trained

    trained = load_trained(settings.run, settings.checkpoint, settings.device)
    images = open_samples(trained, settings.folder)
    with progress_bars(plain_console(stderr=True)) as progress:
        unreadable = dict(unreadable_files(images, progress=progress, channels=trained.preprocessing.channels))
        for path, problem in unreadable.items():
            print(visible(f"warning: {path}: {problem}; left out"), file=sys.stderr)
        images = images.take([i for i in range(len(images)) if images.file(i) not in unreadable])
        if not len(images):
            raise UsageError("FOLDER", found=f"{settings.folder} without a readable image", expected="images")
        with _open(settings.output) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow([*COLUMNS, *map(spreadsheet_text, trained.classes)])
            for done, (path, probabilities) in enumerate(predict(trained, images, settings.batch_size), start=1):
                confidence, label = probabilities.max(0)
                row = [f"{probability:.6g}" for probability in probabilities.tolist()]
                names = spreadsheet_text(path), spreadsheet_text(trained.classes[int(label)])
                table.writerow([*names, f"{float(confidence):.6g}", *row])
                progress("predict", done, len(images))
    return 1 if unreadable else 0


if __name__ == "__main__":
    run_command(main)
