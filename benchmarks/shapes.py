"""The shapes at which the adversarial head is timed, and inputs of those shapes as training makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import gsda_kernels as gk


@dataclass(frozen=True)
class HeadShape:
    """One adversarial head and one batch of it: 1 + num_groups + num_classes discriminators D -> H -> H -> 1."""

    num_classes: int
    num_groups: int
    feature_dim: int = 256
    hidden_dim: int = 1024
    num_source: int = 36
    num_target: int = 36

    @property
    def num_discriminators(self) -> int:
        return 1 + self.num_groups + self.num_classes

    @property
    def num_samples(self) -> int:
        return self.num_source + self.num_target

    @property
    def num_pairs(self) -> int:
        """Pairs with a non-zero weight: domain, group and class of a source sample, all of a target sample."""
        return 3 * self.num_source + self.num_discriminators * self.num_target

    @property
    def unit(self) -> int:
        """Multiply-adds of one unit of work over all N*K pairs, the unit in which docs/method.md counts."""
        per_pair = self.hidden_dim * (self.feature_dim + self.hidden_dim)
        return per_pair * self.num_discriminators * self.num_samples

    @property
    def num_parameters(self) -> int:
        h, d = self.hidden_dim, self.feature_dim
        return self.num_discriminators * (h * d + h * h + 3 * h + 1)


SHAPES: dict[str, HeadShape] = {
    "visda": HeadShape(num_classes=12, num_groups=4),
    "office31": HeadShape(num_classes=31, num_groups=6),
    "office-home": HeadShape(num_classes=65, num_groups=13),
    "digits": HeadShape(10, 3, feature_dim=128, hidden_dim=32, num_source=64, num_target=64),
    "visda-128": HeadShape(num_classes=12, num_groups=4, num_source=128, num_target=128),
    "office31-128": HeadShape(num_classes=31, num_groups=6, num_source=128, num_target=128),
    "office-home-128": HeadShape(num_classes=65, num_groups=13, num_source=128, num_target=128),
}


@dataclass(frozen=True)
class HeadInputs:
    """Inputs of `adversarial_terms` and upstream gradients of its two results."""

    features: Tensor
    disc: gk.DiscriminatorWeights
    sample_weight: Tensor
    domain: Tensor
    max_pairs: int
    grad_loss: Tensor
    grad_gradient_norm: Tensor

    def requires_grad_(self, encoder: bool, discriminators: bool) -> HeadInputs:
        """Choose the player: the encoder alone (E step), or everything (forward and backward)."""
        self.features.requires_grad_(encoder)
        for parameter in self.disc:
            parameter.requires_grad_(discriminators)
        return self


def make_inputs(
    shape: HeadShape, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> HeadInputs:
    """Return one batch as training sees it.

    One-hot source rows, softmax target rows, layers initialised as `Linear`s.
    """
    generator = torch.Generator().manual_seed(seed)
    k, h, d = shape.num_discriminators, shape.hidden_dim, shape.feature_dim

    def uniform(*size: int, fan_in: int) -> Tensor:
        return ((2 * torch.rand(*size, generator=generator) - 1) / fan_in**0.5).to(device, dtype)

    classes = torch.randint(shape.num_classes, (shape.num_source,), generator=generator)
    logits = 4 * torch.randn(shape.num_target, shape.num_classes, generator=generator)
    probabilities = torch.cat([torch.eye(shape.num_classes)[classes], logits.softmax(1)])
    group = torch.randperm(shape.num_classes, generator=generator) % shape.num_groups
    membership = torch.eye(shape.num_groups)[group]
    weight = torch.cat([torch.ones(shape.num_samples, 1), probabilities @ membership, probabilities], dim=1)
    return HeadInputs(
        torch.randn(shape.num_samples, d, generator=generator).relu().to(device, dtype),
        gk.DiscriminatorWeights(
            uniform(k, h, d, fan_in=d),
            uniform(k, h, fan_in=d),
            uniform(k, h, h, fan_in=h),
            uniform(k, h, fan_in=h),
            uniform(k, h, fan_in=h),
            uniform(k, fan_in=h),
        ),
        weight.to(device),
        (torch.arange(shape.num_samples) < shape.num_source).to(device),
        shape.num_pairs,
        torch.randn(k, generator=generator).to(device),
        torch.randn(k, generator=generator).to(device),
    )
