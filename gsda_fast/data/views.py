"""What makes a further view of a target image more than another crop: a shift, and changes of colour.

Both are drawn in the sampling plan and applied on the training device, after decoding, cropping and normalising, by the
same arithmetic for every loader.
"""

import torch
from torch import Tensor

from gsda_fast.data.batches import to_device
from gsda_fast.data.benchmarks import Preprocessing
from gsda_fast.data.sampling import Augmentation


def finish_view(images: Tensor, augmentation: Augmentation, preprocessing: Preprocessing) -> Tensor:
    """Shift and recolour a view's images as its augmentation says.

    Args:
        images: (B, C, H, W), normalised. augmentation: of the same rows.

    Returns:
        The same shape and dtype; the images themselves where nothing was drawn.
    """
    if augmentation.shift is not None:
        images = shifted(images, to_device(torch.from_numpy(augmentation.shift), images.device))
    if augmentation.colour is not None:
        images = recoloured(images, to_device(torch.from_numpy(augmentation.colour), images.device), preprocessing)
    return images


def shifted(images: Tensor, shift: Tensor) -> Tensor:
    """Move each image by whole pixels; what comes in repeats the border.

    Args:
        images: (B, C, H, W). shift: (B, 2) int64, down and right.
    """
    height, width = images.shape[-2:]
    count = len(images)
    rows = torch.arange(height, device=images.device) - shift[:, :1]
    columns = torch.arange(width, device=images.device) - shift[:, 1:]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    samples = torch.arange(count, device=images.device)
    moved = images[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def recoloured(images: Tensor, colour: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Map each pixel's colour by an affine map of its image, and clamp it to what a pixel can be.

    Args:
        images: (B, C, H, W), normalised. colour: (B, C, C + 1) float32, a matrix and an offset for colours in [0, 1].
    """
    mean, std = (
        torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = images.float() * std + mean
    mapped = torch.einsum("bij,bjhw->bihw", colour[:, :, :-1], pixels) + colour[:, :, -1, None, None]
    changed = (mapped.clamp(0, 1) - mean) / std
    return changed.to(images.dtype).contiguous(memory_format=torch.channels_last)
