"""Settings of the data path, and the choice of the loader."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta

from gsda_fast.commands import UNSAID
from gsda_fast.data.batches import Batch, Crops, Loader, Role
from gsda_fast.data.benchmarks import Orientation, Preprocessing
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.feature_loader import FeatureLoader
from gsda_fast.data.substitutes import MOST_FAILED
from gsda_fast.data.synthetic_loader import SyntheticLoader
from gsda_fast.data.torch_loader import TorchLoader
from gsda_fast.errors import UsageError

__all__ = ["Batch", "DataSettings", "Loader", "Role", "open_loader", "resolve_loader"]

LoaderName = Literal["dali", "torch"]

_INSTALL_DALI = "python -m pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120), on x86-64 Linux"


@dataclass(frozen=True)
class DataSettings:
    """Which data, and how it is read."""

    source: Annotated[str | None, UNSAID] = None
    """Labelled domain (its name or alias); the task's usual one if not given."""
    target: Annotated[str | None, UNSAID] = None
    """Unlabelled domain to adapt to; the task's usual one if not given."""
    data_root: Annotated[Path | None, UNSAID] = None
    """Folder of the data set or of a pack; the environment variable GSDA_DATA if not given. Digits need none."""
    quarantine: Annotated[Path | None, UNSAID] = None
    """List of files to leave out, as the command `data verify --quarantine LIST` writes it."""
    verify: bool = True
    """Look for unreadable files before the training; what was found is remembered until files change."""
    orientation: Orientation = "exif"
    """Turn photos as their EXIF orientation says, or use their pixels as they are stored."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """What decodes the images; auto: DALI on a GPU, torch on a CPU."""
    workers: Annotated[int, Meta(ge=0)] = 0
    """Threads that decode images, in each process; 0: the usable cores, shared by the processes of a machine."""
    cache_on_device: bool = False
    """Decode every image once and keep all of them as 8-bit pixels on the training device."""
    crop: Annotated[int, Meta(ge=0)] = 0
    """Side of the square images that the network sees, in pixels; 0: that of the task or the backbone."""
    test_crops: Crops = 1
    """Test the centre of each resized image, or four corners, centre and their mirror images, as older papers do."""
    synthetic: bool = False
    """Random images instead of data: a dry run, for what a machine can do."""


def resolve_loader(
    settings: DataSettings, source: ImageDomain, target: ImageDomain, device: torch.device
) -> LoaderName:
    """Return the loader that the settings mean here: `settings.loader` with ``auto`` decided.

    On a GPU that is DALI, where it is installed. On a CPU it is the torch loader, the faster of the two there, as it is
    for images that are decoded already (a pack) or only once (`cache_on_device`).

    Raises:
        UsageError: there is no such loader, or DALI is asked for and cannot serve.
    """
    if settings.loader not in ("auto", "dali", "torch"):
        raise UsageError("--loader", found=f"'{settings.loader}'", expected="auto, dali or torch")
    if settings.loader == "torch" or (settings.loader == "auto" and device.type != "cuda"):
        return "torch"
    obstacle = _obstacle_to_dali(settings, source, target)
    if settings.loader == "auto":
        return "torch" if obstacle else "dali"
    if obstacle:
        raise obstacle
    return "dali"


def _obstacle_to_dali(settings: DataSettings, source: ImageDomain, target: ImageDomain) -> UsageError | None:
    if source.rows is not None:
        return UsageError("--loader", found="dali, with features", expected="torch or auto: there is nothing to decode")
    if settings.cache_on_device:
        return UsageError(
            "--loader",
            found="dali together with --cache-on-device",
            expected="torch or auto, as every image is decoded once",
            remedy="or add --no-cache-on-device",
        )
    if source.packed is not None or target.packed is not None:
        return UsageError("--loader", found="dali, with a pack", expected="torch or auto: nothing is left to decode")
    try:
        importlib.import_module("nvidia.dali")
    except (ImportError, OSError) as error:
        found = f"dali, which cannot be imported here ({error})"
        return UsageError("--loader", found=found, expected="DALI installed", remedy=_INSTALL_DALI)
    return None


def require_room(crops: Crops, preprocessing: Preprocessing) -> None:
    """Require that test images can be cropped in several ways.

    Raises:
        UsageError: ten crops of images that are as small as a crop.
    """
    if crops > 1 and preprocessing.crop == preprocessing.resize:
        side = f"{preprocessing.resize}x{preprocessing.resize}"
        raise UsageError(
            "--test-crops", found=f"{crops}, for images that are used whole, {side} pixels", expected="1 for this task"
        )


def open_loader(
    settings: DataSettings,
    source: ImageDomain,
    target: ImageDomain,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """Return the loader that the settings ask for, which bears with `MOST_FAILED` files that fail on the way.

    Args:
        settings: all but the names of the domains and their folder.
        source, target: as `open_pair` gives them.
        preprocessing: sizes, augmentation and normalisation; of the task's entry in `BENCHMARKS`.
        batch_size: images in a batch of `evaluate`; a training batch has the plan's size.
        device: where batches are wanted.
        dtype: of the images: float32, or what the network's first product runs in.

    Raises:
        UsageError: the loader does not exist here, `workers` is negative, or (`cache_on_device`) an image cannot be
            read or the images do not fit.
    """
    if settings.synthetic:
        return SyntheticLoader(source, target, preprocessing, batch_size=batch_size, device=device, dtype=dtype)
    if settings.workers < 0:
        raise UsageError("--workers", found=str(settings.workers), expected="0 (automatic) or more")
    if source.rows is not None:
        return FeatureLoader(
            source,
            target,
            batch_size=batch_size,
            device=device,
            on_device=settings.cache_on_device,
            dtype=dtype,
        )
    name = resolve_loader(settings, source, target, device)
    if name == "dali":
        # Here, since DALI is optional and takes half a second to import.
        from gsda_fast.data.dali_loader import DaliLoader

        return DaliLoader(
            source,
            target,
            preprocessing,
            batch_size=batch_size,
            device=device,
            workers=settings.workers,
            dtype=dtype,
            most_failed=MOST_FAILED,
        )
    return TorchLoader(
        source,
        target,
        preprocessing,
        batch_size=batch_size,
        device=device,
        workers=settings.workers,
        cache_on_device=settings.cache_on_device,
        dtype=dtype,
        most_failed=MOST_FAILED,
    )
