"""The closed form in C++: one call forward and one backward, a discriminator at a time, with its own matrix products.

A discriminator's few dozen pairs stay in the second-level cache from the first layer to the last, its weights are read
where they lie, and its gradients are written once, past the caches. AVX2 or AVX-512, chosen at run time.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from gsda_kernels import buffers
from gsda_kernels.sgd import Sgd, follow, step_where_finite


def _load() -> tuple[ModuleType | None, str | None]:
    """Return the extension and, where it cannot run, why."""
    try:
        extension = importlib.import_module("gsda_kernels.native._head")
    except ImportError as error:
        return None, f"the C++ extension was not built or does not load: {error}"
    if extension.instruction_set() is None:
        return None, "the CPU has neither AVX-512 nor AVX2"
    return extension, None


_EXTENSION, _WHY_NOT = _load()


class NativeBackend:
    """float32 and float64 on a CPU; half-precision inputs are computed in float32."""

    def __init__(self, instruction_set: str | None = None) -> None:
        """`instruction_set`: avx2 or avx512; None for the widest that the CPU has."""
        widest = None if _EXTENSION is None else _EXTENSION.instruction_set()
        self._wide = (instruction_set or widest) == "avx512"
        self._why_not = _WHY_NOT
        if _WHY_NOT is None and self._wide and widest != "avx512":
            self._why_not = "the CPU has no AVX-512"

    def unavailable(self, device: torch.device) -> str | None:
        # Meta tensors carry shapes alone, and every backend knows those.
        return self._why_not if device.type in ("cpu", "meta") else f"C++ code for CPUs alone, not for {device.type}"

    def unsupported(self, dtype: torch.dtype) -> str | None:
        return None

    def saved_like(self, tensors: Sequence[Tensor], max_pairs: int, needs_grad: Sequence[bool]) -> list[Tensor]:
        features, (_, hidden, dim) = tensors[0], tensors[1].shape
        kind = _kind(features)
        saved = [
            buffers.empty((max_pairs, _row_stride(dim)), features, kind),
            *(features.new_empty(max_pairs, dtype=kind) for _ in range(2)),
        ]
        if any(needs_grad[1:]):
            kept = (max_pairs, _row_stride(hidden))
            saved += [buffers.empty(kept, features, each) for each in (kind, kind, torch.uint8)]
        return saved

    def forward(
        self,
        tensors: Sequence[Tensor],
        half_weights: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        max_pairs: int,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        assert _EXTENSION is not None
        saved = self.saved_like(tensors, max_pairs, needs_grad)
        loss, gradient_norm = weight.new_empty(weight.shape[1]), weight.new_empty(weight.shape[1])
        if not _EXTENSION.forward(
            _plain(tensors, weight.dtype),
            *_plain((weight, label), weight.dtype),
            *_apart(saved),
            _row_stride(tensors[1].shape[1]),
            *_lent((loss, gradient_norm)),
            torch.get_num_threads(),
            self._wide,
        ):
            loss.fill_(torch.nan)
            gradient_norm.fill_(torch.nan)
        return loss, gradient_norm, saved

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
        assert _EXTENSION is not None
        gradients = [
            buffers.empty(tensor.shape, tensor, weight.dtype) if needed else None
            for tensor, needed in zip(tensors, needs_grad)
        ]
        if not _EXTENSION.backward(
            _plain(tensors, weight.dtype),
            *_plain((weight, label), weight.dtype),
            *_apart(saved),
            _row_stride(tensors[1].shape[1]),
            *_plain((grad_loss, grad_gradient_norm), weight.dtype),
            1.0 if loss_feature_scale is None else float(loss_feature_scale),
            _lent(gradients),
            torch.get_num_threads(),
            self._wide,
        ):
            gradients = [gradient if gradient is None else gradient.fill_(torch.nan) for gradient in gradients]
        return [
            gradient if gradient is None else gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, tensors)
        ]

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
        assert _EXTENSION is not None
        if tensors[1].dtype != weight.dtype:
            # Parameters in half precision: not those that the products read.
            needs_grad = [False, *[True] * 6]
            upstream = (grad_loss, grad_gradient_norm, None)
            gradients = self.backward(tensors, weight, label, saved, *upstream, needs_grad)
            found = [gradient for gradient in gradients if gradient is not None]
            return step_where_finite(tensors[1:], found, momentum, half_weights, rule, skip)
        if bool(skip):
            return torch.ones_like(skip)
        bad = _EXTENSION.update(
            _plain(tensors, weight.dtype),
            *_plain((weight, label), weight.dtype),
            *_apart(saved),
            _row_stride(tensors[1].shape[1]),
            *_plain((grad_loss, grad_gradient_norm), weight.dtype),
            _lent(momentum),
            float(rule.learning_rate),
            rule.momentum,
            rule.weight_decay,
            rule.nesterov,
            torch.get_num_threads(),
            self._wide,
        )
        follow(half_weights, tensors[1:])
        return torch.full_like(skip, float(bad))


def _kind(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _apart(saved: Sequence[Tensor]) -> tuple[list[Any], Any]:
    """Return what is saved as numbers, and the mask, where it is kept."""
    numbers, mask = saved[:5], saved[5] if len(saved) > 5 else None
    return _lent(numbers), *_lent([mask])


def _plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Any]:
    return _lent([tensor if _is_plain(tensor, dtype) else tensor.to(dtype).contiguous() for tensor in tensors])


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous()


def _lent(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return the tensors as the extension takes them: a step lends it seventy, and `Tensor.__dlpack__` in Python, which
    it would call itself, takes ten times as long.
    """
    return [None if tensor is None else to_dlpack(tensor) for tensor in tensors]


def _row_stride(size: int) -> int:
    """Return elements from one pair's row to the next: whole cache lines, but never the same place in every page.

    Rows at a power of two would compete for the same few lines of the first-level cache.
    """
    padded = -(-size // 16) * 16
    return padded + 16 if padded % 256 == 0 else padded
