import importlib.util
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.testing import assert_close

pytest.importorskip("msgspec")  # a machine that is there for the kernels alone may lack what the commands need

from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS, Player, TaskFacts, build_method
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.training.optim import (
    OptimizerSettings,
    build_optimizers,
    forget_momentum,
    set_learning_rate,
    takes_skip_flag,
)

SETTINGS = OptimizerSettings(learning_rate=0.5, backbone_learning_rate=0.25, momentum=0.9, weight_decay=0.125)


def model_of(method: str = "gsda") -> AdaptationModel:
    torch.manual_seed(0)
    entry = METHODS[method]
    head = partial(entry.method.classifier, entry.settings)
    return AdaptationModel(nn.Linear(4, 6), 6, 3, ModelSettings(bottleneck_dim=40), head)


def players(method: str = "gsda", model: AdaptationModel | None = None) -> dict[str, Player]:
    settings = METHODS[method].method.resolve(METHODS[method].settings, 3, "cpu")
    task = TaskFacts(3, 12, 12)
    return build_method(method, model or model_of(method), settings, task).players()


def parameters(player: Player) -> list[nn.Parameter]:
    return [parameter for module in player.modules for parameter in module.parameters()]


def optimizers_of(players: dict[str, Player], settings: OptimizerSettings = SETTINGS) -> dict[str, Optimizer]:
    """Of players without a backbone among them."""
    return build_optimizers(players, settings, nn.Module())


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_has_exactly_one_optimizer(method: str) -> None:
    named = players(method)
    optimizers = optimizers_of(named)
    assert set(optimizers) == set(named)
    for name, player in named.items():
        held = [parameter for group in optimizers[name].param_groups for parameter in group["params"]]
        assert Counter(map(id, held)) == Counter(map(id, parameters(player)))
    # Of ADDA alone, whose encoder has a second player, with rates of its own for adaptation.
    named.pop("target_encoder", None)
    everything = [id(parameter) for player in named.values() for parameter in parameters(player)]
    assert len(everything) == len(set(everything))


def rates(optimizers: dict[str, Optimizer]) -> dict[int, float]:
    return {id(p): g["lr"] for o in optimizers.values() for g in o.param_groups for p in g["params"]}


def test_the_backbone_learns_at_its_own_rate() -> None:
    model = model_of()
    named = players(model=model)
    found = rates(build_optimizers(named, SETTINGS, model.backbone))
    assert {found[id(parameter)] for parameter in model.backbone.parameters()} == {0.25}
    new = [*model.bottleneck.parameters(), *model.classifier.parameters(), *parameters(named["discriminators"])]
    assert {found[id(parameter)] for parameter in new} == {0.5}


def test_a_player_may_have_rates_and_momentum_of_its_own() -> None:
    """The backbone keeps its rate in whichever player it is, and a factor is on both rates."""
    backbone, layer, other = (nn.Linear(2, 2) for _ in range(3))
    named = {"own": Player((layer, backbone), lr_scale=10.0, momentum=0.5), "other": Player((other,), momentum=0.0)}
    optimizers = build_optimizers(named, SETTINGS, backbone)
    found = rates(optimizers)
    assert [found[id(module.weight)] for module in (backbone, layer, other)] == [2.5, 5.0, 0.5]
    assert {group["momentum"] for group in optimizers["own"].param_groups} == {0.5}
    assert {(group["momentum"], group["nesterov"]) for group in optimizers["other"].param_groups} == {(0.0, False)}
    set_learning_rate(optimizers, 0.5)
    assert [rates(optimizers)[id(module.weight)] for module in (backbone, layer, other)] == [1.25, 2.5, 0.25]


def test_the_backbone_may_have_no_momentum() -> None:
    """Its steps are those of plain SGD, its rate stays its own, and what has none needs no buffer."""
    backbone, layer, plain = (nn.Linear(2, 2) for _ in range(3))
    plain.load_state_dict(backbone.state_dict())
    settings = replace(SETTINGS, backbone_momentum=False)
    optimizer = build_optimizers({"only": Player((layer, backbone))}, settings, backbone)["only"]
    assert [(each["lr"], each["momentum"], each["nesterov"]) for each in optimizer.param_groups] == [
        (0.25, 0.0, False),
        (0.5, 0.9, True),
    ]
    other = torch.optim.SGD(plain.parameters(), lr=0.25, weight_decay=0.125)
    for _ in range(3):
        for parameter in (*layer.parameters(), *backbone.parameters(), *plain.parameters()):
            parameter.grad = torch.sin(parameter.detach())
        optimizer.step()
        other.step()
    assert_close(backbone.weight, plain.weight)
    assert [each.shape for each in optimizer.state] == [each.shape for each in layer.parameters()]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_momentum_that_is_forgotten_is_that_of_the_start(name: Any) -> None:
    """The next steps are those of an optimizer that has made none."""
    settings = replace(SETTINGS, optimizer=name)
    module, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = optimizers_of({"only": Player((module,))}, settings)["only"]

    def step(each: nn.Module, of: Optimizer) -> None:
        for parameter in each.parameters():
            parameter.grad = torch.sin(parameter.detach())
        of.step()

    for _ in range(3):
        step(module, optimizer)
    fresh.load_state_dict(module.state_dict())
    new = optimizers_of({"only": Player((fresh,))}, settings)["only"]
    forget_momentum(optimizer)
    for _ in range(2):
        step(module, optimizer)
        step(fresh, new)
    assert torch.equal(module.weight, fresh.weight)


def test_adam_is_pytorchs() -> None:
    module, same = nn.Linear(2, 2), nn.Linear(2, 2)
    same.load_state_dict(module.state_dict())
    own = optimizers_of({"only": Player((module,))}, replace(SETTINGS, optimizer="adam"))["only"]
    other = torch.optim.Adam(same.parameters(), lr=0.5, betas=(0.9, 0.999), weight_decay=0.125)
    for _ in range(3):
        for each in (module, same):
            for parameter in each.parameters():
                parameter.grad = torch.sin(parameter.detach())
        own.step()
        other.step()
    assert_close(module.weight, same.weight)


def test_rates_are_set_from_their_initial_values() -> None:
    model = model_of()
    optimizers = build_optimizers(players(model=model), SETTINGS, model.backbone)
    for factor in (0.5, 0.1):  # not one after the other
        set_learning_rate(optimizers, factor)
        found = [group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups]
        assert found == pytest.approx([0.25 * factor, 0.5 * factor, 0.5 * factor, 0.5 * factor])


def test_a_step_is_nesterov_momentum_with_weight_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    optimizer = optimizers_of({"only": Player((module,))})["only"]
    x = float(module.weight.detach())
    velocity = 0.0
    for gradient in (2.0, -1.0, 0.5):
        module.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        decayed = gradient + 0.125 * x
        velocity = 0.9 * velocity + decayed
        x -= 0.5 * (decayed + 0.9 * velocity)
        assert_close(float(module.weight.detach()), x, rtol=1e-6, atol=1e-6)


def test_momentum_is_part_of_the_state() -> None:
    named = players()
    optimizers = optimizers_of(named)
    for name, player in named.items():
        for parameter in parameters(player):
            parameter.grad = torch.ones_like(parameter)
        optimizers[name].step()
        stored = optimizers[name].state_dict()["state"]
        assert len(stored) == len(parameters(player))
        assert all(state["momentum_buffer"].abs().sum() > 0 for state in stored.values())


def test_without_momentum_it_is_plain_gradient_descent() -> None:
    module = nn.Linear(1, 1, bias=False)
    x = float(module.weight.detach())
    optimizer = optimizers_of({"only": Player((module,))}, replace(SETTINGS, momentum=0.0, weight_decay=0.0))["only"]
    module.weight.grad = torch.full((1, 1), 2.0)
    optimizer.step()
    assert_close(float(module.weight.detach()), x - 0.5 * 2.0)


def test_pytorchs_fused_update_is_taken_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = optimizers_of(players())["encoder"]
    assert fused.param_groups[0]["fused"]
    sgd = torch.optim.SGD

    def without_fused(*arguments: Any, **options: Any) -> torch.optim.SGD:
        if options.get("fused"):
            raise RuntimeError("no fused update for these parameters")
        return sgd(*arguments, **options)

    monkeypatch.setattr(torch.optim, "SGD", without_fused)
    assert optimizers_of(players())["encoder"].param_groups[0]["foreach"]


def test_the_other_package_named_apex_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, optimizer="apex")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--optimizer: found apex, but no Apex; expected NVIDIA Apex built with"):
        optimizers_of(players(), settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "apex" else None)
    with pytest.raises(UsageError, match="found apex, but a package named apex without the extension amp_C: another"):
        optimizers_of(players(), settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_apex_is_given_no_parameters_that_it_would_skip(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsda_fast.training.optim.require_apex", lambda: torch.optim.SGD)
    module = nn.Linear(2, 2).to(dtype)
    with pytest.raises(UsageError, match=f"--optimizer: found apex with {dtype} parameters on cpu"):
        optimizers_of({"only": Player((module,))}, replace(SETTINGS, optimizer="apex"))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("amp_C") is None, reason="Apex is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_apex_and_pytorch_make_the_same_steps() -> None:
    weights = []
    for name in ("sgd", "apex"):
        torch.manual_seed(0)
        module = nn.Conv2d(3, 8, 3).to("cuda", memory_format=torch.channels_last)
        optimizer = optimizers_of({"only": Player((module,))}, replace(SETTINGS, optimizer=name))["only"]
        for flag in (0.0, 1.0, 0.0):
            takes_skip_flag(optimizer, torch.tensor(flag, device="cuda"))
            for parameter in module.parameters():
                parameter.grad = torch.sin(parameter.detach() + flag)
            optimizer.step()
        weights.append(module.weight.detach())
    assert_close(*weights, rtol=1e-6, atol=1e-7)
