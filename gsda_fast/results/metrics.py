"""What an evaluation measures, and the three ways to choose one evaluation of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from gsda_fast.results.run_folder import Selection

UNLABELLED = -1


@dataclass(frozen=True)
class EvaluationFigures:
    """Figures of one evaluation on the target domain.

    Attributes:
        accuracy: overall accuracy, percent; None if no sample has a label.
        mean_per_class: mean of the accuracies of the classes present in the target, percent; None likewise.
        per_class: accuracy of each class, percent; None for a class without a labelled sample.
        mutual_information: H(mean p) - mean H(p) of the predictions, in nats, from 0 to log r: large where predictions
            are certain and spread over the classes. It uses no label.
        confusion: (r, r) int64 on the CPU, counts, rows the true class and columns the predicted one.
    """

    accuracy: float | None
    mean_per_class: float | None
    per_class: tuple[float | None, ...]
    mutual_information: float
    confusion: torch.Tensor


def evaluation_figures(labels: torch.Tensor, probabilities: torch.Tensor) -> EvaluationFigures:
    """The figures of one evaluation, from exact integer counts.

    Args:
        labels: (n,) integer, -1 for a sample without a label: it counts for the mutual information alone.
        probabilities: (n, r), rows sum to 1. The prediction is the largest, the first of equal ones.

    Raises:
        ValueError: no sample, shapes that do not match, or a label outside -1 ... r - 1.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"labels, probabilities: found shapes {tuple(labels.shape)} and {tuple(probabilities.shape)}; "
            "expected (n,) and (n, r) with n > 0"
        )
    num_classes = probabilities.shape[1]
    low, high = int(labels.min()), int(labels.max())
    if low < UNLABELLED or high >= num_classes:
        raise ValueError(f"labels: found values from {low} to {high}; expected -1 to {num_classes - 1}")
    confusion = multiclass_confusion_matrix(
        probabilities.argmax(dim=1), labels, num_classes, ignore_index=UNLABELLED, validate_args=False
    ).cpu()
    per_class = tuple(
        100.0 * correct / count if count else None
        for correct, count in zip(confusion.diagonal().tolist(), confusion.sum(dim=1).tolist())
    )
    present = [accuracy for accuracy in per_class if accuracy is not None]
    p = probabilities.double()
    mutual_information = torch.special.entr(p.mean(dim=0)).sum() - torch.special.entr(p).sum(dim=1).mean()
    return EvaluationFigures(
        accuracy=100.0 * int(confusion.trace()) / int(confusion.sum()) if present else None,
        mean_per_class=math.fsum(present) / len(present) if present else None,
        per_class=per_class,
        mutual_information=float(mutual_information),
        confusion=confusion,
    )


@dataclass(frozen=True)
class _Evaluation:
    step: int
    accuracy: float | None
    mean_per_class: float | None
    mutual_information: float


class AccuracyHistory:
    """The evaluations of a run, and the choice among them. Belongs to the state that a checkpoint keeps."""

    def __init__(self) -> None:
        self._evaluations: list[_Evaluation] = []

    def add(self, step: int, figures: EvaluationFigures) -> None:
        """Takes note of the evaluation after `step` steps.

        Raises:
            ValueError: `step` is not larger than that of the evaluation before.
        """
        if self._evaluations and step <= self._evaluations[-1].step:
            raise ValueError(f"step: found {step} after {self._evaluations[-1].step}; expected a larger one")
        self._evaluations.append(
            _Evaluation(step, figures.accuracy, figures.mean_per_class, figures.mutual_information)
        )

    @property
    def accuracy(self) -> Selection:
        """Overall accuracy, percent, under each choice."""
        return self._select(lambda evaluation: evaluation.accuracy)

    @property
    def mean_per_class(self) -> Selection:
        """Mean accuracy per class, percent, under each choice."""
        return self._select(lambda evaluation: evaluation.mean_per_class)

    @property
    def label_free_step(self) -> int | None:
        """Step of the evaluation with the largest mutual information, the first of equal ones; None before any."""
        chosen = self._label_free()
        return None if chosen is None else chosen.step

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": [asdict(evaluation) for evaluation in self._evaluations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluations = [_Evaluation(**evaluation) for evaluation in state["evaluations"]]

    def _label_free(self) -> _Evaluation | None:
        # A diverged model's mutual information is NaN, which max() would take or leave by position.
        finite = [evaluation for evaluation in self._evaluations if math.isfinite(evaluation.mutual_information)]
        return max(finite, key=lambda evaluation: evaluation.mutual_information, default=None)

    def _select(self, figure: Callable[[_Evaluation], float | None]) -> Selection:
        if not self._evaluations:
            return Selection()
        chosen = self._label_free()
        known = [value for value in map(figure, self._evaluations) if value is not None]
        return Selection(
            last=figure(self._evaluations[-1]),
            best=max(known, default=None),
            label_free=None if chosen is None else figure(chosen),
        )
