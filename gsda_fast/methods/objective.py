"""Equations 3-17 of Hu et al., CVPR 2020, as pure functions of tensors.

Every sum over samples is a mean over the global batch, so that no figure depends on the batch size or on the number of
processes; docs/method.md says how that relates to the paper's sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gsda_fast.losses import entropy
from gsda_fast.methods.groups import ClassGroups
from gsda_kernels import AdversarialTerms


@dataclass(frozen=True)
class Objective:
    """What one player minimizes in a step.

    Attributes:
        total: 0-d, to be differentiated.
        terms: the unweighted parts by name, detached, for the log.
    """

    total: Tensor
    terms: Mapping[str, Tensor]


def class_probabilities(logits: Tensor, source_labels: Tensor) -> Tensor:
    """Return the constants p of the weights: the true class of source samples, the predicted distribution of target
    samples.

    Args:
        logits: (N, r), source rows first. source_labels: (N_s,) int64.

    Returns:
        (N, r), detached; float32, or float64 for float64 logits.
    """
    target = logits.detach()[len(source_labels) :]
    predicted = F.softmax(target, dim=1, dtype=torch.promote_types(target.dtype, torch.float32))
    return torch.cat([F.one_hot(source_labels, logits.shape[1]).to(predicted.dtype), predicted])


def target_class_weights(target_probabilities: Tensor) -> Tensor:
    """Return how much of each class the target seems to hold (PADA: Cao et al., ECCV 2018).

    ``gamma = mean over the target of p, divided by its largest entry``.

    Args:
        target_probabilities: (n_t, r), predictions for all of the target.

    Returns:
        (r,) from 0 to 1, the largest 1; float32, or float64 for float64 probabilities.
    """
    mean = target_probabilities.double().mean(0)
    return (mean / mean.max()).to(target_probabilities.dtype)


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    sample_weight: Tensor | None = None,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of labelled samples: its mean, or the weighted mean ``sum_i w_i CE_i / sum_i w_i``.

    Args:
        logits: (N, r). labels: (N,) int64.
        sample_weight: (N,) >= 0, a constant; None: the plain mean.
        mean_over_ranks: averages a tensor over processes of equal batch shape, without gradient. The sum of the weights
            is that of the global batch, so that the mean of this loss over the processes is the global weighted mean.

    Returns:
        0-d tensor; 0 where every weight is 0.
    """
    if sample_weight is None:
        return F.cross_entropy(logits, labels)
    weighted = (sample_weight * F.cross_entropy(logits, labels, reduction="none")).mean()
    mean_weight = sample_weight.mean()
    if mean_over_ranks is not None:
        mean_weight = mean_over_ranks(mean_weight)
    return weighted / mean_weight.clamp_min(torch.finfo(mean_weight.dtype).tiny)


def synchronization_loss(
    gradient_norm: Tensor,
    groups: ClassGroups,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """L_syn (eqs. 10-12): how far gradient magnitudes of neighbouring levels are apart.

    ``|S_dom - sum_q S_1[q]| + sum over levels l of 1/b_l sum_q |S_l[q] - sum of its children's S|``, where the children
    of the finest level's groups are the classes. With one level these are the paper's two terms.

    Args:
        gradient_norm: (K,), order domain, levels coarse to fine, classes.
        groups: the hierarchy that `gradient_norm` belongs to.
        mean_over_ranks: averages a tensor over processes of equal batch shape, without gradient. L_syn is not linear in
            the batch: |.| is taken of the global sums, and its sign pattern is applied to the local ones.

    Returns:
        0-d tensor.

    Raises:
        ValueError: `gradient_norm` is not of length 1 + groups + classes.
    """
    sizes = (1, *groups.level_sizes, groups.num_classes)
    if gradient_norm.shape != (sum(sizes),):
        raise ValueError(
            f"gradient_norm: found shape {tuple(gradient_norm.shape)}; expected ({sum(sizes)},), "
            "the domain's, every group's and every class's"
        )
    if mean_over_ranks is not None:
        gradient_norm = gradient_norm + (mean_over_ranks(gradient_norm.detach()) - gradient_norm).detach()
    whole, *levels = gradient_norm.split(sizes)
    total = (whole - levels[0].sum()).abs().sum()
    for index, size in enumerate(groups.level_sizes):
        below = groups.shares_below(index).to(gradient_norm.dtype) @ levels[index + 1]
        total = total + (levels[index] - below).abs().sum() / size
    return total


def discriminator_objective(
    terms: AdversarialTerms,
    groups: ClassGroups | None = None,
    *,
    beta: float | Tensor = 0.0,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """Return what the discriminators minimize (eqs. 13-15): ``sum_k L_k + beta * L_syn``.

    Args:
        terms: from `Discriminators`, on detached features.
        groups: the hierarchy; None where there is no synchronization.
        beta: weight of L_syn. mean_over_ranks: see `synchronization_loss`.

    Returns:
        Objective with the terms ``adversarial`` and, with groups, ``synchronization``.
    """
    total = terms.loss.sum()
    named = {"adversarial": total.detach()}
    if groups is not None:
        synchronization = synchronization_loss(terms.gradient_norm, groups, mean_over_ranks)
        named["synchronization"] = synchronization.detach()
        total = total + beta * synchronization
    return Objective(total, named)


def encoder_objective(
    logits: Tensor,
    source_labels: Tensor,
    terms: AdversarialTerms | None = None,
    groups: ClassGroups | None = None,
    *,
    alpha: float = 0.0,
    beta: float | Tensor = 0.0,
    adversarial_ramp: float | Tensor = 1.0,
    adversarial_weight: float = 1.0,
    source_weight: Tensor | None = None,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """Return what the encoder and the classifier minimize (eqs. 3-5, 16, 17).

    ``L_c + adversarial_weight * (beta * L_syn - adversarial_ramp * sum_k L_k)`` with
    ``L_c = mean cross-entropy of the source + alpha * mean entropy of the target``.

    Args:
        logits: (N, r), source rows first; without target rows alpha must be 0.
        source_labels: (N_s,) int64.
        terms: from `Discriminators` with held parameters; None where there are none.
        groups: the hierarchy; None where there is no synchronization.
        alpha, beta: weights of the entropy and of L_syn. adversarial_ramp: lambda of eq. 16.
        adversarial_weight: weight of the whole adversarial part against L_c.
        source_weight: (N_s,), what each source sample counts for in the cross-entropy; None: equally much.
        mean_over_ranks: see `synchronization_loss` and `classification_loss`.

    Returns:
        Objective with the terms ``classification`` and, where they take part, ``entropy``, ``adversarial`` and
        ``synchronization``.

    Raises:
        ValueError: no source rows, or no target rows where their entropy is wanted: a mean over none is NaN.
    """
    num_source = len(source_labels)
    if num_source == 0:
        raise ValueError("source_labels: found none; expected at least one source row")
    if alpha and len(logits) <= num_source:
        raise ValueError(f"logits: found {len(logits)} rows, all of the source; expected target rows, or alpha = 0")
    classification = classification_loss(logits[:num_source], source_labels, source_weight, mean_over_ranks)
    total, named = classification, {"classification": classification.detach()}
    if alpha:
        target_entropy = entropy(logits[num_source:])
        named["entropy"] = target_entropy.detach()
        total = total + alpha * target_entropy
    if terms is not None:
        adversarial = terms.loss.sum()
        named["adversarial"] = adversarial.detach()
        against = -adversarial_ramp * adversarial
        if groups is not None:
            synchronization = synchronization_loss(terms.gradient_norm, groups, mean_over_ranks)
            named["synchronization"] = synchronization.detach()
            against = against + beta * synchronization
        total = total + adversarial_weight * against
    return Objective(total, named)
