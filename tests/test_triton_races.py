"""No program of a Triton kernel depends on another: `TRITON_INTERPRET=1 pytest`, as for test_triton_interpreter.py."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gsda_kernels import backends
from gsda_kernels.sgd import Sgd

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
races = pytest.importorskip("races")
recorded = races.recorded
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("loops over loaded bounds need Triton 3.8 or NumPy < 2.4 in the interpreter", allow_module_level=True)

SINGLE, HALF = torch.float32, torch.float16
EVERYTHING, ENCODER = (True,) * 7, (True,) + (False,) * 6

CASES: dict[str, dict[str, Any]] = {
    "two tiles of pairs, several of H and D, nothing aligned": {
        "shape": (71, 2, 18, 36),
        "zeros": 0.05,
    },
    "half precision, aligned": {"shape": (40, 2, 32, 80), "dtype": HALF, "parameters": HALF},
    "encoder's step": {"shape": (20, 2, 32, 48), "needs_grad": ENCODER},
    "mixed, first and last empty": {"shape": (20, 4, 16, 32), "dtype": HALF, "empty": (0, 3)},
    "three tiles of pairs": {"shape": (260, 1, 16, 32), "dtype": HALF, "zeros": 0.0},
    "no pair": {"shape": (9, 3, 16, 16), "empty": (0, 1, 2), "bound": 27},
    "one pair": {"shape": (1, 1, 1, 1), "zeros": 0.0},
    "a loose bound": {"shape": (12, 3, 20, 16), "bound": 36},
    "routed in blocks": {"shape": (520, 2, 8, 16), "zeros": 0.98},
    "only b2": {"shape": (20, 2, 16, 16), "needs_grad": tuple(index == 4 for index in range(7))},
    "only w1 and w3": {"shape": (20, 2, 16, 16), "needs_grad": tuple(index in (1, 5) for index in range(7))},
}


@pytest.fixture(autouse=True)
def _allocations_are_poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = SINGLE,
    parameters: torch.dtype = SINGLE,
    zeros: float = 0.4,
    empty: tuple[int, ...] = (),
    bound: int | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, int]:
    """The tensors of a backend's call, the pairs' weights, the domains' labels and the bound on pairs."""
    n, k, d, h = shape
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    weight = torch.rand(n, k, generator=generator) + 0.05
    weight[torch.rand(n, k, generator=generator) < zeros] = 0
    weight[:, list(empty)] = 0
    stacked = (draw(k, h, d) / d**0.5, draw(k, h), draw(k, h, h) / h**0.5, draw(k, h), draw(k, h) / h**0.5, draw(k))
    tensors = (draw(n, d).to(dtype), *(each.to(parameters) for each in stacked))
    return tensors, weight, (torch.arange(n) < n // 2).float(), bound or max(1, int(weight.count_nonzero()))


def _step(needs_grad: tuple[bool, ...] = EVERYTHING, **case: Any) -> list[Tensor]:
    """Both results and all gradients."""
    tensors, weight, label, bound = _inputs(**case)
    backend, k, half = backends.get("triton"), weight.shape[1], ()
    loss, gradient_norm, saved = backend.forward(tensors, half, weight, label, bound, needs_grad)
    upstream = torch.linspace(-1, 1, k), torch.full((1,), 0.7).expand(k)
    gradients = backend.backward(tensors, weight, label, saved, *upstream, torch.tensor(-0.5), needs_grad)
    return [loss, gradient_norm, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("case", CASES)
def test_no_race_no_stray_access_and_the_same_numbers_in_every_order(case: str) -> None:
    with recorded() as recorder:
        expected = _step(**CASES[case])
        assert all(each.isfinite().all() for each in expected)
        # One other order for each case, by turns: what matters is that it is another one.
        recorder.order = ("reversed", 7)[list(CASES).index(case) % 2]
        for found, value in zip(_step(**CASES[case]), expected, strict=True):
            assert torch.equal(found, value), f"order {recorder.order}"
    assert not recorder.findings
    assert {"route_kernel", "first_layer_kernel", "terms_kernel"} <= recorder.programs.keys()


@pytest.mark.parametrize(
    ("case", "skip"),
    [
        ("two tiles of pairs, several of H and D, nothing aligned", 0.0),
        ("half precision, aligned", 0.0),
        ("mixed, first and last empty", 0.0),
        ("mixed, first and last empty", 1.0),
        ("no pair", 0.0),
        ("one pair", 0.0),
        ("one pair", 1.0),
    ],
)
def test_an_update_in_place_reads_nothing_that_another_program_writes(case: str, skip: float) -> None:
    """Parameters and momentum move where they are read, W2's own cells for the gradient of w3; copies follow."""
    with recorded() as recorder:
        expected = _update(skip, **CASES[case])
        recorder.order = "reversed"
        for found, value in zip(_update(skip, **CASES[case]), expected, strict=True):
            assert torch.equal(found, value)
    assert not recorder.findings
    assert {"bad_operands_kernel", "small_update_kernel"} <= recorder.programs.keys()


def _update(skip: float, **case: Any) -> list[Tensor]:
    """Parameters, momentum, flag and, of mixed operands, half-precision copies of w1 and w2 after a step."""
    tensors, weight, label, bound = _inputs(**case)
    features, mixed = tensors[0], tensors[0].dtype != tensors[1].dtype
    half = [tensors[index].to(features.dtype) for index in (1, 3)] if mixed else []
    momentum = [torch.full_like(tensor, 0.25) for tensor in tensors[1:]]
    backend, needs_grad = backends.get("triton"), (False,) + (True,) * 6
    loss, _, saved = backend.forward(tensors, half, weight, label, bound, needs_grad)
    rule = Sgd(torch.tensor(0.1), 0.9, 1e-3, nesterov=True)
    flag = torch.tensor(skip)
    found_inf = backend.update(tensors, half, weight, label, saved, torch.ones_like(loss), -loss, momentum, rule, flag)
    assert float(found_inf) == skip
    assert all(torch.equal(copy, tensors[index].to(features.dtype)) for copy, index in zip(half, (1, 3)))
    return [*tensors[1:], *momentum, *half, found_inf]


@triton.jit
def planted_kernel(source, target, size, SHARE: tl.constexpr, AHEAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies 16 elements a program; SHARE programs to a store, AHEAD elements past what is stored."""
    cells = tl.program_id(0) * 16 + tl.arange(0, 16)
    value = tl.load(source + cells + AHEAD, mask=cells < size, other=0.0)
    tl.store(target + cells // SHARE, value, mask=cells < size)


@pytest.mark.parametrize(
    ("size", "share", "ahead", "in_place", "finding"),
    [
        pytest.param(64, 1, 0, False, None, id="none"),
        pytest.param(64, 32, 0, False, "addresses stored by two programs", id="a store shared by two programs"),
        pytest.param(64, 1, 16, True, "loaded by one program and stored by another", id="a neighbour's cells read"),
        pytest.param(80, 1, 0, False, "stores outside all tensors", id="a mask that is one tile too wide"),
        pytest.param(65, 1, 0, False, "1 stores outside all tensors", id="a mask that is one element too wide"),
    ],
)
def test_a_planted_fault_is_found(size: int, share: int, ahead: int, in_place: bool, finding: str | None) -> None:
    source, target = torch.ones(112), torch.zeros(96)  # beyond the first 64, room for what strays
    with recorded() as recorder:
        given = target if in_place else target[:64]
        planted_kernel[(5 if size > 64 else 4,)](given if in_place else source, given, size, SHARE=share, AHEAD=ahead)
    assert recorder.programs == {"planted_kernel": 5 if size > 64 else 4}
    if finding is None:
        assert not recorder.findings
    else:
        assert any(finding in each for each in recorder.findings), recorder.findings


def test_unwritten_memory_and_a_grid_too_large_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded() as recorder:
        planted_kernel[(1,)](torch.empty(16), torch.zeros(16), 16, SHARE=1, AHEAD=0)
    assert recorder.findings == ["planted_kernel: 16 unwritten values loaded"]
    # Of the largest grid every program would run, for half a minute.
    assert races._MOST_IN_A_GRID == 2**16 - 1
    monkeypatch.setattr(races, "_MOST_IN_A_GRID", 7)
    for rows, found in ((7, []), (8, ["planted_kernel: a grid of (1, 8, 1)"])):
        with recorded() as recorder:
            planted_kernel[(1, rows)](torch.ones(16), torch.zeros(16), 0, SHARE=1, AHEAD=0)
        assert recorder.findings == found


def test_a_sum_that_depends_on_the_order_is_found() -> None:
    """The order of programs is indeed another one."""
    results = []
    with recorded() as recorder:
        for order in (None, "reversed"):
            recorder.order = order
            target = torch.zeros(16)
            planted_kernel[(4,)](torch.arange(64.0), target, 64, SHARE=16 * 16, AHEAD=0)
            results.append(float(target[0]))
    assert results[0] != results[1]
