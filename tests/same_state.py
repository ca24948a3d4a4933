"""Comparison of whole training states: nested dicts and lists of tensors, numbers, strings and None, at tolerance 0."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def differences(found: Any, expected: Any, path: str = "state") -> list[str]:
    """Where two states differ, by path; tensors bit by bit."""
    if type(found) is not type(expected):
        return [path]
    if isinstance(found, Mapping):
        if set(found) != set(expected):
            return [path]
        return [each for key in found for each in differences(found[key], expected[key], f"{path}.{key}")]
    if isinstance(found, list | tuple):
        if len(found) != len(expected):
            return [path]
        pairs = enumerate(zip(found, expected))
        return [each for index, (one, other) in pairs for each in differences(one, other, f"{path}[{index}]")]
    if isinstance(found, torch.Tensor):
        return [] if found.dtype == expected.dtype and torch.equal(found, expected) else [path]
    if isinstance(found, np.ndarray):
        return [] if np.array_equal(found, expected) else [path]
    return [] if found == expected else [path]
