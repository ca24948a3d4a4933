import importlib.util
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS, build_method
from gsda_fast.methods.gsda import AdversarialSettings
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.training.optim import OptimizerSettings, build_optimizers, set_learning_rate, takes_skip_flag

SETTINGS = OptimizerSettings(learning_rate=0.5, backbone_learning_rate=0.25, momentum=0.9, weight_decay=0.125)


def players(method: str = "gsda") -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = AdaptationModel(nn.Linear(4, 6), 6, 3, ModelSettings(bottleneck_dim=5))
    return build_method(method, model, AdversarialSettings(groups=2, hidden_dim=4), 3, seed=0).players()


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_has_exactly_one_optimizer(method: str) -> None:
    modules = players(method)
    optimizers = build_optimizers(modules, SETTINGS)
    assert set(optimizers) == set(modules)
    for name, module in modules.items():
        held = [parameter for group in optimizers[name].param_groups for parameter in group["params"]]
        assert Counter(map(id, held)) == Counter(map(id, module.parameters()))
    everything = [id(parameter) for module in modules.values() for parameter in module.parameters()]
    assert len(everything) == len(set(everything))


def test_the_backbone_learns_at_its_own_rate() -> None:
    modules = players()
    optimizers = build_optimizers(modules, SETTINGS)
    rates = {id(p): g["lr"] for o in optimizers.values() for g in o.param_groups for p in g["params"]}
    model, discriminators = modules["encoder"], modules["discriminators"]
    assert isinstance(model, AdaptationModel)
    assert {rates[id(parameter)] for parameter in model.backbone.parameters()} == {0.25}
    new = [*model.bottleneck.parameters(), *model.classifier.parameters(), *discriminators.parameters()]
    assert {rates[id(parameter)] for parameter in new} == {0.5}


def test_rates_are_set_from_their_initial_values() -> None:
    optimizers = build_optimizers(players(), SETTINGS)
    for factor in (0.5, 0.1):  # not one after the other
        set_learning_rate(optimizers, factor)
        found = [group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups]
        assert found == pytest.approx([0.25 * factor, 0.5 * factor, 0.5 * factor])


def test_a_step_is_nesterov_momentum_with_weight_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizers({"only": module}, SETTINGS)["only"]
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
    modules = players()
    optimizers = build_optimizers(modules, SETTINGS)
    for name, module in modules.items():
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers[name].step()
        stored = optimizers[name].state_dict()["state"]
        assert len(stored) == len(list(module.parameters()))
        assert all(state["momentum_buffer"].abs().sum() > 0 for state in stored.values())


def test_without_momentum_it_is_plain_gradient_descent() -> None:
    module = nn.Linear(1, 1, bias=False)
    x = float(module.weight.detach())
    optimizer = build_optimizers({"only": module}, replace(SETTINGS, momentum=0.0, weight_decay=0.0))["only"]
    module.weight.grad = torch.full((1, 1), 2.0)
    optimizer.step()
    assert_close(float(module.weight.detach()), x - 0.5 * 2.0)


def test_pytorchs_fused_update_is_taken_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = build_optimizers(players(), SETTINGS)["encoder"]
    assert fused.param_groups[0]["fused"]
    sgd = torch.optim.SGD

    def without_fused(*arguments: Any, **options: Any) -> torch.optim.SGD:
        if options.get("fused"):
            raise RuntimeError("no fused update for these parameters")
        return sgd(*arguments, **options)

    monkeypatch.setattr(torch.optim, "SGD", without_fused)
    assert build_optimizers(players(), SETTINGS)["encoder"].param_groups[0]["foreach"]


def test_the_other_package_named_apex_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, optimizer="apex")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--optimizer: found apex, but no Apex; expected NVIDIA Apex built with"):
        build_optimizers(players(), settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "apex" else None)
    with pytest.raises(UsageError, match="found apex, but a package named apex without the extension amp_C: another"):
        build_optimizers(players(), settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_apex_is_given_no_parameters_that_it_would_skip(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gsda_fast.training.optim.require_apex", lambda: torch.optim.SGD)
    module = nn.Linear(2, 2).to(dtype)
    with pytest.raises(UsageError, match=f"--optimizer: found apex with {dtype} parameters on cpu"):
        build_optimizers({"only": module}, replace(SETTINGS, optimizer="apex"))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("amp_C") is None, reason="Apex is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_apex_and_pytorch_make_the_same_steps() -> None:
    weights = []
    for name in ("sgd", "apex"):
        torch.manual_seed(0)
        module = nn.Conv2d(3, 8, 3).to("cuda", memory_format=torch.channels_last)
        optimizer = build_optimizers({"only": module}, replace(SETTINGS, optimizer=name))["only"]
        for flag in (0.0, 1.0, 0.0):
            takes_skip_flag(optimizer, torch.tensor(flag, device="cuda"))
            for parameter in module.parameters():
                parameter.grad = torch.sin(parameter.detach() + flag)
            optimizer.step()
        weights.append(module.weight.detach())
    assert_close(*weights, rtol=1e-6, atol=1e-7)
