"""Draw the README's picture from two finished runs of one transfer task, without and with adaptation.

    make demo
    .venv/bin/python docs/make_picture.py runs/demo/digits-fonts-optdigits-source-only-seed0 \
        runs/demo/digits-fonts-optdigits-gsda-seed0

Above: images of both domains, a column for each class. Below: t-SNE of both runs' features after the last step, with
the accuracies that their result.json holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.results.plots import embed
from gsda_fast.results.run_folder import RunFolder

matplotlib.use("Agg")
from matplotlib import pyplot

OUTPUT = Path(__file__).parent / "images" / "adaptation.png"
SAMPLES = 600  # of each domain in a t-SNE plot


def row_of_images(domain: ImageDomain, side: int = 48) -> NDArray[np.uint8]:
    """Return an image of every class side by side, (side, r * side)."""
    first = [int(np.flatnonzero(domain.labels == label)[0]) for label in range(len(domain.classes))]
    images = (Image.open(domain.file(sample)).convert("L").resize((side, side)) for sample in first)
    return np.concatenate([np.pad(np.asarray(image), 2, constant_values=255) for image in images], axis=1)


def draw_features(axes: Axes, folder: RunFolder) -> None:
    """Draw source dots and target crosses of one run, coloured by their true class."""
    features, result = folder.read_features(), folder.read_result()
    assert features is not None, f"{folder.path} has not finished"
    assert result is not None, f"{folder.path} has not finished"
    at = features.at("final")
    assert at is not None
    rng, rows, labels = np.random.default_rng(0), [], []
    for values, own in zip(at, (features.source_labels, features.target_labels)):
        chosen = np.sort(rng.permutation(len(values))[:SAMPLES])
        rows.append(values[chosen])
        labels.append(own[chosen])
    places = np.split(embed(np.concatenate(rows), seed=0), [len(rows[0])])
    for marker, size, of_domain, own in zip("ox", (7, 14), places, labels):
        axes.scatter(*of_domain.T, c=own, cmap="tab10", s=size, marker=marker, linewidths=0.8, alpha=0.75)
    axes.set_title(f"{result.method}: {result.accuracy.last:.1f} % on the target", fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("without", type=Path)
    parser.add_argument("adapted", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()
    folders = RunFolder(options.without), RunFolder(options.adapted)
    result = folders[1].read_result()
    assert result is not None, f"{options.adapted} has not finished"
    domains = open_pair(result.task, result.source, result.target)
    figure = pyplot.figure(figsize=(9, 5.6), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=[1, 1, 7])
    for place, domain, role in zip(range(2), domains, ("labelled source", "unlabelled target")):
        axes = figure.add_subplot(grid[place, :])
        axes.imshow(row_of_images(domain), cmap="gray")
        axes.set_ylabel(domain.name, rotation=0, ha="right", va="center")
        axes.set_title(role, fontsize=9, loc="left", pad=2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for place, folder in enumerate(folders):
        draw_features(figure.add_subplot(grid[2, place]), folder)
    options.output.parent.mkdir(exist_ok=True)
    figure.savefig(options.output, dpi=110)


if __name__ == "__main__":
    main()
