"""CDAN's map and weights, and the discriminators' loss: published digits, literal formulas, mistakes of codes."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_inputs import F1, FEATURES, LOGITS, Z1, Z2, gradient, matrix, printed, random
from torch import Tensor
from torch.testing import assert_close

from gsda_fast.losses import domain_loss, entropy_weights, multilinear_map, randomised_map

EXACT = {"rtol": 1e-10, "atol": 1e-12}
BOTH = torch.cat([Z1, Z2])
DOMAIN_LOGITS = torch.tensor([0.5, -1, 2, 0], dtype=torch.float64)


def test_published_digits() -> None:
    first = [1.995723, 2.660964, 0.734185, 0.978914, 0.270092, 0.360122]
    assert printed(multilinear_map(F1[:2], Z1.softmax(1))[0]) == first
    assert printed(entropy_weights(BOTH, 2)) == [0.973220, 1.026780, 0.987279, 1.012721]
    assert printed(entropy_weights(BOTH, 2, "joint")) == [1.000246, 1.055293, 0.959862, 0.984598]
    assert printed(domain_loss(DOMAIN_LOGITS, 2)) == 1.151853
    assert printed(domain_loss(DOMAIN_LOGITS, 2, entropy_weights(BOTH, 2))) == 1.152912
    assert printed(domain_loss(DOMAIN_LOGITS, 2, entropy_weights(BOTH, 2, "joint"))) == 1.146025
    # ADDA: the discriminator's loss, and the mapping's, with all target rows in the source's place.
    source, target = torch.tensor([1, -0.5]).double(), torch.tensor([0.25, 2]).double()
    assert printed(domain_loss(torch.cat([source, target]), 2)) == 1.060052
    assert printed(domain_loss(target, 2)) == 0.351434


def test_published_gradient_through_the_weights() -> None:
    """Reversed, as the features' is: encoder and classifier ascend the discriminator's loss."""
    logits = BOTH.clone().requires_grad_()
    (found,) = gradient(-domain_loss(DOMAIN_LOGITS, 2, entropy_weights(logits, 2)), logits)
    assert printed(found[0]) == [-0.009881, 0.004922, 0.004959]
    assert printed(found[2]) == [0.017552, -0.035104, 0.017552]


def test_map_is_the_outer_product_class_by_class() -> None:
    f, p = random(4, 3), random(4, 5, seed=1).softmax(1)
    found = multilinear_map(f, p)
    literal = [[p[i, k] * f[i, j] for k in range(5) for j in range(3)] for i in range(4)]
    assert_close(found, torch.tensor(literal, dtype=torch.float64), **EXACT)
    assert_close(found @ found.T, (f @ f.T) * (p @ p.T), **EXACT)
    feature_major = (f[:, :, None] * p[:, None, :]).flatten(1)
    assert (found - feature_major).abs().max() > 0.1


def test_randomised_map_keeps_inner_products_in_expectation() -> None:
    f, p, dim = random(3, 4), random(3, 5, seed=1).softmax(1), 200_000
    rf, rp = random(4, dim, seed=2), random(5, dim, seed=3)
    found = randomised_map(f, p, rf, rp)
    assert_close(found[1, 7], (f[1] @ rf[:, 7]) * (p[1] @ rp[:, 7]) / math.sqrt(dim), **EXACT)
    assert_close(found @ found.T, (f @ f.T) * (p @ p.T), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("normalise", ["domain", "joint", "none"])
def test_weights_are_the_literal_formula(normalise: str) -> None:
    logits = (2 * random(7, 4)).requires_grad_()
    p = logits.softmax(1)
    raw = 1 + ((p * p.log()).sum(1)).exp()
    parts = {"domain": [raw[:3], raw[3:]], "joint": [raw], "none": [raw]}[normalise]
    held = torch.cat([part / (1 if normalise == "none" else part.detach().mean()) for part in parts])
    found = entropy_weights(logits, 3, normalise)  # type: ignore[arg-type]
    assert_close(found, held, **EXACT)
    weight = random(7, seed=5)
    assert_close(gradient(found @ weight, logits)[0], gradient(held @ weight, logits)[0], **EXACT)
    assert ((raw > 1 + 1 / 4) & (raw <= 2)).all()


def test_weights_are_normalised_by_domain_and_by_a_constant() -> None:
    logits = torch.cat([3 * random(4, 3), 0.1 * random(6, 3, seed=1)]).requires_grad_()
    own, joint = entropy_weights(logits, 4), entropy_weights(logits, 4, "joint")
    assert_close(own[:4].mean(), torch.ones(()).double(), **EXACT)
    assert_close(own[4:].mean(), torch.ones(()).double(), **EXACT)
    assert (own - joint).abs().max() > 0.05
    p = logits.softmax(1)
    raw = 1 + (p * p.log()).sum(1).exp()
    free = torch.cat([raw[:4] / raw[:4].mean(), raw[4:] / raw[4:].mean()])
    upstream = random(10, seed=2)
    difference = gradient(own @ upstream, logits)[0] - gradient(free @ upstream, logits)[0]
    assert difference.abs().max() > 1e-3


def test_certain_rows_have_weights_with_finite_gradients() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [500.0, 500.0, 0.0]], requires_grad=True)
    found = entropy_weights(logits, 1, "none")
    assert_close(found, torch.tensor([2, 1 + 1 / 3, 1.5]))
    assert torch.isfinite(gradient(found.sum(), logits)[0]).all()


# ------------------------------------------------------------------------------------------------------ discriminators


def test_domain_loss_is_the_literal_formula() -> None:
    z, w = random(7), random(7, seed=1).abs()
    d = torch.tensor([1.0] * 3 + [0.0] * 4).double()
    p = torch.sigmoid(z)
    each = -(d * p.log() + (1 - d) * (1 - p).log())
    assert_close(domain_loss(z, 3), each.mean(), **EXACT)
    assert_close(domain_loss(z, 3, w), (w * each).mean(), **EXACT)
    assert abs(float((w * each).sum() / w.sum() - (w * each).mean())) > 0.01  # weights are not normalised again


def test_half_everywhere_is_log_2_and_the_mappings_gradient() -> None:
    zeros = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    assert_close(float(domain_loss(zeros, 3)), math.log(2), **EXACT)
    z = random(5).requires_grad_()
    (found,) = gradient(domain_loss(z, 5), z)
    assert_close(found, (torch.sigmoid(z) - 1) / 5, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discriminator_that_is_certain_and_wrong(dtype: torch.dtype) -> None:
    z = torch.tensor([-800.0, 800.0], dtype=dtype, requires_grad=True)
    value = domain_loss(z, 1)
    assert float(value) == 800
    assert gradient(value, z)[0].tolist() == [-0.5, 0.5]
    assert float(domain_loss(-z, 1)) == 0
    assert torch.isinf(F.logsigmoid(z).exp().log()).any()  # what a sigmoid and a logarithm make of it


def discriminators(sample: int) -> list[Tensor]:
    """Two discriminators of two hidden units with parameters that are written down in one line."""

    def tensor(s: int, *shape: int) -> Tensor:
        count = math.prod(shape)
        return torch.tensor([((5 * i + 3 * s) % 13 - 5) / 5 for i in range(count)], dtype=torch.float64).reshape(shape)

    shapes = [(1, 2, 2, 2), (3, 2, 2), (2, 2, 2, 2), (5, 2, 2), (4, 2, 2), (6, 2)]
    return [tensor(shape[0], *shape[1:])[sample] for shape in shapes]


def logits_of(k: int, features: Tensor) -> Tensor:
    w1, b1, w2, b2, w3, b3 = discriminators(k)
    hidden = torch.relu(features @ w1.T + b1)
    return torch.relu(hidden @ w2.T + b2) @ w3 + b3


def test_several_discriminators_add_up_as_in_mada() -> None:
    features = FEATURES.clone().requires_grad_()
    p = LOGITS.softmax(1)
    z = torch.stack([logits_of(k, p[:, k, None] * features) for k in range(2)], 1)
    assert [printed(domain_loss(z[:, k], 3)) for k in range(2)] == [0.692115, 1.063679]
    total = domain_loss(z, 3)
    assert_close(total, domain_loss(z[:, 0], 3) + domain_loss(z[:, 1], 3), **EXACT)
    (found,) = gradient(total, features)
    assert printed(found[0]) == [0.001866, -0.001120]
    assert printed(found[4]) == [-0.039356, 0.074183]
    # The probability as a weight of the loss is another method.
    on_loss = [domain_loss(logits_of(k, FEATURES), 3, p[:, k]) for k in range(2)]
    assert [printed(each) for each in on_loss] == [0.394458, 0.349882]


def test_arguments_that_do_not_fit() -> None:
    z = matrix([1, 2], [3, 4])
    with pytest.raises(ValueError, match="num_source: found 2; expected 1 to 1"):
        entropy_weights(z, 2)
    with pytest.raises(ValueError, match="normalise: found 'all'; expected 'domain', 'joint' or 'none'"):
        entropy_weights(z, 1, "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_source: found 3; expected 0 to 2"):
        domain_loss(z, 3)
    with pytest.raises(ValueError, match=r"weights: found shape \(2, 2\); expected \(2,\)"):
        domain_loss(z, 1, z)
    with pytest.raises(ValueError, match=r"probabilities: found shape \(1, 2\); expected \(2, columns\)"):
        multilinear_map(z, z[:1])
    with pytest.raises(ValueError, match=r"probability_projection: found shape \(2, 3\); expected \(2, 4\)"):
        randomised_map(z, z, random(2, 4), random(2, 3))
