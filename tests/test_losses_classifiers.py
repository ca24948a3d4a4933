"""MCD's, MDD's and SymNets' losses: published digits, the literal formulas, and the mistakes that codes make."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_inputs import CERTAIN, Z1, Z2, Y, gradient, printed, random
from torch.testing import assert_close

from gsda_fast.losses import (
    classifier_discrepancy,
    margin_disparity,
    symmetric_classifier_loss,
    symmetric_feature_loss,
    uniform_class_prior,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SOURCE, TARGET = torch.cat([Z1, Z2], 1), torch.cat([Z2, CERTAIN], 1)


# --------------------------------------------------------------------------------------------------------------- MCD


def test_published_digits_of_mcd() -> None:
    distance, prior = classifier_discrepancy(Z1, Z2), uniform_class_prior(Z1) + uniform_class_prior(Z2)
    assert printed(distance) == 0.271701
    assert printed(prior) == 2.548425
    # The three updates of a step, heads of source (Z1, Z2) and of target (Z2, CERTAIN).
    source = F.cross_entropy(Z1, Y) + F.cross_entropy(Z2, Y)
    own = source + 0.01 * (uniform_class_prior(Z2) + uniform_class_prior(CERTAIN))
    target = classifier_discrepancy(Z2, CERTAIN)
    assert printed(own) == 1.510382
    assert printed(own - target) == 1.086677
    assert printed(target) == 0.423705


def test_discrepancy_is_a_mean_over_classes_of_probabilities() -> None:
    a, b = random(5, 4), random(5, 4, seed=1)
    p, q = a.softmax(1).tolist(), b.softmax(1).tolist()
    literal = sum(abs(x - y) for left, right in zip(p, q) for x, y in zip(left, right)) / 20
    found = classifier_discrepancy(a, b)
    assert_close(float(found), literal, **EXACT)
    for wrong in (4 * literal, float((a - b).abs().mean())):  # a sum over classes; logits for probabilities
        assert abs(wrong - literal) > 0.1
    offset = random(5, 1, seed=2)
    assert_close(classifier_discrepancy(a + offset, b), found, **EXACT)
    assert float(classifier_discrepancy(500 * a, -500 * a)) == pytest.approx(2 / 4)  # the largest there is


def test_equal_classifiers_stay_equal() -> None:
    a = random(5, 4).requires_grad_()
    b = a.detach().clone().requires_grad_()
    value = classifier_discrepancy(a, b)
    assert value == 0
    assert all(not each.any() for each in gradient(value, a, b))


def test_uniform_prior_is_least_for_equally_many() -> None:
    assert printed(uniform_class_prior(50 * torch.eye(3, dtype=torch.float64))) == pytest.approx(math.log(3), abs=1e-5)
    assert uniform_class_prior(Z1) > math.log(3)
    one_class = torch.tensor([[1e3, 0.0, 0.0]], requires_grad=True)
    value = uniform_class_prior(one_class)
    assert float(value.detach()) == pytest.approx(-2 / 3 * math.log(1e-6), rel=1e-5)
    assert torch.isfinite(gradient(value, one_class)[0]).all()


# --------------------------------------------------------------------------------------------------------------- MDD


def test_published_digits_of_mdd() -> None:
    assert printed(margin_disparity(Z1, Z2, Z2, CERTAIN, 4)) == 4.632385


def test_margin_disparity_is_the_literal_formula() -> None:
    zs, vs, zt, vt = (random(n, 4, seed=n) for n in (5, 6, 7, 8))
    vs, vt = vs[:5], vt[:7]
    ys, yt = zs.argmax(1), zt.argmax(1)
    literal = 3 * -vs.log_softmax(1)[torch.arange(5), ys].mean()
    literal = literal - (1 - vt.softmax(1)[torch.arange(7), yt]).log().mean()
    assert_close(margin_disparity(zs, vs, zt, vt, 3), literal, **EXACT)
    # An (N, N) matrix of all pairs, whose mean is another number.
    pairs = 3 * F.cross_entropy(vs, ys) - (1 - vt.softmax(1)[:, yt]).log().mean()
    assert abs(float(pairs - literal)) > 0.01


def test_margin_disparity_of_a_certain_adversary() -> None:
    """1 - p rounds to 0 already at 40 in float64: the logarithm of the difference is -inf there."""
    r, gap = 5, 60.0
    main = torch.zeros(1, r, dtype=torch.float64)
    main[0, 2] = 1
    adversary = (gap * F.one_hot(torch.tensor([2]), r).double()).requires_grad_()
    value = margin_disparity(main, main, main, adversary, 0)
    assert_close(float(value), gap - math.log(r - 1), **EXACT)
    assert torch.isinf((1 - adversary.softmax(1)[0, 2]).log())
    assert_close(gradient(value, adversary)[0], torch.tensor([[-0.25, -0.25, 1, -0.25, -0.25]]).double(), **EXACT)


def test_margin_disparity_moves_the_adversary_alone() -> None:
    tensors = [random(4, 3, seed=i).requires_grad_() for i in range(4)]
    gradients = gradient(margin_disparity(*tensors, margin=2), *tensors)
    assert [bool(each.any()) for each in gradients] == [False, True, False, True]


# ----------------------------------------------------------------------------------------------------------- SymNets


def test_published_digits_of_symnets() -> None:
    assert printed(symmetric_classifier_loss(SOURCE, Y, TARGET)) == 2.162064
    assert printed(symmetric_feature_loss(SOURCE, Y, TARGET, 0.5)) == 2.328173


def test_symmetric_losses_are_the_literal_formulas() -> None:
    zs, zt, y = random(5, 8), random(6, 8, seed=1), torch.tensor([3, 0, 1, 1, 2])
    ps, pt, rows = zs.softmax(1), zt.softmax(1), torch.arange(5)
    supervised = F.cross_entropy(zs[:, :4], y) + F.cross_entropy(zs[:, 4:], y)
    classifiers = supervised - ps[:, :4].sum(1).log().mean() - pt[:, 4:].sum(1).log().mean()
    assert_close(symmetric_classifier_loss(zs, y, zt), classifiers, **EXACT)
    category = -(ps[rows, y].log().mean() + ps[rows, y + 4].log().mean()) / 2
    domain = -(pt[:, :4].sum(1).log().mean() + pt[:, 4:].sum(1).log().mean()) / 2
    q = pt[:, :4] + pt[:, 4:]
    entropy = -(q * q.log()).sum(1).mean()
    assert_close(symmetric_feature_loss(zs, y, zt, 0.3), category + 0.3 * (domain + entropy), **EXACT)
    # Each half's own softmax, added and not halved, as a peer has the category loss.
    peers = F.cross_entropy(zs[:, :4], y) + F.cross_entropy(zs[:, 4:], y)
    assert abs(float(peers - category)) > 0.1
    # The source's rows do not confuse the domains.
    assert_close(symmetric_feature_loss(zs, y, zt, 0.0), category, **EXACT)


def test_halves_that_are_equal() -> None:
    zt = torch.cat([Z1, Z1], 1)
    domain_and_entropy = symmetric_feature_loss(SOURCE, Y, zt, 1.0) - symmetric_feature_loss(SOURCE, Y, zt, 0.0)
    p = Z1.softmax(1)
    assert_close(domain_and_entropy, math.log(2) - (p * p.log()).sum(1).mean(), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_half_without_probability(dtype: torch.dtype) -> None:
    """-log S = 200 - log 2 where S itself is 0 in float32."""
    z = torch.tensor([[0.0, 0.0, 200.0, 0.0]], dtype=dtype, requires_grad=True)
    y = torch.tensor([0])
    value = symmetric_classifier_loss(z, y, z)
    # + CE of the halves log 2 and 200, and -log T of 0.
    assert float(value) == pytest.approx(199.306853 + math.log(2) + 0.0, rel=1e-6)
    moved = symmetric_feature_loss(z, y, z, 1.0)
    assert torch.isfinite(moved)
    for each in (value, moved):
        assert torch.isfinite(gradient(each, z)[0]).all()
    assert torch.isinf(z.softmax(1)[:, :2].sum().float().log())


def test_arguments_that_do_not_fit() -> None:
    z = random(2, 6)
    with pytest.raises(ValueError, match="source_logits: found 5 columns; expected an even number"):
        symmetric_classifier_loss(z[:, :5], Y, z)
    with pytest.raises(ValueError, match=r"labels: found torch.int64 of shape \(3,\); expected integers \(2,\)"):
        symmetric_feature_loss(z, torch.tensor([0, 1, 1]), z, 1.0)
    with pytest.raises(ValueError, match=r"logits_b: found shape \(2, 3\); expected \(2, 6\)"):
        classifier_discrepancy(z, Z1)
    with pytest.raises(ValueError, match=r"target_adversarial: found shape \(1, 6\); expected \(2, 6\)"):
        margin_disparity(z, z, z, z[:1], 1.0)
