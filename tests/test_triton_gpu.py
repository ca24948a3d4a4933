"""The Triton backend on a real device, bfloat16 included: `pytest -m gpu`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from equivalence import (
    INPUTS,
    TF32Products,
    assert_close_to_exact,
    assert_equivalent,
    assert_nan_stays_visible,
    compute,
    make_problem,
    non_contiguous,
)
from triton_cases import SHAPES

import gsda_kernels as gk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, None),
    (torch.float16, torch.float32),
]
VISDA = {"num_source": 36, "num_target": 36, "num_discriminators": 17, "dim": 256, "hidden": 1024, "zero_weights": 0.8}


@pytest.fixture(autouse=True)
def _allocations_are_poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, and the largest number in integers: whatever is read unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _problem(dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    return make_problem(device="cuda", dtype=dtype, **shape)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: dict[str, Any], dtype: torch.dtype, parameter_dtype: torch.dtype | None) -> None:
    assert_equivalent(_problem(dtype, parameter_dtype=parameter_dtype, **shape), "triton")


@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES, ids=str)
def test_at_the_size_of_visda(dtype: torch.dtype, parameter_dtype: torch.dtype | None) -> None:
    assert_equivalent(_problem(dtype, parameter_dtype=parameter_dtype, **VISDA), "triton")


def test_tf32_where_it_is_allowed() -> None:
    """Compared with what truncated operands give: PyTorch's own products may round them, which is not the kernels'."""
    problem = _problem(**VISDA)
    with TF32Products():
        plain = compute(problem.to("cpu"), "reference")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = compute(problem, "triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert_close_to_exact(problem, found, plain=plain)


@pytest.mark.parametrize("frozen", [[name] for name in INPUTS] + [INPUTS[1:], INPUTS[:1], INPUTS], ids="+".join)
def test_frozen(frozen: list[str]) -> None:
    assert_equivalent(_problem(torch.bfloat16), "triton", frozen=frozen)


def test_options() -> None:
    assert_equivalent(_problem(), "triton", loss_feature_scale=-0.7, min_weight=0.4)
    assert_equivalent(non_contiguous(_problem()), "triton")


def test_nan_in_an_input_stays_visible() -> None:
    assert_nan_stays_visible("triton", device="cuda")


@pytest.mark.parametrize("num_discriminators", [1, 64], ids=["samples", "tiles"])
def test_more_than_a_grid_has_rows(num_discriminators: int) -> None:
    shape = {"num_source": 0, "num_target": 70_000, "num_discriminators": num_discriminators, "dim": 16, "hidden": 16}
    assert_equivalent(_problem(**shape), "triton")


def test_more_than_max_pairs_is_nan() -> None:
    found = compute(_problem(zero_weights=0.0), "triton", max_pairs=35)
    assert found["loss"].isnan().all()
    assert found["gradient_norm"].isnan().all()
    assert all(found[name].isnan().any() for name in INPUTS)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_never_waits_for_the_device(compiled: bool) -> None:
    problem, scale = _problem(torch.bfloat16, **VISDA), torch.tensor(-0.7)  # on the CPU, as a schedule may keep it
    expected = compute(problem, "triton", compiled=compiled, loss_feature_scale=scale)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = compute(problem, "triton", compiled=compiled, loss_feature_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bitwise_repeatable() -> None:
    problem = _problem(torch.bfloat16, **VISDA)
    first = compute(problem, "triton")
    for _ in range(5):
        again = compute(problem, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_compiled() -> None:
    assert_equivalent(_problem(torch.bfloat16), "triton", compiled=True)


def test_cuda_graph() -> None:
    """The whole step is captured, and replays follow the inputs."""
    problem = _problem(torch.bfloat16, **VISDA)
    compute(problem, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute(problem, "triton")
    for scale in (1.0, 0.5):
        problem.features.mul_(scale)
        graph.replay()
        expected = compute(problem, "triton")
        assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_auto_takes_it() -> None:
    problem = _problem()
    expected, found = (compute(problem, backend) for backend in ("triton", "auto"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert gk.available_backends()["triton"] is None


UPDATE_DTYPES = [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None)]
RULE: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}


def _updated(problem: Any, steps: int = 2, **options: Any) -> dict[str, torch.Tensor]:
    """Parameters and momentum after steps in one operation, and what the last one told."""
    disc = gk.DiscriminatorWeights(*(tensor.clone().requires_grad_() for tensor in problem.disc))
    momentum = gk.DiscriminatorWeights(*(torch.zeros_like(tensor) for tensor in disc))
    upstream = (problem.grad_loss, problem.grad_gradient_norm)
    arguments = (problem.features, disc, momentum, problem.sample_weight, problem.domain, upstream)
    rate = torch.full((), 0.01, device="cuda")
    for _ in range(steps):
        told = gk.adversarial_update_(*arguments, learning_rate=rate, backend="triton", **RULE, **options)
    found = {name: tensor.detach() for name, tensor in disc._asdict().items()}
    found |= {f"momentum of {name}": tensor for name, tensor in momentum._asdict().items()}
    return found | told._asdict()


@pytest.mark.parametrize(("dtype", "parameter_dtype"), UPDATE_DTYPES, ids=str)
def test_an_update_is_a_backward_pass_and_sgd(dtype: torch.dtype, parameter_dtype: torch.dtype | None) -> None:
    problem = _problem(dtype, parameter_dtype=parameter_dtype, **VISDA)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in problem.disc._asdict().items()}
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.01, fused=True, **RULE)
    for _ in range(2):
        optimizer.zero_grad()
        disc = gk.DiscriminatorWeights(**parameters)
        out = gk.adversarial_terms(problem.features, disc, problem.sample_weight, problem.domain, backend="triton")
        torch.autograd.backward(out, (problem.grad_loss, problem.grad_gradient_norm))
        optimizer.step()
    found = _updated(problem)
    assert float(found["found_inf"]) == 0
    # The sums are the same ones; gradients in half precision are rounded once less.
    tolerance = 1e-5 if parameters["w1"].dtype == torch.float32 else 4 * torch.finfo(parameters["w1"].dtype).eps
    for name, value in parameters.items():
        moved = optimizer.state[value]["momentum_buffer"]
        for each, expected in ((found[name], value.detach()), (found[f"momentum of {name}"], moved)):
            error = torch.linalg.vector_norm((each - expected).double())
            assert error <= tolerance * torch.linalg.vector_norm(expected.double()), name


def test_half_precision_copies_are_read_and_move_along_bit_for_bit() -> None:
    problem = _problem(torch.bfloat16, parameter_dtype=torch.float32, **VISDA)
    half = problem.disc.w1.bfloat16(), problem.disc.w2.bfloat16()
    expected, found = _updated(problem), _updated(problem, half_weights=half)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(half[0], found["w1"].bfloat16())
    assert torch.equal(half[1], found["w2"].bfloat16())


def test_an_update_never_waits_and_a_flag_holds_it() -> None:
    problem = _problem(torch.bfloat16, parameter_dtype=torch.float32, **VISDA)
    expected = _updated(problem)
    flag = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, held = _updated(problem), _updated(problem, skip=flag)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert float(held["found_inf"]) == 1
    assert all(torch.equal(held[name], value) for name, value in problem.disc._asdict().items())
    problem.features[0, 0] = torch.nan
    bad = _updated(problem)
    assert float(bad["found_inf"]) == 1
    assert all(torch.equal(bad[name], value) for name, value in problem.disc._asdict().items())
