"""Discrepancies: published digits, the literal sums, what they are invariant to, and the mistakes that codes make."""

import math

import pytest
import torch
from tiny_inputs import FEATURES, LOGITS, gradient, matrix, printed, random
from torch import Tensor
from torch.testing import assert_close

from gsda_fast.losses import fused_mmd, joint_mmd, mk_mmd
from gsda_fast.losses.discrepancy import Estimator

ESTIMATORS: list[Estimator] = ["full", "biased", "linear"]
EVERY_ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def squared(a: Tensor, b: Tensor) -> float:
    return sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist()))


def by_hand(layers: list[tuple[Tensor, Tensor, float | None]], estimator: Estimator) -> float:
    """Layers of (source, target, bandwidth), None: the five kernels of the mean distance; loops over all pairs."""
    n = len(layers[0][0])
    size = n + len(layers[0][1])
    kernel = [[1.0] * size for _ in range(size)]
    for source, target, given in layers:
        rows = torch.cat([source, target])
        mean = sum(squared(a, b) for a in rows for b in rows) / (size * (size - 1))
        bandwidths = [given] if given is not None else [mean * 2.0**j for j in (-2, -1, 0, 1, 2)]
        for i in range(size):
            for j in range(size):
                kernel[i][j] *= sum(math.exp(-squared(rows[i], rows[j]) / b) for b in bandwidths)
    s, t = range(n), range(n, size)
    if estimator == "linear":
        pairs = [(i, (i + 1) % n) for i in s]
        terms = [kernel[i][j] + kernel[n + i][n + j] - kernel[i][n + j] - kernel[n + i][j] for i, j in pairs]
        return sum(terms) / n
    between = sum(kernel[i][j] for i in s for j in t) / (len(s) * len(t))
    within = 0.0
    for block in (s, t):
        pairs = [(i, j) for i in block for j in block if estimator == "biased" or i != j]
        within += sum(kernel[i][j] for i, j in pairs) / len(pairs)
    return within - 2 * between


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def of_both(loss: object, features: Tensor, second: Tensor, estimator: Estimator) -> Tensor:
    (fs, ft), (gs, gt) = halves(features), halves(second)
    return loss((fs, gs), (ft, gt), estimator)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("estimator", "features", "logits", "joint", "fused", "line"),
    [
        ("full", -0.156066, -0.862067, -0.378669, -0.471274, 2.038000),
        ("biased", 1.711403, 0.971499, 1.816084, 1.012528, 3.885052),
        ("linear", -0.160235, -0.604547, -0.267706, -0.123263, 1.548037),
    ],
)
def test_published_digits(
    estimator: Estimator, features: float, logits: float, joint: float, fused: float, line: float
) -> None:
    assert printed(mk_mmd(*halves(FEATURES), estimator)) == features
    assert printed(mk_mmd(*halves(LOGITS), estimator)) == logits
    assert printed(of_both(joint_mmd, FEATURES, LOGITS.softmax(1), estimator)) == joint
    assert printed(of_both(fused_mmd, FEATURES, LOGITS, estimator)) == fused
    assert printed(mk_mmd(matrix([0], [1]), matrix([2], [4]), estimator)) == line


@EVERY_ESTIMATOR
def test_the_literal_sums(estimator: Estimator) -> None:
    features, logits = 3 + random(10, 4), random(10, 3, seed=1)
    fused = (features[:, :, None] * logits[:, None, :]).flatten(1)
    p = logits.softmax(1)
    assert_close(float(mk_mmd(*halves(features), estimator)), by_hand([(*halves(features), None)], estimator), **EXACT)
    joint = by_hand([(*halves(features), None), (*halves(p), 1.68)], estimator)
    assert_close(float(of_both(joint_mmd, features, p, estimator)), joint, **EXACT)
    whole = by_hand([(*halves(fused), None)], estimator)
    assert_close(float(of_both(fused_mmd, features, logits, estimator)), whole, **EXACT)
    assert_close(of_both(fused_mmd, features, logits, estimator), mk_mmd(*halves(fused), estimator), **EXACT)


def test_kernels_are_summed_over_the_mean_of_different_pairs() -> None:
    """Not averaged over the five, and the bandwidth not over N^2, which counts each row's distance to itself."""
    source, target = halves(FEATURES)
    rows = FEATURES
    d = (rows[:, None] - rows).square().sum(2)

    def full(kernel: Tensor) -> Tensor:
        different = kernel - kernel.diag().diag()
        return different[:3, :3].sum() / 6 + different[3:, 3:].sum() / 6 - 2 * kernel[:3, 3:].mean()

    def kernels(mean: Tensor) -> Tensor:
        return sum((-d / (mean * 2.0**j)).exp() for j in range(-2, 3))  # type: ignore[return-value]

    right, counted_all = kernels(d.sum() / 30), kernels(d.sum() / 36)
    found = mk_mmd(source, target)
    assert_close(found, full(right), **EXACT)
    for wrong in (full(right / 5), full(counted_all)):
        assert abs(float(wrong - found)) > 1e-3


def test_rows_of_unequal_number() -> None:
    rows = random(7, 3)
    for estimator in ("full", "biased"):
        expected = by_hand([(rows[:2], rows[2:], None)], estimator)  # type: ignore[arg-type]
        assert_close(float(mk_mmd(rows[:2], rows[2:], estimator)), expected, **EXACT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'linear' for 2 source and 5 target rows; expected equally many"):
        mk_mmd(rows[:2], rows[2:], "linear")


def test_identical_samples_are_0_but_for_the_unbiased_one() -> None:
    rows = random(6, 3)
    assert abs(float(mk_mmd(rows, rows, "biased"))) < 1e-12
    assert abs(float(mk_mmd(rows, rows, "linear"))) < 1e-12
    assert abs(float(joint_mmd((rows, rows.softmax(1)), (rows, rows.softmax(1)), "biased"))) < 1e-12
    d = (torch.cat([rows, rows])[:, None] - torch.cat([rows, rows])).square().sum(2)
    k: Tensor = sum((-d / (d.sum() / 132 * 2.0**j)).exp() for j in range(-2, 3))  # type: ignore[assignment]
    different = (k[:6, :6].sum() - 30) / 30
    assert_close(mk_mmd(rows, rows), 2 / 6 * (different - 5), **EXACT)
    assert mk_mmd(rows, rows) < -0.5


@EVERY_ESTIMATOR
def test_invariances(estimator: Estimator) -> None:
    source, target = random(5, 4), 0.5 + random(5, 4, seed=1)
    value = mk_mmd(source, target, estimator)
    assert_close(mk_mmd(target, source, estimator), value, **EXACT)
    rotation = torch.linalg.qr(random(4, 4, seed=2))[0]
    offset = random(4, seed=3)
    moved = [7 * x @ rotation + 1e6 * offset for x in (source, target)]
    assert_close(mk_mmd(moved[0], moved[1], estimator), value, rtol=1e-7, atol=1e-9)
    permuted = mk_mmd(source[[3, 1, 0, 4, 2]], target, estimator)
    if estimator == "linear":
        assert abs(float(permuted - value)) > 1e-4
    else:
        assert_close(permuted, value, **EXACT)


@EVERY_ESTIMATOR
def test_bandwidth_takes_no_gradient(estimator: Estimator) -> None:
    rows = random(8, 3).requires_grad_()
    d = (rows[:, None] - rows).square().sum(2)
    mean = d.sum() / 56

    def literal(bandwidth: Tensor) -> Tensor:
        k: Tensor = sum((-d / (bandwidth * 2.0**j)).exp() for j in range(-2, 3))  # type: ignore[assignment]
        off = k - k.diag().diag()
        if estimator == "full":
            return off[:4, :4].sum() / 12 + off[4:, 4:].sum() / 12 - 2 * k[:4, 4:].mean()
        if estimator == "biased":
            return k[:4, :4].mean() + k[4:, 4:].mean() - 2 * k[:4, 4:].mean()
        i, j = torch.arange(4), (torch.arange(4) + 1) % 4
        return (k[i, j] + k[4 + i, 4 + j] - k[i, 4 + j] - k[4 + i, j]).mean()

    (found,) = gradient(mk_mmd(rows[:4], rows[4:], estimator), rows)
    (held,), (free,) = gradient(literal(mean.detach()), rows), gradient(literal(mean), rows)
    assert_close(found, held, rtol=1e-8, atol=1e-11)
    assert (found - free).abs().max() > 1e-3


@EVERY_ESTIMATOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e-8])
def test_constant_features_have_a_small_gradient(estimator: Estimator, dtype: torch.dtype, value: float) -> None:
    rows = torch.full((12, 256), value, dtype=dtype, requires_grad=True)
    logits = torch.full((12, 3), 0.3, dtype=dtype, requires_grad=True)
    for loss in (
        mk_mmd(rows[:6], rows[6:], estimator),
        joint_mmd((rows[:6], logits[:6]), (rows[6:], logits[6:]), estimator),
        fused_mmd((rows[:6], logits[:6]), (rows[6:], logits[6:]), estimator),
    ):
        gradients = gradient(loss, rows, logits)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(each).all() for each in gradients)
        if value >= 0.1:  # rounding is not amplified: features of 1 with a gradient of 1e7 would be thrown anywhere
            assert all(each.abs().max() < 10 for each in gradients)


def test_an_offset_costs_no_digits() -> None:
    """The spread is a two-hundredth of the offset; a Gram matrix of rows that are not centred loses it."""
    rows = (20 + 0.1 * random(24, 64)).float()
    exact = mk_mmd(*halves(rows.double()))
    assert_close(mk_mmd(*halves(rows)).double(), exact, rtol=0, atol=1e-6)
    products = rows @ rows.T
    naive = products.diag()[:, None] + products.diag() - 2 * products
    d = (rows.double()[:, None] - rows.double()).square().sum(2)
    different = ~torch.eye(24, dtype=torch.bool)
    assert ((naive.double() - d).abs() / d)[different].max() > 1e-3


def test_samples_of_one_and_two_rows() -> None:
    for n in (1, 2):
        rows = random(2 * n, 3, dtype=torch.float32).requires_grad_()
        for estimator in ESTIMATORS:
            value = mk_mmd(rows[:n], rows[n:], estimator)
            assert torch.isfinite(value)
            assert torch.isfinite(gradient(value, rows)[0]).all()


# ------------------------------------------------------------------------------------------------------------- joint


@EVERY_ESTIMATOR
def test_joint_with_constant_probabilities_is_that_of_the_features(estimator: Estimator) -> None:
    features, constant = random(8, 3), torch.full((8, 4), 0.25, dtype=torch.float64)
    assert_close(of_both(joint_mmd, features, constant, estimator), mk_mmd(*halves(features), estimator), **EXACT)


def test_joint_notices_a_permuted_pairing() -> None:
    """Equal marginals, another joint distribution: this is what it is for. A sum of layers' discrepancies is blind."""
    features, p = random(6, 3), torch.eye(6, dtype=torch.float64)[:, :3] + 0.1
    other = p[[3, 4, 5, 0, 1, 2]]
    assert joint_mmd((features, p), (features, other), "biased") > 0.05
    assert mk_mmd(features, features, "biased") + mk_mmd(p, other, "biased") < 1e-12


def test_joint_is_not_the_product_of_discrepancies() -> None:
    p = LOGITS.softmax(1)
    product = mk_mmd(*halves(FEATURES), "biased") * by_hand([(*halves(p), 1.68)], "biased")
    assert abs(float(of_both(joint_mmd, FEATURES, p, "biased") - product)) > 0.1


def test_joint_moves_the_classifier_through_both_domains() -> None:
    logits = LOGITS.clone().requires_grad_()
    value = of_both(joint_mmd, FEATURES, logits.softmax(1), "full")
    assert (gradient(value, logits)[0].norm(dim=1) > 1e-3).all()


# ------------------------------------------------------------------------------------------------------------- fused


def test_fused_knows_only_the_product_of_its_factors() -> None:
    value = of_both(fused_mmd, FEATURES, LOGITS, "full")
    assert_close(of_both(fused_mmd, FEATURES / 16, 16 * LOGITS, "full"), value, **EXACT)
    ones = torch.ones(6, 1, dtype=torch.float64)
    assert_close(of_both(fused_mmd, FEATURES, ones, "full"), mk_mmd(*halves(FEATURES)), **EXACT)


def test_fused_factors_must_not_be_centred() -> None:
    centred = of_both(fused_mmd, FEATURES - FEATURES.mean(0), LOGITS, "full")
    assert abs(float(centred - of_both(fused_mmd, FEATURES, LOGITS, "full"))) > 0.01


def test_fused_gradient_is_that_of_the_formed_product() -> None:
    features, logits = random(8, 5).requires_grad_(), random(8, 3, seed=1).requires_grad_()
    formed = mk_mmd(*halves((features[:, :, None] * logits[:, None, :]).flatten(1)))
    found = gradient(of_both(fused_mmd, features, logits, "full"), features, logits)
    for each, expected in zip(found, gradient(formed, features, logits)):
        assert_close(each, expected, rtol=1e-8, atol=1e-11)
        assert (each.abs() > 0).all()


# ------------------------------------------------------------------------------------------------------------ errors


def test_arguments_that_do_not_fit() -> None:
    a, b = random(4, 3), random(4, 2)
    with pytest.raises(ValueError, match=r"target: found shape \(4, 2\); expected \(N > 0, 3\)"):
        mk_mmd(a, b)
    with pytest.raises(ValueError, match=r"source: found shape \(3,\)"):
        mk_mmd(a[0], b)
    with pytest.raises(ValueError, match=r"estimator: found 'unbiased'; expected 'full', 'biased' or 'linear'"):
        mk_mmd(a, a, "unbiased")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"source probabilities: found shape \(2, 2\); expected \(4, columns\)"):
        joint_mmd((a, b[:2]), (a, b))
    with pytest.raises(ValueError, match=r"target logits: found shape \(4, 3\); expected \(4, 2\)"):
        fused_mmd((a, b), (a, a))
