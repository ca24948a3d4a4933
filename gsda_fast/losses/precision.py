"""In which precision the losses compute, and how they report tensors that do not fit each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def widen(value: Any) -> Any:
    """Return half-precision tensors, also those in a tuple, as float32; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(widen(each) for each in value)
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _device(values: Any) -> str:
    for value in values:
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, tuple):
            return _device(value)
    return "cpu"


def wide(function: Callable[P, R]) -> Callable[P, R]:
    """Run a loss outside autocast, on float32 where its tensors are narrower; float64 stays.

    Distances, norms and logarithms of half-precision numbers have no digits left, and autocast would make them such.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(_device((*args, *kwargs.values())), enabled=False):
            return function(*(widen(each) for each in args), **{name: widen(each) for name, each in kwargs.items()})

    return run


def check_matrix(name: str, value: Tensor, columns: int | None = None, rows: int | None = None) -> None:
    """Raise if a tensor is not a matrix, or not one of so many rows and columns.

    Raises:
        ValueError: names the argument, the shape found and the shape expected.
    """
    wrong = value.dim() != 2 or value.shape[0] == 0
    wrong = wrong or (columns is not None and value.shape[1] != columns) or (rows is not None and len(value) != rows)
    if wrong:
        expected = f"({'N > 0' if rows is None else rows}, {'columns' if columns is None else columns})"
        raise ValueError(f"{name}: found shape {tuple(value.shape)}; expected {expected}")


def check_labels(name: str, value: Tensor, rows: int) -> None:
    """Raise if labels are not one integer a row.

    Raises:
        ValueError: names the argument, what was found and what was expected.
    """
    if value.shape != (rows,) or value.is_floating_point():
        raise ValueError(f"{name}: found {value.dtype} of shape {tuple(value.shape)}; expected integers ({rows},)")
