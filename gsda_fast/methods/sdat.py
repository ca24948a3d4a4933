"""Smooth domain adversarial training (SDAT: Rangwani et al., ICML 2022), of CDAN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor
from torch.func import functional_call

from gsda_fast.data.batches import Batch
from gsda_fast.methods.base import Network
from gsda_fast.methods.cdan import CDAN, CDANSettings
from gsda_fast.methods.recipes import on_images
from gsda_fast.methods.step import Step, Update


@dataclass(frozen=True)
class SDATSettings(CDANSettings):
    """CDAN, where the loss of the task is to be flat."""

    radius: Annotated[float, Meta(ge=0)] = 0.02
    """Length of the ascent of the classification loss and the terms added, before gradients are taken."""


RECIPE = on_images(
    run={"batch_size": 32}, optimizer={"learning_rate": 0.02, "backbone_learning_rate": 0.002, "weight_decay": 1e-3}
)


class SDAT(CDAN):
    """CDAN with gradients taken where the classification loss, and the terms added, are nearly the worst around.

    The discriminator's loss takes no part in the ascent. The network is not compiled: its weights are others in each
    pass.
    """

    settings: SDATSettings

    def compile_parts(self, mode: str | None = None) -> None:
        self.discriminators.compile(dynamic=False, mode=mode)

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        network = self._ahead(batch, step)
        for update in self.played(self.outputs(batch, network), batch, step):
            yield update._replace(images=2 * update.images)

    def _ahead(self, batch: Batch, step: Step) -> Network:
        """Return the network with its weights moved up the task's loss; gradients go to the weights as they are."""
        task = self.encoder_update(self.outputs(batch), batch, step).loss
        parameters = dict(self.trained.named_parameters())
        gradients = torch.autograd.grad(task, list(parameters.values()))
        flat = step.mean(torch.cat([each.flatten() for each in gradients]))
        moves = ascent(flat.split([each.numel() for each in gradients]), self.settings.radius)
        moved = {name: each + move.view_as(each) for (name, each), move in zip(parameters.items(), moves)}
        return lambda images: functional_call(self.trained, moved, (images,))


def ascent(gradients: Sequence[Tensor], radius: float) -> list[Tensor]:
    """Return the gradients at the length `radius`, of all of them together; zeros where all are zero."""
    length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients]))
    return [radius * each / length.clamp_min(torch.finfo(length.dtype).tiny) for each in gradients]
