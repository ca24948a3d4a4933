"""Races, stray accesses and unwritten memory in Triton kernels, found in the interpreter although it runs one program
after the other.

Every launch keeps the addresses that each of its programs loads and stores. Reported are

- an address that two programs store, or that one loads and another stores: the order of programs is not defined;
- an address outside all tensors of the launch;
- a load of what nobody wrote: NaN, or the largest integer, which `torch.empty` is filled with under
  `torch.use_deterministic_algorithms`;
- a grid beyond what a GPU takes.

The programs run in an order that the caller chooses, so that results can be compared between orders.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, interpreter_builder

_MOST_IN_A_GRID = 65535  # in all dimensions but the first

Order = str | int | None


@dataclass
class Recorder:
    """What was found in the launches since `recorded` was entered.

    Attributes:
        order: in which programs run: None as the interpreter does, ``reversed``, or the seed of a shuffle.
        findings: one line each. programs: how many ran, by kernel.
    """

    order: Order = None
    findings: list[str] = field(default_factory=list)
    programs: dict[str, int] = field(default_factory=dict)

    def permutation(self, count: int) -> list[int]:
        numbers = list(range(count))
        if self.order == "reversed":
            numbers.reverse()
        elif self.order is not None:
            random.Random(self.order).shuffle(numbers)
        return numbers


@dataclass
class _Launch:
    name: str
    extents: list[tuple[int, int]]
    loads: list[tuple[np.ndarray, int]] = field(default_factory=list)
    stores: list[tuple[np.ndarray, int]] = field(default_factory=list)
    unwritten: int = 0
    grid: tuple[int, int, int] = (1, 1, 1)
    order: list[int] = field(default_factory=list)
    started: int = 0
    program: int = 0

    def findings(self) -> Iterator[str]:
        if max(self.grid[1:]) > _MOST_IN_A_GRID:
            yield f"{self.name}: a grid of {self.grid}"
        if self.unwritten:
            yield f"{self.name}: {self.unwritten} unwritten values loaded"
        stored, stored_by = _joined(self.stores)
        loaded, loaded_by = _joined(self.loads)
        for what, addresses in (("stores", stored), ("loads", loaded)):
            outside = ~np.any([(addresses >= low) & (addresses < high) for low, high in self.extents], axis=0)
            if outside.any():
                yield f"{self.name}: {int(outside.sum())} {what} outside all tensors"
        if not len(stored):
            return
        by_address = np.lexsort((stored_by, stored))
        stored, stored_by = stored[by_address], stored_by[by_address]
        twice = (stored[1:] == stored[:-1]) & (stored_by[1:] != stored_by[:-1])
        if twice.any():
            yield f"{self.name}: {int(twice.sum())} addresses stored by two programs"
        if len(loaded):
            owned, first = np.unique(stored, return_index=True)
            place = np.minimum(np.searchsorted(owned, loaded), len(owned) - 1)
            foreign = (owned[place] == loaded) & (stored_by[first][place] != loaded_by)
            if foreign.any():
                yield f"{self.name}: {int(foreign.sum())} addresses loaded by one program and stored by another"


def _joined(accesses: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses, and the program of each."""
    if not accesses:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    programs = [np.full(len(addresses), program, np.int32) for addresses, program in accesses]
    return np.concatenate([addresses for addresses, _ in accesses]), np.concatenate(programs)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * reach


@contextlib.contextmanager
def recorded() -> Iterator[Recorder]:
    """Watches every launch of the interpreter."""
    builder = type(interpreter_builder)
    recorder = Recorder()
    current: list[_Launch] = []
    run, set_dimensions, set_program = GridExecutor.__call__, builder.set_grid_dim, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        tensors = [each for each in (*args, *options.values()) if isinstance(each, torch.Tensor) and each.numel()]
        current[:] = [_Launch(self.fn.__name__, sorted({_extent(tensor) for tensor in tensors}))]
        try:
            return run(self, *args, **options)
        finally:
            (each,) = current
            current.clear()
            recorder.findings += each.findings()
            recorder.programs[each.name] = recorder.programs.get(each.name, 0) + each.started

    def dimensions(self: Any, x: int, y: int, z: int) -> None:
        current[0].grid, current[0].order = (x, y, z), recorder.permutation(x * y * z)
        set_dimensions(self, x, y, z)

    def program(self: Any, x: int, y: int, z: int) -> None:
        each = current[0]
        each.program = each.order[each.started]
        each.started += 1
        _, height, depth = each.grid
        set_program(self, each.program // (height * depth), each.program // depth % height, each.program % depth)

    def addresses(pointers: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        inside = np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(bool)
        return inside, pointers.data.reshape(-1)[inside].astype(np.int64)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found = load(self, pointers, mask, *rest)
        inside, places = addresses(pointers, mask)
        each = current[0]
        each.loads.append((np.unique(places), each.program))
        values = np.ascontiguousarray(found.data).reshape(-1)[inside]
        poison = np.isnan(values) if values.dtype.kind == "f" else values == np.iinfo(values.dtype).max
        each.unwritten += int(poison.sum())
        return found

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        # Lanes of one program that store to one address hold one value, as on a GPU.
        each = current[0]
        each.stores.append((np.unique(addresses(pointers, mask)[1]), each.program))
        return store(self, pointers, value, mask, *rest)

    with contextlib.ExitStack() as patches:
        for owner, name, changed in (
            (GridExecutor, "__call__", launch),
            (builder, "set_grid_dim", dimensions),
            (builder, "set_grid_idx", program),
            (builder, "create_masked_load", masked_load),
            (builder, "create_masked_store", masked_store),
        ):
            patches.enter_context(mock.patch.object(owner, name, changed))
        yield recorder
