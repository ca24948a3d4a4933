"""Losses of the size of features: their norms and their largest singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from gsda_fast.losses.precision import check_matrix, wide


@wide
def hard_feature_norm(source: Tensor, target: Tensor, radius: float) -> Tensor:
    r"""Squared gap between each domain's mean feature norm and a radius (HAFN: Xu et al., ICCV 2019).

    .. math:: (\tfrac{1}{B} \sum_i |s_i| - R)^2 + (\tfrac{1}{B'} \sum_i |t_i| - R)^2

    Args:
        source: features of one domain.
        target: features of the other.
        radius: R, in the units of the features.

    Shape:
        (B, D), (B', D); 0-d result. A row of zeros has gradient 0.

    Raises:
        ValueError: other shapes.

    Example::

        >>> losses.hard_feature_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 5.0]]), radius=5)
        tensor(4.)
    """
    check_matrix("source", source)
    check_matrix("target", target, columns=source.shape[1])
    gaps = [torch.linalg.vector_norm(features, dim=1).mean() - radius for features in (source, target)]
    return gaps[0].square() + gaps[1].square()


@wide
def stepwise_feature_norm(features: Tensor, step: float) -> Tensor:
    r"""Constant outward pull on every feature (SAFN: Xu et al., ICCV 2019).

    .. math:: \frac{1}{N} \sum_i (|h_i| - \overline{(|h_i| + \delta)})^2

    where the bar holds constant. The value is always :math:`\delta^2`; the gradient, :math:`-2 \delta h / (N |h|)`, has
    the same length at every feature: log the norms, not this.

    Args:
        features: h, of one domain.
        step: :math:`\delta`, in the units of the features.

    Shape:
        (N, D); 0-d result. A row of zeros has gradient 0.

    Raises:
        ValueError: `features` is no matrix.

    Example::

        >>> features = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> torch.autograd.grad(losses.stepwise_feature_norm(features, step=1), features)
        (tensor([[-1.2000, -1.6000]]),)
    """
    check_matrix("features", features)
    norms = torch.linalg.vector_norm(features, dim=1)
    return (norms - (norms.detach() + step)).square().mean()


@wide
def spectral_penalty(features: Tensor, k: int = 1) -> Tensor:
    r"""Sum of the k largest squared singular values of one domain's features (BSP: Chen et al., ICML 2019).

    .. math:: \sum_{j \le k} \sigma_j^2 = \sum_{j \le k} |F^\top u_j|^2

    with the singular vectors u held constant, which leaves value and gradient exact, also at repeated values, and needs
    no decomposition. Not centred, not divided by the number of rows: it grows like N. Of singular values that differ by
    less than a hundredth any mixture may be taken for the larger one.

    Args:
        features: F, of one domain.
        k: how many singular values, at most the smaller side of F.

    Shape:
        (N, D); 0-d result.

    Raises:
        ValueError: `features` is no matrix, or k is not from 1 to its smaller side.

    Example::

        >>> losses.spectral_penalty(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        tensor(9.)
    """
    check_matrix("features", features)
    if not 1 <= k <= min(features.shape):
        raise ValueError(f"k: found {k}; expected 1 to {min(features.shape)}, the smaller side of the features")
    rows = features if features.shape[0] <= features.shape[1] else features.T
    scale = rows.detach().abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
    rest = rows.detach() / scale
    vectors: list[Tensor] = []
    for _ in range(k):
        vector = _leading_vector(rest @ rest.T)
        rest = rest - vector[:, None] * (vector @ rest)
        for found in vectors:  # where nothing but rounding is left, it points back to what was taken out
            vector = vector - (found @ vector) * found
        vectors.append(vector)
    return (torch.stack(vectors) @ rows).square().sum()


def _leading_vector(gram: Tensor, squarings: int = 8) -> Tensor:
    """Return the eigenvector of the largest eigenvalue, (n,) of length 1, from the 256th power; zeros where all is
    zero.
    """
    tiny = torch.finfo(gram.dtype).tiny
    power = gram
    for _ in range(squarings):
        power = power / power.diagonal().sum().clamp_min(tiny)
        power = power @ power
    # The column with the largest diagonal entry is never orthogonal to the eigenvector.
    column = power.index_select(1, power.diagonal().argmax().reshape(1)).squeeze(1)
    column = gram @ (column / torch.linalg.vector_norm(column).clamp_min(tiny))  # smooths the rounding of the powers
    return column / torch.linalg.vector_norm(column).clamp_min(tiny)
