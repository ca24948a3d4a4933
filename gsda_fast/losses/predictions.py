"""Losses of one domain's predictions alone: how certain, how confused, how diverse they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gsda_fast.losses.precision import check_matrix, wide


def row_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's prediction, (N,) in nats."""
    log_probabilities = F.log_softmax(logits, dim=1)
    return -(log_probabilities.exp() * log_probabilities).sum(1)


@wide
def entropy(logits: Tensor) -> Tensor:
    r"""Mean entropy of the predictions, in nats (GSDA, eq. 5; Grandvalet and Bengio, NeurIPS 2004).

    .. math:: -\frac{1}{N} \sum_i \sum_c p_{ic} \log p_{ic}, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: z.

    Shape:
        (N, r); 0-d result.

    Raises:
        ValueError: `logits` is no matrix.

    Example::

        >>> losses.entropy(torch.zeros(2, 4))
        tensor(1.3863)
    """
    check_matrix("logits", logits)
    return row_entropy(logits).mean()


@wide
def minimum_class_confusion(logits: Tensor, temperature: float = 2.5) -> Tensor:
    r"""Confusion between classes in a batch of predictions (MCC: Jin et al., ECCV 2020).

    .. math:: \frac{1}{r} \sum_{c \ne c'} \frac{C_{cc'}}{\sum_{c''} C_{cc''}}, \qquad C = P^\top \mathrm{diag}(w) P,
        \quad P = \mathrm{softmax}(z / T), \quad w_i \propto 1 + \exp(-H(P_i))

    The weights are constants. A row of the normalised C is the mean prediction where class c is predicted,
    :math:`\sum_i a_{ic} P_i` with :math:`a_{\cdot c} = \mathrm{softmax}_i(\log P_{ic} + \log w_i)`, which needs
    no division: a class that nobody predicts makes no 0/0.

    Args:
        logits: z.
        temperature: T > 0.

    Shape:
        (N, r); 0-d result from 0 (certain predictions of every class) to 1.

    Raises:
        ValueError: `logits` is no matrix, or the temperature is not above 0.

    Example::

        >>> losses.minimum_class_confusion(torch.zeros(3, 4))
        tensor(0.7500)
    """
    check_matrix("logits", logits)
    if temperature <= 0:
        raise ValueError(f"temperature: found {temperature}; expected a number above 0")
    softened = logits / temperature
    log_probabilities = F.log_softmax(softened, dim=1)
    log_weight = torch.log1p((-row_entropy(softened.detach())).exp())
    share = (log_probabilities + log_weight[:, None]).softmax(0)
    return 1 - (share * log_probabilities.exp()).sum() / logits.shape[1]


@wide
def nuclear_norm(logits: Tensor) -> Tensor:
    r"""Negative nuclear norm of a batch of predictions (BNM: Cui et al., CVPR 2020).

    .. math:: -\frac{1}{N} \|P\|_* = -\frac{1}{N} \langle P, Q \rangle, \qquad P = \mathrm{softmax}(z)

    with Q the polar factor of P, held constant: the gradient is Q, finite where singular values are 0 or repeated.
    Q comes from thirty Newton-Schulz steps, since a singular value decomposition makes the host wait for the device.
    Singular values below 1e-4 of the norm of P may count for less than they are.

    Args:
        logits: z.

    Shape:
        (N, r); 0-d result, from -sqrt(min(N, r) / N) to -1/sqrt(N).

    Raises:
        ValueError: `logits` is no matrix.

    Example::

        >>> losses.nuclear_norm(100 * torch.eye(3))
        tensor(-1.)
    """
    check_matrix("logits", logits)
    probabilities = F.softmax(logits, dim=1)
    factor = polar_factor(probabilities.detach()).to(probabilities.dtype)
    return -(probabilities * factor).sum() / len(logits)


def polar_factor(matrix: Tensor, steps: int = 30) -> Tensor:
    """Return the nearest matrix with singular values of 1 (0 where `matrix` has none), in float64, by Newton-Schulz
    steps.
    """
    wide_matrix = matrix.double()
    factor = wide_matrix / wide_matrix.square().sum().sqrt().clamp_min(torch.finfo(wide_matrix.dtype).tiny)
    for _ in range(steps):  # s -> (3 s - s^3) / 2 takes every singular value in (0, 1] to 1
        if factor.shape[0] < factor.shape[1]:
            factor = 1.5 * factor - 0.5 * (factor @ factor.T) @ factor
        else:
            factor = 1.5 * factor - 0.5 * factor @ (factor.T @ factor)
    return factor
