"""Stochastic gradient descent as `torch.optim.SGD` does it, on gradients that may turn out to be no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class Sgd(NamedTuple):
    """How parameters move: m <- momentum * m + g + weight_decay * p, then p <- p - learning_rate * m.

    Attributes:
        learning_rate: 0-d, on the parameters' device. momentum, weight_decay: >= 0.
        nesterov: p <- p - learning_rate * (g + weight_decay * p + momentum * m) instead.
    """

    learning_rate: Tensor
    momentum: float
    weight_decay: float
    nesterov: bool


def step_where_finite(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum: Sequence[Tensor],
    half_weights: Sequence[Tensor],
    rule: Sgd,
    skip: Tensor,
) -> Tensor:
    """Move parameters and momentum in place, all of them or none; a GPU is not waited for.

    Args:
        parameters: w1, b1, w2, b2, w3, b3. gradients, momentum: of each.
        half_weights: (), or w1 and w2 in half precision, which follow.

    Returns:
        0-d, like `skip`: 1 where nothing moved, because `skip` is 1 or an entry of a gradient is not finite.
    """
    # In float32 an entry's size survives, whatever the dtype: only infinities and NaN have no finite largest entry.
    largest = torch.stack([gradient.detach().abs().amax().to(skip.dtype) for gradient in gradients])
    found_inf = torch.maximum(skip, (~largest.isfinite()).any().to(skip.dtype))
    on_cpu = skip.device.type == "cpu"
    if on_cpu and bool(found_inf):
        return found_inf
    sgd(
        list(parameters),
        list(gradients),
        list(momentum),
        foreach=False,
        fused=not on_cpu,
        found_inf=None if on_cpu else found_inf,
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        lr=float(rule.learning_rate) if on_cpu else rule.learning_rate,
        dampening=0.0,
        nesterov=rule.nesterov,
        maximize=False,
    )
    follow(half_weights, parameters)
    return found_inf


def follow(half_weights: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Convert w1 and w2, of the parameters, into their copies in half precision, where there are such."""
    for copy, parameter in zip(half_weights, (parameters[0], parameters[2])):
        copy.copy_(parameter)
