"""Batches of embeddings: rows gathered from memory, in place of images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gsda_fast.data.batches import Batch, Crops, Role, to_device
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import IntArray, SamplingPlan, view_numbers
from gsda_fast.errors import UsageError


class FeatureLoader:
    """Gathers the rows of a plan's samples. What a `Batch` calls images are rows (B, D) here.

    Training takes one of a sample's stored views at random, a function of the plan's seed and the slot, for each of the
    target's views in a batch anew; evaluation takes view 0. Where only one is stored, all are alike.

    Args:
        source, target: domains with rows.
        batch_size: rows in a batch of `evaluate`.
        device: where batches are put.
        on_device: keep all rows there, in the type in which they are stored.
        dtype: of the batches.

    Raises:
        UsageError: rows of different sizes, or more of them than fit.
    """

    def __init__(
        self,
        source: ImageDomain,
        target: ImageDomain,
        *,
        batch_size: int,
        device: torch.device,
        on_device: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert source.rows is not None
        assert target.rows is not None
        require_same_size(source, target)
        self._device, self._dtype, self._batch_size = torch.device(device), dtype, batch_size
        self._views: dict[Role, int] = {"source": source.rows.views, "target": target.rows.views}
        self._count: dict[Role, int] = {"source": len(source.rows.values[0]), "target": len(target.rows.values[0])}
        self._index: dict[Role, IntArray] = {"source": source.rows.index, "target": target.rows.index}
        self._rows: dict[Role, Tensor] = {}
        for role, domain in (("source", source), ("target", target)):
            rows = torch.from_numpy(np.asarray(domain.rows.values).reshape(-1, domain.rows.dim))  # type: ignore[union-attr]
            self._rows[role] = self._resident(rows) if on_device else rows  # type: ignore[index]
        self._labels = torch.from_numpy(source.labels).to(self._device)

    @property
    def failed(self) -> list[tuple[str, str]]:
        """See `Loader.failed`: all rows were read and checked before."""
        return []

    def _resident(self, rows: Tensor) -> Tensor:
        try:
            return rows.to(self._device)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                "--cache-on-device",
                found=f"{rows.numel() * rows.element_size() / 2**30:.1f} GiB of features, more than fit",
                expected="--no-cache-on-device",
            ) from error

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        """See `Loader.train`."""
        for step in steps:
            batch = plan.batch(step, rank)
            source_index = torch.from_numpy(batch.source_index).to(self._device, non_blocking=True)
            views = range(1 + len(batch.further_views))
            target = [
                self._gather("target", batch.target_index, self._drawn(plan, step, rank, "target", v)) for v in views
            ]
            yield Batch(
                source_images=self._gather("source", batch.source_index, self._drawn(plan, step, rank, "source")),
                source_labels=self._labels[source_index],
                target_images=target[0],
                source_index=source_index,
                target_index=torch.from_numpy(batch.target_index).to(self._device, non_blocking=True),
                further_views=tuple(target[1:]),
            )

    def _drawn(self, plan: SamplingPlan, step: int, rank: int, role: Role, further: int = 0) -> IntArray | None:
        if self._views[role] == 1:
            return None
        return view_numbers(plan, step, rank, role, self._views[role], further)

    def evaluate(
        self, domain: Role, samples: IntArray | None = None, crops: Crops = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.evaluate`; there are no crops."""
        chosen = np.arange(len(self._index[domain])) if samples is None else samples
        for start in range(0, len(chosen), self._batch_size):
            part = chosen[start : start + self._batch_size]
            yield self._gather(domain, part), torch.from_numpy(part).to(self._device)

    def close(self) -> None:
        """See `Loader.close`."""
        self._rows = {}

    def _gather(self, role: Role, samples: IntArray, views: IntArray | None = None) -> Tensor:
        places = self._index[role][samples]
        if views is not None:
            places = places + views * self._count[role]
        rows = self._rows[role]
        gathered = rows.index_select(0, torch.from_numpy(places).to(rows.device, non_blocking=True))
        return to_device(gathered.to(self._dtype), self._device)


def require_same_size(source: ImageDomain, target: ImageDomain) -> None:
    """Raise where the rows of two domains cannot go through one network.

    Raises:
        UsageError: they differ in size.
    """
    assert source.rows is not None
    assert target.rows is not None
    if source.rows.dim != target.rows.dim:
        raise UsageError(
            "--target",
            found=f"{target.name}, whose features have {target.rows.dim} numbers",
            expected=f"{source.rows.dim}, as in {source.name}: both from the same backbone",
        )
