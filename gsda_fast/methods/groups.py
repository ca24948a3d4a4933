"""Groups of classes: the middle levels of the hierarchy (Hu et al., CVPR 2020, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class ClassGroups(nn.Module):
    """Memberships of r classes in groups, on one level or on several, coarse to fine.

    A module, so that its constant matrices follow the discriminators to their device and into checkpoints.

    Args:
        levels: one 0/1 matrix (b_l, r) a level, coarse to fine. Every class lies in a group of each level. A single
            level may overlap: a class's memberships are then divided by their number. Several levels may not overlap,
            and each group lies inside exactly one group of the level above.

    Attributes:
        membership: (b, r) float32, all levels' rows stacked; each level's columns sum to 1.

    Raises:
        ValueError: a membership that is not 0/1, an empty group, a class outside a level, levels that do not nest.

    Examples:
        >>> ClassGroups([[[1, 1, 0, 0], [0, 0, 1, 1]]]).num_groups
        2
    """

    membership: Tensor

    def __init__(self, levels: Sequence[Any]) -> None:
        super().__init__()
        if not len(levels):
            raise ValueError("levels: found none; expected at least one (groups, classes) matrix")
        arrays = [np.asarray(level) for level in levels]
        for index, array in enumerate(arrays):
            _check_level(index, array, arrays[0].shape[-1], may_overlap=len(arrays) == 1)
        fractions = [array / array.sum(axis=0, keepdims=True) for array in arrays]
        self.num_classes = int(arrays[0].shape[1])
        self.level_sizes = tuple(len(array) for array in arrays)
        self.register_buffer("membership", torch.tensor(np.concatenate(fractions), dtype=torch.float32))
        # Row q of matrix l holds the shares in which group q of level l gathers the level below it; classes come last.
        below = [_nesting(index, coarse, fine) for index, (coarse, fine) in enumerate(pairwise(arrays))]
        for index, matrix in enumerate([*below, fractions[-1]]):
            self.register_buffer(f"_shares_below_{index}", torch.tensor(matrix, dtype=torch.float32))

    @classmethod
    def random(cls, num_classes: int, num_groups: int, seed: int) -> ClassGroups:
        """Return a random division into `num_groups` groups without overlap, as equal in size as possible.

        The order is the stable argsort of raw Philox numbers, which numpy promises to keep across versions.

        Raises:
            ValueError: `num_groups` outside 1 .. `num_classes`.
        """
        if not 1 <= num_groups <= num_classes:
            raise ValueError(f"num_groups: found {num_groups}; expected 1 to {num_classes}, the number of classes")
        order = np.argsort(np.random.Philox(seed).random_raw(num_classes), kind="stable")
        membership = np.zeros((num_groups, num_classes), dtype=np.int64)
        for group, classes in enumerate(np.array_split(order, num_groups)):
            membership[group, classes] = 1
        return cls([membership])

    @property
    def num_groups(self) -> int:
        """Groups of all levels together."""
        return sum(self.level_sizes)

    @property
    def max_groups_per_class(self) -> int:
        """The largest number of groups, over all levels, that one class belongs to."""
        return int((self.membership > 0).sum(0).max())

    def shares_below(self, level: int) -> Tensor:
        """Return (b_level, b_(level+1)), or (b_level, r) for the finest: each group's share in what lies below it."""
        return self.get_buffer(f"_shares_below_{level}")


def _check_level(index: int, array: np.ndarray, num_classes: int, may_overlap: bool) -> None:
    name = f"levels[{index}]"
    if array.ndim != 2 or 0 in array.shape or array.shape[1] != num_classes:
        raise ValueError(
            f"{name}: found shape {array.shape}; expected (groups, classes) with as many classes throughout"
        )
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name}: found {array[~np.isin(array, (0, 1))][0]}; expected memberships 0 or 1")
    if not array.any(axis=1).all():
        raise ValueError(
            f"{name}: found group {int(np.argmin(array.any(axis=1)))} empty; expected a class in each group"
        )
    counts = array.sum(axis=0)
    if (counts == 0).any():
        raise ValueError(f"{name}: found class {int(np.argmin(counts))} in no group; expected every class in a group")
    if not may_overlap and (counts > 1).any():
        raise ValueError(
            f"{name}: found class {int(np.argmax(counts))} in {counts.max()} groups; expected one group a class "
            "where there are several levels"
        )


def _nesting(index: int, coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Return (coarse groups, fine groups), 1 where the fine group lies inside the coarse one."""
    shared = coarse @ fine.T
    parents = (shared > 0).sum(axis=0)
    if (parents != 1).any():
        raise ValueError(
            f"levels[{index + 1}]: found group {int(np.argmax(parents))} spread over {parents.max()} groups of "
            f"levels[{index}]; expected each group inside exactly one coarser group"
        )
    return (shared > 0).astype(np.float64)
