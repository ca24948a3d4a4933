"""Losses of two classifiers against each other: MCD, MDD, SymNets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gsda_fast.losses.precision import check_labels, check_matrix, wide
from gsda_fast.losses.predictions import row_entropy


@wide
def classifier_discrepancy(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    r"""Mean absolute difference of two classifiers' probabilities (MCD: Saito et al., CVPR 2018).

    .. math:: \frac{1}{N r} \sum_i \sum_c |p^a_{ic} - p^b_{ic}|

    A mean over classes as well, as the authors have it: at most 2 / r, so that its weight is to grow with r.

    Args:
        logits_a: of one classifier.
        logits_b: of the other, for the same rows.

    Shape:
        both (N, r); 0-d result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.classifier_discrepancy(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
        tensor(1.)
    """
    check_matrix("logits_a", logits_a)
    check_matrix("logits_b", logits_b, columns=logits_a.shape[1], rows=len(logits_a))
    return (F.softmax(logits_a, dim=1) - F.softmax(logits_b, dim=1)).abs().mean()


@wide
def uniform_class_prior(logits: Tensor) -> Tensor:
    r"""Cross-entropy of the mean prediction against equally many samples of each class (MCD's code for VisDA).

    .. math:: -\frac{1}{r} \sum_c \log(\tfrac{1}{N} \sum_i p_{ic} + 10^{-6})

    Args:
        logits: of one classifier.

    Shape:
        (N, r); 0-d result, at least log r.

    Raises:
        ValueError: `logits` is no matrix.

    Example::

        >>> losses.uniform_class_prior(torch.zeros(2, 4))
        tensor(1.3863)
    """
    check_matrix("logits", logits)
    return -(F.softmax(logits, dim=1).mean(0) + 1e-6).log().mean()


@wide
def margin_disparity(
    source_logits: Tensor,
    source_adversarial: Tensor,
    target_logits: Tensor,
    target_adversarial: Tensor,
    margin: float,
) -> Tensor:
    r"""Margin disparity discrepancy, as the adversarial classifier minimizes it (MDD: Zhang et al., ICML 2019).

    .. math:: \gamma \, \mathrm{mean}_s[-\log p'_{\hat y}] + \mathrm{mean}_t[-\log(1 - p'_{\hat y})]

    with p' the adversarial classifier's probabilities and :math:`\hat y` the main classifier's decision, a constant.
    The logarithm of 1 - p is a difference of two logsumexp: finite where p rounds to 1.

    Args:
        source_logits, target_logits: of the main classifier.
        source_adversarial, target_adversarial: of the adversarial one, for the same rows.
        margin: :math:`\gamma`, the exponential of the margin.

    Shape:
        (B, r) twice, (B', r) twice, r > 1; 0-d result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> sure, opposed = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])
        >>> losses.margin_disparity(sure, sure, sure, opposed, margin=4)
        tensor(0.0006)
    """
    check_matrix("source_logits", source_logits)
    check_matrix("target_logits", target_logits, columns=source_logits.shape[1])
    check_matrix("source_adversarial", source_adversarial, source_logits.shape[1], len(source_logits))
    check_matrix("target_adversarial", target_adversarial, target_logits.shape[1], len(target_logits))
    agreement = F.cross_entropy(source_adversarial, source_logits.argmax(1))
    others = target_adversarial.scatter(1, target_logits.argmax(1, keepdim=True), -torch.inf)
    disagreement = (target_adversarial.logsumexp(1) - others.logsumexp(1)).mean()
    return margin * agreement + disagreement


def _halves(name: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix(name, logits)
    if logits.shape[1] % 2:
        raise ValueError(f"{name}: found {logits.shape[1]} columns; expected an even number, two for each class")
    source_half, target_half = logits.chunk(2, dim=1)
    return source_half, target_half


def _not_of_half(logits: Tensor, half: Tensor) -> Tensor:
    """Mean of minus the logarithm of a half's probability: two logsumexp, finite where the probability is 0."""
    return (logits.logsumexp(1) - half.logsumexp(1)).mean()


@wide
def symmetric_classifier_loss(source_logits: Tensor, labels: Tensor, target_logits: Tensor) -> Tensor:
    r"""Return what the two classifiers of SymNets minimize (Zhang et al., CVPR 2019).

    With logits :math:`z = [z^s | z^t]` of both classifiers, :math:`P = \mathrm{softmax}(z)` over all 2r,
    S the sum of its first half and T = 1 - S,

    .. math:: \mathrm{CE}(z^s, y) + \mathrm{CE}(z^t, y) + \mathrm{mean}_s[-\log S] + \mathrm{mean}_t[-\log T]

    where the cross-entropies are of source rows, each over its own r classes. The network below takes no gradient from
    it.

    Args:
        source_logits: of source rows.
        labels: their classes.
        target_logits: of target rows.

    Shape:
        (B, 2r), (B,) int64, (B', 2r); 0-d result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.symmetric_classifier_loss(torch.zeros(1, 4), torch.tensor([1]), torch.zeros(1, 4))
        tensor(2.7726)
    """
    of_source, of_target = _halves("source_logits", source_logits)
    check_matrix("target_logits", target_logits, columns=source_logits.shape[1])
    check_labels("labels", labels, len(source_logits))
    supervised = F.cross_entropy(of_source, labels) + F.cross_entropy(of_target, labels)
    domain = _not_of_half(source_logits, of_source) + _not_of_half(target_logits, _halves("", target_logits)[1])
    return supervised + domain


@wide
def symmetric_feature_loss(
    source_logits: Tensor, labels: Tensor, target_logits: Tensor, ramp: float | Tensor
) -> Tensor:
    r"""Return what the features of SymNets minimize (Zhang et al., CVPR 2019).

    .. math:: \tfrac12 \mathrm{CE}(z, y) + \tfrac12 \mathrm{CE}(z, y + r)
        + \lambda \, \mathrm{mean}_t[-\tfrac12 \log S - \tfrac12 \log T + H(q)], \qquad q_k = P_k + P_{k + r}

    with the notation of `symmetric_classifier_loss` and cross-entropies over all 2r. The classifiers take no gradient
    from it: apply the head with held weights.

    Args:
        source_logits: of source rows.
        labels: their classes.
        target_logits: of target rows.
        ramp: :math:`\lambda`, from 0 to 1.

    Shape:
        (B, 2r), (B,) int64, (B', 2r); 0-d result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.symmetric_feature_loss(torch.zeros(1, 4), torch.tensor([1]), torch.zeros(1, 4), ramp=0.0)
        tensor(1.3863)
    """
    _halves("source_logits", source_logits)
    check_matrix("target_logits", target_logits, columns=source_logits.shape[1])
    check_labels("labels", labels, len(source_logits))
    category = F.cross_entropy(source_logits, labels)
    category = category + F.cross_entropy(source_logits, labels + source_logits.shape[1] // 2)
    halves = _halves("target_logits", target_logits)
    domain = _not_of_half(target_logits, halves[0]) + _not_of_half(target_logits, halves[1])
    return category / 2 + ramp * (domain / 2 + row_entropy(torch.logaddexp(*halves)).mean())
