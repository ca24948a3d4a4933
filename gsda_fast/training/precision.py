"""In which numbers the network runs, and whether it is compiled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from gsda_fast.errors import UsageError

AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the network's products run in; None: what the parameters are. Parameters are float32 throughout."""


@dataclass(frozen=True)
class PrecisionSettings:
    """Numbers and compilation."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the network's products; auto: bf16 on GPUs that have it, fp32 elsewhere. fp16 scales its losses."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network and the discriminators (--compile, --no-compile); auto: on GPUs."""
    cuda_graphs: bool = False
    """Replay what is compiled as CUDA graphs: for steps so short that starting kernels takes the time."""

    def resolved(self, device: str) -> PrecisionSettings:
        """The same with both choices made for "cuda" or "cpu".

        Raises:
            UsageError: CUDA graphs of what is not compiled, or not on a GPU.
        """
        precision, compiled = self.precision, self.compile
        if precision == "auto":
            native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if native else "fp32"
        if compiled == "auto":
            compiled = "on" if device == "cuda" else "off"
        if self.cuda_graphs and (device != "cuda" or compiled == "off"):
            found = f"device {device}" if device != "cuda" else "--no-compile"
            raise UsageError("--cuda-graphs", found=found, expected="a GPU, and compilation")
        return replace(self, precision=precision, compile=compiled)
