"""TPN's losses: published digits, literal formulas, absent classes, and the mistakes that codes make."""

import pytest
import torch
from tiny_inputs import gradient, matrix, printed, random
from torch import Tensor
from torch.testing import assert_close

from gsda_fast.losses import class_means, prototype_losses, prototype_pseudo_labels

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SOURCE, LABELS = matrix([0, 0], [2, 0], [0, 2], [0, 4]), torch.tensor([0, 0, 1, 1])
TARGET, PSEUDO = matrix([1, 1], [1, 4], [9, 9]), torch.tensor([0, 1, -1])


def test_published_digits() -> None:
    found = prototype_losses(SOURCE, LABELS, TARGET, PSEUDO, 2)
    assert [printed(each) for each in found] == [0.004623, 2.333333, 0.910491]
    assert printed(sum(found)) == 3.248447  # type: ignore[arg-type]


def literal(
    source: Tensor, labels: Tensor, target: Tensor, pseudo: Tensor, num_classes: int, inner_products: bool = False
) -> list[Tensor]:
    """Loops over classes and rows; classes outside both domains have no part in the general and the task loss."""
    both, all_labels = torch.cat([source, target]), torch.cat([labels, pseudo])
    sets = []
    for rows, classes in ((source, labels), (target, pseudo), (both, all_labels)):
        sets.append({c: rows[classes == c].mean(0) for c in range(num_classes) if (classes == c).any()})
    common = sorted(set(sets[0]) & set(sets[1]))

    def log_probability(row: Tensor, prototypes: dict[int, Tensor], classes: list[int]) -> Tensor:
        if inner_products:
            return torch.stack([row @ prototypes[c] for c in classes]).log_softmax(0)
        return torch.stack([-(row - prototypes[c]).square().sum() for c in classes]).log_softmax(0)

    seen = sorted(sets[0])
    own = [-log_probability(row, sets[0], seen)[seen.index(int(y))] for row, y in zip(source, labels)]
    kept = [row for row, y in zip(both, all_labels) if y >= 0]
    general, task = torch.zeros(()).double(), torch.zeros(()).double()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for c in common:
            general = general + (sets[i][c] - sets[j][c]).square().sum() / len(common)
        for row in kept:
            p, q = (log_probability(row, sets[k], common) for k in (i, j))
            kl = (p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()
            task = task + kl / 2 / len(kept)
    return [torch.stack(own).mean(), general, task]


def test_the_literal_formula_with_absent_classes() -> None:
    source, target = random(7, 3).requires_grad_(), random(6, 3, seed=1).requires_grad_()
    labels, pseudo = torch.tensor([0, 1, 1, 2, 2, 2, 5]), torch.tensor([1, 2, 2, -1, 3, 1])
    found = prototype_losses(source, labels, target, pseudo, 6)
    expected = literal(source, labels, target, pseudo, 6)
    for each, right in zip(found, expected):
        assert_close(each, right, **EXACT)
        for mine, theirs in zip(gradient(each, source, target), gradient(right, source, target)):
            assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    # Through all prototypes: source prototypes score target rows, and move.
    assert (gradient(found.task, source)[0].norm(dim=1) > 0).sum() >= 5
    wrong = literal(source, labels, target, pseudo, 6, inner_products=True)
    assert abs(float(wrong[2] - found.task)) > 0.01


def test_an_unconfident_row_changes_nothing() -> None:
    without = prototype_losses(SOURCE, LABELS, TARGET[:2], PSEUDO[:2], 2)
    assert_close(prototype_losses(SOURCE, LABELS, TARGET, PSEUDO, 2), without, **EXACT)


def test_equal_domains_have_nothing_to_align() -> None:
    found = prototype_losses(SOURCE, LABELS, SOURCE, LABELS, 2)
    assert float(found.general) == pytest.approx(0, abs=1e-14)
    assert float(found.task) == pytest.approx(0, abs=1e-14)
    assert found.supervised > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pseudo", [[-1, -1, -1], [2, 2, -1], [0, -1, -1]])
def test_no_class_in_both_domains(pseudo: list[int], dtype: torch.dtype) -> None:
    source, target = SOURCE.to(dtype).requires_grad_(), TARGET.to(dtype).requires_grad_()
    found = prototype_losses(source, LABELS, target, torch.tensor(pseudo), 4)
    for each in found:
        assert torch.isfinite(each)
        assert all(torch.isfinite(g).all() for g in gradient(each, source, target))
    if pseudo[0] != 0:
        assert found.general == found.task == 0


def test_an_offset_costs_no_digits() -> None:
    near = prototype_losses(SOURCE, LABELS, TARGET, PSEUDO, 2)
    far = prototype_losses((SOURCE + 1000).float(), LABELS, (TARGET + 1000).float(), PSEUDO, 2)
    for a, b in zip(near, far):
        assert_close(b.double(), a, rtol=1e-5, atol=1e-6)
        assert b.dtype == torch.float32


def test_distances_are_a_linear_classifier() -> None:
    """What lets prototypes be written into the model's own classifier."""
    means, f = random(5, 3), random(7, 3, seed=1)
    by_distance = (-(f[:, None] - means).square().sum(2)).softmax(1)
    assert_close((f @ (2 * means).T - means.square().sum(1)).softmax(1), by_distance, rtol=0, atol=1e-12)


def test_pseudo_labels() -> None:
    target = matrix([1, 0], [0, 3], [1.5, 1.5], [9, -9])
    distances = (target[:, None] - matrix([1, 0], [0, 3])).square().sum(2)
    probability, label = (-distances).softmax(1).max(1)
    for threshold in (0.6, 0.999, 0.0):
        expected = [int(y) if p > threshold else -1 for p, y in zip(probability, label)]
        found = prototype_pseudo_labels(SOURCE, LABELS, target, 3, threshold)
        assert found.tolist() == expected
        assert found.dtype == torch.int64
    assert 2 not in prototype_pseudo_labels(SOURCE, LABELS, target, 3, 0.0)  # the class without source rows


def test_class_means() -> None:
    found = class_means(TARGET, torch.tensor([2, 2, -1]), 4)
    assert found.tolist() == [[0, 0], [0, 0], [1, 2.5], [0, 0]]


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"pseudo_labels: found torch.int64 of shape \(2,\); expected integers \(3,\)"):
        prototype_losses(SOURCE, LABELS, TARGET, PSEUDO[:2], 2)
    with pytest.raises(ValueError, match=r"labels: found torch.float32 of shape \(4,\)"):
        class_means(SOURCE, LABELS.float(), 2)
