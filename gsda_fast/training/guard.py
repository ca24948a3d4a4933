"""What ranks exchange in each step, without the host waiting for the device: bad numbers, a wish to stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gsda_fast.errors import TrainingError

_COPY_EVERY = 5
"""Steps between two copies of the flag to the host, each of which is read one interval later: seen within 10 steps."""


class Guard:
    """A flag on the device that keeps every optimizer from moving, from the first step with a bad number on.

    All ranks come to the same flag: the loss terms' indicators are averaged over them with the gradients, and a bad
    number in one rank's gradients is one in the averaged gradients. The wish to stop, which a signal brought to some of
    them, goes the same way; so all of them know of it after the same step.

    Args:
        device: where training runs.

    Attributes:
        stop: whether a rank wants to stop, and all of them know by now.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stop = False
        self._wish = torch.zeros(1, device=device)
        self._wishes = torch.zeros((), device=device)
        self._stopped = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad: dict[tuple[str, ...], Tensor] = {}
        self._names: list[str] = []
        self._updates: list[Tensor] = []
        self._copy: tuple[Tensor, torch.cuda.Event | None] | None = None

    def begin(self) -> None:
        """Start a step."""
        self._skipped = self._stopped
        self._names, self._updates = [], []

    def ask_to_stop(self) -> None:
        """Let the other ranks know in the next step; within ten steps, `stop` is set on all of them at once."""
        self._wish.fill_(1)

    def indicators(self, total: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """Return (1 + terms + 1,) float32: 1 for each loss that is not finite, the objective first; 1 for the wish to
        stop.
        """
        values = torch.stack([total.detach(), *terms.values()])
        return torch.cat([(~torch.isfinite(values)).float(), self._wish])

    @property
    def skip(self) -> Tensor:
        """0-d float32 on the device: 1 if nothing may move in this step, as `found_inf` of PyTorch's optimizers."""
        return self._skipped

    def check(
        self, player: str, terms: Iterable[str], indicators: Tensor, bad_gradient: Tensor, *, scaled: bool
    ) -> Tensor:
        """Look at one update of the step.

        Args:
            player: who moves, for the message. terms: names of the loss terms.
            indicators: as above, averaged over the ranks.
            bad_gradient: 0-d float32: above 0 if a gradient, of any rank, was not finite (`not_finite`).
            scaled: losses are scaled (fp16), so that gradients which overflow skip a step but do not end the run.

        Returns:
            `skip`, as it is from now on.
        """
        bad_gradient = (bad_gradient > 0).float().reshape(1)
        self._wishes = torch.maximum(self._wishes, indicators[-1])
        bad = torch.cat([(indicators[:-1] > 0).float(), bad_gradient])
        self._skipped = torch.maximum(self._skipped, bad.amax())
        self._names += [f"objective of the {player}", *terms, f"gradient norm of the {player}"]
        self._updates.append(bad if not scaled else torch.cat([bad[:-1], torch.zeros_like(bad_gradient)]))
        return self.skip

    def end(self, step: int) -> None:
        """End the step with that number, counted from 0.

        Raises:
            TrainingError: a number was not finite, now or up to ten steps ago.
        """
        bad = torch.cat(self._updates)
        before, waits = self._stopped > 0, self._device.type != "cuda"
        self._stopped = torch.maximum(self._stopped, bad.amax())
        self._step = torch.where(before, self._step, step)
        if not waits or bool(self._stopped):
            # A step that is skipped may end after its first update: what the first bad one said is kept beside it.
            own = tuple(self._names)
            self._bad.setdefault(own, torch.zeros_like(bad))
            for names, known in self._bad.items():
                self._bad[names] = torch.where(before, known, bad if names == own else 0.0)
        if waits:
            self.require_finite()
        elif (step + 1) % _COPY_EVERY == 0:
            self._read_copy()
            self._start_copy()

    def require_finite(self) -> None:
        """Wait for the device and raise if any step so far had a number that was not finite. Sets `stop` as well.

        Raises:
            TrainingError: naming the first such step and what was not finite in it.
        """
        self.stop = self.stop or bool(self._wishes)
        if not bool(self._stopped):
            return
        names = [name for of_step, bad in self._bad.items() for name, each in zip(of_step, bad.tolist()) if each]
        # The terms say more than the sums and gradients that follow from them.
        terms = [name for name in names if " " not in name] or names
        raise TrainingError(
            f"step {int(self._step) + 1}: {', '.join(terms)} not finite; nothing moves from there on, and "
            "the last checkpoint is good; a lower --learning-rate, or --precision fp32, may help"
        )

    def require_scale(self, scale: float) -> None:
        """Raise if the scale of fp16's losses has been halved away: gradients overflow at every scale.

        Raises:
            TrainingError: the scale is below 1.
        """
        if scale < 1:
            raise TrainingError(
                f"step {int(self._step) + 1}: gradients not finite at any scale of the losses, down to {scale:g}; "
                "nothing has moved since; --precision bf16 or fp32 may help"
            )

    def _start_copy(self) -> None:
        copy = torch.empty(2, pin_memory=True)
        copy.copy_(torch.stack([self._stopped, self._wishes]), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copy = copy, event

    def _read_copy(self) -> None:
        if self._copy is None:
            return
        copy, event = self._copy
        if event is not None:
            event.synchronize()
        stopped, wishes = copy.tolist()
        self.stop = self.stop or wishes > 0
        if stopped:
            self.require_finite()


def not_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0-d float32: 1 if the norm of the parameters' gradients is not finite; those without a gradient do not count."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return (~torch.isfinite(norm)).float()
