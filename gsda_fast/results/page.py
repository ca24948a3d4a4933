"""The report: one self-contained HTML page about one run or several, and its plots as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsda_fast.errors import UsageError
from gsda_fast.files import atomic_file
from gsda_fast.results import alignment, plots
from gsda_fast.results.html import Section, drawn, panel, template
from gsda_fast.results.metrics import evaluation_figures
from gsda_fast.results.run_folder import (
    Features,
    Predictions,
    RunFolder,
    RunResult,
    Selection,
    flat_settings,
)
from gsda_fast.results.tables import CHOICE_NAMES, ResultTable, test_notes, transfer_table

LOSSES = {
    "classification": "Classification loss (source)",
    "entropy": "Entropy of the target predictions",
    "adversarial_domain": "Adversarial loss: domain",
    "adversarial_group": "Adversarial loss: groups",
    "adversarial_class": "Adversarial loss: classes",
    "synchronization": "Synchronization loss",
}
IDENTITY = ("task", "source", "target", "method", "seed")
MOMENTS = {"warmup": "before adaptation", "final": "after the last step"}


@dataclass(frozen=True)
class _Run:
    """Everything that the page says about one run."""

    folder: RunFolder
    identity: Mapping[str, Any]
    label: str
    curves: plots.Curves
    result: RunResult | None
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    predictions: Predictions | None
    features: Features | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; their numbers while the run has not finished."""
        if self.result is not None:
            return self.result.classes
        if self.predictions is not None:
            return tuple(map(str, range(self.predictions.probabilities.shape[1])))
        if self.features is not None:
            return tuple(map(str, range(1 + int(self.features.source_labels.max(initial=0)))))
        return ()

    @property
    def last_step(self) -> int:
        return self.curves.records[-1]["step"] if self.curves.records else 0

    @property
    def steps(self) -> int | None:
        """The number of steps asked for, if it is known."""
        return self.folder.setting("steps")

    def selection(self, figure: str) -> Selection:
        """The result's figure; of an unfinished run the last and the highest so far."""
        if self.result is not None:
            return getattr(self.result, figure)
        _, values = self.curves.series(figure)
        values = values[np.isfinite(values)]
        return Selection(last=float(values[-1]), best=float(values.max())) if len(values) else Selection()


def write_page(runs: Sequence[RunFolder], folder: Path, *, points: int = 1000) -> Path:
    """Draws the plots and writes the page about them.

    The plots of one run alone are kept as PNG files in its folder, those that compare the runs beside the page.

    Args:
        runs: at least one; a run that has not finished is shown as far as it came.
        folder: where to write the page; for a single run its own folder.
        points: samples of each domain in a t-SNE plot, at most.

    Returns:
        The page's path.

    Raises:
        UsageError: a run's file is broken, or a folder cannot be written.
    """
    page = RunFolder(folder)
    records = _read(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sections = [
            *_outcome_sections(records, page),
            _feature_section(records, points),
            *_training_sections(records, page),
        ]
        html = template("page.html.jinja").render(
            title=_title(records),
            runs=records,
            tested=_tested(records),
            tables=_tables(records),
            sections=[section for section in sections if section.panels],
            how={
                "Settings": _side_by_side([flat_settings(run.config) for run in records]),
                "Environment": _side_by_side([flat_settings(run.environment) for run in records]),
            },
        )
        with atomic_file(page.report_path) as file:
            file.write(html.encode())
    except OSError as error:
        raise UsageError(
            "report", found=f"{error.filename or folder} ({error.strerror})", expected="a folder that can be written"
        ) from error
    return page.report_path


def _read(folders: Sequence[RunFolder]) -> list[_Run]:
    results = [folder.read_result() for folder in folders]
    identities = [
        {name: getattr(result, name) if result else folder.setting(name) for name in IDENTITY}
        for folder, result in zip(folders, results)
    ]
    return [
        _Run(
            folder=folder,
            identity=identity,
            label=label,
            curves=plots.Curves(
                label,
                folder.read_metrics(),
                folder.setting("warmup") or 0,
                plots.RUN_COLOURS[index % len(plots.RUN_COLOURS)],
            ),
            result=result,
            config=folder.read_config(),
            environment=folder.read_environment(),
            predictions=folder.read_predictions(),
            features=folder.read_features(),
        )
        for index, (folder, result, identity, label) in enumerate(
            zip(folders, results, identities, _labels(folders, identities))
        )
    ]


def _labels(folders: Sequence[RunFolder], identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """The shortest names that tell the runs apart: the method, and the transfer task and the seed where they differ."""
    pairs = [f"{identity['source']} → {identity['target']}" for identity in identities]
    seeds = [f"seed {identity['seed']}" for identity in identities]
    labels = []
    for identity, pair, seed in zip(identities, pairs, seeds):
        parts = [str(identity["method"])]
        if len(set(pairs)) > 1:
            parts.insert(0, pair)
        if len(set(seeds)) > 1:
            parts.append(seed)
        labels.append(", ".join(parts))
    if len(set(labels)) < len(labels) or any(identity["method"] is None for identity in identities):
        return [folder.path.resolve().name for folder in folders]
    return labels


def _title(runs: Sequence[_Run]) -> str:
    described = {(run.identity["task"], run.identity["source"], run.identity["target"]) for run in runs}
    if len(described) == 1:
        task, source, target = described.pop()
        return f"{task}: {source} → {target}" if task else runs[0].label
    tasks = {str(task) for task, _, _ in described}
    return f"{', '.join(sorted(tasks))}: {len(described)} transfer tasks"


def _tables(runs: Sequence[_Run]) -> list[ResultTable]:
    """Means over seeds and transfer tasks, where there are several of either."""
    results = [run.result for run in runs if run.result is not None]
    cells = {(result.task, result.source, result.target, result.method) for result in results}
    pairs = {(result.source, result.target) for result in results}
    distinct = {(result.method, result.source, result.target, result.seed) for result in results}
    one_task = len({result.task for result in results}) == 1
    if not one_task or len(distinct) < len(results) or (len(pairs) == 1 and len(cells) == len(results)):
        return []
    return [transfer_table(results, choice=choice) for choice in CHOICE_NAMES]


def _tested(runs: Sequence[_Run]) -> list[str]:
    """How the target's images were tested; for each run, if not all alike."""
    notes = [(run.label, note) for run in runs if run.result is not None for note in test_notes([run.result])]
    different = list(dict.fromkeys(note for _, note in notes))
    return different if len(different) < 2 else [f"{label}: {note}" for label, note in notes]


def _outcome_sections(runs: Sequence[_Run], page: RunFolder) -> list[Section]:
    curves = [run.curves for run in runs]
    accuracy = [
        panel(plots.metric_curves(curves, name, title, unit), page.plot_path(name), f"{title} over the steps")
        for name, title, unit in (
            ("accuracy", "Overall accuracy on the target", "percent"),
            ("mean_per_class", "Mean accuracy per class on the target", "percent"),
            ("mutual_information", "Mutual information of the predictions", "nats"),
        )
    ]
    by_classes: dict[tuple[str, ...], list[plots.ClassAccuracies]] = {}
    for run in runs:
        if run.result is not None and any(value is not None for value in run.result.per_class):
            accuracies = plots.ClassAccuracies(run.label, run.result.per_class, run.curves.colour)
            by_classes.setdefault(run.result.classes, []).append(accuracies)
    bars = [
        panel(
            plots.per_class_bars(figures, classes),
            page.plot_path("per_class", index),
            "Accuracy of each class",
        )
        for index, (classes, figures) in enumerate(by_classes.items())
    ]
    confusions = []
    for run in runs:
        if run.predictions is not None and (run.predictions.labels >= 0).any():
            labels, probabilities = map(torch.from_numpy, (run.predictions.labels, run.predictions.probabilities))
            confusion = evaluation_figures(labels, probabilities).confusion.numpy()
            figure = plots.confusion_matrix(confusion, run.classes, f"Confusion matrix: {run.label}")
            confusions.append(panel(figure, run.folder.plot_path("confusion"), f"Confusion matrix of {run.label}"))
    return [
        Section(
            "Accuracy during training",
            "Measured on all target samples. The mutual information needs no label; where it is largest, the "
            "label-free figure is taken.",
            drawn(accuracy),
        ),
        Section(
            "Classes",
            "After the last step. A row of a confusion matrix adds up to 100 percent of that class's samples.",
            drawn([*bars, *confusions]),
        ),
    ]


def _feature_section(runs: Sequence[_Run], points: int) -> Section:
    panels = []
    for run in runs:
        if run.features is None:
            continue
        starts_row = True
        for moment, words in MOMENTS.items():
            source, target = (getattr(run.features, f"{domain}_{moment}") for domain in ("source", "target"))
            if source is None or target is None:
                continue
            distance = alignment.proxy_a_distance(source, target)
            told = "" if distance is None else f", proxy A-distance {distance:.2f}"
            figure = plots.tsne(
                source,
                run.features.source_labels,
                target,
                run.features.target_labels,
                classes=run.classes,
                title=f"{run.label}, {words}{told}",
                points=points,
            )
            alternative = f"Features of {run.label}, {words}"
            panels.append(panel(figure, run.folder.plot_path(f"tsne_{moment}"), alternative, starts_row))
            starts_row = False
    return Section(
        "Features of both domains",
        "Each point is an image, placed by t-SNE so that neighbours have similar features; colour is the true class. "
        "Adaptation should lay the target (crosses) onto the source (dots) of the same colour. Distances between "
        "clusters and between plots mean nothing. The proxy A-distance is 2 where a linear classifier, cross-validated "
        "on the features, tells the domains apart, and 0 where it does no better than chance.",
        drawn(panels),
        in_pairs=True,
    )


def _training_sections(runs: Sequence[_Run], page: RunFolder) -> list[Section]:
    curves = [run.curves for run in runs]
    losses = [
        panel(
            plots.metric_curves(curves, name, title, "unweighted"),
            page.plot_path(f"loss_{name}"),
            f"{title} over the steps",
        )
        for name, title in LOSSES.items()
    ]
    norms = [
        panel(
            plots.gradient_norms(run.curves),
            run.folder.plot_path("gradient_norms"),
            f"Gradient magnitudes of {run.label}",
        )
        for run in runs
    ]
    mismatch = panel(
        plots.relative_mismatch(curves),
        page.plot_path("relative_mismatch"),
        "Relative mismatch of the gradient magnitudes",
    )
    return [
        Section(
            "Losses",
            "Without their weights; the adversarial and synchronization terms as the discriminators' step sees them, "
            "the others as the encoder's does. A discriminator that cannot tell the domains apart has 0.69.",
            drawn(losses),
        ),
        Section(
            "Synchronization of the gradients",
            "Synchronized levels have equal magnitudes: the lines of one run lie together, and the mismatch is near 0.",
            drawn([*norms, mismatch]),
        ),
    ]


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """Name, value in each run, and whether the runs differ; None where a run has no such entry."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return [(name, values, any(value != values[0] for value in values)) for name, values in rows]
