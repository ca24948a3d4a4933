"""What a run leaves behind, as values: its outcome, its predictions and its features; and the names of its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

LABEL_FREE_CRITERION = "mutual_information"
"""The score that chooses the label-free metric (see `metrics.SCORES`)."""

NORM = "gradient_norm_"
"""What the names of the discriminators' gradient magnitudes begin with."""

# Whatever else stands in metrics.jsonl is a term of a method's loss, whose names the method chooses.
_OF_THE_HARNESS = frozenset(
    [
        "step",
        "accuracy",
        "mean_per_class",
        "mutual_information",
        "domain_accuracy",
        "images_per_second",
        "data_wait",
        "progress",
        "mfu",
        "mbu",
    ]
)
_PREFIXES, _SUFFIXES = (NORM, "learning_rate", "score_", "ramp"), ("_ramp",)


def loss_terms(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the loss terms in lines of `metrics.jsonl`, in order of appearance."""
    names = dict.fromkeys(name for record in records for name in record)
    return [
        name
        for name in names
        if name not in _OF_THE_HARNESS and not name.startswith(_PREFIXES) and not name.endswith(_SUFFIXES)
    ]


@dataclass(frozen=True)
class Selection:
    """One metric, in percent, under the three ways to choose the evaluation; None where the target has no labels.

    Attributes:
        last: after the last step; nothing is chosen.
        best: the highest of all evaluations. Chosen with the target's labels, so an upper bound and no result.
        label_free: at the evaluation whose predictions have the largest mutual information; no label is used. None
            also where none of them had a finite one.
    """

    last: float | None = None
    best: float | None = None
    label_free: float | None = None


@dataclass(frozen=True)
class RunResult:
    """`result.json`: what a finished run found on the target domain.

    Attributes:
        task, source, target, method, seed: what was run.
        steps: optimizer steps, warm-up included.
        accuracy: overall accuracy, percent.
        mean_per_class: mean over the classes present in the target of their accuracies, percent.
        per_class: accuracy of each class after the last step, percent, in the order of `classes`; None for a class
            without a target sample.
        classes: names of the classes.
        images_per_second: training throughput, both domains and all ranks; None if no step was timed.
        seconds: wall-clock time of the run, with that before an interruption.
        label_free_criterion: the score that chose the `label_free` metrics.
        test_crops: crops of an image over which its probabilities were averaged, for all metrics.
        label_free_by: by score (`metrics.SCORES`), `accuracy` and `mean_per_class` at the evaluation that it chooses.
        unreadable_files: how many files failed while the run was at work, and had another sample or the mean colour in
            their place; in all processes, and with those before an interruption.
    """

    task: str
    source: str
    target: str
    method: str
    seed: int
    steps: int
    accuracy: Selection
    mean_per_class: Selection
    per_class: tuple[float | None, ...]
    classes: tuple[str, ...]
    images_per_second: float | None
    seconds: float
    label_free_criterion: str = LABEL_FREE_CRITERION
    test_crops: int = 1
    label_free_by: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    unreadable_files: int = 0

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RunResult:
        """Invert `dataclasses.asdict`; keys that an earlier version lacked have their defaults.

        Keys that a later version added are ignored.

        Raises:
            ValueError: a key is missing or of another kind.
        """
        try:
            result = msgspec.convert(stored, cls)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        if len(result.per_class) != len(result.classes):
            raise ValueError(f"{len(result.per_class)} accuracies of {len(result.classes)} classes")
        return result

    @property
    def transfer_task(self) -> tuple[str, str]:
        """Source and target."""
        return self.source, self.target


@dataclass(frozen=True)
class Predictions:
    """`predictions.npz`: the target as the final model sees it.

    Attributes:
        labels: (n,) int64, -1 where unknown.
        probabilities: (n, r) float32.
    """

    labels: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True)
class Features:
    """`features.npz`: bottleneck features of some samples of each domain, the same samples at both moments.

    Attributes:
        source_labels, target_labels: (n_s,) and (n_t,) int64, -1 where unknown.
        source_warmup, target_warmup: (n_s, D) and (n_t, D) float32 at the end of warm-up; None if not reached.
        source_final, target_final: the same after the last step.
    """

    source_labels: np.ndarray
    target_labels: np.ndarray
    source_warmup: np.ndarray | None = None
    target_warmup: np.ndarray | None = None
    source_final: np.ndarray | None = None
    target_final: np.ndarray | None = None

    def at(self, moment: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return both domains' features at `warmup` or `final`; None if there are none."""
        source, target = getattr(self, f"source_{moment}"), getattr(self, f"target_{moment}")
        return None if source is None or target is None else (source, target)
