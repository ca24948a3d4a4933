"""Compiling the Triton kernels for GPUs that are not there: the host code's own launches, and what the compiler made.

The head's host code runs on fake CUDA tensors; each launch is recorded instead of made, and compiled by Triton's own
`warmup`, with the specialisation that the launch itself would have had.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from gsda_kernels import backends

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes that one block may take: compute capability 8.0, 9.0, 10.0 and the tightest supported chips.
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}


@dataclass(frozen=True)
class Launch:
    """One launch of the host code: `args` with fake tensors, `options` the constexprs and num_warps, num_stages."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch; bytes, and registers a thread."""

    ptx: str
    registers: int
    stack: int
    local_accesses: int
    shared: int


@contextlib.contextmanager
def recorded_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Fake tensors instead of real ones, and a list of launches instead of launches."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, grid, args, options))

    with monkeypatch.context() as patch, FakeTensorMode():
        patch.setattr(JITFunction, "run", record)
        # Entering a device asks the CUDA driver for it.
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        yield found


def head_launches(
    monkeypatch: pytest.MonkeyPatch,
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
) -> tuple[list[Launch], list[Launch]]:
    """The launches of one forward and of one backward on fake CUDA tensors."""
    n, k, parameter_dtype = num_samples, num_discriminators, parameter_dtype or dtype
    shapes = ((k, hidden, dim), (k, hidden), (k, hidden, hidden), (k, hidden), (k, hidden), (k,))
    backend = backends.get("triton")
    with recorded_launches(monkeypatch) as launches:
        place = torch.device("cuda")

        def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=kind, device=place)

        tensors = (empty(n, dim, kind=dtype), *(empty(*shape, kind=parameter_dtype) for shape in shapes))
        weight, label = empty(n, k), empty(n)
        loss, gradient_norm, saved = backend.forward(tensors, weight, label, max_pairs or n * k, needs_grad)
        forward = list(launches)
        launches.clear()
        scale = empty() if loss_feature_scale else None
        gradients = backend.backward(tensors, weight, label, saved, loss, gradient_norm, scale, needs_grad)
        for tensor, gradient, needed in zip(tensors, gradients, needs_grad):
            assert (gradient is not None) == needed
            assert gradient is None or (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
        return forward, list(launches)


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
    """Compiles one launch for one compute capability down to machine code, and reads what that uses."""
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
    local_accesses = len(re.findall(r"\b(?:LDL|STL)\b", _run("nvdisasm", "-c", cubin)))
    return Compiled(made.asm["ptx"], registers, stack, local_accesses, made.metadata.shared)


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
