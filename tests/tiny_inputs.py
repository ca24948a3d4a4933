"""Inputs small enough to compute by hand, in float64, and the comparison to printed digits."""

import torch
from torch import Tensor


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Three rows of each domain, source first: features and logits, labels of the source.
FEATURES = matrix([0, 1], [1, 0.5], [2, -1], [1, 1], [3, 0], [2.5, 2])
LOGITS = matrix([2, 0], [0.5, 1], [-1, 1.5], [1, 0], [0, 0.5], [3, -1])
LABELS = torch.tensor([0, 1, 1])

Z1, Z2 = matrix([1, 0, -1], [0, 2, 0]), matrix([0, 1, 0], [1, 1, -1])
CERTAIN = matrix([4, 0, 0], [0, 5, 0])
Y = torch.tensor([0, 1])
F1, F2 = matrix([3, 4], [0, 2], [1, 0]), matrix([1, 1], [2, 0], [0, 1])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def printed(value: Tensor) -> list[float] | float:
    """The value to six digits behind the point."""
    rounded: list[float] | float = (value.detach().double() * 1e6).round().div(1e6).tolist()
    return rounded


def gradient(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients, zeros where none arrives; `value` can be asked again."""
    return torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
