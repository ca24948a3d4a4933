"""What every loss keeps to: its docstring's example, precision, one graph, no wait for the device, finite edges."""

import doctest
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_inputs import random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import gsda_fast
from gsda_fast import losses

N, D, R = 6, 5, 4
LABELS = torch.arange(N) % R
PSEUDO = torch.tensor([0, 1, 2, -1, 1, 3])

# Of each loss: it as a function of two domains' features (N, D) and of two classifiers' logits (N, 2 R), which of these
# it depends on, and whether all of its derivative is the gradient (nothing of it is held constant).
CASES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Any], str, bool]] = {
    "class_balance": (lambda a, b, y, z: losses.class_balance(y, 0.5), "y", True),
    "class_means": (lambda a, b, y, z: losses.class_means(a, PSEUDO[: len(a)], R), "a", True),
    "classifier_discrepancy": (lambda a, b, y, z: losses.classifier_discrepancy(y, z), "yz", True),
    "confident_cross_entropy": (lambda a, b, y, z: losses.confident_cross_entropy(y, 4 * z, 0.6), "y", True),
    "consistency": (lambda a, b, y, z: losses.consistency(y, 4 * z, 0.6), "y", True),
    "domain_loss": (lambda a, b, y, z: losses.domain_loss(a, len(a) // 2, b[:, 0]), "ab", True),
    "entropy": (lambda a, b, y, z: losses.entropy(y), "y", True),
    "entropy_weights": (lambda a, b, y, z: losses.entropy_weights(torch.cat([y, z]), len(y)), "yz", False),
    "fused_mmd": (lambda a, b, y, z: losses.fused_mmd((a, y), (b, z)), "abyz", False),
    "hard_feature_norm": (lambda a, b, y, z: losses.hard_feature_norm(a, b, 3.0), "ab", True),
    "joint_mmd": (lambda a, b, y, z: losses.joint_mmd((a, y.softmax(1)), (b, z.softmax(1))), "abyz", False),
    "margin_disparity": (lambda a, b, y, z: losses.margin_disparity(z, y, 2 * z, y, 3.0), "y", True),
    "minimum_class_confusion": (lambda a, b, y, z: losses.minimum_class_confusion(y), "y", False),
    "mk_mmd": (lambda a, b, y, z: losses.mk_mmd(a, b), "ab", False),
    "multilinear_map": (lambda a, b, y, z: losses.multilinear_map(a, y), "ay", True),
    "nuclear_norm": (lambda a, b, y, z: losses.nuclear_norm(y), "y", True),
    "prototype_losses": (
        lambda a, b, y, z: losses.prototype_losses(a, LABELS[: len(a)], b, PSEUDO[: len(b)], R),
        "ab",
        True,
    ),
    "randomised_map": (
        lambda a, b, y, z: losses.randomised_map(a, y, projection(a, D), projection(y, 2 * R)),
        "ay",
        True,
    ),
    "spectral_penalty": (lambda a, b, y, z: losses.spectral_penalty(a, min(2, len(a))), "a", True),
    "stepwise_feature_norm": (lambda a, b, y, z: losses.stepwise_feature_norm(a, 1.0), "a", False),
    "symmetric_classifier_loss": (
        lambda a, b, y, z: losses.symmetric_classifier_loss(y, LABELS[: len(y)], z),
        "yz",
        True,
    ),
    "symmetric_feature_loss": (
        lambda a, b, y, z: losses.symmetric_feature_loss(y, LABELS[: len(y)], z, 0.5),
        "yz",
        True,
    ),
    "uniform_class_prior": (lambda a, b, y, z: losses.uniform_class_prior(y), "y", True),
}
CONSTANT = {"confident_rows", "prototype_pseudo_labels"}
EVERY_LOSS = pytest.mark.parametrize("name", CASES)


def projection(like: Tensor, rows: int) -> Tensor:
    """One that half precision has the digits for."""
    entries = (5 * torch.arange(rows * 3, device=like.device)) % 7 - 3
    return (entries / 4).to(like.dtype).reshape(rows, 3)


def inputs(n: int = N, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    shapes = ((n, D), (n, D), (n, 2 * R), (n, 2 * R))
    drawn = [random(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes)]
    return [each.requires_grad_() for each in drawn]


def scalar(name: str, tensors: list[Tensor]) -> Tensor:
    """The result as a number: with weights for each entry of a tensor, since a plain sum may be constant."""
    result = CASES[name][0](*tensors)
    parts = result if isinstance(result, tuple) else (result,)
    total = torch.zeros((), dtype=parts[0].dtype, device=parts[0].device)
    for part in parts:
        weights = torch.arange(1, part.numel() + 1, dtype=part.dtype, device=part.device).reshape(part.shape)
        total = total + (part * weights.sqrt()).sum()
    return total


def of_interest(name: str, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for letter, tensor in zip("abyz", tensors) if letter in CASES[name][1]]


def gradients(name: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(scalar(name, tensors), of_interest(name, tensors))


def test_every_public_loss_is_among_the_cases() -> None:
    functions = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert functions == set(CASES) | CONSTANT
    assert set(losses.__all__) - functions == {"PrototypeLosses"}


@pytest.mark.parametrize("name", sorted(set(CASES) | CONSTANT))
def test_docstrings_have_one_shape_and_examples_that_run(name: str) -> None:
    function = getattr(losses, name)
    text = inspect.getdoc(function) or ""
    headings = re.findall(r"^(\w+)::?$", text, flags=re.MULTILINE)
    assert headings == ["Args", "Shape", "Raises", "Example"]
    first, rest = text.split("\n", 1)
    assert len(first.split()) < 20
    assert ".. math::" in rest or name in ("class_means", "confident_rows", "prototype_pseudo_labels")
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\b{argument}\b", text.split("Args:")[1]), argument
    examples = doctest.DocTestFinder(recurse=False).find(function, name, globs={"torch": torch, "losses": losses})
    assert sum(len(each.examples) for each in examples) > 0
    runner = doctest.DocTestRunner()
    for each in examples:
        runner.run(each)
    assert runner.summarize(verbose=False).failed == 0


@EVERY_LOSS
def test_gradients_arrive_where_they_should(name: str) -> None:
    tensors = inputs()
    found = torch.autograd.grad(scalar(name, tensors), tensors, allow_unused=True, materialize_grads=True)
    arrived = {letter for letter, gradient in zip("abyz", found) if gradient.any()}
    assert arrived == set(CASES[name][1])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_gradients_are_finite_differences(name: str) -> None:
    tensors = inputs()
    fixed = {id(each) for each in of_interest(name, tensors)}

    def of(*moving: Tensor) -> Tensor:
        remaining = iter(moving)
        return scalar(name, [next(remaining) if id(each) in fixed else each.detach() for each in tensors])

    assert torch.autograd.gradcheck(of, of_interest(name, tensors), atol=1e-6)


@EVERY_LOSS
def test_one_graph(name: str) -> None:
    """Whole, and without a wait for the device: neither is a question of the compiler's back end."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: scalar(name, list(tensors)), fullgraph=True, backend="aot_eager")
    tensors = inputs(dtype=torch.float32)
    value = compiled(*tensors)
    assert_close(value, scalar(name, tensors))
    found = torch.autograd.grad(value, of_interest(name, tensors))
    assert_close(found, gradients(name, tensors))


@pytest.mark.parametrize("name", [*CASES, *sorted(CONSTANT)])
def test_no_result_depends_on_the_host(name: str) -> None:
    """On tensors without numbers anything that asks for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = [mode.from_tensor(each.detach()).requires_grad_() for each in inputs()]
        if name in CONSTANT:
            assert losses.confident_rows(tensors[0], 0.5).shape == (N,)
            assert losses.prototype_pseudo_labels(tensors[0], LABELS, tensors[1], R).shape == (N,)
        else:
            gradients(name, tensors)


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(name: str, dtype: torch.dtype) -> None:
    narrow = inputs(dtype=dtype)
    wide = [each.detach().float().requires_grad_() for each in narrow]
    with torch.autocast("cpu", dtype=dtype):
        found, plain = scalar(name, narrow), scalar(name, wide)
    assert found.dtype == torch.float32
    if name == "joint_mmd":  # its probabilities are those of the case, narrow as well
        assert_close(found, plain, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(found, plain)
        for each, right in zip(gradients(name, narrow), gradients(name, wide)):
            assert_close(each, right.to(dtype))


@EVERY_LOSS
def test_autocast_changes_nothing(name: str) -> None:
    tensors = inputs(dtype=torch.float32)
    plain = scalar(name, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scalar(name, tensors), plain)
    assert plain.dtype == torch.float32
    assert scalar(name, inputs()).dtype == torch.float64
    assert_close(plain.double(), scalar(name, inputs()), rtol=1e-5, atol=1e-5)


EDGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.1),
    "equal rows": lambda x: x[:1].expand_as(x),
    "tiny": lambda x: 1e-20 * x,
    "large": lambda x: 1e4 * x,
    "certain": lambda x: 1e3 * torch.eye(*x.shape, dtype=x.dtype, device=x.device),
    "one-sided": lambda x: 1e3 * (torch.arange(x.shape[1], device=x.device) == 0).to(x.dtype).expand_as(x),
}


@EVERY_LOSS
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("n", [1, 2, N])
def test_edges_are_finite(name: str, edge: str, n: int) -> None:
    tensors = [EDGES[edge](each.detach()).clone().requires_grad_() for each in inputs(n, torch.float32)]
    assert torch.isfinite(scalar(name, tensors))
    assert all(torch.isfinite(each).all() for each in gradients(name, tensors))


@EVERY_LOSS
def test_rows_of_both_domains_may_be_permuted(name: str) -> None:
    if name in (
        "class_means",
        "prototype_losses",
        "domain_loss",
        "entropy_weights",
        "multilinear_map",
        "randomised_map",
    ):
        pytest.skip("has labels or a result for each row")
    if name.startswith("symmetric"):
        pytest.skip("has labels")
    tensors = inputs()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert_close(scalar(name, [each[order] for each in tensors]), scalar(name, tensors))


def test_losses_are_public() -> None:
    assert gsda_fast.losses is losses


@pytest.mark.gpu
@EVERY_LOSS
def test_no_wait_for_the_device(name: str) -> None:
    tensors = inputs(dtype=torch.float32, device="cuda")
    if name in ("class_means", "prototype_losses"):
        pytest.skip("the labels of the case are on the host")
    if name.startswith("symmetric"):
        pytest.skip("the labels of the case are on the host")
    gradients(name, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = scalar(name, tensors)
        found = torch.autograd.grad(value, of_interest(name, tensors))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = inputs(dtype=torch.float32)
    assert_close(value.cpu(), scalar(name, host), rtol=1e-3, atol=1e-3)
    assert all(torch.isfinite(each).all() for each in found)
