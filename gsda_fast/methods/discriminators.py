"""The K = 1 + b + r discriminators as one module of stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gsda_fast.methods.groups import ClassGroups
from gsda_fast.methods.half_weights import HalfWeights
from gsda_fast.methods.objective import Objective
from gsda_fast.methods.step import Descent
from gsda_kernels import (
    AdversarialTerms,
    DiscriminatorWeights,
    adversarial_terms,
    adversarial_update_,
    resolve_backend,
)

LEVELS = ("domain", "group", "class")


class Discriminators(nn.Module):
    """Adversarial discriminators of the whole domain, of groups of classes and of classes.

    Each is a ReLU network D -> H -> H -> 1, without BatchNorm (which would couple the samples, so that no per-sample
    gradient would exist) and without dropout. Sample i weighs ``[1, p_i @ G.T, p_i]`` in the K discriminators.

    Args:
        feature_dim: D. groups: the groups of classes (see `ClassGroups`). hidden_dim: H.
        levels: which of "domain", "group", "class" exist; the order is always domain, groups, classes.
        backend: how the terms are computed (`gsda_kernels.available_backends`).
        min_weight: target pairs below this weight are dropped; 0 is exact.

    Attributes:
        w1 (K, H, D), b1 (K, H), w2 (K, H, H), b2 (K, H), w3 (K, H), b3 (K,): the parameters. After `keep`, K stands for
            the number of those that are left, here and in all results.
    """

    class_weights: Tensor

    def __init__(
        self,
        feature_dim: int,
        groups: ClassGroups,
        hidden_dim: int = 1024,
        levels: Sequence[str] = LEVELS,
        backend: str = "auto",
        min_weight: float = 0.0,
    ) -> None:
        super().__init__()
        unknown = set(levels) - set(LEVELS)
        if unknown or not levels:
            raise ValueError(f"levels: found {tuple(levels)}; expected one or more of {', '.join(LEVELS)}")
        self.groups = groups
        self.levels = tuple(level for level in LEVELS if level in levels)
        self.backend = backend
        self.min_weight = min_weight
        rows = {
            "domain": torch.ones(1, groups.num_classes),
            "group": groups.membership,
            "class": torch.eye(groups.num_classes),
        }
        sizes = {level: len(rows[level]) for level in self.levels}
        self._slices: dict[str, slice] = {}
        start = 0
        for level, size in sizes.items():
            self._slices[level] = slice(start, start + size)
            start += size
        # (K, r): what each class's probability weighs in each discriminator.
        self.register_buffer("class_weights", torch.cat([rows[level] for level in self.levels]))
        self._count_pairs(slice(0, self.num_discriminators))
        shape = (self.num_discriminators, hidden_dim)
        self.w1, self.b1 = stacked_linear(*shape, feature_dim)
        self.w2, self.b2 = stacked_linear(*shape, hidden_dim)
        w3, b3 = stacked_linear(self.num_discriminators, 1, hidden_dim)
        self.w3, self.b3 = nn.Parameter(w3.detach().squeeze(1)), nn.Parameter(b3.detach().squeeze(1))
        self._half = HalfWeights()

    @property
    def num_discriminators(self) -> int:
        """K, of all levels together."""
        return len(self.class_weights)

    def expected_pairs(self) -> list[float]:
        """Return in how many pairs each discriminator takes part, for one source and one target sample."""
        of_source = (self.class_weights > 0).double().mean(1)
        return (1 + of_source).tolist()

    def keep(self, own: slice) -> None:
        """Keep some of the discriminators alone, where others are kept by other ranks."""
        self._count_pairs(own)
        for name, parameter in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(parameter.detach()[own].clone()))

    def _count_pairs(self, own: slice) -> None:
        self._own = own
        self._pairs_per_class = int((self.class_weights[own] > 0).sum(0).max())

    def level_slice(self, level: str) -> slice:
        """Return where a level's discriminators lie in the (K,) results."""
        return self._slices[level]

    def sum_per_level(self, values: Tensor) -> dict[str, Tensor]:
        """Return (K,) -> a 0-d sum for each level that exists, by its name."""
        return {level: values[where].sum() for level, where in self._slices.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> AdversarialTerms:
        # In front of what may be compiled: a graph knows nothing of when its inputs were written.
        has_half = not torch.compiler.is_compiling() and self._half.are_valid((self.w1, self.w2))
        terms: AdversarialTerms = super().__call__(*args, **kwargs, has_half=has_half)
        return terms

    def forward(
        self,
        features: Tensor,
        class_probabilities: Tensor,
        domain: Tensor,
        num_source: int | None = None,
        sample_weight: Tensor | None = None,
        *,
        loss_feature_scale: float | Tensor = 1.0,
        frozen: bool = False,
        has_half: bool = False,
    ) -> AdversarialTerms:
        """Return losses and gradient magnitudes of all discriminators (eqs. 6-12).

        Args:
            features: (N, D), in any order.
            class_probabilities: (N, r), source rows one-hot, target rows predicted; used as constants.
            domain: (N,), 1 source, 0 target.
            num_source: number of source rows, which bounds the work: a one-hot row takes part in few discriminators.
                None: no bound is assumed.
            sample_weight: (N,) >= 0, a constant: what each sample counts for in all discriminators; None: 1.
            loss_feature_scale: factor on the losses' gradient to `features`; -lambda is gradient reversal.
            frozen: hold the parameters, as the step of the encoder does.
            has_half: read the copies of w1 and w2 that `descend_` has left. A call of the module finds out whether they
                hold, and says so itself.

        Returns:
            AdversarialTerms: loss (K,) and gradient_norm (K,), float32 (float64 for float64 features), in the order
            domain, groups, classes.
        """
        parameters = self._stacked
        if frozen:
            parameters = DiscriminatorWeights(*(parameter.detach() for parameter in parameters))
        half_weights = self._half.copies if has_half else None
        if half_weights is not None and half_weights[0].dtype != features.dtype:
            half_weights = None
        with torch.autocast(features.device.type, enabled=False):
            return adversarial_terms(
                features,
                parameters,
                self._pair_weight(features, class_probabilities, sample_weight),
                domain,
                backend=self.backend,
                min_weight=self.min_weight,
                max_pairs=self._max_pairs(len(features), num_source),
                loss_feature_scale=loss_feature_scale,
                half_weights=half_weights,
                validate=False,
            )

    def descend_(
        self,
        features: Tensor,
        class_probabilities: Tensor,
        domain: Tensor,
        num_source: int | None,
        sample_weight: Tensor | None,
        objective: Callable[[AdversarialTerms], Objective],
        descent: Descent,
    ) -> tuple[Objective, Tensor]:
        """Move the parameters by a step on an objective of the terms, in place and without gradients in memory.

        Args:
            features, class_probabilities, domain, num_source, sample_weight: see `forward`; no gradient flows to them.
            objective: what is minimized, of the terms that `forward` returns. descent: how the parameters move.

        Returns:
            The objective before the step, detached; 0-d float32: 1 where something was not finite and nothing moved.
        """
        found: list[Objective] = []

        def upstream(terms: AdversarialTerms) -> tuple[Tensor, Tensor]:
            leaves = AdversarialTerms(*(term.detach().requires_grad_() for term in terms))
            found.append(objective(leaves))
            total = found[0].total
            of_loss, of_norm = torch.autograd.grad(total, leaves, materialize_grads=True)
            # Terms of other ranks can be part of it: where one of these is not finite, nothing moves anywhere.
            return torch.where(total.isfinite(), of_loss, torch.nan), of_norm

        parameters = self._stacked
        matrices = (self.w1, self.w2)
        keeps_half = descent.writes_are_counted and self._reads_half(features)
        half_weights = self._half.renewed(matrices, features.dtype) if keeps_half else None
        with torch.autocast(features.device.type, enabled=False):
            done = adversarial_update_(
                features.detach(),
                parameters,
                DiscriminatorWeights(*descent.momentum_buffers(parameters)),
                self._pair_weight(features, class_probabilities, sample_weight),
                domain,
                upstream,
                learning_rate=descent.learning_rate,
                momentum=descent.momentum,
                weight_decay=descent.weight_decay,
                nesterov=descent.nesterov,
                skip=descent.skip,
                half_weights=half_weights,
                backend=self.backend,
                min_weight=self.min_weight,
                max_pairs=self._max_pairs(len(features), num_source),
                validate=False,
            )
        if half_weights is not None:
            self._half.confirm(matrices)
        return replace(found[0], total=found[0].total.detach()), done.found_inf

    @torch.no_grad()
    def domain_accuracy(self, features: Tensor, domain: Tensor) -> Tensor | None:
        """Return how often the domain's discriminator names the domain, in one forward pass of it alone.

        Args:
            features: (N, D). domain: (N,), 1 source, 0 target.

        Returns:
            0-d, from 0 to 1, see `domain_accuracy`; None where that discriminator does not exist, or is another rank's.
        """
        if "domain" not in self.levels or self._own.start > 0:
            return None
        w1, b1, w2, b2, w3, b3 = (each[0] for each in self._stacked)
        with torch.autocast(features.device.type, enabled=False):
            hidden = F.relu(F.linear(features.to(w1.dtype), w1, b1))
            logits = F.linear(F.relu(F.linear(hidden, w2, b2)), w3[None], b3[None])
        return domain_accuracy(logits, domain)

    def _reads_half(self, features: Tensor) -> bool:
        """Return whether there are kernels here that gain by half-precision copies of the matrices."""
        mixed = features.dtype in (torch.float16, torch.bfloat16) and self.w1.dtype == torch.float32
        return mixed and resolve_backend(self.backend, features.device, features.dtype) == "triton"

    @property
    def _stacked(self) -> DiscriminatorWeights:
        return DiscriminatorWeights(self.w1, self.b1, self.w2, self.b2, self.w3, self.b3)

    def _pair_weight(self, features: Tensor, class_probabilities: Tensor, sample_weight: Tensor | None) -> Tensor:
        """Return (N, K): what each sample weighs in each discriminator.

        Never below 0, being made of probabilities; of numbers that are not finite it makes losses that are not, which
        the guard of training names. So the kernels' check of every value is left out, as it is on a GPU.
        """
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        weight = class_probabilities.detach().to(dtype) @ self.class_weights[self._own].to(dtype).T
        if "domain" in self.levels and self._own.start == 0:
            weight[:, 0] = 1  # exactly, which a sum of rounded probabilities is not
        if sample_weight is not None:
            weight = weight * sample_weight.detach().to(dtype).unsqueeze(1)
        return weight

    def _max_pairs(self, num_samples: int, num_source: int | None) -> int | None:
        if num_source is None:
            return None
        return num_source * self._pairs_per_class + (num_samples - num_source) * len(self.w1)


def domain_accuracy(logits: Tensor, domain: Tensor, share: Tensor | None = None) -> Tensor:
    """Return how often discriminators name the domain of a row: 0.5 is chance where the domains are equally large.

    A logit of 0 names the target, so that a discriminator that gives nothing else is at chance.

    Args:
        logits: (N, K), of the source domain. domain: (N,), 1 source, 0 target.
        share: (N, K), what each discriminator counts for in a row, of sum 1; None: all alike.

    Returns:
        0-d float32, or float64 for a share in it, detached.
    """
    right = ((logits.detach() > 0) == (domain > 0.5)[:, None]).to(torch.float32)
    return right.mean() if share is None else (share.detach() * right).sum(1).mean()


def stacked_linear(num: int, out_features: int, in_features: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return parameters of `num` linear layers, each initialised on its own: with its fan-in, not that of the stack."""
    weight, bias = torch.empty(num, out_features, in_features), torch.empty(num, out_features)
    bound = 1 / math.sqrt(in_features)
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)
    return nn.Parameter(weight), nn.Parameter(bias)
