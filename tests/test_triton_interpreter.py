"""The Triton kernels in Triton's interpreter, against the reference: `TRITON_INTERPRET=1 pytest` on this file alone.

The interpreter has to be chosen before Triton is imported, and its bfloat16 is not that of a GPU: float32 and float16.
"""

import importlib
import os
from collections.abc import Iterator

import numpy as np
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
from triton_cases import SHAPES

import gsda_kernels as gk
from gsda_fast import ClassGroups, Discriminators
from gsda_fast.methods.objective import discriminator_objective
from gsda_fast.methods.step import Descent
from gsda_kernels import backends, ops
from gsda_kernels.triton.configs import configure

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

triton = pytest.importorskip("triton")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("loops over loaded bounds need Triton 3.8 or NumPy < 2.4 in the interpreter", allow_module_level=True)
routing = pytest.importorskip("gsda_kernels.triton.routing")


@pytest.fixture(autouse=True)
def _allocations_are_poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, and the largest number in integers: whatever is read unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: dict[str, int], dtype: torch.dtype) -> None:
    assert_equivalent(make_problem(dtype=dtype, **shape), "triton")


@pytest.mark.parametrize("num_samples", [40, 100])
def test_float32_parameters_beside_half_precision_features(num_samples: int) -> None:
    problem = make_problem(
        num_source=20,
        num_target=num_samples - 20,
        dim=40,
        hidden=72,
        dtype=torch.float16,
        parameter_dtype=torch.float32,
    )
    assert_equivalent(problem, "triton")


@pytest.mark.parametrize("pairs", [65, 127, 129, 200, 257])
def test_tiles_of_128_rows(pairs: int) -> None:
    """A last tile that is nearly empty, half full or all but full; the next discriminator's pairs follow at once."""
    problem = make_problem(
        num_source=30,
        num_target=230,
        num_discriminators=2,
        dim=16,
        hidden=16,
        zero_weights=0.0,
        dtype=torch.float16,
        parameter_dtype=torch.float32,
    )
    features, w1, weight = problem.features, problem.disc.w1, problem.sample_weight
    weight[pairs:, 0] = 0.0
    weight[: 260 - 3, 1] = 0.0
    config = configure(*features.shape, w1.shape[1], features.dtype, w1.dtype, "ieee")
    assert config.block_pairs == 128
    assert_equivalent(problem, "triton", max_pairs=pairs + 3)


@pytest.mark.parametrize(
    "frozen", [[name] for name in INPUTS] + [INPUTS[1:], INPUTS[:1], INPUTS], ids=lambda names: "+".join(names)
)
def test_frozen(frozen: list[str]) -> None:
    assert_equivalent(make_problem(), "triton", frozen=frozen)


@pytest.mark.parametrize("wanted", INPUTS)
def test_only_one_gradient(wanted: str) -> None:
    assert_equivalent(make_problem(), "triton", frozen=[name for name in INPUTS if name != wanted])


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_loss_feature_scale(scale: float) -> None:
    assert_equivalent(make_problem(), "triton", loss_feature_scale=scale)


def test_non_contiguous_inputs_and_expanded_upstream_gradients() -> None:
    assert_equivalent(non_contiguous(make_problem()), "triton")


def test_min_weight() -> None:
    assert_equivalent(make_problem(), "triton", min_weight=0.4)


def test_dead_unit_of_weight_zero() -> None:
    """A unit that is on while its outgoing weight is 0 still has a gradient to that weight."""
    problem = make_problem()
    problem.disc.w3[:, ::2] = 0.0
    assert_equivalent(problem, "triton")


def test_nan_in_an_input_stays_visible() -> None:
    assert_nan_stays_visible("triton")


def _num_active(problem: Problem) -> int:
    return int(problem.sample_weight.count_nonzero())


def test_exactly_max_pairs() -> None:
    problem = make_problem()
    assert_equivalent(problem, "triton", max_pairs=_num_active(problem))


def test_more_than_max_pairs_is_nan() -> None:
    problem = make_problem(zero_weights=0.0)
    found = compute(problem, "triton", max_pairs=_num_active(problem) - 1)
    assert found["loss"].isnan().all()
    assert found["gradient_norm"].isnan().all()
    assert all(found[name].isnan().any() for name in INPUTS)


@pytest.mark.parametrize("shift", [-80.0, 80.0])
def test_extreme_logits_overflow_nowhere(shift: float) -> None:
    problem = make_problem()
    problem.disc.b3.fill_(shift)
    assert_equivalent(problem, "triton")


def test_losses_of_decided_pairs_keep_their_digits() -> None:
    """Source samples alone, all recognised: a loss of 1e-9 a pair, far below the spacing of numbers around 1."""
    problem = make_problem(num_target=0)
    problem.disc.b3.fill_(20.0)
    assert_equivalent(problem, "triton")


def test_deterministic() -> None:
    problem = make_problem(num_source=40, num_target=40, num_discriminators=3)
    first, second = compute(problem, "triton"), compute(problem, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("num_samples", "num_discriminators", "max_pairs"),
    [
        pytest.param(9, 5, None, id="one block"),
        pytest.param(1, 1, None, id="one pair at most"),
        pytest.param(600, 20, None, id="several blocks of samples, several tiles to a discriminator"),
        pytest.param(200, 5, 300, id="cut inside a discriminator"),
    ],
)
def test_routing(num_samples: int, num_discriminators: int, max_pairs: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(num_samples, num_discriminators, generator=generator)
    weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.4, 0.0)
    weight[:, num_discriminators // 2] = 0.0
    active = weight.t().nonzero()
    bound, block_pairs = max_pairs or weight.numel(), 64
    found = routing.Routing.empty(weight, num_samples, num_discriminators, bound, block_pairs)
    routing.route(weight, found, block_pairs)

    kept = active[:bound]
    counts = torch.bincount(kept[:, 0], minlength=num_discriminators)
    ends = counts.cumsum(0)
    assert found.offsets.tolist() == [0, *ends.tolist(), len(active)]
    assert found.sample[: len(kept)].equal(kept[:, 1].int())
    position = torch.full_like(found.position, -1)
    position[kept[:, 1], kept[:, 0]] = torch.arange(len(kept), dtype=torch.int32)
    assert found.position.equal(position)
    tiles = [
        [k, first]
        for k in range(num_discriminators)
        for first in range(int(ends[k] - counts[k]), int(ends[k]), block_pairs)
    ]
    assert len(tiles) <= found.num_tiles
    assert found.tiles[: len(tiles)].tolist() == tiles
    assert (found.tiles[len(tiles) :, 0] == -1).all()


def test_registered_operation() -> None:
    problem = make_problem(zero_weights=0.0)
    inputs = [tensor.requires_grad_() for tensor in problem.inputs.values()]
    weight, label = problem.sample_weight, problem.domain.float()
    args = (inputs, [], weight, label, None, weight.numel(), [True] * len(inputs), "triton")
    torch.library.opcheck(ops.adversarial_forward, args)


def test_a_precision_that_changes_before_the_backward_pass_is_refused() -> None:
    problem = make_problem(num_source=300, num_target=300, num_discriminators=2, dim=16, hidden=16)
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        disc = gk.DiscriminatorWeights(*(problem.inputs[name].requires_grad_() for name in INPUTS[1:]))
        features, weight = problem.inputs["features"], problem.sample_weight
        terms = gk.adversarial_terms(features, disc, weight, problem.domain, backend="triton")
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        with pytest.raises(RuntimeError, match="fp32_precision: changed between the forward and backward pass"):
            terms.loss.sum().backward()
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def test_compiled() -> None:
    inductor = importlib.import_module("torch._inductor.config")
    # To find out which vector instructions there are, a program is compiled; what is around the kernels matters little.
    with inductor.patch({"cpp.vec_isa_ok": False}):
        assert_equivalent(make_problem(), "triton", compiled=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_discriminators_read_half_precision_copies_and_get_the_same_numbers(compiled: bool) -> None:
    features = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).half()
    probabilities, domain = torch.eye(3).repeat(3, 1), (torch.arange(9) < 4).float()
    found = {}
    for counted in (False, True):
        torch.manual_seed(0)
        module = Discriminators(6, ClassGroups([[[1, 1, 0], [0, 0, 1]]]), 20, backend="triton")
        if compiled:
            module.compile(backend="aot_eager", dynamic=False)
        momentum = [torch.zeros_like(each) for each in module.parameters()]
        descent = Descent(0.1, 0.9, 0.0, True, lambda _, own=momentum: own, torch.zeros(()), counted)
        rows, terms = (features, probabilities, domain), []
        for _ in range(2):
            module.descend_(*rows, None, None, lambda own: discriminator_objective(own, None, beta=0.0), descent)
            terms += module(*rows, frozen=True)
        found[counted] = [*terms, *(each.detach().clone() for each in module.parameters())]
    assert all(map(torch.equal, found[True], found[False]))
    # Proof that the copies were read: what has become of them behind everybody's back shows.
    copies = module._half.copies
    assert copies is not None
    copies[0].data.zero_()
    assert not torch.equal(module(*rows, frozen=True).loss, found[True][2])
    if compiled:
        # A CUDA graph reads an input where it lies only if it stays there, and copies every other one at each replay.
        assert all(getattr(copy, "_dynamo_static_input_type", None) for copy in copies)


def test_interpreter_serves_cpu_tensors() -> None:
    assert gk.available_backends("cpu")["triton"] is None
    assert backends.resolve_backend("auto", "cpu", torch.float32) == "triton"
    assert backends.resolve_backend("auto", "cpu", torch.float64) != "triton"
    with pytest.raises(ValueError, match=r"backend: found 'triton', which cannot run here \(no float64\)"):
        compute(make_problem(dtype=torch.float64), "triton")
