from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gsda_fast import ClassGroups


def division(groups: ClassGroups) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in groups.membership]


@pytest.mark.parametrize(
    ("num_classes", "num_groups", "sizes"),
    [(12, 4, [3, 3, 3, 3]), (10, 3, [4, 3, 3]), (31, 6, [6, 5, 5, 5, 5, 5]), (5, 5, [1] * 5), (7, 1, [7]), (1, 1, [1])],
)
def test_random_groups_divide_the_classes_as_evenly_as_possible(
    num_classes: int, num_groups: int, sizes: list[int]
) -> None:
    groups = ClassGroups.random(num_classes, num_groups, seed=3)
    found = division(groups)
    assert [len(group) for group in found] == sizes
    assert sorted(chain.from_iterable(found)) == list(range(num_classes))
    assert groups.membership.dtype == torch.float32
    assert (groups.num_groups, groups.num_classes, groups.level_sizes) == (num_groups, num_classes, (num_groups,))


# These divisions must never change: results name a seed, and a checkpoint goes on under it.
@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [[0, 3, 8, 9], [1, 5, 7], [2, 4, 6]]),
        (1, [[0, 1, 2, 4], [5, 6, 7], [3, 8, 9]]),
        (2, [[4, 6, 8, 9], [0, 5, 7], [1, 2, 3]]),
    ],
)
def test_random_groups_are_those_of_the_seed(seed: int, expected: list[list[int]]) -> None:
    assert division(ClassGroups.random(10, 3, seed)) == expected


def test_the_order_is_the_argsort_of_raw_philox_numbers() -> None:
    raw = np.random.Philox(7).random_raw(6).tolist()
    order = sorted(range(6), key=raw.__getitem__)
    assert division(ClassGroups.random(6, 2, seed=7)) == [sorted(order[:3]), sorted(order[3:])]


def test_overlapping_memberships_become_shares() -> None:
    groups = ClassGroups([[[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]]])
    third = 1 / 3
    assert_close(groups.membership, torch.tensor([[1, 0.5, 0, third], [0, 0.5, 1, third], [0, 0, 0, third]]))
    assert_close(groups.membership.sum(0), torch.ones(4))
    assert groups.max_groups_per_class == 3
    # What a group gathers below it are the same shares.
    assert_close(groups.shares_below(0), groups.membership)


def test_a_hierarchy_keeps_its_levels_and_who_lies_in_whom() -> None:
    coarse = [[1, 1, 0, 1], [0, 0, 1, 0]]
    fine = [[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]]
    groups = ClassGroups([coarse, fine])
    assert groups.level_sizes == (2, 3)
    assert groups.num_groups == 5
    assert groups.max_groups_per_class == 2
    assert groups.membership.tolist() == coarse + fine
    assert groups.shares_below(0).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert groups.shares_below(1).tolist() == fine


def test_three_levels_nest_pairwise() -> None:
    levels = [[[1, 1, 1, 1]], [[1, 1, 0, 0], [0, 0, 1, 1]], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]]
    groups = ClassGroups(levels)
    assert [groups.shares_below(level).tolist() for level in range(3)] == [
        [[1, 1]],
        [[1, 1, 0], [0, 0, 1]],
        levels[2],
    ]


def test_the_whole_division_travels_in_a_checkpoint() -> None:
    stored, other = ClassGroups.random(10, 3, seed=0), ClassGroups.random(10, 3, seed=1)
    assert not torch.equal(stored.membership, other.membership)
    other.load_state_dict(stored.state_dict())
    assert torch.equal(stored.membership, other.membership)
    assert torch.equal(stored.shares_below(0), other.shares_below(0))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "levels: found none"),
        ([[1, 0]], r"levels\[0\]: found shape \(2,\)"),
        ([[[]]], r"levels\[0\]: found shape \(1, 0\)"),
        ([[[1, 1]], [[1, 1, 1]]], r"levels\[1\]: found shape \(1, 3\)"),
        ([[[1, 2]]], r"levels\[0\]: found 2; expected memberships 0 or 1"),
        ([[[1, 0.5]]], r"levels\[0\]: found 0.5"),
        ([[[1, -1]]], r"levels\[0\]: found -1"),
        ([[[1, 1], [0, 0]]], r"levels\[0\]: found group 1 empty"),
        ([[[1, 0, 1]]], r"levels\[0\]: found class 1 in no group"),
        ([[[1, 1]], [[1, 1], [0, 1]]], r"levels\[1\]: found class 1 in 2 groups"),
        ([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], r"levels\[1\]: found group 1 spread over 2 groups"),
    ],
)
def test_memberships_that_do_not_fit(levels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassGroups(levels)


@pytest.mark.parametrize("num_groups", [0, -1, 5])
def test_a_number_of_groups_that_the_classes_cannot_fill(num_groups: int) -> None:
    with pytest.raises(ValueError, match=f"num_groups: found {num_groups}; expected 1 to 4"):
        ClassGroups.random(4, num_groups, seed=0)
