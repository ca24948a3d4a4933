"""Discriminators divided over the ranks: each one owned, with its gradients, momentum and update, by a single rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gsda_kernels import AdversarialTerms


class AdversarialRows(NamedTuple):
    """What discriminators see of a batch; of their `forward` the first arguments.

    Attributes:
        features: (N, D). class_probabilities: (N, r), constants. domain: (N,), 1 source, 0 target.
        num_source: rows of the source. sample_weight: (N,), constants, or None.
    """

    features: Tensor
    class_probabilities: Tensor
    domain: Tensor
    num_source: int
    sample_weight: Tensor | None


class Collectives(Protocol):
    """What a division asks of the ranks: see `gsda_fast.training.distributed.Ranks`."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_gather(self, tensor: Tensor) -> list[Tensor]: ...
    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor: ...


class Division:
    """Who owns which of K discriminators, and what the owners tell each other.

    A rank computes the terms of its own discriminators over the rows of all ranks, so that they are those of the whole
    batch, and so are the gradients to the parameters. Owners tell each other K losses and K gradient magnitudes, and
    every rank sums up what all of them make of its own features' gradient.

    Args:
        costs: (K,), what each discriminator costs. ranks: the processes.

    Attributes:
        own: which ones this rank owns. num_parts: K.

    Raises:
        ValueError: more ranks than discriminators.
    """

    def __init__(self, costs: Sequence[float], ranks: Collectives) -> None:
        self._ranks = ranks
        self._shares = balanced_shares(costs, ranks.world_size)
        self.own = self._shares[ranks.rank]
        self.num_parts = len(costs)

    def everyone(self, rows: AdversarialRows) -> AdversarialRows:
        """Return the rows of all ranks, in rank order; the same number of either domain comes from each.

        The gradient to the features is the sum over the owners, times the number of ranks, over which the gradients to
        the network's parameters are averaged.
        """
        world_size = self._ranks.world_size
        given = (rows.features, rows.class_probabilities, rows.sample_weight)
        constants = [each.detach() for each in given if each is not None]
        # One collective, whatever their dtypes.
        as_bytes = [each.reshape(len(each), -1).contiguous().view(torch.uint8) for each in constants]
        gathered = torch.cat(self._ranks.all_gather(torch.cat(as_bytes, dim=1)))
        pieces = gathered.split([each.shape[1] for each in as_bytes], dim=1)
        features, probabilities, *weight = (
            piece.contiguous().view(each.dtype).reshape(-1, *each.shape[1:]) for piece, each in zip(pieces, constants)
        )
        return AdversarialRows(
            _Everyone.apply(rows.features, features, self._ranks),
            probabilities,
            rows.domain.repeat(world_size),
            rows.num_source * world_size,
            weight[0] if weight else None,
        )

    def terms(self, own: AdversarialTerms) -> AdversarialTerms:
        """Return the terms of all K discriminators. Only a rank's own ones carry a gradient, which stays with it."""
        loss, gradient_norm = _AllTerms.apply(torch.stack(own), self)
        return AdversarialTerms(loss, gradient_norm)

    def of_owner(self, value: Tensor | None, like: Tensor) -> Tensor:
        """Return what a single rank has, 0-d, as a number whose mean over the ranks is the value.

        Args:
            value: None on all other ranks. like: of the wanted device.
        """
        return torch.zeros((), device=like.device) if value is None else self._ranks.world_size * value

    def whole(self, own: Tensor, dim: int = 0) -> Tensor:
        """Return what the owners hold, put together along a dimension: (K_own, ...) -> (K, ...), detached."""
        sizes = [share.stop - share.start for share in self._shares]
        # As large as the largest, since not every library gathers what is of different sizes.
        shape = list(own.shape)
        shape[dim] = max(sizes)
        padded = own.new_zeros(shape)
        padded.narrow(dim, 0, own.shape[dim]).copy_(own.detach())
        parts = self._ranks.all_gather(padded)
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes)], dim)


def balanced_shares(costs: Sequence[float], world_size: int) -> list[slice]:
    """Divide K neighbours into one share a rank, none empty, each within one neighbour's cost of the mean.

    Args:
        costs: (K,), > 0.

    Raises:
        ValueError: fewer than `world_size` of them.
    """
    if len(costs) < world_size:
        raise ValueError(f"costs: found {len(costs)}; expected at least {world_size}, one for each rank")
    before = [0.0, *accumulate(costs)]
    bounds = [0]
    for rank in range(1, world_size):
        ideal = before[-1] * rank / world_size
        possible = range(bounds[-1] + 1, len(costs) - (world_size - rank) + 1)
        bounds.append(min(possible, key=lambda bound: abs(before[bound] - ideal)))
    return [slice(start, stop) for start, stop in pairwise([*bounds, len(costs)])]


class _Everyone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, everyone: Tensor, ranks: Collectives) -> Tensor:
        ctx.ranks = ranks
        return everyone.view_as(everyone)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        # Half precision has too few digits for a sum over ranks.
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        parts = [part.contiguous() for part in wide.chunk(ctx.ranks.world_size)]
        return (ctx.ranks.world_size * ctx.ranks.reduce_scatter(parts)).to(gradient.dtype), None, None


class _AllTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, division: Division) -> tuple[Tensor, Tensor]:
        ctx.own = division.own
        loss, gradient_norm = division.whole(own, dim=1).unbind()
        return loss, gradient_norm

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.stack([gradient[ctx.own] for gradient in gradients]), None
