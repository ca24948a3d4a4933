"""Compiling the Triton kernels for GPUs that are not there: the host code's own launches, and what the compiler made.

The head's host code runs on fake CUDA tensors; each launch is recorded instead of made, and compiled by Triton's own
`warmup`, with the specialisation that the launch itself would have had. Tests and benchmarks/tune_triton.py rest on it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from gsda_kernels import backends
from gsda_kernels.sgd import Sgd
from gsda_kernels.triton import head

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes that one block may take, by compute capability.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
TENSOR_CORES = {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma", 12: "mma.sync"}  # by its major number
# Which of a configuration's products a kernel is cut by.
PRODUCT_OF = {
    "first_layer_kernel": "layer",
    "second_layer_kernel": "layer",
    "hidden_gradient_kernel": "layer",
    "hidden_backward_kernel": "layer",
    "jacobian_kernel": "jacobian",
    "weight_gradient_kernel": "weight",
}
# What a forward and a backward launch beside the products.
ALL_KERNELS = (*PRODUCT_OF, "route_kernel", "terms_kernel", "pair_gradient_kernel", "feature_gradient_kernel")


@dataclass(frozen=True)
class Launch:
    """One launch: `args` its tensors and numbers, `options` the constexprs, num_warps and num_stages."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def __call__(self) -> None:
        self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.options)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch: assembly, machine code, bytes, and registers a thread."""

    ptx: str
    sass: str
    registers: int
    stack: int
    local_accesses: int
    shared: int

    def flaw(self, capability: int, tensor_cores: bool) -> str | None:
        """Why this code should not run on a chip, in a few words; None where it should."""
        if self.local_accesses or self.stack:
            return f"spills ({self.local_accesses} accesses, a stack of {self.stack} bytes)"
        if self.shared > SHARED_MEMORY[capability]:
            return f"{self.shared} bytes of shared memory; the chip has {SHARED_MEMORY[capability]}"
        if tensor_cores and TENSOR_CORES[capability // 10] not in self.ptx:
            return f"no {TENSOR_CORES[capability // 10]}"
        return None


@contextlib.contextmanager
def recorded_launches(execute: Collection[str] = ()) -> Iterator[list[Launch]]:
    """Record launches in a list instead of launching; run the kernels that `execute` names as well."""
    found: list[Launch] = []
    run = JITFunction.run

    def record(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, grid, args, options))
        if kernel.fn.__name__ in execute:
            run(kernel, *args, grid=grid, warmup=warmup, **options)

    with mock.patch.object(JITFunction, "run", record):
        yield found


@contextlib.contextmanager
def fake_device(capability: int | None = None) -> Iterator[None]:
    """Fake tensors on a CUDA device that need not exist, of a compute capability that the host code is told."""
    chip = None if capability is None else f"sm_{capability}"
    # Entering a device asks the CUDA driver for it.
    no_device = mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext())
    with no_device, mock.patch.object(head, "_chip", return_value=chip), FakeTensorMode():
        yield


def head_launches(
    *,
    num_samples: int,
    num_discriminators: int,
    dim: int,
    hidden: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None = None,
    max_pairs: int | None = None,
    needs_grad: Sequence[bool] = (True,) * 7,
    loss_feature_scale: bool = False,
    half_weights: bool = False,
    capability: int | None = None,
) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of one forward and of one backward on fake CUDA tensors.

    Args:
        half_weights: whether the forward reads w1 and w2 in the dtype of the features.
    """
    n, k, parameter_dtype = num_samples, num_discriminators, parameter_dtype or dtype
    shapes = ((k, hidden, dim), (k, hidden), (k, hidden, hidden), (k, hidden), (k, hidden), (k,))
    backend = backends.get("triton")
    with fake_device(capability), recorded_launches() as launches:
        place = torch.device("cuda")

        def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=kind, device=place)

        tensors = (empty(n, dim, kind=dtype), *(empty(*shape, kind=parameter_dtype) for shape in shapes))
        half = [empty(*shapes[index], kind=dtype) for index in (0, 2)] if half_weights else []
        weight, label = empty(n, k), empty(n)
        loss, gradient_norm, saved = backend.forward(tensors, half, weight, label, max_pairs or n * k, needs_grad)
        forward = list(launches)
        launches.clear()
        scale = empty() if loss_feature_scale else None
        gradients = backend.backward(tensors, weight, label, saved, loss, gradient_norm, scale, needs_grad)
        for tensor, gradient, needed in zip(tensors, gradients, needs_grad):
            assert (gradient is not None) == needed
            assert gradient is None or (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
        return forward, list(launches)


def update_launches(
    *,
    num_samples: int,
    num_discriminators: int,
    dim: int,
    hidden: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None = None,
    max_pairs: int | None = None,
    half_weights: bool = False,
    capability: int | None = None,
) -> list[Launch]:
    """Return the launches of one update, after its forward, on fake CUDA tensors.

    Args:
        half_weights: whether w1 and w2 lie there in the dtype of the features, too.
    """
    n, k, parameter_dtype = num_samples, num_discriminators, parameter_dtype or dtype
    shapes = ((k, hidden, dim), (k, hidden), (k, hidden, hidden), (k, hidden), (k, hidden), (k,))
    backend = backends.get("triton")
    with fake_device(capability), recorded_launches() as launches:
        place = torch.device("cuda")
        parameters, momentum = (
            [torch.empty(shape, dtype=parameter_dtype, device=place) for shape in shapes] for _ in range(2)
        )
        tensors = (torch.empty(n, dim, dtype=dtype, device=place), *parameters)
        half = [torch.empty(shapes[index], dtype=dtype, device=place) for index in (0, 2)] if half_weights else []
        weight, label, flag = (torch.empty(size, device=place) for size in ((n, k), (n,), ()))
        loss, gradient_norm, saved = backend.forward(
            tensors, half, weight, label, max_pairs or n * k, [False] + [True] * len(parameters)
        )
        launches.clear()
        rule = Sgd(torch.empty((), device=place), 0.9, 1e-3, nesterov=True)
        backend.update(tensors, half, weight, label, saved, loss, gradient_norm, momentum, rule, flag)
        return list(launches)


class _StandInDriver:
    """What the compiler asks of a driver. One device index for each architecture: kernels are cached by it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_launch(launch: Launch, capability: int, folder: Path) -> Compiled:
    """Compile one launch for one compute capability down to machine code, and read what that uses."""
    previous = driver._active
    driver.set_active(_StandInDriver(capability))
    try:
        args = [MockTensor(arg.dtype, arg.shape) if isinstance(arg, Tensor) else arg for arg in launch.args]
        made = launch.kernel.warmup(*args, grid=launch.grid, **launch.options)
    finally:
        driver._active = previous
    cubin = folder / f"{launch.name}-{capability}.cubin"
    cubin.write_bytes(made.asm["cubin"])
    usage = _run("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack = (int(re.findall(rf"\b{field}:(\d+)", usage)[-1]) for field in ("REG", "STACK"))
    sass = _run("nvdisasm", "-c", cubin)
    local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Compiled(made.asm["ptx"], sass, registers, stack, local_accesses, made.metadata.shared)


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
