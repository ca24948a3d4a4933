from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_state import differences
from test_guard import LateGuard
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gsda_kernels as gk
from gsda_fast.data.batches import Batch
from gsda_fast.errors import TrainingError
from gsda_fast.methods import AdaptationSettings, Method, Player, Step, TaskFacts, Update, build_method
from gsda_fast.methods.gsda import GSDASettings
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.optim import OptimizerSettings, build_optimizers
from gsda_fast.training.update import Updater

PLAYERS = ("encoder", "discriminators")
OPTIMIZER = OptimizerSettings(learning_rate=0.1, backbone_learning_rate=0.1)


class Setup:
    """A method, its players' optimizers and a batch.

    Args:
        in_place: the discriminators' step is made without gradients in memory, as in training, where that can be.
    """

    def __init__(
        self,
        *,
        scale_losses: bool = False,
        update: Any = "alternating",
        class_weights: Any = "none",
        in_place: bool = False,
        backend: str = "torch",
        optimizer: OptimizerSettings = OPTIMIZER,
        ranks: Ranks | None = None,
        beta: float = 1.0,
    ) -> None:
        torch.manual_seed(0)
        model = AdaptationModel(nn.Sequential(nn.Linear(5, 9), nn.ReLU()), 9, 4, ModelSettings(bottleneck_dim=8))
        settings = GSDASettings(groups=2, hidden_dim=7, backend=backend, update=update, beta=beta)
        adaptation = AdaptationSettings(class_weights=class_weights)
        self.method: Method = build_method("gsda", model, settings, TaskFacts(4), adaptation)
        players = self.method.players()
        optimizers = build_optimizers(players, optimizer, model.backbone)
        self.updater = Updater(players, optimizers, ranks or Ranks(), torch.device("cpu"), scale_losses)
        generator = torch.Generator().manual_seed(1)
        self.batch = Batch(
            source_images=torch.randn(6, 5, generator=generator),
            source_labels=torch.arange(6) % 4,
            target_images=torch.randn(6, 5, generator=generator),
            source_index=torch.arange(6),
            target_index=torch.arange(6),
        )
        self.known = Step(ramp=torch.tensor(0.5), progress=torch.tensor(0.1))
        if in_place:
            self.known = replace(self.known, descent=self.updater.descent)

    def updates(self) -> Iterator[Update]:
        return self.method.updates(self.batch, self.known)

    def state(self) -> dict[str, Tensor]:
        """Parameters and momentum of both players."""
        found = {name: parameter.detach().clone() for name, parameter in self.method.named_parameters()}
        for name, optimizer in self.updater.optimizers.items():
            for number, state in enumerate(optimizer.state.values()):
                found |= {f"{name} {number} {what}": value.clone() for what, value in state.items()}
        return found

    def overflowing(self, player: str) -> Iterator[Update]:
        """The updates, the gradient of one of them infinite though its terms are finite."""
        for update in self.updates():
            infinite = (0 * update.loss).sqrt() if player in update.players else 0
            yield update._replace(loss=update.loss + infinite)

    def scale(self) -> float:
        return float(self.updater.state_dict()["scaler"]["scale"])


@pytest.mark.parametrize("in_place", [False, True])
def test_whatever_moves_a_parameter_is_counted_as_a_write(in_place: bool) -> None:
    """PyTorch's fused optimizers leave it out; copies of parameters are kept by these counts."""
    setup = Setup(in_place=in_place)
    before = {name: parameter._version for name, parameter in setup.method.named_parameters()}
    setup.updater.step(0, setup.updates())
    after = {name: parameter._version for name, parameter in setup.method.named_parameters()}
    assert all(after[name] > count for name, count in before.items())


@pytest.mark.parametrize("player", PLAYERS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_scaled_gradients_that_overflow_skip_the_rest_of_the_step(player: str, steps_before: int) -> None:
    setup = Setup(scale_losses=True)
    for step in range(steps_before):
        setup.updater.step(step, setup.updates())
    before, scale = setup.state(), setup.scale()
    setup.updater.step(steps_before, setup.overflowing(player))
    moved = differences(setup.state(), before)
    if player == "discriminators":  # the first to move: nobody has
        assert moved == []
    else:
        assert moved
        assert all("discriminators" in name for name in moved)
    assert setup.scale() == scale / 2
    setup.updater.step(steps_before + 1, setup.updates())
    setup.updater.require_finite()
    assert {name.split(".")[2] for name in differences(setup.state(), before) if "model" in name}


def test_after_a_step_that_moved_nobody_training_goes_on_as_if_it_had_not_been() -> None:
    states = []
    for skipped in (True, False):
        setup = Setup(scale_losses=True)
        setup.updater.step(0, setup.updates())
        if skipped:
            setup.updater.step(1, setup.overflowing("discriminators"))
        setup.updater.step(2, setup.updates())
        states.append(setup.state())
    assert_close(*states, rtol=1e-4, atol=1e-6)  # at half the scale


@pytest.mark.parametrize("player", PLAYERS)
def test_what_follows_a_skipped_update_belongs_to_a_step_that_is_made(player: str) -> None:
    """A teacher's average, for one: code of the method after its last update."""
    for overflows in (False, True):
        setup, seen = Setup(scale_losses=True), []

        def updates(setup: Setup = setup, seen: list[str] = seen, overflows: bool = overflows) -> Iterator[Update]:
            yield from setup.overflowing(player) if overflows else setup.updates()
            seen.append("after the last update")

        setup.updater.step(0, updates())
        assert seen == ([] if overflows else ["after the last update"])


def test_a_scaled_step_is_the_unscaled_one() -> None:
    states = []
    for scale_losses in (True, False):
        setup = Setup(scale_losses=scale_losses)
        for step in range(3):
            setup.updater.step(step, setup.updates())
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
        setup.updater.step(step, setup.overflowing("discriminators"))
    with pytest.raises(TrainingError, match=r"step 17: gradients not finite at any scale of the losses, down to 0\.5"):
        setup.updater.require_finite()
    assert differences(setup.state(), before) == []


@pytest.mark.parametrize(("scale_losses", "in_place"), [(False, False), (False, True), (True, False)])
def test_a_loss_that_is_not_finite_ends_the_run_whatever_the_precision(scale_losses: bool, in_place: bool) -> None:
    setup = Setup(scale_losses=scale_losses, in_place=in_place)
    setup.updater.step(0, setup.updates())
    before = setup.state()
    setup.batch.source_images[0] = torch.inf
    # Of the first update alone, after which a scaled step ends.
    term = "adversarial_domain" if scale_losses else "adversarial_domain.*classification"
    with pytest.raises(TrainingError, match=rf"^step 2: .*{term}.* not finite; nothing moves from there on"):
        setup.updater.step(1, setup.updates())
    assert differences(setup.state(), before) == []


@pytest.mark.parametrize("scale_losses", [False, True])
def test_what_was_not_finite_is_named_by_a_host_that_looks_later(scale_losses: bool) -> None:
    """In between, scaled steps end after their first update, which has other terms."""
    setup = Setup(scale_losses=scale_losses)
    setup.updater._guard = LateGuard()
    before = setup.state()
    for step in range(4):
        updates = setup.updates()
        if step == 1:
            updates = (
                each._replace(loss=each.loss * torch.nan) if "encoder" in each.players else each for each in updates
            )
        setup.updater.step(step, updates)
        if step == 1:
            before = setup.state()
    with pytest.raises(TrainingError, match=r"^step 2: objective of the encoder and classifier.* not finite"):
        setup.updater.require_finite()
    assert differences(setup.state(), before) == []  # nothing has moved since


class NeverRead(TorchDispatchMode):
    """Refuses the operations for whose result a host waits."""

    _READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self._READ, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("update", ["alternating", "reversal"])
@pytest.mark.parametrize("class_weights", ["none", "pada"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_step_on_a_gpu_reads_nothing_back(
    update: str, class_weights: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Values that are looked at on a CPU alone: labels, weights.
    monkeypatch.setattr(F, "one_hot", lambda labels, count: (labels.unsqueeze(1) == torch.arange(count)).long())
    monkeypatch.setattr("gsda_kernels.functional._check_values", lambda *_: None)
    setup = Setup(update=update, class_weights=class_weights, in_place=in_place)
    with NeverRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        setup.updater.step(0, setup.updates())  # as on a CPU, where reading costs nothing
    setup = Setup(update=update, class_weights=class_weights, in_place=in_place)
    setup.updater._guard = LateGuard()
    with NeverRead():
        for step in range(4):  # the fifth copies the guard's flags
            setup.updater.step(step, setup.updates())


class Reads(NeverRead):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self._READ
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("update", "updates"), [("alternating", 2), ("reversal", 1)])
def test_a_scaled_step_reads_one_flag_for_each_update(
    update: str, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch's own scaler does, to know whether the step goes on."""
    monkeypatch.setattr(F, "one_hot", lambda labels, count: (labels.unsqueeze(1) == torch.arange(count)).long())
    monkeypatch.setattr("gsda_kernels.functional._check_values", lambda *_: None)
    setup = Setup(scale_losses=True, update=update)
    setup.updater._guard = LateGuard()
    with Reads() as reads:
        setup.updater.step(0, setup.updates())
    assert reads.count == updates


def test_plain_optimizers_are_held_by_the_host() -> None:
    setup = Setup(scale_losses=True)
    for name, player in setup.method.players().items():
        parameters = [parameter for module in player.modules for parameter in module.parameters()]
        setup.updater.optimizers[name] = torch.optim.SGD(parameters, lr=0.1, foreach=True)
    before = {name: each for name, each in setup.state().items() if " " not in name}
    setup.updater.step(0, setup.overflowing("discriminators"))
    assert differences({name: each.detach() for name, each in setup.method.named_parameters()}, before) == []


class Written(TorchDispatchMode):
    """Counts the bytes that operations write into certain storages."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.watched = {each.untyped_storage().data_ptr() for each in tensors}
        self.bytes = 0
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        for argument, value in zip(func._schema.arguments, [*args]):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.bytes += sum(each.nbytes for each in tree_leaves(value) if self.watches(each))
        copies = func.overloadpacket.__name__ in ("clone", "copy_", "_foreach_copy_", "_foreach_clone")
        self.copies += copies and any(self.watches(each) for each in tree_leaves(given))
        return func(*args, **(kwargs or {}))

    def watches(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self.watched


@pytest.mark.parametrize(("scale_losses", "in_place"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("update", ["alternating", "reversal"])
def test_a_step_writes_parameters_and_momentum_once_and_copies_none(
    update: str, scale_losses: bool, in_place: bool
) -> None:
    setup = Setup(update=update, scale_losses=scale_losses, in_place=in_place)
    momentum = [state["momentum_buffer"] for each in setup.updater.optimizers.values() for state in each.state.values()]
    watched = [*setup.method.parameters(), *momentum]
    assert len(watched) == 2 * len(momentum)
    with Written(watched) as step:
        setup.updater.step(0, setup.updates())
    assert step.bytes == sum(each.nbytes for each in watched)
    assert step.copies == 0
    with Written(watched) as control:
        kept = [each.detach().clone() for each in watched]
    assert control.copies == len(kept)


# ------------------------------------------------------------------------------- the discriminators' step, in one piece

BACKENDS = [name for name, why in gk.available_backends("cpu").items() if why is None]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("class_weights", ["none", "pada"])
def test_a_step_in_place_is_the_one_along_gradients(backend: str, class_weights: str) -> None:
    states = []
    for in_place in (True, False):
        setup = Setup(backend=backend, class_weights=class_weights, in_place=in_place)
        setup.method.on_evaluation(SimpleNamespace(probabilities=torch.tensor([[0.7, 0.2, 0.1, 0.0]])))  # type: ignore[arg-type]
        outcomes = [setup.updater.step(step, setup.updates()) for step in range(4)]
        states.append((setup.state(), [each.terms for each in outcomes]))
    assert_close(*states, rtol=1e-5, atol=1e-7)
    assert differences(states[0][0], Setup().state())


def test_what_can_be_moved_in_place_has_no_gradients() -> None:
    for in_place in (True, False):
        setup = Setup(in_place=in_place)
        setup.updater.step(0, setup.updates())
        found = {parameter.grad is None for parameter in setup.method.discriminators.parameters()}
        assert found == {in_place}
        assert all(parameter.grad is not None for parameter in setup.method.model.parameters())


class Made(TorchDispatchMode):
    """Counts the bytes of new tensors of certain shapes that operations return."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.bytes = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, Tensor)}
        made = (each for each in tree_leaves(result) if isinstance(each, Tensor) and each.shape in self.shapes)
        self.bytes += sum(each.nbytes for each in made if each.untyped_storage().data_ptr() not in known)
        return result


def test_no_gradient_as_large_as_a_weight_is_stored() -> None:
    stored = {}
    for in_place in (True, False):
        setup = Setup(in_place=in_place)
        weights = [setup.method.discriminators.w1, setup.method.discriminators.w2]
        with Made({weight.shape for weight in weights}) as made:
            setup.updater.step(0, setup.updates())
        stored[in_place] = made.bytes
        assert sum(weight.nbytes for weight in weights) == 7 * (7 * 8 + 7 * 7) * 4
    assert stored == {True: 0, False: 7 * (7 * 8 + 7 * 7) * 4}


@each_backend
def test_the_flag_of_the_step_in_place_ends_the_run(backend: str) -> None:
    """Every loss is finite; the gradients of w1 are not."""
    setup = Setup(backend=backend, in_place=True, beta=1e37)
    with torch.no_grad():
        setup.method.discriminators.w1 *= 1e-12
        setup.method.discriminators.b1 *= 1e-6
        setup.method.discriminators.w2 *= 1e6
    before = setup.state()
    with pytest.raises(
        TrainingError, match=r"^step 1: gradient norm of the discriminators.* not finite; nothing moves"
    ):
        setup.updater.step(0, setup.updates())
    assert differences(setup.state(), before) == []


def test_nothing_is_moved_in_place_in_a_step_that_is_skipped() -> None:
    setup = Setup(in_place=True)
    setup.updater._guard = LateGuard()
    setup.updater.step(0, setup.updates())
    setup.updater._guard._stopped.fill_(1)
    before = setup.state()
    setup.updater.step(1, setup.updates())
    assert differences(setup.state(), before) == []


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": replace(OPTIMIZER, optimizer="adam")},
        {"optimizer": replace(OPTIMIZER, momentum=0.0)},
        {"scale_losses": True},
        {"ranks": Ranks(world_size=2)},
    ],
    ids=["Adam", "no momentum", "scaled losses", "a mean over ranks"],
)
def test_whoever_needs_the_gradients_gets_them(options: dict[str, Any]) -> None:
    assert Setup(**options).updater.descent("discriminators") is None
    assert Setup().updater.descent("discriminators") is not None


def test_a_player_without_any_gradient_is_named() -> None:
    setup = Setup()

    def updates() -> Iterator[Update]:
        for update in setup.updates():
            yield update._replace(players=("classifier", "discriminators"))

    # The discriminators' own update does not reach the classifier.
    with pytest.raises(RuntimeError, match="player classifier: found no gradient for any parameter; expected its loss"):
        setup.updater.step(0, updates())


def test_some_parameters_without_a_gradient_stay_where_they_are() -> None:
    used, unused = nn.Linear(2, 1), nn.Linear(2, 1)
    players = {"only": Player((used, unused))}
    updater = Updater(players, build_optimizers(players, OPTIMIZER, nn.Module()), Ranks(), torch.device("cpu"))
    before = [module.weight.detach().clone() for module in (used, unused)]
    loss = used(torch.ones(1, 2)).sum()
    updater.step(0, iter([Update(("only",), loss, {"loss": loss.detach()})]))
    assert [torch.equal(module.weight, b) for module, b in zip((used, unused), before)] == [False, True]


def test_each_update_is_carried_out_before_the_next_is_asked_for() -> None:
    setup, seen = Setup(), []
    parameters = {name: each.detach().clone() for name, each in setup.method.named_parameters()}

    def updates() -> Iterator[Update]:
        for update in setup.updates():
            yield update
            now = {name: each.detach() for name, each in setup.method.named_parameters()}
            seen.append({name.split(".")[1] for name in differences(now, parameters)})

    outcome = setup.updater.step(0, updates())
    assert [{"discriminators"}, {"discriminators", "model"}] == seen
    assert outcome.images == 12
    assert {"classification", "adversarial_domain", "synchronization"} <= set(outcome.terms)


def test_a_player_forgets_its_momentum_alone() -> None:
    setup = Setup()
    setup.updater.step(0, setup.updates())
    before = setup.state()
    setup.updater.forget("classifier")
    changed = differences(setup.state(), before)
    assert changed
    assert all("classifier " in name for name in changed)
