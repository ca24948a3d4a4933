"""What a run costs on its machine, and what it would cost at the least."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gsda_fast.data.benchmarks import Preprocessing
from gsda_fast.model import FEATURES, ModelSettings, build_model


def forget_peak_memory(device: torch.device) -> None:
    """Let the peak of a GPU start from what is allocated there now, since a process may train one run after another.

    That of host memory is the process's and stays.

    Args:
        device: if a GPU, one that this process has used already.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Return bytes needed at most: on the GPU, as PyTorch allocated them since `forget_peak_memory`, or else of host
    memory, by this process.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(kilobytes) * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Peaks:
    """What a device can do at most, by its data sheet, without structured sparsity.

    Attributes:
        terabytes: memory bandwidth, 1e12 bytes a second. half: bf16 and fp16 products, float32 accumulation, 1e12
            operations a second, a multiply-add being two. tf32: the same for TF32; `single` where there is none.
        single: float32.
    """

    terabytes: float
    half: float
    tf32: float
    single: float


_A100 = {"half": 312.0, "tf32": 156.0, "single": 19.5}
PEAKS = {
    "NVIDIA H200": Peaks(4.8, 989.4, 494.7, 66.9),
    "NVIDIA H100 80GB HBM3": Peaks(3.35, 989.4, 494.7, 66.9),
    "NVIDIA H100 PCIe": Peaks(2.0, 756.0, 378.0, 51.0),
    "NVIDIA A100-SXM4-80GB": Peaks(2.039, **_A100),
    "NVIDIA A100-SXM4-40GB": Peaks(1.555, **_A100),
    "NVIDIA A100 80GB PCIe": Peaks(1.935, **_A100),
    "NVIDIA A100-PCIE-40GB": Peaks(1.555, **_A100),
    "NVIDIA L40S": Peaks(0.864, 362.0, 183.0, 91.6),
    "NVIDIA L4": Peaks(0.3, 121.0, 60.0, 30.3),
    "NVIDIA A10": Peaks(0.6, 125.0, 62.5, 31.2),
    "Tesla V100-SXM2-32GB": Peaks(0.9, 125.0, 15.7, 15.7),
    "Tesla V100-SXM2-16GB": Peaks(0.9, 125.0, 15.7, 15.7),
    "Tesla T4": Peaks(0.32, 65.0, 8.1, 8.1),
}
"""By PyTorch's name of the device, in full: a part of a GPU has a longer name, and other peaks."""


@dataclass(frozen=True)
class Work:
    """The network's part of a training step (forward and backward), for one image of the batch.

    Attributes:
        convolutions, products: floating point operations of convolutions and of matrix products, as PyTorch counts
            them; a multiply-add is two.
        bytes: what products, convolutions and normalisations read and write, parameters and their gradients included,
            each operand once. All else is taken to be fused into these, so that this is an estimate from below.
    """

    convolutions: float
    products: float
    bytes: float


@dataclass(frozen=True)
class Floors:
    """The least seconds that a device needs for the network's part of a training step, for one image.

    Attributes:
        matrix: if it did nothing but multiply, at its peak. bandwidth: if it did nothing but move the operands.
    """

    matrix: float
    bandwidth: float

    def shares(self, images: int, seconds: float) -> dict[str, float]:
        """Return the floors' shares of the time that `images` took, from 0 to 1, under their names in metrics.jsonl."""
        return {
            "mfu": images * self.matrix / seconds,
            "mbu": images * self.bandwidth / seconds,
        }


def training_work(
    settings: ModelSettings, preprocessing: Preprocessing, *, num_classes: int, images: int, dtype: torch.dtype
) -> Work:
    """Count the work on tensors without memory; a second or so.

    Args:
        settings, preprocessing, num_classes: the network and its images.
        images: in the batch, which shares the parameters. dtype: of the operands.
    """
    with torch.device("meta"):
        model = build_model(replace(settings, weights="none"), num_classes).to(dtype)
        row = (
            (settings.input_dim,)
            if settings.backbone == FEATURES
            else (preprocessing.channels, preprocessing.crop, preprocessing.crop)
        )
        batch = torch.empty(images, *row, dtype=dtype)
    from torch.utils.flop_counter import FlopCounterMode

    operations, moved = FlopCounterMode(display=False), _MovedBytes()
    with operations, moved:
        # Layer by layer: the model's own forward has an autocast, which knows no device without memory.
        model.classifier(model.bottleneck(model.backbone(batch))).sum().backward()
    counted: Mapping[Any, int] = operations.get_flop_counts()["Global"]
    convolutions = sum(count for operator, count in counted.items() if "convolution" in str(operator))
    return Work(convolutions / images, (sum(counted.values()) - convolutions) / images, moved.total / images)


def device_floors(
    device: torch.device,
    precision: str,
    settings: ModelSettings,
    preprocessing: Preprocessing,
    *,
    num_classes: int,
    images: int,
) -> Floors | None:
    """Return the floors of a step on `device`; None for a device whose peaks are not known.

    Args:
        precision: fp32, tf32, bf16 or fp16. settings, preprocessing, num_classes, images: as for `training_work`.
    """
    if device.type != "cuda":
        return None
    peaks = PEAKS.get(torch.cuda.get_device_name(device))
    if peaks is None:
        return None
    half = precision in ("bf16", "fp16")
    dtype = torch.bfloat16 if half else torch.float32
    work = training_work(settings, preprocessing, num_classes=num_classes, images=images, dtype=dtype)
    return floors(work, peaks, half=half)


def floors(work: Work, peaks: Peaks, *, half: bool) -> Floors:
    """Return the floors of some work; float32 products count as TF32 where PyTorch is set to compute them so."""
    convolutions = products = peaks.half
    if not half:
        own = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        convolutions = peaks.tf32 if own == "tf32" else peaks.single
        products = peaks.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else peaks.single
    seconds = (work.convolutions / convolutions + work.products / products) / 1e12
    return Floors(seconds, work.bytes / (1e12 * peaks.terabytes))


class _MovedBytes(TorchDispatchMode):
    """Adds up the operands of the operations that cannot be fused into one another."""

    _COUNTED = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_norm", "attention")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(part in str(func.overloadpacket) for part in self._COUNTED):
            tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
