"""Classifiers that are more than one linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perceptron(sizes: Sequence[int], batchnorm: bool = False, dropout: float = 0.5) -> nn.Sequential:
    """Build linear layers with BatchNorm where asked for, ReLU and dropout between them.

    Args:
        sizes: of the input, the hidden layers and the output. batchnorm: before each ReLU.
        dropout: probability, after each ReLU.
    """
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes[:-1]):
        norm = [nn.BatchNorm1d(following)] if batchnorm else []
        layers += [nn.Linear(size, following), *norm, nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class TwoClassifiers(nn.Module):
    """Two classifiers of one shape and different initial weights; the mean of their probabilities predicts.

    Args:
        sizes: of the features, the hidden layers and the classes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.first, self.second = perceptron(sizes, batchnorm=True), perceptron(sizes, batchnorm=True)

    def both(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of each, both (N, r)."""
        return self.first(features), self.second(features)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logarithm of the mean probability, (N, r)."""
        return _log_mean_probability(*self.both(features))


class TwinClassifier(nn.Module):
    """One linear layer of 2 r outputs: a classifier for the source beside one for the target.

    Args:
        feature_dim: D. num_classes: r. mean: predict by the mean of both probabilities; the target's alone otherwise.
    """

    def __init__(self, feature_dim: int, num_classes: int, mean: bool = False) -> None:
        super().__init__()
        self.mean = mean
        self.linear = nn.Linear(feature_dim, 2 * num_classes)

    def both(self, features: Tensor, frozen: bool = False) -> Tensor:
        """Return the logits of both, (N, 2 r), source half first.

        Args:
            features: (N, D). frozen: hold the parameters: the gradient goes to the features alone.
        """
        weight, bias = self.linear.weight, self.linear.bias
        return F.linear(features, weight.detach(), bias.detach()) if frozen else F.linear(features, weight, bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the target half, (N, r), or the logarithm of the mean probability."""
        of_source, of_target = self.linear(features).chunk(2, dim=1)
        return _log_mean_probability(of_source, of_target) if self.mean else of_target


def _log_mean_probability(first: Tensor, second: Tensor) -> Tensor:
    """Return the logarithm of the mean of two predictions, from logits; all (N, r)."""
    first, second = (F.log_softmax(each.float(), dim=1).to(each.dtype) for each in (first, second))
    return torch.logaddexp(first, second) - math.log(2)
