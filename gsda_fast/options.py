"""Options that several commands share. Nothing here needs PyTorch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gsda_fast.commands import UNSAID

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class CheckpointOptions:
    """What every command on a trained run asks for."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a finished or interrupted run."""
    _: KW_ONLY
    checkpoint: Annotated[int | None, UNSAID] = None
    """Step of the checkpoint; the newest one if not given."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(CheckpointOptions):
    """The same, of those that compute."""

    device: Device = "auto"
    """Where to compute; auto: the GPU if there is one."""
