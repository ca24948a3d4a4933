"""What a contender does, counted: multiply-adds, bytes that must move, the floor they imply, peak memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import BASELINE, INDEXING, REFERENCE, contenders, step
from benchmarks.shapes import SHAPES, HeadInputs, HeadShape, make_inputs
from gsda_kernels import backends


def needed_multiply_adds(shape: HeadShape, discriminators: bool) -> int:
    """Return the closed form's products over active pairs (docs/method.md): 2 D*H + 2 H*H forward, 2 D*H + H*H
    backward.

    The backward takes none where the discriminators are frozen.
    """
    first_layer, second_layer = shape.feature_dim * shape.hidden_dim, shape.hidden_dim**2
    forward, backward = 2 * (first_layer + second_layer), 2 * first_layer + second_layer
    return (forward + (backward if discriminators else 0)) * shape.num_pairs


def counted_multiply_adds(name: str, shape: HeadShape, discriminators: bool) -> int:
    """Multiply-adds of the products a contender runs, by torch's counter where they are torch's own products.

    Backends with products of their own (native, triton) run the needed ones: no pair without weight, no padded row.
    """
    with FlopCounterMode(display=False) as counter:
        if name in (REFERENCE, INDEXING, BASELINE):
            with FakeTensorMode():
                step(contenders("cpu")[name], make_inputs(shape).requires_grad_(True, discriminators))
        elif name == "torch":
            # The counter does not see inside a registered operation.
            inputs = make_inputs(shape)
            tensors, label = (inputs.features, *inputs.disc), inputs.domain.float()
            needs_grad = [True] + [discriminators] * 6
            backend = backends.get(name)
            _, _, saved = backend.forward(tensors, (), inputs.sample_weight, label, inputs.max_pairs, needs_grad)
            upstream = (inputs.grad_loss, inputs.grad_gradient_norm)
            backend.backward(tensors, inputs.sample_weight, label, saved, *upstream, None, needs_grad)
        else:
            return needed_multiply_adds(shape, discriminators)
    return counter.get_total_flops() // 2


def needed_bytes(shape: HeadShape, discriminators: bool, item_size: int) -> int:
    """Return parameters read once forward.

    Where they are trained, read once more backward and their gradients written.
    """
    return (3 if discriminators else 1) * shape.num_parameters * item_size


@cache
def device_peaks(device: str) -> tuple[float, float]:
    """Return (multiply-adds a second, bytes a second) that this device reaches in large float32 products and copies."""
    size = 1024 if device == "cpu" else 8192
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    image, filters = torch.randn(1, 256, 32, 32, device=device), torch.randn(256, 256, 3, 3, device=device)
    source = torch.empty(1 << 26, device=device)
    target = torch.empty_like(source)
    # On a CPU the convolutions' library may use wider vectors than the products' one.
    of_product = size**3 / _best_time(lambda: torch.mm(a, b), device)
    of_convolution = image.numel() * 9 * 256 / _best_time(lambda: F.conv2d(image, filters, padding=1), device)
    of_copy = 2 * source.numel() * source.element_size() / _best_time(lambda: target.copy_(source), device)
    return max(of_product, of_convolution), of_copy


def floor_seconds(shape: HeadShape, discriminators: bool, device: str, item_size: int) -> float:
    """Return the time below which nothing that does the needed work on this device can get."""
    multiply_adds, copied = device_peaks(device)
    return max(
        needed_multiply_adds(shape, discriminators) / multiply_adds,
        needed_bytes(shape, discriminators, item_size) / copied,
    )


def _best_time(run: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_memory(shape: str, contender: str, discriminators: bool, device: str) -> int:
    """Return bytes that a first step needs beside its inputs, at its peak; on a CPU in a process of its own."""
    if device != "cpu":
        inputs = make_inputs(SHAPES[shape], device=device).requires_grad_(True, discriminators)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(contenders(device)[contender], inputs)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", "benchmarks.work", shape, contender, str(int(discriminators))]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def _own_peak_memory(shape: str, contender: str, discriminators: bool) -> int:
    run = contenders("cpu")[contender]
    small = make_inputs(SHAPES["digits"]).requires_grad_(True, discriminators)
    step(run, small)  # loads what is loaded at a first call
    inputs: HeadInputs = make_inputs(SHAPES[shape]).requires_grad_(True, discriminators)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step(run, inputs)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_own_peak_memory(sys.argv[1], sys.argv[2], bool(int(sys.argv[3]))))
