"""What an evaluation measures, the scores that need no label, and the ways to choose one evaluation of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsda_fast.data.domains import UNKNOWN
from gsda_fast.results.records import LABEL_FREE_CRITERION, Selection


def entropy(probabilities: Tensor) -> Tensor:
    """Return the mean entropy of the predictions, in nats; small where they are certain.

    Source: Morerio et al., ICLR 2018, who choose hyperparameters by it.

    Args:
        probabilities: (n, r), rows sum to 1; so in all scores, which compute in float64.

    Returns:
        0-d float64, from 0 to log r.
    """
    return torch.special.entr(probabilities.double()).sum(dim=1).mean()


def mutual_information(probabilities: Tensor) -> Tensor:
    """Return H(mean p) - mean H(p), in nats: large where predictions are certain and spread over the classes.

    Returns:
        0-d float64, from 0 to log r.
    """
    return torch.special.entr(probabilities.double().mean(dim=0)).sum() - entropy(probabilities)


def soft_neighbourhood_density(
    rows: Tensor, *, temperature: float = 0.05, max_rows: int = 1000, chunk: int = 250
) -> Tensor:
    """Return the mean entropy of each sample's similarities to the others, large where neighbourhoods are dense.

    With rows of length 1, sample i is to the others as p_ij = softmax over j != i of <f_i, f_j> / temperature.
    Source: Saito et al., ICCV 2021 (SND).

    Args:
        rows: (n, d), n > 1: class probabilities, as there, or features.
        temperature: of the softmax.
        max_rows: at most so many rows, evenly spread over all of them; time grows with their square.
        chunk: rows whose similarities are held at a time; memory grows with chunk * max_rows.

    Returns:
        0-d float64, from 0 to log(n - 1); NaN for a single row.
    """
    kept = torch.linspace(0, len(rows) - 1, min(len(rows), max_rows), dtype=torch.float64, device=rows.device)
    rows = torch.nn.functional.normalize(rows[kept.round().long()].double(), dim=1)
    total = rows.new_zeros(())
    for start in range(0, len(rows), chunk):
        similarities = rows[start : start + chunk] @ rows.T / temperature
        similarities.diagonal(start).fill_(-math.inf)
        # entr(0) is 0, so the sample itself adds nothing.
        total += torch.special.entr(similarities.softmax(dim=1)).sum()
    return total / len(rows)


def nuclear_norm(probabilities: Tensor) -> Tensor:
    """Return the sum of the predictions' singular values, over n: large where they are certain and diverse.

    Source: Cui et al., CVPR 2020 (batch nuclear-norm maximization).

    Returns:
        0-d float64, from 1 / sqrt(n r) to 1; NaN where a prediction is not finite.
    """
    rows = probabilities.double()
    if not rows.isfinite().all():  # LAPACK would raise
        return rows.new_tensor(math.nan)
    return torch.linalg.svdvals(rows).sum() / len(rows)


def softmax_correlation(probabilities: Tensor, class_distribution: Tensor | None = None) -> Tensor:
    """Return the cosine between the classes' correlations P'P / n and a diagonal matrix.

    Large where predictions are certain (mass off the diagonal is doubt between two classes) and as frequent as the
    classes are thought to be: unlike the other scores it can be given how frequent. It costs one product.
    Source: Tu et al., TMLR 2024 (SoftmaxCorr), who rank classifiers under distribution shift by it.

    Args:
        class_distribution: (r,), the diagonal, such as the source's frequencies; uniform if None.

    Returns:
        0-d float64, from 0 to 1.
    """
    rows = probabilities.double()
    correlations = rows.T @ rows / len(rows)
    if class_distribution is None:
        class_distribution = rows.new_ones(rows.shape[1])
    diagonal = class_distribution.double()
    return correlations.diagonal() @ diagonal / (correlations.norm() * diagonal.norm())


class Score(NamedTuple):
    """A metric of unlabelled target predictions, (n, r) to a number, by which an evaluation can be chosen."""

    function: Callable[[Tensor], Tensor]
    higher_is_better: bool = True

    def merit(self, value: float) -> float:
        """Return the value with the sign under which more is better."""
        return value if self.higher_is_better else -value


SCORES: Mapping[str, Score] = {
    LABEL_FREE_CRITERION: Score(mutual_information),
    "entropy": Score(entropy, higher_is_better=False),
    "soft_neighbourhood_density": Score(soft_neighbourhood_density),
    "nuclear_norm": Score(nuclear_norm),
    "softmax_correlation": Score(softmax_correlation),
}


@dataclass(frozen=True)
class EvaluationMetrics:
    """Figures of one evaluation on the target domain.

    Attributes:
        accuracy: overall accuracy, percent; None if no sample has a label.
        mean_per_class: mean of the accuracies of the classes present in the target, percent; None likewise.
        per_class: accuracy of each class, percent; None for a class without a labelled sample.
        scores: of `SCORES`, by name; no label is used.
        confusion: (r, r) int64 on the CPU, counts, rows the true class and columns the predicted one.
    """

    accuracy: float | None
    mean_per_class: float | None
    per_class: tuple[float | None, ...]
    scores: Mapping[str, float]
    confusion: Tensor

    @property
    def mutual_information(self) -> float:
        """The score that chooses the label-free metric."""
        return self.scores[LABEL_FREE_CRITERION]


def evaluation_metrics(labels: Tensor, probabilities: Tensor) -> EvaluationMetrics:
    """Compute the metrics of one evaluation, accuracies from exact integer counts.

    Args:
        labels: (n,) integer, -1 for a sample without a label: it counts for the scores alone.
        probabilities: (n, r), rows sum to 1. The prediction is the largest, the first of equal ones.

    Raises:
        ValueError: no sample, shapes that do not match, or a label outside -1 ... r - 1.
    """
    confusion = confusion_matrix(labels, probabilities)
    per_class = tuple(
        100.0 * correct / count if count else None
        for correct, count in zip(confusion.diagonal().tolist(), confusion.sum(dim=1).tolist())
    )
    present = [accuracy for accuracy in per_class if accuracy is not None]
    return EvaluationMetrics(
        accuracy=100.0 * int(confusion.trace()) / int(confusion.sum()) if present else None,
        mean_per_class=math.fsum(present) / len(present) if present else None,
        per_class=per_class,
        scores={name: float(score.function(probabilities)) for name, score in SCORES.items()},
        confusion=confusion,
    )


def confusion_matrix(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Count predictions: (r, r) int64 on the CPU, rows the true class. Arguments and errors: `evaluation_metrics`."""
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"labels, probabilities: found shapes {tuple(labels.shape)} and {tuple(probabilities.shape)}; "
            "expected (n,) and (n, r) with n > 0"
        )
    num_classes = probabilities.shape[1]
    low, high = int(labels.min()), int(labels.max())
    if low < UNKNOWN or high >= num_classes:
        raise ValueError(f"labels: found values from {low} to {high}; expected -1 to {num_classes - 1}")
    known = labels != UNKNOWN
    cells = labels[known] * num_classes + probabilities[known.to(probabilities.device)].argmax(dim=1).to(labels.device)
    # Counted on the CPU, where a bincount is deterministic.
    return torch.bincount(cells.long().cpu(), minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class _Evaluation:
    step: int
    accuracy: float | None
    mean_per_class: float | None
    scores: Mapping[str, float]


class AccuracyHistory:
    """The evaluations of a run, and the choices among them. Belongs to the state that a checkpoint keeps."""

    def __init__(self) -> None:
        self._evaluations: list[_Evaluation] = []

    def add(self, step: int, metrics: EvaluationMetrics) -> None:
        """Take note of the evaluation after `step` steps.

        Raises:
            ValueError: `step` is not larger than that of the evaluation before.
        """
        if self._evaluations and step <= self._evaluations[-1].step:
            raise ValueError(f"step: found {step} after {self._evaluations[-1].step}; expected a larger one")
        self._evaluations.append(_Evaluation(step, metrics.accuracy, metrics.mean_per_class, dict(metrics.scores)))

    @property
    def accuracy(self) -> Selection:
        """Overall accuracy, percent, under each choice."""
        return self._select("accuracy")

    @property
    def mean_per_class(self) -> Selection:
        """Mean accuracy per class, percent, under each choice."""
        return self._select("mean_per_class")

    @property
    def label_free_step(self) -> int | None:
        """Step of the evaluation with the largest mutual information, the first of equal ones; None before any."""
        chosen = self._chosen_by(LABEL_FREE_CRITERION)
        return None if chosen is None else chosen.step

    @property
    def label_free_by(self) -> dict[str, dict[str, float | None]]:
        """By score, both accuracies of the evaluation that it chooses; of the scores that were finite once."""
        chosen = {name: self._chosen_by(name) for name in SCORES}
        return {
            name: {"accuracy": evaluation.accuracy, "mean_per_class": evaluation.mean_per_class}
            for name, evaluation in chosen.items()
            if evaluation is not None
        }

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": [asdict(evaluation) for evaluation in self._evaluations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluations = [_Evaluation(**evaluation) for evaluation in state["evaluations"]]

    def _chosen_by(self, name: str) -> _Evaluation | None:
        # A diverged model's scores are NaN, which max() would take or leave by position.
        finite = [each for each in self._evaluations if math.isfinite(each.scores.get(name, math.nan))]
        return max(finite, key=lambda evaluation: SCORES[name].merit(evaluation.scores[name]), default=None)

    def _select(self, metric: str) -> Selection:
        if not self._evaluations:
            return Selection()
        values = [getattr(evaluation, metric) for evaluation in self._evaluations]
        chosen = self._chosen_by(LABEL_FREE_CRITERION)
        return Selection(
            last=values[-1],
            best=max((value for value in values if value is not None), default=None),
            label_free=None if chosen is None else getattr(chosen, metric),
        )
