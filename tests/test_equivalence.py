"""The tests' own yardstick (equivalence.py): it passes what is right and refuses planted faults, in every precision.

Run in the interpreter's process too, where the Triton kernels are the ones that are tampered with.
"""

from collections.abc import Callable

import pytest
import torch
from equivalence import INPUTS, Problem, TF32Products, assert_close_to_exact, compute, make_problem
from torch import Tensor

import gsda_kernels as gk
from gsda_kernels import backends

Results = dict[str, Tensor]
Fault = Callable[[Results], object]

BACKENDS = [name for name, why in gk.available_backends("cpu").items() if why is None and name != "reference"]
if "triton" in BACKENDS:  # the others have been tampered with in the other process
    BACKENDS = ["triton"]
PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "mixed bf16": (torch.bfloat16, torch.float32),
    "mixed fp16": (torch.float16, torch.float32),
}


def _problem(dtype: torch.dtype, parameter_dtype: torch.dtype | None = None) -> Problem:
    """Two tiles of pairs to a discriminator, several tiles of H."""
    return make_problem(
        num_source=24,
        num_target=42,
        num_discriminators=5,
        dim=48,
        hidden=144,
        zero_weights=0.7,
        dtype=dtype,
        parameter_dtype=parameter_dtype,
    )


def _everything_larger(found: Results) -> None:
    for value in found.values():
        value.mul_(1.45)


def _rows_dropped(found: Results) -> None:
    found["w2"][:, ::10] = 0


def _features_smaller(found: Results) -> None:
    found["features"].mul_(0.55)


def _losses_swapped(found: Results) -> None:
    found["loss"][[0, 1]] = found["loss"][[1, 0]]


def _tile_unwritten(found: Results) -> None:
    found["w2"][3, 64:80, 32:64] = 0


def _rows_shifted(found: Results) -> None:
    found["w1"][2, 1:] = found["w1"][2, :-1].clone()


FAULTS: dict[str, Fault] = {
    "everything x 1.45": _everything_larger,
    "a tenth of dW2's rows dropped": _rows_dropped,
    "df x 0.55": _features_smaller,
    "one discriminator's loss swapped with another's": _losses_swapped,
    "one tile unwritten": _tile_unwritten,
    "rows off by one": _rows_shifted,
}


@pytest.fixture(scope="module")
def computed() -> Callable[[str, str], tuple[Problem, Results]]:
    """Problem and results of a backend in a precision, once for all faults."""
    kept: dict[tuple[str, str], tuple[Problem, Results]] = {}

    def of(backend: str, precision: str) -> tuple[Problem, Results]:
        if (backend, precision) not in kept:
            problem = _problem(*PRECISIONS[precision])
            kept[backend, precision] = problem, compute(problem, backend)
        problem, found = kept[backend, precision]
        return problem, {name: value.clone() for name, value in found.items()}

    return of


def _possible(backend: str, precision: str) -> None:
    if backend == "triton" and "bf16" in precision:
        pytest.skip("the interpreter's bfloat16 is not that of a GPU")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_result_is_refused(
    computed: Callable[[str, str], tuple[Problem, Results]], backend: str, precision: str, fault: str
) -> None:
    _possible(backend, precision)
    problem, found = computed(backend, precision)
    assert_close_to_exact(problem, found)
    FAULTS[fault](found)
    with pytest.raises(AssertionError, match="tolerance"):
        assert_close_to_exact(problem, found)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_off_by_one_is_refused(backend: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's mask, which every backend saves last, as that of the unit beside."""
    _possible(backend, precision)
    inside = backends.get(backend)

    class Shifted:
        def __getattr__(self, name: str) -> object:
            return getattr(inside, name)

        def backward(self, tensors, weight, label, saved, *rest):  # type: ignore[no-untyped-def]
            return inside.backward(tensors, weight, label, [*saved[:-1], saved[-1].roll(1, -1)], *rest)

    problem = _problem(*PRECISIONS[precision])
    monkeypatch.setitem(backends._BACKENDS, backend, Shifted())
    with pytest.raises(AssertionError, match="w2, 2-norm: error"):
        assert_close_to_exact(problem, compute(problem, backend))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tile_that_ends_one_pair_early_is_refused(backend: str, precision: str) -> None:
    _possible(backend, precision)
    problem = _problem(*PRECISIONS[precision])
    kept = problem.sample_weight[-1, 2].clone()
    problem.sample_weight[-1, 2] = 0
    found = compute(problem, backend)
    problem.sample_weight[-1, 2] = kept
    with pytest.raises(AssertionError, match="tolerance"):
        assert_close_to_exact(problem, found)


@pytest.mark.parametrize("fault", FAULTS)
def test_tf32_by_hand(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's TF32 is compared with (test_triton_gpu.py) refuses the faults as well."""
    inside = backends.get("torch")

    class Truncated:
        def __getattr__(self, name: str) -> object:
            return getattr(inside, name)

        def forward(self, *args):  # type: ignore[no-untyped-def]
            with TF32Products():
                return inside.forward(*args)

        def backward(self, *args):  # type: ignore[no-untyped-def]
            with TF32Products():
                return inside.backward(*args)

    problem = _problem(torch.float32)
    monkeypatch.setitem(backends._BACKENDS, "torch", Truncated())
    found = compute(problem, "torch")
    with TF32Products():
        plain = compute(problem, "reference")
    with pytest.raises(AssertionError, match="tolerance"):
        assert_close_to_exact(problem, found)  # float32's own tolerance is a narrower one
    assert_close_to_exact(problem, found, plain=plain)
    FAULTS[fault](found)
    with pytest.raises(AssertionError, match="tolerance"):
        assert_close_to_exact(problem, found, plain=plain)


@pytest.mark.parametrize("name", ["loss", *INPUTS])
def test_nan_and_other_dtypes_are_refused(name: str) -> None:
    problem = _problem(torch.float32)
    found = compute(problem, "torch")
    with pytest.raises(AssertionError, match=f"{name}, 2-norm: error nan"):
        assert_close_to_exact(problem, {**found, name: torch.full_like(found[name], torch.nan)})
    with pytest.raises(AssertionError, match=f"{name}: found torch.float64"):
        assert_close_to_exact(problem, {**found, name: found[name].double()})
