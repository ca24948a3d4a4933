"""Maximum mean discrepancies of two samples: of features, of several layers jointly, of fused layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gsda_fast.losses.precision import check_matrix, wide

Estimator = Literal["full", "biased", "linear"]

# Of the probabilities' kernel in a joint discrepancy: exp(-|p - p'|^2 / 1.68), as JAN's authors have it.
PROBABILITY_BANDWIDTH = 1.68


def _squared_distances(rows: Tensor) -> Tensor:
    """Squared distances of all pairs of rows, (N, N) float64.

    Rows are centred: a common offset takes the digits that a Gram matrix has for the differences.
    """
    centred = rows.double()
    centred = centred - centred.detach().mean(0)
    products = centred @ centred.T
    lengths = products.diagonal()
    return (lengths[:, None] + lengths - 2 * products).clamp_min(0)


def _gaussian_kernels(distances: Tensor) -> Tensor:
    """Sum of five Gaussian kernels of 1/4 to 4 times the mean squared distance of different rows, held constant."""
    n = len(distances)
    mean = distances.detach().sum() / max(n * (n - 1), 1)
    # Rows that are all alike have no distance to measure by: the bound keeps values and gradients finite.
    bandwidth = mean.clamp_min(torch.finfo(torch.float32).tiny)
    kernel = (-distances / (4 * bandwidth)).exp()
    total = kernel
    for _ in range(4):  # exp(-d / (b / 2)) is the square of exp(-d / b)
        kernel = kernel.square()
        total = total + kernel
    return total


def _mean_of_different(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.diagonal().sum()) / max(n * (n - 1), 1)


def _discrepancy(kernel: Tensor, num_source: int, estimator: Estimator) -> Tensor:
    """Estimate the squared discrepancy from the kernel of all rows, source rows first."""
    source, target = kernel[:num_source, :num_source], kernel[num_source:, num_source:]
    between = kernel[:num_source, num_source:]
    if estimator == "full":
        return _mean_of_different(source) + _mean_of_different(target) - 2 * between.mean()
    if estimator == "biased":
        return source.mean() + target.mean() - 2 * between.mean()
    if estimator != "linear":
        raise ValueError(f"estimator: found {estimator!r}; expected 'full', 'biased' or 'linear'")
    if len(source) != len(target):
        raise ValueError(
            f"estimator: found 'linear' for {len(source)} source and {len(target)} target rows; expected equally many"
        )
    within = source.roll(-1, 1).diagonal() + target.roll(-1, 1).diagonal()
    return (within - between.roll(-1, 1).diagonal() - between.roll(-1, 0).diagonal()).mean()


@wide
def mk_mmd(source: Tensor, target: Tensor, estimator: Estimator = "full") -> Tensor:
    r"""Multi-kernel maximum mean discrepancy of two samples (DAN: Long et al., ICML 2015).

    .. math:: \frac{1}{B(B-1)} \sum_{i \ne j} k(s_i, s_j) + \frac{1}{B'(B'-1)} \sum_{i \ne j} k(t_i, t_j)
        - \frac{2}{B B'} \sum_{i, j} k(s_i, t_j), \qquad k(x, y) = \sum_{j=-2}^{2} \exp(-|x - y|^2 / (2^j \bar d))

    where :math:`\bar d`, a constant, is the mean squared distance of different rows of both samples. Each kernel counts
    once (the paper learns their weights; no published code does).

    Args:
        source: rows of one domain.
        target: rows of the other.
        estimator: ``full``, the unbiased one above, may be negative; ``biased`` keeps the pairs i = j and is never;
            ``linear`` takes only the pairs (i, i + 1 mod B), at the same expectation and a larger variance.

    Shape:
        source (B, D), target (B', D); 0-d result. One row has no pair: its term of ``full`` is 0.

    Raises:
        ValueError: other shapes, an unknown estimator, ``linear`` with B not B'.

    Example::

        >>> source, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]])
        >>> losses.mk_mmd(source, target)
        tensor(2.0380)
    """
    check_matrix("source", source)
    check_matrix("target", target, columns=source.shape[1])
    rows = torch.cat([source, target])
    return _discrepancy(_gaussian_kernels(_squared_distances(rows)), len(source), estimator).to(rows.dtype)


@wide
def joint_mmd(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], estimator: Estimator = "full") -> Tensor:
    r"""Joint maximum mean discrepancy of features and predictions (JAN: Long et al., ICML 2017).

    The estimators of `mk_mmd` on the product of the layers' kernels,

    .. math:: k((f, p), (f', p')) = k_f(f, f') \, \exp(-|p - p'|^2 / 1.68)

    with the five kernels of `mk_mmd` for :math:`k_f`. Gradients flow through the features and the probabilities.

    Args:
        source: features and class probabilities of one domain.
        target: those of the other.
        estimator: see `mk_mmd`.

    Shape:
        (B, D) and (B, r); (B', D) and (B', r); 0-d result.

    Raises:
        ValueError: other shapes, an unknown estimator, ``linear`` with B not B'.

    Example::

        >>> source = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> target = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> losses.joint_mmd(source, target, "biased") > losses.mk_mmd(source[0], target[0], "biased")
        tensor(True)
    """
    features, probabilities = _both("probabilities", source, target)
    by_features = _gaussian_kernels(_squared_distances(features))
    by_probabilities = (-_squared_distances(probabilities) / PROBABILITY_BANDWIDTH).exp()
    return _discrepancy(by_features * by_probabilities, len(source[0]), estimator).to(features.dtype)


@wide
def fused_mmd(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], estimator: Estimator = "full") -> Tensor:
    r"""Maximum mean discrepancy of features fused with logits (RTN: Long et al., NeurIPS 2016).

    `mk_mmd` of the outer products :math:`z = f \otimes g`, which are never formed:

    .. math:: |z - z'|^2 = |f|^2 |g|^2 + |f'|^2 |g'|^2 - 2 \langle f, f' \rangle \langle g, g' \rangle

    Args:
        source: features and logits of one domain.
        target: those of the other.
        estimator: see `mk_mmd`.

    Shape:
        (B, D) and (B, r); (B', D) and (B', r); 0-d result.

    Raises:
        ValueError: other shapes, an unknown estimator, ``linear`` with B not B'.

    Example::

        >>> source = torch.tensor([[0.0], [1.0]]), torch.ones(2, 1)
        >>> target = torch.tensor([[2.0], [4.0]]), torch.ones(2, 1)
        >>> losses.fused_mmd(source, target)
        tensor(2.0380)
    """
    features, logits = _both("logits", source, target)
    # Centring a factor would change the product, so that only float64 has the digits for differences of close rows.
    wide_features, wide_logits = features.double(), logits.double()
    products = (wide_features @ wide_features.T) * (wide_logits @ wide_logits.T)
    lengths = products.diagonal()
    distances = (lengths[:, None] + lengths - 2 * products).clamp_min(0)
    return _discrepancy(_gaussian_kernels(distances), len(source[0]), estimator).to(features.dtype)


def _both(second: str, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both domains' features and both domains' second layer, source rows first."""
    check_matrix("source features", source[0])
    check_matrix(f"source {second}", source[1], rows=len(source[0]))
    check_matrix("target features", target[0], columns=source[0].shape[1])
    check_matrix(f"target {second}", target[1], columns=source[1].shape[1], rows=len(target[0]))
    return torch.cat([source[0], target[0]]), torch.cat([source[1], target[1]])
