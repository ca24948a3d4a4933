"""The registered operations: schemas, derivatives, compilation, and memory that nobody initialised."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from equivalence import INPUTS, Problem, assert_equivalent, compute, make_problem, non_contiguous
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gsda_kernels as gk
from gsda_kernels import ops

BACKENDS = [name for name, why in gk.available_backends("cpu").items() if why is None and name != "reference"]
SMALL = {"num_source": 3, "num_target": 2, "num_discriminators": 3, "dim": 4, "hidden": 5}
LARGE = {"num_source": 5, "num_target": 4, "num_discriminators": 3, "dim": 96, "hidden": 224, "empty": [1]}
FROZEN = {"none": (), "discriminators": INPUTS[1:], "features": INPUTS[:1]}
both_layouts = pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["batched", "grouped"])


def forward_arguments(problem: Problem, backend: str, frozen: tuple[str, ...], scale: float | None) -> tuple[Any, ...]:
    inputs = [tensor.requires_grad_(name not in frozen) for name, tensor in problem.inputs.items()]
    label = problem.domain.to(problem.sample_weight.dtype)
    return (
        inputs,
        [],
        problem.sample_weight,
        label,
        None if scale is None else torch.tensor(scale, dtype=problem.sample_weight.dtype),
        problem.sample_weight.numel(),
        [tensor.requires_grad for tensor in inputs],
        backend,
    )


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("scale", [None, -0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_forward(backend: str, scale: float | None, frozen: tuple[str, ...]) -> None:
    # All pairs active and rows of whole vectors: what is saved for the backward has no uninitialised corner to compare.
    problem = make_problem(num_source=3, num_target=2, num_discriminators=3, dim=16, hidden=32, zero_weights=0.0)
    torch.library.opcheck(ops.adversarial_forward, forward_arguments(problem, backend, frozen, scale))


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("backend", BACKENDS)
@both_layouts
def test_opcheck_backward(backend: str, frozen: tuple[str, ...], shape: dict[str, Any]) -> None:
    problem = make_problem(**shape)
    arguments = forward_arguments(problem, backend, frozen, -0.5)
    inputs, _, weight, label, scale, _max_pairs, needs_grad, _backend = arguments
    tensors = [tensor.detach() for tensor in inputs]
    _, _, saved = ops.adversarial_forward(tensors, *arguments[1:])
    upstream = (problem.grad_loss, problem.grad_gradient_norm)
    torch.library.opcheck(
        ops.adversarial_backward, (tensors, weight, label, scale, saved, *upstream, needs_grad, backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@both_layouts
def test_gradcheck(backend: str, shape: dict[str, Any]) -> None:
    problem = make_problem(dtype=torch.float64, **shape)
    inputs = tuple(tensor.requires_grad_() for tensor in problem.inputs.values())

    def terms(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        disc = gk.DiscriminatorWeights(*tensors[1:])
        return gk.adversarial_terms(tensors[0], disc, problem.sample_weight, problem.domain, backend=backend)

    torch.autograd.gradcheck(terms, inputs, fast_mode=True)


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend: str, frozen: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    problem = make_problem(**SMALL)
    scale = torch.tensor(-0.4)
    expected = compute(problem, backend, frozen=frozen, loss_feature_scale=scale, min_weight=0.1)
    found = compute(problem, backend, frozen=frozen, loss_feature_scale=scale, min_weight=0.1, compiled=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-8)


def test_compile_without_recompiling_for_a_scheduled_scale() -> None:
    torch._dynamo.reset()
    problem = make_problem(**SMALL)
    compute(problem, "auto", compiled=True, loss_feature_scale=torch.tensor(-0.1))
    with torch.compiler.set_stance("fail_on_recompile"):
        compute(problem, "auto", compiled=True, loss_feature_scale=torch.tensor(-0.2))


def test_compile_refuses_the_reference_by_name() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"backend: found 'reference', which cannot run here \(torch.compile refuses"):
        compute(make_problem(**SMALL), "reference", compiled=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("used", ["loss", "gradient_norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_that_nobody_uses(backend: str, used: str, compiled: bool) -> None:
    torch._dynamo.reset()
    problem = make_problem(**SMALL)

    def gradients(backend: str, compiled: bool) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in problem.inputs.values()]

        def total() -> torch.Tensor:
            disc = gk.DiscriminatorWeights(*inputs[1:])
            out = gk.adversarial_terms(inputs[0], disc, problem.sample_weight, problem.domain, backend=backend)
            return (getattr(out, used) * problem.grad_loss).sum()

        value = torch.compile(total, fullgraph=True)() if compiled else total()
        return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)

    for found, expected in zip(gradients(backend, compiled), gradients("reference", False)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_made_for_what_is_saved(backend: str) -> None:
    """What is saved is an output of the operation, for which autograd would make a gradient of as many zeros."""
    problem = make_problem(num_source=9, num_target=8, num_discriminators=3, dim=96, hidden=224, zero_weights=0.0)
    inputs = [tensor.requires_grad_() for tensor in problem.inputs.values()]
    disc = gk.DiscriminatorWeights(*inputs[1:])
    out = gk.adversarial_terms(inputs[0], disc, problem.sample_weight, problem.domain, backend=backend)
    largest = []

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if "zeros" in str(func):
                largest.append(made.numel())
            return made

    with Zeros():
        torch.autograd.grad(out, inputs, (problem.grad_loss, problem.grad_gradient_norm))
    assert max(largest, default=0) < problem.sample_weight.numel() * 96


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """Every tensor that PyTorch does not initialise is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("backend", BACKENDS)
@both_layouts
def test_poisoned_allocations(backend: str, frozen: tuple[str, ...], shape: dict[str, Any]) -> None:
    problem = make_problem(**{**shape, "empty": [1]}, dead=[0])
    assert_equivalent(problem, backend, frozen=frozen)
    assert_equivalent(non_contiguous(problem), backend, frozen=frozen, loss_feature_scale=-0.3)


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("backend", BACKENDS)
@both_layouts
def test_fake_and_meta_tensors(backend: str, frozen: tuple[str, ...], shape: dict[str, Any]) -> None:
    problem = make_problem(**shape)
    expected = shapes(compute(problem, backend, frozen=frozen))
    assert shapes(compute(problem.to("meta"), backend, frozen=frozen)) == expected
    with FakeTensorMode() as mode:
        fake = replace(problem.map(mode.from_tensor), domain=mode.from_tensor(problem.domain))
        assert shapes(compute(fake, backend, frozen=frozen, validate=False)) == expected


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


_COMPILED_GRADIENT = """
import torch
from gsda_kernels import DiscriminatorWeights, adversarial_terms

disc = DiscriminatorWeights(*(torch.ones(shape) for shape in [(2, 4, 3), (2, 4), (2, 4, 4), (2, 4), (2, 4), (2,)]))

@torch.compile(fullgraph=True)
def loss(features):
    domain = torch.tensor([1, 1, 0])
    return adversarial_terms(features, disc, torch.ones(3, 2), domain, backend="torch").loss.sum()

features = torch.full((3, 3), 0.125, requires_grad=True)
loss(features).backward()
print(features.grad.abs().sum().item())
"""


def test_a_changed_formula_is_not_hidden_by_what_was_compiled_before(tmp_path: Path) -> None:
    package = tmp_path / "path" / "gsda_kernels"
    shutil.copytree(Path(ops.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    # -S: the copy, and not the package that is installed here.
    path = os.pathsep.join([str(package.parent), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # with an empty cache it compiles a program to find out

    def gradient() -> float:
        command = [sys.executable, "-S", "-c", _COMPILED_GRADIENT]
        return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    before = gradient()
    module = package / "ops.py"
    formula = "[next(found) if needed"
    assert module.read_text().count(formula) == 1
    module.write_text(module.read_text().replace(formula, "[2 * next(found) if needed"))
    assert before > 0
    assert gradient() == pytest.approx(2 * before)
