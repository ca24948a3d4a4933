from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_state import differences
from test_guard import LateGuard
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gsda_fast.errors import TrainingError
from gsda_fast.methods import Method, Move, StepInputs, build_method
from gsda_fast.methods.gsda import AdversarialSettings
from gsda_fast.methods.objective import Objective
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.optim import OptimizerSettings, build_optimizers
from gsda_fast.training.update import Updater

PLAYERS = ("encoder", "discriminators")


class Setup:
    def __init__(self, *, scale_losses: bool = False, update: str = "alternating", class_weights: str = "none") -> None:
        torch.manual_seed(0)
        model = AdaptationModel(nn.Sequential(nn.Linear(5, 9), nn.ReLU()), 9, 4, ModelSettings(bottleneck_dim=8))
        settings = AdversarialSettings(groups=2, hidden_dim=7, backend="torch")
        settings = replace(settings, update=update, class_weights=class_weights)  # type: ignore[arg-type]
        self.method: Method = build_method("gsda", model, settings, 4, seed=0)
        players = self.method.players()
        optimizers = build_optimizers(players, OptimizerSettings(learning_rate=0.1, backbone_learning_rate=0.1))
        self.updater = Updater(players, optimizers, Ranks(), torch.device("cpu"), scale_losses)
        generator = torch.Generator().manual_seed(1)
        self.inputs = StepInputs(
            source_images=torch.randn(6, 5, generator=generator),
            source_labels=torch.arange(6) % 4,
            target_images=torch.randn(6, 5, generator=generator),
            warming_up=False,
            adversarial_ramp=torch.tensor(0.5),
        )

    def state(self) -> dict[str, Tensor]:
        """Parameters and momentum of both players."""
        found = {name: parameter.detach().clone() for name, parameter in self.method.named_parameters()}
        for name, optimizer in self.updater.optimizers.items():
            for number, state in enumerate(optimizer.state.values()):
                found[f"{name} {number}"] = state["momentum_buffer"].clone()
        return found

    def overflowing(self, player: str) -> Iterator[Move]:
        """The moves, the gradient of one of them infinite though its terms are finite."""
        for move in self.method.moves(self.inputs):
            if player in move.players:
                infinite = (0 * move.objective.total).sqrt()
                yield replace(move, objective=Objective(move.objective.total + infinite, move.objective.terms))
            else:
                yield move

    def scale(self) -> float:
        return float(self.updater.state_dict()["scaler"]["scale"])


@pytest.mark.parametrize("player", PLAYERS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_scaled_gradients_that_overflow_skip_the_step_for_both_players(player: str, steps_before: int) -> None:
    setup = Setup(scale_losses=True)
    for step in range(steps_before):
        setup.updater.step(step, setup.method.moves(setup.inputs))
    before, scale = setup.state(), setup.scale()
    setup.updater.step(steps_before, setup.overflowing(player))
    assert differences(setup.state(), before) == []
    assert setup.scale() == scale / 2
    # Training goes on from there as if the step had not been.
    other = Setup(scale_losses=True)
    for step in range(steps_before):
        other.updater.step(step, other.method.moves(other.inputs))
    for each in (setup, other):
        each.updater.step(steps_before + 1, each.method.moves(each.inputs))
        each.updater.require_finite()
    assert_close(setup.state(), other.state(), rtol=1e-4, atol=1e-6)
    assert differences(setup.state(), before) != []


def test_without_its_mark_the_first_move_would_stay() -> None:
    setup = Setup(scale_losses=True)
    before = setup.state()
    setup.updater.step(0, (replace(move, provisional=False) for move in setup.overflowing("encoder")))
    changed = differences(setup.state(), before)
    assert changed
    assert all("discriminators" in name for name in changed)


def test_a_scaled_step_is_the_unscaled_one() -> None:
    states = []
    for scale_losses in (True, False):
        setup = Setup(scale_losses=scale_losses)
        for step in range(3):
            setup.updater.step(step, setup.method.moves(setup.inputs))
        states.append(setup.state())
    assert_close(*states, rtol=1e-5, atol=1e-7)


def test_the_scale_is_part_of_the_state() -> None:
    setup, other = Setup(scale_losses=True), Setup(scale_losses=True)
    setup.updater.step(0, setup.overflowing("encoder"))
    other.updater.load_state_dict(setup.updater.state_dict())
    assert other.scale() == setup.scale() == 2.0**15


def test_gradients_that_overflow_at_every_scale_end_the_run() -> None:
    setup = Setup(scale_losses=True)
    before = setup.state()
    for step in range(17):
        setup.updater.step(step, setup.overflowing("encoder"))
    with pytest.raises(TrainingError, match=r"step 17: gradients not finite at any scale of the losses, down to 0\.5"):
        setup.updater.require_finite()
    assert differences(setup.state(), before) == []


@pytest.mark.parametrize("scale_losses", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_whatever_the_precision(scale_losses: bool) -> None:
    setup = Setup(scale_losses=scale_losses)
    setup.updater.step(0, setup.method.moves(setup.inputs))
    before = setup.state()
    setup.inputs.source_images[0] = torch.inf
    with pytest.raises(TrainingError, match=r"^step 2: .*classification.* not finite; nothing has moved"):
        setup.updater.step(1, setup.method.moves(setup.inputs))
    assert differences(setup.state(), before) == []


class NeverRead(TorchDispatchMode):
    """Refuses the operations for whose result a host waits."""

    _READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self._READ, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale_losses", [False, True])
@pytest.mark.parametrize("update", ["alternating", "reversal"])
@pytest.mark.parametrize("class_weights", ["none", "pada"])
def test_a_step_on_a_gpu_reads_nothing_back(
    scale_losses: bool, update: str, class_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Values that are looked at on a CPU alone: labels, weights.
    monkeypatch.setattr(F, "one_hot", lambda labels, count: (labels.unsqueeze(1) == torch.arange(count)).long())
    monkeypatch.setattr("gsda_kernels.functional._check_values", lambda *_: None)
    setup = Setup(scale_losses=scale_losses, update=update, class_weights=class_weights)
    with NeverRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        setup.updater.step(0, setup.method.moves(setup.inputs))  # as on a CPU, where reading costs nothing
    setup = Setup(scale_losses=scale_losses, update=update, class_weights=class_weights)
    monkeypatch.setattr("gsda_fast.training.update.restore_where", lambda flag, tensors, copies: None)
    setup.updater._guard = LateGuard()
    with NeverRead():
        for step in range(4):  # the fifth copies the guard's flags
            setup.updater.step(step, setup.method.moves(setup.inputs))


def test_plain_optimizers_are_held_by_the_host() -> None:
    setup = Setup(scale_losses=True)
    for name, module in setup.method.players().items():
        setup.updater.optimizers[name] = torch.optim.SGD(module.parameters(), lr=0.1, foreach=True)
    before = {name: each for name, each in setup.state().items() if " " not in name}
    setup.updater.step(0, setup.overflowing("discriminators"))
    assert differences({name: each.detach() for name, each in setup.method.named_parameters()}, before) == []
