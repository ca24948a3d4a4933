"""What a domain discriminator sees and how much each sample counts for it: CDAN, and the discriminators' own loss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gsda_fast.losses.precision import check_matrix, wide
from gsda_fast.losses.predictions import row_entropy


@wide
def multilinear_map(features: Tensor, probabilities: Tensor) -> Tensor:
    r"""Outer product of predictions and features, class by class (CDAN: Long et al., NeurIPS 2018).

    .. math:: T_{i, k D + j} = p_{ik} f_{ij}

    Args:
        features: f.
        probabilities: p; CDAN detaches them.

    Shape:
        (N, D), (N, r); (N, r D) result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.multilinear_map(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5, 0.25]]))
        tensor([[1.5000, 2.0000, 0.7500, 1.0000]])
    """
    check_matrix("features", features)
    check_matrix("probabilities", probabilities, rows=len(features))
    return (probabilities[:, :, None] * features[:, None, :]).flatten(1)


@wide
def randomised_map(
    features: Tensor, probabilities: Tensor, feature_projection: Tensor, probability_projection: Tensor
) -> Tensor:
    r"""Random projection of the multilinear map (CDAN: Long et al., NeurIPS 2018, eq. 6).

    .. math:: T_i = \frac{1}{\sqrt d} (f_i R_f) \odot (p_i R_p)

    Inner products of rows are those of `multilinear_map` in expectation, for standard normal projections.

    Args:
        features: f.
        probabilities: p; CDAN detaches them.
        feature_projection, probability_projection: R, drawn once and kept.

    Shape:
        (N, D), (N, r), (D, d), (r, d); (N, d) result.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.randomised_map(torch.ones(1, 2), torch.ones(1, 3), torch.ones(2, 4), torch.ones(3, 4))
        tensor([[3., 3., 3., 3.]])
    """
    check_matrix("features", features)
    check_matrix("probabilities", probabilities, rows=len(features))
    check_matrix("feature_projection", feature_projection, rows=features.shape[1])
    dim = feature_projection.shape[1]
    check_matrix("probability_projection", probability_projection, columns=dim, rows=probabilities.shape[1])
    return (features @ feature_projection) * (probabilities @ probability_projection) / dim**0.5


@wide
def entropy_weights(
    logits: Tensor, num_source: int, normalise: Literal["domain", "joint", "none"] = "domain"
) -> Tensor:
    r"""Return weights of samples by the certainty of their prediction (CDAN+E: Long et al., NeurIPS 2018).

    .. math:: w_i = \frac{1 + \exp(-H(p_i))}{\overline{\mathrm{mean}_j (1 + \exp(-H(p_j)))}}

    where the bar holds constant: the weights pass gradients to the logits, their mean does not.

    Args:
        logits: source rows first.
        num_source: how many of them.
        normalise: the mean is each domain's own (``domain``, as the authors' code), that of all rows (``joint``), or 1
            (``none``).

    Shape:
        (N, r); (N,) result.

    Raises:
        ValueError: `logits` is no matrix, a domain without rows, an unknown normalisation.

    Example::

        >>> losses.entropy_weights(torch.tensor([[50.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), num_source=2)
        tensor([1.1429, 0.8571, 1.0000])
    """
    check_matrix("logits", logits)
    if not 0 < num_source < len(logits):
        raise ValueError(f"num_source: found {num_source}; expected 1 to {len(logits) - 1}, fewer than all rows")
    weights = 1 + (-row_entropy(logits)).exp()
    if normalise == "none":
        return weights
    if normalise == "joint":
        return weights / weights.detach().mean()
    if normalise != "domain":
        raise ValueError(f"normalise: found {normalise!r}; expected 'domain', 'joint' or 'none'")
    source, target = weights[:num_source], weights[num_source:]
    return torch.cat([source / source.detach().mean(), target / target.detach().mean()])


@wide
def domain_loss(logits: Tensor, num_source: int, weights: Tensor | None = None) -> Tensor:
    r"""Binary cross-entropy of domain discriminators, source 1 and target 0 (DANN: Ganin et al., JMLR 2016).

    .. math:: \sum_k \frac{1}{N} \sum_i w_i \, \mathrm{BCE}(z_{ik}, d_i)

    Several discriminators (MADA) add up. From logits: finite where a probability rounds to 0.

    Args:
        logits: z, source rows first.
        num_source: how many of them; all N rows count as source for the mapping loss of ADDA.
        weights: w, one a row; None: ones.

    Shape:
        (N,) or (N, K), (N,); 0-d result.

    Raises:
        ValueError: other shapes, or `num_source` not from 0 to N.

    Example::

        >>> losses.domain_loss(torch.zeros(4), num_source=2)
        tensor(0.6931)
    """
    if logits.dim() not in (1, 2) or len(logits) == 0:
        raise ValueError(f"logits: found shape {tuple(logits.shape)}; expected (N > 0,) or (N > 0, K)")
    if not 0 <= num_source <= len(logits):
        raise ValueError(f"num_source: found {num_source}; expected 0 to {len(logits)}")
    if weights is not None and weights.shape != (len(logits),):
        raise ValueError(f"weights: found shape {tuple(weights.shape)}; expected ({len(logits)},)")
    # BCE(z, 1) = softplus(-z), BCE(z, 0) = softplus(z); logsigmoid is exact in both tails.
    losses = torch.cat([-F.logsigmoid(logits[:num_source]), -F.logsigmoid(-logits[num_source:])])
    if losses.dim() == 2:
        losses = losses.sum(1)
    return losses.mean() if weights is None else (weights * losses).mean()
