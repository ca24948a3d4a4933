"""The Triton backend without a GPU: its host code on fake CUDA tensors, and every kernel compiled to machine code."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import gsda_kernels as gk
from gsda_kernels import backends

pytest.importorskip("triton")
if gk.available_backends("cpu")["triton"] is None:
    pytest.skip("TRITON_INTERPRET is set: such a process cannot compile", allow_module_level=True)

from benchmarks.cross_compile import (
    PRODUCT_OF,
    SHARED_MEMORY,
    TENSOR_CORES,
    Launch,
    compile_launch,
    fake_device,
    head_launches,
    recorded_launches,
    update_launches,
)

HALF, SINGLE = torch.bfloat16, torch.float32
VISDA = {"num_discriminators": 17, "dim": 256, "hidden": 1024}

FORWARD = [
    "route_kernel",
    "first_layer_kernel",
    "second_layer_kernel",
    "hidden_gradient_kernel",
    "jacobian_kernel",
    "terms_kernel",
]
CAPABILITIES = (80, 90, 100)

# name: number of samples, dtype of the features, dtype of the parameters, TF32 allowed.
CASES = {
    "bf16, small batch": (72, HALF, HALF, False),
    "bf16, medium batch": (256, HALF, HALF, False),
    "bf16, large batch": (1024, HALF, HALF, False),
    "mixed, small batch": (72, HALF, SINGLE, False),
    "mixed, medium batch": (256, HALF, SINGLE, False),
    "mixed, large batch": (1024, HALF, SINGLE, False),
    "tf32, small batch": (72, SINGLE, SINGLE, True),
    "tf32, medium batch": (256, SINGLE, SINGLE, True),
    "tf32, large batch": (1024, SINGLE, SINGLE, True),
    "float32": (72, SINGLE, SINGLE, False),
}
# Between them every kernel on every chip, and every dtype and size class on one.
QUICK = [("bf16, small batch", 80), ("bf16, medium batch", 90), ("bf16, large batch", 100)] + [
    (name, 90) for name in ("mixed, small batch", "tf32, medium batch", "float32")
]


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def _case(name: str, capability: int, half_weights: bool = False) -> list[Launch]:
    num_samples, dtype, parameter_dtype, tf32 = CASES[name]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        forward, backward = head_launches(
            num_samples=num_samples,
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            half_weights=half_weights,
            capability=capability,
            **VISDA,
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return forward + backward


def _assert_compiles(launches: list[Launch], capability: int, folder: Path, tensor_cores: bool) -> None:
    for launch in launches:
        made = compile_launch(launch, capability, folder)
        found = f"{launch.name} {launch.options}: {made.registers} registers, {made.shared} bytes of shared memory"
        flaw = made.flaw(capability, tensor_cores and launch.name in PRODUCT_OF)
        assert flaw is None, f"{found}; {flaw}"
        if launch.name in PRODUCT_OF and not tensor_cores:
            assert TENSOR_CORES[capability // 10] not in made.ptx, found


@pytest.mark.parametrize(("name", "capability"), QUICK)
def test_compiles(name: str, capability: int, tmp_path: Path) -> None:
    _assert_compiles(_case(name, capability), capability, tmp_path, tensor_cores=name != "float32")


MIXED = [name for name in CASES if name.startswith("mixed")]


@pytest.mark.parametrize("name", [MIXED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MIXED[1:])])
def test_a_forward_that_reads_copies_in_half_precision_compiles(name: str, tmp_path: Path) -> None:
    launches = [launch for launch in _case(name, 90, half_weights=True) if launch.name in FORWARD]
    _assert_compiles(launches, 90, tmp_path, tensor_cores=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "capability"), [each for each in itertools.product(CASES, CAPABILITIES) if each not in QUICK]
)
def test_compiles_everywhere(name: str, capability: int, tmp_path: Path) -> None:
    _assert_compiles(_case(name, capability), capability, tmp_path, tensor_cores=name != "float32")


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"), [(torch.float16, None), (HALF, None), (HALF, SINGLE), (SINGLE, None)], ids=str
)
def test_compiles_for_dimensions_that_align_with_nothing(
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None,
    capability: int,
    tmp_path: Path,
) -> None:
    forward, backward = head_launches(
        num_samples=71,
        num_discriminators=3,
        dim=37,
        hidden=101,
        dtype=dtype,
        parameter_dtype=parameter_dtype,
        capability=capability,
    )
    _assert_compiles(forward + backward, capability, tmp_path, tensor_cores=dtype != SINGLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_fits_the_chips_with_the_least_shared_memory(name: str, tmp_path: Path) -> None:
    for launch in _case(name, 86):
        assert compile_launch(launch, 86, tmp_path).shared <= SHARED_MEMORY[86]


@pytest.mark.parametrize(
    ("wanted", "backward"),
    [
        pytest.param("", [], id="nothing"),
        pytest.param("features", ["feature_gradient_kernel"], id="encoder step: two units of work, no product more"),
        pytest.param(
            "w1 b1 w2 b2 w3 b3",
            ["pair_gradient_kernel", "weight_gradient_kernel", "hidden_backward_kernel", "weight_gradient_kernel"],
            id="discriminator step",
        ),
        pytest.param("b3", ["pair_gradient_kernel"], id="no product for b3"),
        pytest.param("w1", ["pair_gradient_kernel", "weight_gradient_kernel"], id="layer 1 only"),
        pytest.param("b2", ["pair_gradient_kernel", "weight_gradient_kernel"], id="no g1 for b2"),
        pytest.param(
            "w3", ["pair_gradient_kernel", "hidden_backward_kernel", "weight_gradient_kernel"], id="layer 2 for w3"
        ),
    ],
)
def test_launches(wanted: str, backward: list[str]) -> None:
    names = ("features", "w1", "b1", "w2", "b2", "w3", "b3")
    needs_grad = [name in wanted.split() for name in names]
    found = head_launches(num_samples=72, dtype=HALF, needs_grad=needs_grad, **VISDA)
    assert [launch.name for launch in found[0]] == FORWARD
    assert [launch.name for launch in found[1]] == backward


def test_weight_gradients_without_their_product() -> None:
    needs_grad = [name == "b2" for name in ("features", "w1", "b1", "w2", "b2", "w3", "b3")]
    _, backward = head_launches(num_samples=72, dtype=HALF, needs_grad=needs_grad, **VISDA)
    assert backward[-1].grid[0] == 1
    assert not backward[-1].options["WANT_WEIGHT"]
    assert not backward[-1].options["WANT_W3"]


def test_grids_and_buffers_follow_max_pairs() -> None:
    """Three pairs of a source sample out of K: the bound that the host knows, not N*K."""
    shape = {"num_samples": 72, "dtype": HALF, **VISDA}
    bounded, _ = head_launches(max_pairs=3 * 36 + 17 * 36, **shape)
    every, _ = head_launches(**shape)
    assert [launch.grid for launch in bounded[1:5]] == [(16 * 29,), (16 * 29,), (16 * 29,), (8 * 29,)]
    assert [launch.grid for launch in every[1:5]] == [(16 * 34,), (16 * 34,), (16 * 34,), (8 * 34,)]


UPDATE = [
    "pair_gradient_kernel",
    "hidden_backward_kernel",
    "bad_operands_kernel",
    "weight_gradient_kernel",
    "weight_gradient_kernel",
    "small_update_kernel",
]


def _update(name: str, capability: int) -> list[Launch]:
    num_samples, dtype, parameter_dtype, tf32 = CASES[name]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        return update_launches(
            num_samples=num_samples,
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            half_weights=dtype != parameter_dtype,
            capability=capability,
            **VISDA,
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_launches_of_an_update() -> None:
    """No gradient of a large matrix is among the tensors, and every one of those is a parameter or its momentum."""
    launches = _update("mixed, small batch", 90)
    assert [launch.name for launch in launches] == UPDATE
    # Beside them w1 and w2 in half precision, one of each.
    large = {
        id(arg): arg.shape
        for launch in launches
        for arg in launch.args
        if isinstance(arg, torch.Tensor) and arg.numel() >= 17 * 1024 * 256
    }
    assert sorted(large.values()) == 3 * [(17, 1024, 256)] + 3 * [(17, 1024, 1024)]


@pytest.mark.parametrize(
    ("name", "capability"),
    [("mixed, small batch", 80), ("bf16, medium batch", 90), ("float32", 90)],
)
def test_an_update_compiles(name: str, capability: int, tmp_path: Path) -> None:
    own = [launch for launch in _update(name, capability) if launch.name in (*UPDATE[2:4], UPDATE[5])]
    _assert_compiles(own, capability, tmp_path, tensor_cores=name != "float32")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), list(itertools.product(CASES, CAPABILITIES)))
def test_an_update_compiles_everywhere(name: str, capability: int, tmp_path: Path) -> None:
    _assert_compiles(_update(name, capability), capability, tmp_path, tensor_cores=name != "float32")


@pytest.mark.parametrize("layer", ["first_layer_kernel", "second_layer_kernel"])
def test_relu_keeps_a_nan(layer: str, tmp_path: Path) -> None:
    """A GPU's `max` of a NaN and 0 is 0; the interpreter's is the NaN."""
    (launch,) = (each for each in _case("bf16, small batch", 90) if each.name == layer)
    assert "max.f32" not in compile_launch(launch, 90, tmp_path).ptx


@pytest.mark.parametrize(("num_samples", "num_discriminators"), [(72, 1), (70_000, 1), (70_000, 64)])
def test_no_grid_is_larger_than_a_gpu_takes(num_samples: int, num_discriminators: int) -> None:
    shape = {"num_samples": num_samples, "num_discriminators": num_discriminators, "dim": 256, "hidden": 64}
    for launch in itertools.chain(*head_launches(dtype=HALF, **shape)):
        assert all(size <= 65535 for size in launch.grid[1:]), f"{launch.name}: {launch.grid}"


def test_forward_and_backward_under_compile() -> None:
    """The fake kernels of the registered operations agree with what the backend returns."""
    backend = backends.get("triton")
    with fake_device(), recorded_launches():
        k, h, d, n = 3, 8, 6, 5
        shapes = ((n, d), (k, h, d), (k, h), (k, h, h), (k, h), (k, h), (k,))
        tensors = tuple(torch.empty(shape, device="cuda") for shape in shapes)
        weight, label = torch.empty(n, k, device="cuda"), torch.empty(n, device="cuda")
        _, _, saved = backend.forward(tensors, (), weight, label, 7, [True] * 7)
        expected = backend.saved_like(tensors, 7, [True] * 7)
    assert [(t.shape, t.dtype, t.device) for t in saved] == [(t.shape, t.dtype, t.device) for t in expected]


@pytest.mark.parametrize(
    "synchronizes",
    [lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: x[x > 0]],
    ids=["nonzero", "item", "boolean index"],
)
def test_fake_tensors_refuse_what_waits_for_the_device(
    synchronizes: Callable[[torch.Tensor], object],
) -> None:
    """What the tests above rest on."""
    with (
        fake_device(),
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
    ):
        synchronizes(torch.empty(3, 4, device="cuda"))


def test_availability(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.get("triton")
    assert backend.unavailable(torch.device("cpu")) == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable(torch.device("cuda")) == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=0))
    assert backend.unavailable(torch.device("cuda")) is None
    assert backends.resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert backends.resolve_backend("auto", "cuda", torch.float64) == "torch"
    with pytest.raises(
        ValueError, match=r"backend: found 'triton', which cannot run here \(no float64\); expected auto"
    ):
        backends.resolve_backend("triton", "cuda", torch.float64)
    monkeypatch.setattr("gsda_kernels.triton._INSTALLED", False)
    assert backend.unavailable(torch.device("cuda")) == "triton is not installed"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        pytest.param((9, 0), None, None, id="Hopper"),
        pytest.param((12, 0), None, None, id="newer than any row of the table"),
        pytest.param((7, 5), None, "compute capability 7.5; expected 8.0 or newer", id="Turing"),
        pytest.param((9, 4), "7.0", "AMD GPUs are not supported", id="ROCm calls its devices cuda"),
    ],
)
def test_chips_that_are_not_supported(
    capability: tuple[int, int], hip: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    major, minor = capability
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major, minor=minor))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert gk.available_backends("cuda")["triton"] == reason
    assert backends.resolve_backend("auto", "cuda", HALF) == ("triton" if reason is None else "torch")


def test_import_loads_no_triton_and_asks_no_device() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import gsda_kernels;"
        "assert before or 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
