"""All random generators of a process as one value: PyTorch's, of the CPU and of the GPU, NumPy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed all of them, with a number from 0 to 2^63 - 1."""
    torch.manual_seed(seed)
    # NumPy's global generator, which transforms of others may draw from; this package does not.
    np.random.seed([seed & 0xFFFF_FFFF, seed >> 32])  # noqa: NPY002
    random.seed(seed)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Their states, as tensors and plain numbers on the host.

    Args:
        device: whose generator is one of them, where it is a GPU.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words, dtype=torch.int64), next_gauss],
    }


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Undo `generator_states`: restore them."""
    torch.set_rng_state(states["torch"].cpu())
    # A checkpoint may be read on a machine without a GPU, or go on there.
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, next_gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), next_gauss))
