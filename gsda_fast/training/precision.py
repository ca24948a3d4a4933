"""In which numbers the network runs, and whether it is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from gsda_fast.errors import UsageError

AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What the network's products run in; None: what the parameters are. Parameters are float32 throughout."""


@dataclass(frozen=True)
class PrecisionSettings:
    """Numbers and compilation."""

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Of the network's products; auto: bf16 on GPUs that have it, fp32 elsewhere. tf32: float32, with convolutions of a
    GPU in TF32. fp16 scales its losses."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network and the discriminators (--compile, --no-compile); auto: on GPUs."""
    cuda_graphs: bool = False
    """Replay what is compiled as CUDA graphs: for steps so short that starting kernels takes the time."""

    def resolved(self, device: str, sync_batchnorm: bool = False) -> PrecisionSettings:
        """Return the same with both choices made for "cuda" or "cpu".

        Args:
            sync_batchnorm: whether layers of the network talk to other processes, which no compiled graph spans: each
                of them would end one, and processes that wait for each other inside a CUDA graph wait for ever.

        Raises:
            UsageError: TF32 without a GPU that has it, compilation with `sync_batchnorm`, CUDA graphs of what is not
                compiled, or not on a GPU.
        """
        precision, compiled = self.precision, self.compile
        if precision == "tf32" and not (device == "cuda" and torch.cuda.is_tf32_supported()):
            found = f"tf32 on a {'GPU without it' if device == 'cuda' else 'CPU'}"
            raise UsageError("--precision", found=found, expected="fp32, or a GPU of compute capability 8.0 or newer")
        if sync_batchnorm and (compiled == "on" or self.cuda_graphs):
            option = "--cuda-graphs" if self.cuda_graphs else "--compile"
            raise UsageError(option, found="--sync-batchnorm", expected="one of the two")
        if precision == "auto":
            native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if native else "fp32"
        if compiled == "auto":
            compiled = "on" if device == "cuda" and not sync_batchnorm else "off"
        if self.cuda_graphs and (device != "cuda" or compiled == "off"):
            found = f"device {device}" if device != "cuda" else "--no-compile"
            raise UsageError("--cuda-graphs", found=found, expected="a GPU, and compilation")
        return replace(self, precision=precision, compile=compiled)


def set_arithmetic(device: torch.device, precision: str) -> None:
    """Set, for the whole process, how a GPU computes convolutions and float32 products.

    Args:
        device: which one. precision: resolved.
    """
    if device.type != "cuda":
        return
    # Shapes repeat in every step, so that cuDNN's trial of its algorithms pays after a few of them.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    # The weights of the discriminators' losses come from such a product. NVIDIA's containers turn TF32 on for it.
    torch.backends.cuda.matmul.allow_tf32 = False
