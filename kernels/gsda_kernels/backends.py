"""The table of backends. A new backend is one new module and one line in `_BACKENDS`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gsda_kernels.closed_form import TorchBackend
from gsda_kernels.native import NativeBackend
from gsda_kernels.sgd import Sgd
from gsda_kernels.triton import TritonBackend


class Backend(Protocol):
    """One way of computing the terms. `tensors` is always (features, w1, b1, w2, b2, w3, b3)."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device`, in a few words; None where it can."""
        ...

    def unsupported(self, dtype: torch.dtype) -> str | None:
        """Why this backend does not compute on features of `dtype`, in a few words; None where it does."""
        ...

    def saved_like(self, tensors: Sequence[Tensor], max_pairs: int, needs_grad: Sequence[bool]) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes that `forward` saves, a function of shapes alone."""
        ...

    def forward(
        self,
        tensors: Sequence[Tensor],
        half_weights: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        max_pairs: int,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """loss (K,), gradient_norm (K,) and what `backward` needs.

        Both results are NaN beyond `max_pairs` active pairs, and so are the gradients to whatever has such a pair.
        `half_weights`: (), or w1 and w2 in the dtype of the features, which can be read in their place.
        """
        ...

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
        """Return gradients to `tensors`; None (uncomputed) where `needs_grad` is False."""
        ...

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
        """Move the parameters, `tensors[1:]`, their momentum and `half_weights` in place; may write over `saved`.

        Returns `found_inf`, 0-d float32: 1 where nothing moved, because `skip` is 1 or a gradient is not finite.
        """
        ...


_BACKENDS: dict[str, Backend] = {
    "torch": TorchBackend(),
    "native": NativeBackend(),
    "triton": TritonBackend(),
}

# Not behind the registered operations, since autograd must see through it: reference.py.
_REFERENCE = "reference"

# Tried in this order by "auto".
_FASTEST_FIRST = ("triton", "native", "torch")


def get(name: str) -> Backend:
    return _BACKENDS[name]


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend by name: None where it can run, else why it cannot.

    Args:
        device: the device to run on; None for the first CUDA device where there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    return {_REFERENCE: None, **{name: backend.unavailable(place) for name, backend in _BACKENDS.items()}}


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Return the backend that runs on `device` with features of `dtype`: `name`, or the fastest usable one for
    ``auto``.

    Raises:
        ValueError: an unknown name, a backend that cannot run on the device or in the dtype, or the reference inside
            `torch.compile`, which refuses double backward.
    """
    device = torch.device(device)
    reasons = available_backends(device)
    for each, backend in _BACKENDS.items():
        reasons[each] = reasons[each] or backend.unsupported(dtype)
    if name == "auto":
        return next(each for each in _FASTEST_FIRST if reasons[each] is None)
    if name not in reasons:
        raise ValueError(f"backend: found {name!r}; expected auto, {', '.join(reasons)}")
    if name == _REFERENCE and torch.compiler.is_compiling():
        reasons[name] = "torch.compile refuses its double backward"
    if reasons[name] is not None:
        usable = ", ".join(each for each, why in reasons.items() if why is None)
        raise ValueError(f"backend: found {name!r}, which cannot run here ({reasons[name]}); expected auto, {usable}")
    return name
