"""Norms and singular values: published digits, literal formulas, and the mistakes that codes make."""

import pytest
import torch
from tiny_inputs import F1, F2, gradient, printed, random
from torch.testing import assert_close

from gsda_fast.losses import hard_feature_norm, spectral_penalty, stepwise_feature_norm

EXACT = {"rtol": 1e-10, "atol": 1e-12}


# ------------------------------------------------------------------------------------------------------- HAFN and SAFN


def test_published_digits_of_feature_norms() -> None:
    at_radius = torch.tensor([[0.0, 5.0]], dtype=torch.float64)
    assert printed(hard_feature_norm(F1, at_radius, 5)) == 5.444444
    features = F1.clone().requires_grad_()
    (found,) = gradient(stepwise_feature_norm(features, 1), features)
    assert printed(found) == [[-0.4, -0.533333], [0, -0.666667], [-0.666667, 0]]


def test_hard_norm_squares_the_gap_of_the_mean() -> None:
    source, target = random(5, 3), random(4, 3, seed=1)
    norms = [x.square().sum(1).sqrt() for x in (source, target)]
    right = sum((each.mean() - 2) ** 2 for each in norms)
    assert_close(hard_feature_norm(source, target, 2), right, **EXACT)
    per_sample = sum(((each - 2) ** 2).mean() for each in norms)
    assert abs(float(per_sample - right)) > 0.1
    assert float(((torch.tensor([5.0, 2, 1]) - 5) ** 2).mean()) == pytest.approx(8.333333)  # what F1 would have


def test_stepwise_norm_cannot_be_lowered() -> None:
    """A radius that is not held makes a constant without gradient; a loss that falls is another loss."""
    features = random(6, 3).requires_grad_()
    for scale in (1, 0.1, 10):
        assert float(stepwise_feature_norm(scale * features.detach(), 0.7)) == pytest.approx(0.49)
    (found,) = gradient(stepwise_feature_norm(features, 0.7), features)
    assert_close(found, -2 * 0.7 * features / (6 * features.norm(dim=1, keepdim=True)), **EXACT)
    norms = features.norm(dim=1)
    not_held = (norms - (norms + 0.7)).square().mean()
    assert gradient(not_held, features)[0].abs().max() < 1e-12


def test_rows_of_zeros_have_no_direction() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    for value in (stepwise_feature_norm(features, 1.0), hard_feature_norm(features, features, 25.0)):
        (found,) = gradient(value, features)
        assert found[0].tolist() == [0, 0]
        assert found[1].abs().min() > 0
        assert torch.isfinite(found).all()
    naive = features.square().sum(1).sqrt().sum()
    assert torch.isnan(gradient(naive, features)[0][0]).all()


# ----------------------------------------------------------------------------------------------------------------- BSP


def test_published_digits_of_the_spectral_penalty() -> None:
    assert printed(spectral_penalty(F1)) == 28
    assert printed(spectral_penalty(F2)) == 5.302776
    features = F1.clone().requires_grad_()
    (found,) = gradient(spectral_penalty(features), features)
    assert printed(found) == [[5.538462, 8.307692], [1.846154, 2.769231], [0.615385, 0.923077]]


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (36, 256), (1, 4), (4, 1)])
@pytest.mark.parametrize("k", [1, 3])
def test_value_and_gradient_are_those_of_the_decomposition(shape: tuple[int, int], k: int) -> None:
    k = min(k, *shape)
    features = random(*shape).requires_grad_()
    # Singular values a twentieth apart: what is drawn may be closer than the power steps can tell.
    u, _, vh = torch.linalg.svd(features.detach(), full_matrices=False)
    values = 3 * 0.95 ** torch.arange(min(shape), dtype=torch.float64)
    features = ((u * values) @ vh).requires_grad_()
    exact = torch.linalg.svdvals(features)[:k].square().sum()
    found = spectral_penalty(features, k)
    assert_close(found, exact, **EXACT)
    assert_close(gradient(found, features)[0], gradient(exact, features)[0], rtol=1e-8, atol=1e-8)


def test_values_that_nearly_repeat() -> None:
    """Random signed features: the largest value is exact to a few parts in a million, whichever vector is found."""
    for seed in range(5):
        features = random(36, 256, seed=seed, dtype=torch.float32)
        exact = torch.linalg.svdvals(features.double())[0] ** 2
        assert float(spectral_penalty(features)) == pytest.approx(float(exact), rel=1e-4)
        assert float(spectral_penalty(features)) <= float(exact) * (1 + 1e-6)


def test_repeated_values_have_a_finite_gradient() -> None:
    features = torch.eye(4, requires_grad=True)
    value = spectral_penalty(features)
    assert float(value) == pytest.approx(1)
    (found,) = gradient(value, features)
    assert float(found.norm()) == pytest.approx(2)
    assert torch.isfinite(found).all()
    assert float(spectral_penalty(torch.eye(4), 4)) == pytest.approx(4)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-15, 1e15])
def test_rank_one_zeros_and_extreme_scales(scale: float) -> None:
    features = (scale * torch.ones(5, 3)).requires_grad_()
    value = spectral_penalty(features, 2)
    assert float(value) == pytest.approx(15 * scale**2, rel=1e-5, abs=1e-45)
    assert torch.isfinite(gradient(value, features)[0]).all()


def test_features_orthogonal_to_their_mean() -> None:
    """Centred features: power steps from the mean row would start, and stay, at nothing."""
    features = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert float(spectral_penalty(features)) == pytest.approx(18)


def test_grows_with_the_rows_and_each_domain_stands_alone() -> None:
    whole = spectral_penalty(F1)
    assert_close(spectral_penalty(torch.cat([F1, F1])), 2 * whole, **EXACT)
    apart = whole + spectral_penalty(F2)
    assert printed(apart) == 33.302776
    assert abs(float(spectral_penalty(torch.cat([F1, F2])) - apart)) > 1
    # Halves of a batch, as two processes have them, are not the whole: gather the rows first.
    assert spectral_penalty(F1[:2]) + spectral_penalty(F1[2:]) > whole + 0.1
    centred = spectral_penalty(F1 - F1.mean(0))
    assert abs(float(centred - whole)) > 1


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    features = F1.clone()
    features[0, 0] = torch.nan
    assert torch.isnan(spectral_penalty(features))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="k: found 3; expected 1 to 2, the smaller side"):
        spectral_penalty(F1, 3)
    with pytest.raises(ValueError, match=r"target: found shape \(3, 1\); expected \(N > 0, 2\)"):
        hard_feature_norm(F1, F1[:, :1], 25)
    with pytest.raises(ValueError, match=r"features: found shape \(0, 2\)"):
        stepwise_feature_norm(F1[:0], 1)
