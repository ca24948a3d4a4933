"""Entropy, class confusion, nuclear norm: published digits, literal formulas, and the mistakes that codes make."""

import math

import pytest
import torch
from tiny_inputs import CERTAIN, LOGITS, Z1, Z2, gradient, printed, random
from torch import Tensor
from torch.testing import assert_close

from gsda_fast.losses import entropy, minimum_class_confusion, nuclear_norm
from gsda_fast.losses.predictions import polar_factor

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def test_published_digits() -> None:
    assert printed(entropy(LOGITS[3:])) == 0.445048
    assert printed(minimum_class_confusion(Z1, 1.0)) == 0.550926
    assert printed(minimum_class_confusion(Z1)) == 0.644671
    assert printed(nuclear_norm(Z1)) == -0.734682
    assert printed(nuclear_norm(Z2) - nuclear_norm(Z1)) == 0.172025  # the critic's gap of NWD
    logits = Z1.clone().requires_grad_()
    assert printed(gradient(minimum_class_confusion(logits), logits)[0][0]) == [-0.015545, 0.013096, 0.002449]


# ------------------------------------------------------------------------------------------------------------- entropy


def test_entropy_is_a_mean_over_rows_of_one_softmax() -> None:
    logits = 2 * random(5, 4)
    p = logits.softmax(1)
    literal = -(p * p.log()).sum() / 5
    assert_close(entropy(logits), literal, **EXACT)
    twice = p.softmax(1)
    assert abs(float(-(twice * twice.log()).sum() / 5 - literal)) > 0.1
    of_mean = p.mean(0)
    assert abs(float(-(of_mean * of_mean.log()).sum() - literal)) > 0.1


def test_entropy_of_uniform_and_certain_predictions() -> None:
    assert_close(float(entropy(torch.full((3, 7), 5.0))), math.log(7), rtol=1e-6, atol=0)
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = entropy(logits)
    assert float(value.detach()) == 0
    assert torch.isfinite(gradient(value, logits)[0]).all()


# ----------------------------------------------------------------------------------------------------------- confusion


def literal_confusion(logits: Tensor, temperature: float, held: bool = True, sign: float = -1) -> Tensor:
    p = (logits / temperature).softmax(1)
    weight = 1 + (sign * -(p * p.log()).sum(1)).exp()
    weight = len(p) * weight / weight.sum()
    weight = weight.detach() if held else weight
    matrix = p.T @ (weight[:, None] * p)
    normalised = matrix / matrix.sum(1, keepdim=True)
    return (normalised.sum() - normalised.trace()) / len(matrix)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_confusion_is_the_literal_formula(temperature: float) -> None:
    logits = (3 * random(6, 4)).requires_grad_()
    found, literal = minimum_class_confusion(logits, temperature), literal_confusion(logits, temperature)
    assert_close(found, literal, **EXACT)
    assert_close(gradient(found, logits)[0], gradient(literal, logits)[0], rtol=1e-9, atol=1e-11)
    assert abs(float(literal_confusion(logits, temperature, sign=1) - literal)) > 1e-3
    free = gradient(literal_confusion(logits, temperature, held=False), logits)[0]
    assert (free - gradient(found, logits)[0]).abs().max() > 1e-4


def test_confusion_of_uniform_and_of_certain_predictions() -> None:
    assert_close(float(minimum_class_confusion(torch.zeros(3, 5))), 1 - 1 / 5)
    certain = 300 * torch.eye(4)
    assert float(minimum_class_confusion(certain)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_classes_that_nobody_predicts(dtype: torch.dtype) -> None:
    """Probabilities of 0: the literal formula is 0/0 there."""
    logits = torch.tensor([[400.0, 0.0, 0.0], [400.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    value = minimum_class_confusion(logits, 1.0)
    assert float(value.detach()) == pytest.approx(2 / 3)  # two of three rows of the matrix lie at the wrong class
    assert torch.isfinite(gradient(value, logits)[0]).all()
    assert torch.isnan(literal_confusion(logits.float(), 1.0))


def test_confusion_refuses_a_temperature_of_0() -> None:
    with pytest.raises(ValueError, match="temperature: found 0; expected a number above 0"):
        minimum_class_confusion(Z1, 0)


# -------------------------------------------------------------------------------------------------------- nuclear norm


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (36, 12), (1, 5), (2, 2)])
def test_nuclear_norm_is_that_of_the_decomposition(shape: tuple[int, int]) -> None:
    logits = (3 * random(*shape)).requires_grad_()
    exact = -torch.linalg.svdvals(logits.softmax(1)).sum() / shape[0]
    found = nuclear_norm(logits)
    assert_close(found, exact, rtol=1e-9, atol=1e-12)
    assert_close(gradient(found, logits)[0], gradient(exact, logits)[0], rtol=1e-6, atol=1e-9)
    smaller_side = -torch.linalg.svdvals(logits.softmax(1)).sum() / min(shape)
    assert shape[0] <= shape[1] or abs(float(smaller_side - exact)) > 0.05


def test_nuclear_norm_bounds_and_equal_rows() -> None:
    assert float(nuclear_norm(300 * torch.eye(4))) == pytest.approx(-1)
    logits = torch.zeros(8, 4, requires_grad=True)
    value = nuclear_norm(logits)  # rank one, every other singular value 0
    assert float(value.detach()) == pytest.approx(-math.sqrt(8 / 4) / 8)
    assert torch.isfinite(gradient(value, logits)[0]).all()
    assert printed(nuclear_norm(CERTAIN)) < printed(nuclear_norm(Z1))  # type: ignore[operator]


def test_polar_factor_of_zeros_is_zeros() -> None:
    assert not polar_factor(torch.zeros(3, 2)).any()
    rotation = torch.linalg.qr(random(4, 4))[0]
    assert_close(polar_factor(5 * rotation), rotation, **EXACT)
