from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gsda_fast.methods import METHODS, build_method
from gsda_fast.methods.gsda import AdversarialSettings
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.training.optim import OptimizerSettings, build_optimizers, set_learning_rate

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
