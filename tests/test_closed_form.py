"""The closed form against the reference: PyTorch's in both of its layouts, and C++'s for both instruction sets."""

from dataclasses import replace

import pytest
import torch
from equivalence import (
    INPUTS,
    Problem,
    assert_equivalent,
    assert_nan_stays_visible,
    compute,
    make_problem,
    non_contiguous,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gsda_kernels import backends, pairs
from gsda_kernels.native import NativeBackend

IMPLEMENTATIONS = ("torch, grouped", "torch, batched", "native, avx2", "native, avx512")

drawn = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def problems(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64) -> Problem:
    """Hypothesis strategy: shapes down to 1 (one domain may be missing), any share of zeros, empty and dead ones."""
    num_source = draw(st.integers(0, 6), label="num_source")
    num_target = draw(st.integers(1 if num_source == 0 else 0, 6), label="num_target")
    k = draw(st.integers(1, 5), label="num_discriminators")
    some = st.sets(st.integers(0, k - 1), max_size=k)
    return make_problem(
        num_source=num_source,
        num_target=num_target,
        num_discriminators=k,
        dim=draw(st.integers(1, 9), label="dim"),
        hidden=draw(st.integers(1, 12), label="hidden"),
        dtype=dtype,
        zero_weights=draw(st.sampled_from([0.0, 0.5, 1.0]), label="zero_weights"),
        empty=sorted(draw(some, label="empty")),
        dead=sorted(draw(some, label="dead")),
        silent_sample=draw(st.none() | st.integers(0, num_source + num_target - 1), label="silent_sample"),
        seed=draw(st.integers(0, 2**32 - 1), label="seed"),
    )


frozen_inputs = st.sets(st.sampled_from(INPUTS)).map(sorted)


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, variant = request.param.split(", ")
    if name == "torch":
        monkeypatch.setattr(pairs, "_BATCHED_BELOW", 0 if variant == "grouped" else 1 << 62)
    else:
        native = NativeBackend(variant)
        why_not = native.unavailable(torch.device("cpu"))
        if why_not:
            pytest.skip(why_not)
        monkeypatch.setitem(backends._BACKENDS, "native", native)
    return name


@drawn
@given(problem=problems(), frozen=frozen_inputs, scale=st.sampled_from([1.0, 0.0, -0.7]))
def test_float64(backend: str, problem: Problem, frozen: list[str], scale: float) -> None:
    assert_equivalent(problem, backend, frozen=frozen, loss_feature_scale=scale)


@drawn
@given(problem=problems(dtype=torch.float32), frozen=frozen_inputs)
def test_float32(backend: str, problem: Problem, frozen: list[str]) -> None:
    assert_equivalent(problem, backend, frozen=frozen)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_half_precision(backend: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    problem = make_problem(num_source=9, num_target=8, dim=32, hidden=48, dtype=dtype, parameter_dtype=parameter_dtype)
    assert_equivalent(problem, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_a_size_that_blocks_its_products(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(
        num_source=36, num_target=36, num_discriminators=5, dim=96, hidden=200, dtype=dtype, zero_weights=0.7, empty=[3]
    )
    assert_equivalent(problem, backend)


@pytest.mark.parametrize(
    "frozen", [[name] for name in INPUTS] + [INPUTS[1:], INPUTS], ids=lambda names: "+".join(names)
)
def test_frozen(backend: str, frozen: list[str]) -> None:
    assert_equivalent(make_problem(dtype=torch.float64), backend, frozen=frozen)


@pytest.mark.parametrize("wanted", INPUTS)
def test_only_one_gradient(backend: str, wanted: str) -> None:
    assert_equivalent(make_problem(dtype=torch.float64), backend, frozen=[name for name in INPUTS if name != wanted])


def test_non_contiguous_inputs_and_expanded_upstream_gradients(backend: str) -> None:
    assert_equivalent(non_contiguous(make_problem(dtype=torch.float64)), backend)


@pytest.mark.parametrize("unused", ["grad_loss", "grad_gradient_norm"])
def test_one_result_without_an_upstream_gradient(backend: str, unused: str) -> None:
    """The synchronisation term is off in the first step of its ramp, and in the ablations."""
    problem = make_problem(dtype=torch.float64)
    assert_equivalent(replace(problem, **{unused: torch.zeros_like(problem.grad_loss)}), backend)


@pytest.mark.parametrize("scale", [-0.3, torch.tensor(-0.3), torch.tensor(2), torch.tensor([0.5])], ids=str)
def test_loss_feature_scale(backend: str, scale: float | torch.Tensor) -> None:
    assert_equivalent(make_problem(dtype=torch.float64), backend, loss_feature_scale=scale)


def test_gradient_norm_of_exactly_zero(backend: str) -> None:
    problem = make_problem(dtype=torch.float64, dead=[0, 2], silent_sample=1)
    assert (compute(problem, backend)["gradient_norm"][[0, 2]] == 0).all()
    assert_equivalent(problem, backend)


def test_no_pair_at_all(backend: str) -> None:
    problem = make_problem(dtype=torch.float64, empty=range(4))
    found = compute(problem, backend, max_pairs=1)
    assert found.keys() == {"loss", "gradient_norm", *INPUTS}
    assert all((value == 0).all() for value in found.values())


def test_nan_in_an_input_stays_visible(backend: str) -> None:
    assert_nan_stays_visible(backend)


def test_min_weight_drops_light_target_pairs_and_no_source_pair(backend: str) -> None:
    problem = make_problem(dtype=torch.float64, zero_weights=0.0)
    weight = problem.sample_weight.clone()
    weight[0, 0] = 0.01  # source
    weight[-1, 1] = 0.2  # target, exactly at the threshold
    problem = replace(problem, sample_weight=weight)
    light = (weight < 0.2) & (problem.domain == 0).unsqueeze(1)
    assert light.any()
    kept = replace(problem, sample_weight=weight.masked_fill(light, 0.0))
    for each in ("reference", backend):
        found, expected = compute(problem, each, min_weight=0.2), compute(kept, each)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert_equivalent(problem, backend, min_weight=0.2)


@pytest.mark.parametrize("with_reference", [False, True])
def test_more_pairs_than_max_pairs_is_nan_and_never_a_wrong_number(backend: str, with_reference: bool) -> None:
    backend = "reference" if with_reference else backend
    problem = make_problem(dtype=torch.float64)
    active = int((problem.sample_weight != 0).sum())
    assert active < problem.sample_weight.numel()
    plain = compute(problem, backend)
    for bound in (active, active + 1, problem.sample_weight.numel() + 5):
        found = compute(problem, backend, max_pairs=bound)
        assert all(torch.equal(found[name], value) for name, value in plain.items())
    for bound in (1, active - 1):
        found = compute(problem, backend, max_pairs=bound)
        assert found["loss"].isnan().all()
        assert found["gradient_norm"].isnan().all()
        assert found["features"].isnan().any()
        assert found["w1"].isnan().any()
