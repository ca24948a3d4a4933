"""Losses of class means: TPN."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gsda_fast.losses.precision import check_labels, check_matrix, wide


class PrototypeLosses(NamedTuple):
    """The three parts of TPN's objective, each 0-d: of the source's classes, of the prototypes, of the predictions."""

    supervised: Tensor
    general: Tensor
    task: Tensor


def _sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the features of each class (r, D), and how many there are (r,).

    Labels below 0 belong to none.
    """
    member = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(features.dtype)
    return member.T @ features, member.sum(0)


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.clamp_min(1)[:, None]


def _scores(features: Tensor, prototypes: Tensor, counts: Tensor) -> Tensor:
    """Log-probabilities by the distance to prototypes, up to a constant of each row; absent classes have -inf."""
    scores = 2 * features @ prototypes.T - prototypes.square().sum(1)
    # Without any class at all the scores stay: whoever asks multiplies by zero, and infinities would make that NaN.
    absent = (counts == 0) & (counts > 0).any()
    return scores.masked_fill(absent, -torch.inf)


@wide
def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Mean feature of each class, its prototype (Snell et al., NeurIPS 2017).

    Args:
        features: rows.
        labels: their classes; a negative one belongs to no class.
        num_classes: r.

    Shape:
        (N, D), (N,) integers; (r, D) result, zeros for a class without rows.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.class_means(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([1, 1, -1]), 2)
        tensor([[0.],
                [1.]])
    """
    check_matrix("features", features)
    check_labels("labels", labels, len(features))
    return _means(*_sums(features.double(), labels, num_classes)).to(features.dtype)


@wide
def prototype_pseudo_labels(
    source: Tensor, labels: Tensor, target: Tensor, num_classes: int, threshold: float = 0.6
) -> Tensor:
    r"""Return classes of target rows by the source's prototypes, where they are confident (TPN: Pan et al., CVPR 2019).

    Args:
        source: features, with their classes in `labels`.
        target: features.
        num_classes: r.
        threshold: a row is confident above this probability.

    Shape:
        (B, D), (B,) integers, (B', D); (B',) int64 result, -1 where not confident. Constants.

    Raises:
        ValueError: other shapes.

    Example::

        >>> source, labels = torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1])
        >>> losses.prototype_pseudo_labels(source, labels, torch.tensor([[1.0], [2.0], [5.0]]), 2)
        tensor([ 0, -1,  1])
    """
    source, target, _ = _centred(source, labels, target)
    sums, counts = _sums(source.detach(), labels, num_classes)
    probability, label = F.softmax(_scores(target.detach(), _means(sums, counts), counts), dim=1).max(1)
    return torch.where(probability > threshold, label, -1)


@wide
def prototype_losses(
    source: Tensor, labels: Tensor, target: Tensor, pseudo_labels: Tensor, num_classes: int
) -> PrototypeLosses:
    r"""Return losses of transferrable prototypical networks (TPN: Pan et al., CVPR 2019).

    With :math:`\mu^s, \mu^t, \mu^{st}` the class means of source, pseudo-labelled target and both, and
    :math:`p(c | f; \mu) = \mathrm{softmax}_c(-|f - \mu_c|^2)`,

    .. math:: L_S = \mathrm{mean}_s[-\log p(y | f; \mu^s)], \quad
        L_G = \sum_{(\mu, \mu')} \frac{1}{|C|} \sum_{c \in C} |\mu_c - \mu'_c|^2, \quad
        L_T = \sum_{(\mu, \mu')} \mathrm{mean} \tfrac12 (KL(p \| p') + KL(p' \| p))

    over the three pairs of sets of prototypes, C the classes with rows in both domains, and the last mean over source
    rows and target rows with a pseudo-label, of probabilities over C. L_G has the linear kernel. Without any class in C
    L_G and L_T are 0. Gradients flow through all prototypes.

    Args:
        source: features, with their classes in `labels`.
        target: features; `pseudo_labels` are their classes, -1 for none.
        num_classes: r.

    Shape:
        (B, D), (B,) integers, (B', D), (B',) integers; a `PrototypeLosses` of 0-d tensors.

    Raises:
        ValueError: other shapes.

    Example::

        >>> features, labels = torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1])
        >>> losses.prototype_losses(features, labels, features, labels, 2).general
        tensor(0.)
    """
    dtype = source.dtype
    source, target, rows = _centred(source, labels, target)
    check_labels("pseudo_labels", pseudo_labels, len(target))
    source_sums, source_counts = _sums(source, labels, num_classes)
    target_sums, target_counts = _sums(target, pseudo_labels, num_classes)
    prototypes = [
        _means(source_sums, source_counts),
        _means(target_sums, target_counts),
        _means(source_sums + target_sums, source_counts + target_counts),
    ]
    supervised = F.cross_entropy(_scores(source, prototypes[0], source_counts), labels)

    in_both = torch.minimum(source_counts, target_counts)
    present = (in_both > 0).to(rows.dtype)
    counted = torch.cat([torch.ones_like(source[:, 0]), (pseudo_labels >= 0).to(rows.dtype)])
    counted = counted / counted.sum() * present.amax()  # 0 where no class is in both
    log_probabilities = [F.log_softmax(_scores(rows, each, in_both), dim=1) for each in prototypes]
    general, task = supervised.new_zeros(()), supervised.new_zeros(())
    for i, j in ((0, 1), (0, 2), (1, 2)):
        gaps = (prototypes[i] - prototypes[j]).square().sum(1)
        general = general + (present * gaps).sum() / present.sum().clamp_min(1)
        # Absent classes are masked in both factors: -inf minus -inf has no gradient that could be multiplied away.
        p, q = (each.masked_fill(present == 0, 0) for each in (log_probabilities[i], log_probabilities[j]))
        task = task + (counted * ((p.exp() - q.exp()) * (p - q)).sum(1)).sum() / 2
    return PrototypeLosses(supervised.to(dtype), general.to(dtype), task.to(dtype))


def _centred(source: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both domains' features and all rows, in float64 and without their common offset, which no distance knows."""
    check_matrix("source", source)
    check_labels("labels", labels, len(source))
    check_matrix("target", target, columns=source.shape[1])
    rows = torch.cat([source, target]).double()
    rows = rows - rows.detach().mean(0)
    return rows[: len(source)], rows[len(source) :], rows
