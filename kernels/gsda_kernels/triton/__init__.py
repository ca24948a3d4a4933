"""The Triton backend. Triton itself is imported at the first call, and no device is asked for anything before it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from gsda_kernels.sgd import Sgd

_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton's own switch, which it reads when it is imported: kernels then run on CPU tensors, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton's own bound, and the least that has tensor cores for bfloat16.
_LEAST_CAPABILITY = (8, 0)


class TritonBackend:
    """float32, bfloat16 and float16 on a CUDA device, float32 parameters beside half-precision features included."""

    def unavailable(self, device: torch.device) -> str | None:
        if not _INSTALLED:
            return "triton is not installed"
        if _INTERPRETED and device.type == "cpu":
            return None
        if device.type != "cuda" or not torch.cuda.is_available():
            return "no CUDA device"
        if torch.version.hip is not None:
            return "AMD GPUs are not supported"
        # Not `get_device_capability`: torch.compile takes these properties for the constants that they are.
        properties = torch.cuda.get_device_properties(device)
        if (properties.major, properties.minor) < _LEAST_CAPABILITY:
            found, least = f"{properties.major}.{properties.minor}", "{}.{}".format(*_LEAST_CAPABILITY)
            return f"compute capability {found}; expected {least} or newer"
        return None

    def unsupported(self, dtype: torch.dtype) -> str | None:
        return "no float64" if dtype == torch.float64 else None

    def saved_like(self, tensors: Sequence[Tensor], max_pairs: int, needs_grad: Sequence[bool]) -> list[Tensor]:
        from gsda_kernels.triton import head

        return head.Saved.empty(tensors, max_pairs, needs_grad).tensors()

    def forward(
        self,
        tensors: Sequence[Tensor],
        half_weights: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        max_pairs: int,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        from gsda_kernels.triton import head

        return head.forward(tensors, half_weights, weight, label, max_pairs, needs_grad)

    def backward(
        self,
        tensors: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        saved: Sequence[Tensor],
        grad_loss: Tensor,
        grad_gradient_norm: Tensor,
        loss_feature_scale: Tensor | None,
        needs_grad: Sequence[bool],
    ) -> list[Tensor | None]:
        from gsda_kernels.triton import head

        return head.backward(
            tensors, weight, label, saved, grad_loss, grad_gradient_norm, loss_feature_scale, needs_grad
        )

    def update(
        self,
        tensors: Sequence[Tensor],
        half_weights: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        saved: Sequence[Tensor],
        grad_loss: Tensor,
        grad_gradient_norm: Tensor,
        momentum: Sequence[Tensor],
        rule: Sgd,
        skip: Tensor,
    ) -> Tensor:
        from gsda_kernels.triton import head

        return head.update(
            tensors, half_weights, weight, label, saved, grad_loss, grad_gradient_norm, momentum, rule, skip
        )
