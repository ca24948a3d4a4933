"""Where kernels are launched."""

from __future__ import annotations

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current device, the one that Triton launches on; nothing for tensors of the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
