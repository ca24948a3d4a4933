"""Losses of two views of the same samples: self-ensembling, FixMatch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gsda_fast.losses.precision import check_matrix, wide


@wide
def confident_rows(logits: Tensor, threshold: float) -> Tensor:
    r"""Return which rows have a prediction more probable than a threshold.

    Args:
        logits: z.
        threshold: of the largest probability; nothing exceeds 1.

    Shape:
        (N, r); (N,) result of 0 and 1, in the logits' dtype, constant.

    Raises:
        ValueError: `logits` is no matrix.

    Example::

        >>> losses.confident_rows(torch.tensor([[9.0, 0.0], [1.0, 0.0]]), threshold=0.9)
        tensor([1., 0.])
    """
    check_matrix("logits", logits)
    return (F.softmax(logits.detach(), dim=1).amax(1) > threshold).to(logits.dtype)


@wide
def consistency(student_logits: Tensor, teacher_logits: Tensor, threshold: float) -> Tensor:
    r"""Squared difference of a student's and a confident teacher's probabilities (French et al., ICLR 2018).

    .. math:: \frac{1}{N} \sum_i 1(\max_c q_{ic} > \tau) \frac{1}{r} \sum_c (p_{ic} - q_{ic})^2

    A mean over classes and over all rows, kept or not. The teacher's q is constant.

    Args:
        student_logits: of one view.
        teacher_logits: of another view of the same samples.
        threshold: :math:`\tau`.

    Shape:
        both (N, r); 0-d result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.consistency(torch.zeros(1, 2), torch.tensor([[100.0, 0.0]]), threshold=0.9)
        tensor(0.2500)
    """
    check_matrix("student_logits", student_logits)
    check_matrix("teacher_logits", teacher_logits, columns=student_logits.shape[1], rows=len(student_logits))
    gaps = F.softmax(student_logits, dim=1) - F.softmax(teacher_logits.detach(), dim=1)
    return (confident_rows(teacher_logits, threshold) * gaps.square().mean(1)).mean()


@wide
def class_balance(student_logits: Tensor, kept: float | Tensor) -> Tensor:
    r"""Binary cross-entropy of the mean prediction against a uniform one (French et al., ICLR 2018).

    .. math:: -\kappa \sum_c \left( \tfrac1r \log m_c + (1 - \tfrac1r) \log(1 - m_c) \right),
        \qquad m = \tfrac1N \sum_i p_i

    Both logarithms come from logsumexp: finite, with a gradient, where a mean rounds to 0 or 1.

    Args:
        student_logits: of the target.
        kept: :math:`\kappa`, the share of confident rows.

    Shape:
        (N, r) with r > 1; 0-d result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.class_balance(torch.zeros(3, 2), kept=1.0)
        tensor(1.3863)
    """
    check_matrix("student_logits", student_logits)
    n, r = student_logits.shape
    if r < 2:
        raise ValueError(f"student_logits: found {r} column; expected at least two classes")
    log_mean = F.log_softmax(student_logits, dim=1).logsumexp(0) - math.log(n)
    itself = torch.eye(r, dtype=torch.bool, device=log_mean.device)
    log_others = log_mean.expand(r, r).masked_fill(itself, -torch.inf).logsumexp(1)
    return -kept * (log_mean / r + (1 - 1 / r) * log_others).sum()


@wide
def confident_cross_entropy(strong_logits: Tensor, weak_logits: Tensor, threshold: float) -> Tensor:
    r"""Cross-entropy of one view against another's confident decision (FixMatch: Sohn et al., NeurIPS 2020).

    .. math:: \frac{1}{N} \sum_i 1(\max_c p^w_{ic} > \tau) \, \mathrm{CE}(z_i, \arg\max_c p^w_{ic})

    A mean over all rows, kept or not. The weak view is constant.

    Args:
        strong_logits: z, of a strongly augmented view.
        weak_logits: of a weakly augmented view of the same samples.
        threshold: :math:`\tau`.

    Shape:
        both (N, r); 0-d result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.confident_cross_entropy(torch.zeros(2, 2), torch.tensor([[9.0, 0.0], [1.0, 0.0]]), threshold=0.9)
        tensor(0.3466)
    """
    check_matrix("strong_logits", strong_logits)
    check_matrix("weak_logits", weak_logits, columns=strong_logits.shape[1], rows=len(strong_logits))
    each = F.cross_entropy(strong_logits, weak_logits.detach().argmax(1), reduction="none")
    return (confident_rows(weak_logits, threshold) * each).mean()
