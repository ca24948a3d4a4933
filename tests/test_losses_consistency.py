"""Losses of two views: published digits, literal formulas, and the mistakes that codes make."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_inputs import CERTAIN, Z1, gradient, printed, random
from torch import Tensor
from torch.testing import assert_close

from gsda_fast.losses import class_balance, confident_cross_entropy, confident_rows, consistency

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def test_published_digits() -> None:
    assert printed(consistency(Z1, CERTAIN, 0.96)) == 0.034379
    assert confident_rows(CERTAIN, 0.96).tolist() == [1, 1]
    assert confident_rows(CERTAIN, 0.97).tolist() == [0, 1]
    assert printed(confident_cross_entropy(Z1, CERTAIN, 0.97)) == 0.119772
    # 2.188978 has 1e-6 inside both logarithms; without it:
    m = Z1.softmax(1).mean(0)
    assert printed(-((m + 1e-6).log() / 3 + 2 / 3 * (1 - m + 1e-6).log()).sum()) == 2.188978
    assert printed(class_balance(Z1, 1.0)) == 2.188986


def test_consistency_is_the_literal_formula() -> None:
    student, teacher = random(6, 4), (3 * random(6, 4, seed=1))
    p, q = student.softmax(1), teacher.softmax(1)
    kept = q.max(1).values > 0.7
    assert 0 < kept.sum() < 6
    each = (p - q).square()
    right = (each.mean(1) * kept).mean()
    found = consistency(student, teacher, 0.7)
    assert_close(found, right, **EXACT)
    wrongs = {
        "sum over classes": (each.sum(1) * kept).mean(),
        "mean over the kept": each.mean(1)[kept].mean(),
        "softmax twice": ((p.softmax(1) - q.softmax(1)).square().mean(1) * kept).mean(),
        "student's confidence": (each.mean(1) * (p.max(1).values > 0.7)).mean(),
    }
    for name, wrong in wrongs.items():
        assert abs(float(wrong - right)) > 1e-3, name


def test_only_the_student_moves() -> None:
    for loss in (consistency, confident_cross_entropy):
        student, teacher = random(5, 3).requires_grad_(), (4 * random(5, 3, seed=1)).requires_grad_()
        moved, held = gradient(loss(student, teacher, 0.5), student, teacher)
        assert moved.abs().max() > 1e-3
        assert not held.any()


def test_nothing_exceeds_certainty() -> None:
    student = random(3, 4).requires_grad_()
    certain = 1000 * torch.eye(4)[:3].double()
    for loss in (consistency, confident_cross_entropy):
        value = loss(student, certain, 1.0)
        assert float(value.detach()) == 0
        assert not gradient(value, student)[0].any()
    assert consistency(certain, certain, 0.9) == 0


def literal_balance(logits: Tensor, kept: float) -> Tensor:
    m, r = logits.softmax(1).mean(0), logits.shape[1]
    return -kept * (m.log() / r + (1 - 1 / r) * (1 - m).log()).sum()


def test_class_balance_is_the_literal_formula() -> None:
    logits = random(5, 4).requires_grad_()
    found, right = class_balance(logits, 0.6), literal_balance(logits, 0.6)
    assert_close(found, right, **EXACT)
    assert_close(gradient(found, logits)[0], gradient(right, logits)[0], **EXACT)
    assert_close(class_balance(logits, torch.tensor(0.6, dtype=torch.float64)), right, **EXACT)
    m = logits.softmax(1).mean(0)
    one_sided = -0.6 * m.log().sum()
    wrong_sign = -0.6 * (m.log() / 4 + 3 / 4 * (1 + m).log()).sum()
    assert min(abs(float(one_sided - right)), abs(float(wrong_sign - right))) > 0.1
    uniform = class_balance(torch.zeros(2, 4), 1.0)
    assert float(uniform) == pytest.approx(math.log(4) + 3 * math.log(4 / 3))
    assert found / 0.6 > uniform


def test_class_balance_of_a_collapsed_prediction() -> None:
    """One class alone, beyond what float32 can tell from 1: a finite loss that still pulls."""
    logits = torch.tensor([[200.0, 0.0, 0.0]] * 2, requires_grad=True)
    value = class_balance(logits, 1.0)
    assert torch.isinf(literal_balance(logits, 1.0))
    assert float(value.detach()) == pytest.approx(200 * 4 / 3, rel=0.01)
    (pull,) = gradient(value, logits)
    assert torch.isfinite(pull).all()
    assert (pull[:, 0] > 0.1).all()


def test_fixmatch_is_the_literal_formula() -> None:
    strong, weak = random(6, 4), 3 * random(6, 4, seed=1)
    probability, label = weak.softmax(1).max(1)
    each = F.cross_entropy(strong, label, reduction="none") * (probability > 0.7)
    assert_close(confident_cross_entropy(strong, weak, 0.7), each.mean(), **EXACT)
    assert abs(float(each.sum() / (probability > 0.7).sum() - each.mean())) > 0.01


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"teacher_logits: found shape \(1, 3\); expected \(2, 3\)"):
        consistency(Z1, Z1[:1], 0.5)
    with pytest.raises(ValueError, match=r"weak_logits: found shape \(2, 2\); expected \(2, 3\)"):
        confident_cross_entropy(Z1, Z1[:, :2], 0.5)
    with pytest.raises(ValueError, match="found 1 column; expected at least two classes"):
        class_balance(Z1[:, :1], 1.0)
