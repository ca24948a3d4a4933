"""What the C++ backend does beyond the cases that every closed form shares (test_closed_form.py)."""

import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from equivalence import assert_equivalent, compute, make_problem

from gsda_kernels import backends, native
from gsda_kernels.native import NativeBackend

WHY_NOT = NativeBackend().unavailable(torch.device("cpu"))
built = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@built
@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("num_source", "num_target", "dim", "hidden"),
    [
        (1, 0, 1, 1),  # one pair of everything, all of it padding
        (0, 7, 16, 16),  # one vector exactly (AVX-512, float32); more rows than one tile
        (3, 4, 17, 33),  # one column more than whole vectors
        (6, 7, 64, 64),  # whole strips of four vectors
        (6, 6, 112, 112),  # strips of four, two and one vector
        (2, 70, 80, 130),  # deeper than one block of the depth, and not a whole number of them
        (30, 40, 256, 256),  # rows whose stride is moved off a page
    ],
)
def test_edges_of_tiles(
    monkeypatch: pytest.MonkeyPatch,
    instruction_set: str,
    dtype: torch.dtype,
    num_source: int,
    num_target: int,
    dim: int,
    hidden: int,
) -> None:
    backend = NativeBackend(instruction_set)
    if backend.unavailable(torch.device("cpu")):
        pytest.skip(str(backend.unavailable(torch.device("cpu"))))
    monkeypatch.setitem(backends._BACKENDS, "native", backend)
    problem = make_problem(num_source=num_source, num_target=num_target, dim=dim, hidden=hidden, dtype=dtype)
    assert_equivalent(problem, "native")


@built
def test_the_number_of_threads_changes_nothing() -> None:
    problem = make_problem(num_source=20, num_target=20, num_discriminators=7, dim=40, hidden=50, empty=[3])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = compute(problem, "native")
        torch.set_num_threads(3)
        together = compute(problem, "native")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(together[name], value) for name, value in alone.items())


@built
def test_the_interpreter_runs_on_meanwhile() -> None:
    """Another thread gets on in the middle of a call. Nothing makes threads take turns here but a call that lets go."""
    problem = make_problem(num_source=100, num_target=100, num_discriminators=20, dim=128, hidden=512)
    tensors, weight = (problem.features, *problem.disc), problem.sample_weight
    arguments = (tensors, [], weight, problem.domain.to(weight.dtype), weight.numel(), [False] * 7)
    backend, steps, done = NativeBackend(), [0], threading.Event()

    def get_on() -> None:
        while not done.is_set():
            steps[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    other = threading.Thread(target=get_on)
    other.start()
    try:
        for _ in range(1000):  # on a busy machine the other thread misses many calls
            before = steps[0]
            backend.forward(*arguments)
            if steps[0] > before:
                break
        else:
            pytest.fail("no call let the other thread get on")
    finally:
        done.set()
        sys.setswitchinterval(interval)
        other.join()


@built
@pytest.mark.parametrize(
    "spoil", [lambda t: t.double(), lambda t: t.new_empty(2 * t.numel())[::2]], ids=["dtype", "gaps"]
)
@pytest.mark.parametrize("place", ["result", "saved", "gradient", "momentum"])
def test_arrays_to_write_to_are_never_converted(place: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What is written into a converted copy would be lost in silence."""
    problem = make_problem(dim=16, hidden=16)
    tensors, weight, label = [problem.features, *problem.disc], problem.sample_weight, problem.domain.float()
    saved = NativeBackend().saved_like(tensors, weight.numel(), [True] * 7)
    results = [torch.empty(4), torch.empty(4)]
    gradients, momentum = [torch.empty_like(t) for t in tensors], [torch.zeros_like(t) for t in tensors[1:]]

    def call() -> None:
        head, wide = native._EXTENSION, native._EXTENSION.instruction_set() == "avx512"
        kept = (saved[:5], saved[5], 16)
        head.forward(tensors, weight, label, *kept, *results, 1, wide)
        head.backward(tensors, weight, label, *kept, *results, 1.0, gradients, 1, wide)
        head.update(tensors, weight, label, *kept, *results, momentum, 0.1, 0.9, 0.0, False, 1, wide)

    call()
    arrays = {"result": results, "saved": saved, "gradient": gradients, "momentum": momentum}[place]
    arrays[1] = spoil(arrays[1])
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call()


@built
def test_a_nan_stays_out_of_discriminators_without_its_sample() -> None:
    problem = make_problem()
    problem.features[0, 0] = torch.nan
    active = problem.sample_weight[0] != 0
    assert not active.all()
    found = compute(problem, "native")
    assert torch.equal(found["loss"].isnan(), active)
    assert torch.equal(found["gradient_norm"].isnan(), active)


def test_without_the_extension_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(native.importlib, "import_module", missing)
    extension, why_not = native._load()
    assert extension is None
    assert why_not is not None
    assert "the C++ extension was not built or does not load: No module named" in why_not


def test_other_devices_are_refused() -> None:
    assert "for CPUs alone, not for cuda" in str(NativeBackend().unavailable(torch.device("cuda")))
