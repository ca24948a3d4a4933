"""Settings of the data path, and the choice of the loader."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gsda_fast.data.batches import Batch, Loader, Role
from gsda_fast.data.benchmarks import ImageRecipe
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.synthetic_loader import SyntheticLoader
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.errors import UsageError

__all__ = ["Batch", "DataSettings", "Loader", "Role", "open_loader"]

_LOADERS = {"torch": TorchLoader}


@dataclass(frozen=True)
class DataSettings:
    """Which data, and how it is read."""

    source: str | None = None
    """Labelled domain (its name or alias); the task's usual one if not given."""
    target: str | None = None
    """Unlabelled domain to adapt to; the task's usual one if not given."""
    data_root: Path | None = None
    """Folder of the data set; the environment variable GSDA_DATA if not given. The digits task needs none."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """What decodes the images."""
    workers: int = 0
    """Threads that decode images, in each process; 0: the usable cores, shared by the processes of a machine."""
    cache_on_device: bool = False
    """Decode every image once and keep all of them on the training device as 8-bit pixels."""
    synthetic: bool = False
    """Random images instead of data: a dry run, for what a machine can do."""


def open_loader(
    settings: DataSettings,
    source: ImageDomain,
    target: ImageDomain,
    recipe: ImageRecipe,
    *,
    batch_size: int,
    device: torch.device,
) -> Loader:
    """The loader that the settings ask for.

    Args:
        settings: all but the names of the domains and their folder.
        source, target: as `open_pair` gives them.
        recipe: sizes, augmentation and normalisation; of the task's entry in `BENCHMARKS`.
        batch_size: images in a batch of `evaluate`; a training batch has the plan's size.
        device: where batches are wanted.

    Raises:
        UsageError: the loader does not exist here, `workers` is negative, or (`cache_on_device`) an image cannot be
            read or the images do not fit.
    """
    if settings.synthetic:
        return SyntheticLoader(source, target, recipe, batch_size=batch_size, device=device)
    name = "torch" if settings.loader == "auto" else settings.loader
    if name not in _LOADERS:
        raise UsageError("--loader", found=f"'{name}'", expected=f"auto or {', '.join(_LOADERS)}")
    if settings.workers < 0:
        raise UsageError("--workers", found=str(settings.workers), expected="0 (automatic) or more")
    return _LOADERS[name](
        source,
        target,
        recipe,
        batch_size=batch_size,
        device=device,
        workers=settings.workers,
        cache_on_device=settings.cache_on_device,
    )
