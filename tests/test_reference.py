"""The oracle against formulas written out by hand in numpy: eqs. 6-12, and finite differences for every gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from equivalence import INPUTS, Problem, compute, make_problem

STEP = 1e-5  # of the central differences; inputs are further than this from every kink


def terms_by_hand(inputs: dict[str, np.ndarray], weight: np.ndarray, domain: np.ndarray) -> tuple[np.ndarray, ...]:
    """Loss and gradient norm by explicit loops; the gradient to the features by the chain rule, unit by unit."""
    features = inputs["features"]
    (num_samples, dim), (k, hidden) = features.shape, inputs["b1"].shape
    loss, gradient_norm = np.zeros(k), np.zeros(k)
    for j in range(k):
        w1, b1, w2, b2, w3, b3 = (inputs[name][j] for name in INPUTS[1:])
        for i in range(num_samples):
            before_1 = w1 @ features[i] + b1
            before_2 = w2 @ np.maximum(before_1, 0) + b2
            logit = w3 @ np.maximum(before_2, 0) + b3
            probability = 1 / (1 + np.exp(-logit))
            label = domain[i]
            cross_entropy = -label * np.log(probability) - (1 - label) * np.log(1 - probability)
            loss[j] += weight[i, j] * cross_entropy / num_samples
            slope = np.zeros(dim)
            for g in range(hidden):
                for h in range(hidden):
                    if before_2[g] > 0 and before_1[h] > 0:
                        slope += w3[g] * w2[g, h] * w1[h]
            gradient_norm[j] += np.sqrt(np.sum((weight[i, j] / num_samples * (probability - label) * slope) ** 2))
    return loss, gradient_norm


def in_numpy(problem: Problem) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    inputs = {name: tensor.numpy().copy() for name, tensor in problem.inputs.items()}
    return inputs, problem.sample_weight.numpy(), problem.domain.numpy()


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_source": 1, "num_target": 1, "num_discriminators": 1, "dim": 1, "hidden": 1},
        {"empty": [1], "dead": [2], "silent_sample": 6},
    ],
    ids=["usual", "ones", "empty class, dead units, silent sample"],
)
def test_values(shape: dict) -> None:
    problem = make_problem(dtype=torch.float64, **shape)
    loss, gradient_norm = terms_by_hand(*in_numpy(problem))
    found = compute(problem, "reference")
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-12)
    np.testing.assert_allclose(found["gradient_norm"], gradient_norm, rtol=1e-12)


def test_gradient_norm_is_the_norm_of_the_losss_own_gradient() -> None:
    """Eqs. 10-12 by finite differences of L_k itself, without the chain rule."""
    problem = make_problem(dtype=torch.float64)
    inputs, weight, domain = in_numpy(problem)
    num_samples, dim = inputs["features"].shape
    slopes = np.zeros((weight.shape[1], num_samples, dim))
    for i, d in np.ndindex(num_samples, dim):
        losses = []
        for sign in (1, -1):
            moved = inputs["features"].copy()
            moved[i, d] += sign * STEP
            losses.append(terms_by_hand({**inputs, "features": moved}, weight, domain)[0])
        slopes[:, i, d] = (losses[0] - losses[1]) / (2 * STEP)
    found = compute(problem, "reference")["gradient_norm"]
    np.testing.assert_allclose(found, np.linalg.norm(slopes, axis=2).sum(1), rtol=1e-7)


@pytest.mark.parametrize("name", INPUTS)
def test_gradients_are_finite_differences(name: str) -> None:
    problem = make_problem(num_source=3, num_target=2, num_discriminators=2, dim=3, hidden=4, dtype=torch.float64)
    inputs, weight, domain = in_numpy(problem)

    def objective(values: np.ndarray) -> float:
        loss, gradient_norm = terms_by_hand({**inputs, name: values}, weight, domain)
        return float(problem.grad_loss.numpy() @ loss + problem.grad_gradient_norm.numpy() @ gradient_norm)

    expected = np.zeros_like(inputs[name])
    for index in np.ndindex(*expected.shape):
        step = np.zeros_like(expected)
        step[index] = STEP
        expected[index] = (objective(inputs[name] + step) - objective(inputs[name] - step)) / (2 * STEP)
    np.testing.assert_allclose(compute(problem, "reference")[name], expected, rtol=1e-6, atol=1e-9)


def test_loss_feature_scale_touches_the_losss_gradient_to_the_features_alone() -> None:
    problem = make_problem(dtype=torch.float64)
    plain = compute(problem, "reference")
    scaled = compute(problem, "reference", loss_feature_scale=-0.4)
    loss_part = compute(replace(problem, grad_gradient_norm=torch.zeros_like(problem.grad_loss)), "reference")
    for name in plain.keys() - {"features"}:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(scaled["features"], plain["features"] - 1.4 * loss_part["features"])
