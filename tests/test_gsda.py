from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gsda_fast.config import preset
from gsda_fast.data.batches import Batch
from gsda_fast.errors import UsageError
from gsda_fast.methods import (
    METHODS,
    AdaptationSettings,
    Method,
    Step,
    TaskFacts,
    Update,
    build_method,
)
from gsda_fast.methods.base import ENCODER
from gsda_fast.methods.gsda import GSDA, AdversarialSettings, GSDASettings
from gsda_fast.methods.objective import (
    class_probabilities,
    classification_loss,
    entropy,
    synchronization_loss,
    target_class_weights,
)
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_kernels import available_backends

NUM_CLASSES, NUM_SOURCE, NUM_TARGET, RAMP = 4, 6, 6, 0.4
SETTINGS = GSDASettings(alpha=0.3, beta=0.7, groups=2, hidden_dim=7)
EXACT = {"rtol": 1e-12, "atol": 1e-15}

# What each method minimizes, besides the source's cross-entropy: levels, entropy, synchronization, target samples.
PARTS = {
    "source-only": ((), False, False, "none"),
    "entropy": ((), True, False, "confident"),
    "dann": (("domain",), False, False, "all"),
    "glb": (("domain",), True, False, "confident"),
    "glb-cls": (("domain", "class"), True, False, "confident"),
    "glb-cls-grp": (("domain", "group", "class"), True, False, "confident"),
    "gsda": (("domain", "group", "class"), True, True, "confident"),
}
each_method = pytest.mark.parametrize("name", PARTS)
each_adversarial_method = pytest.mark.parametrize("name", [name for name, parts in PARTS.items() if parts[0]])


class CountingBackbone(nn.Linear):
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images)


def build(name: str, settings: AdversarialSettings = SETTINGS, class_weights: Any = "none") -> Method:
    torch.manual_seed(0)
    model = AdaptationModel(CountingBackbone(5, 9), 9, NUM_CLASSES, ModelSettings(bottleneck_dim=8))
    adaptation = AdaptationSettings({"entropy": 0.3} if name == "entropy" else {}, class_weights)
    return build_method(name, model, settings, TaskFacts(NUM_CLASSES), adaptation).double()


def inputs() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        source_images=torch.randn(NUM_SOURCE, 5, dtype=torch.float64, generator=generator),
        source_labels=torch.arange(NUM_SOURCE) % NUM_CLASSES,
        target_images=torch.randn(NUM_TARGET, 5, dtype=torch.float64, generator=generator),
        source_index=torch.arange(NUM_SOURCE),
        target_index=torch.arange(NUM_TARGET),
    )


def at(ramp: float = RAMP) -> Step:
    return Step(torch.tensor(ramp, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))


def updates_of(method: Method, batch: Batch, ramp: float = RAMP) -> Iterator[Update]:
    return iter(method.updates(batch, at(ramp)))


def seen(probabilities: Tensor) -> Any:
    """An evaluation with these probabilities."""
    return SimpleNamespace(probabilities=probabilities)


def gradients(total: Tensor, module: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(total, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), found)]


def losses(method: Method, batch: Batch, class_weights: Tensor | None = None) -> dict[str, Tensor]:
    """Every loss of the method on the batch, composed here, with all parameters free."""
    features, logits = method.model(torch.cat([batch.source_images, batch.target_images]))
    source_weight = None if class_weights is None else class_weights[batch.source_labels]
    sample_weight = None if source_weight is None else torch.cat([source_weight, torch.ones(NUM_TARGET)])
    found = {
        "classification": classification_loss(logits[:NUM_SOURCE], batch.source_labels, source_weight),
        "entropy": entropy(logits[NUM_SOURCE:]),
    }
    if isinstance(method, GSDA):
        probabilities = class_probabilities(logits, batch.source_labels)
        domain = torch.tensor([1.0] * NUM_SOURCE + [0.0] * NUM_TARGET)
        terms = method.discriminators(features, probabilities, domain, sample_weight=sample_weight)
        found |= method.discriminators.sum_per_level(terms.loss)
        if len(method.discriminators.levels) == 3:
            found["synchronization"] = synchronization_loss(terms.gradient_norm, method.discriminators.groups)
    return found


def total_of(found: dict[str, Tensor], **factors: float) -> Tensor:
    return torch.stack([factor * found[name] for name, factor in factors.items()]).sum()


def encoder_total(name: str, found: dict[str, Tensor], ramp: float = RAMP) -> Tensor:
    levels, with_entropy, synchronize, _ = PARTS[name]
    factors = {"classification": 1.0, **dict.fromkeys(levels, -ramp)}
    if with_entropy:
        factors["entropy"] = 0.3
    if synchronize:
        factors["synchronization"] = 0.7 * ramp
    return total_of(found, **factors)


def discriminator_total(name: str, found: dict[str, Tensor]) -> Tensor:
    levels, _, synchronize, _ = PARTS[name]
    factors = dict.fromkeys(levels, 1.0)
    if synchronize:
        factors["synchronization"] = 0.7 * RAMP
    return total_of(found, **factors)


def test_the_methods_are_those_of_the_table() -> None:
    assert list(METHODS)[: len(PARTS)] == list(PARTS)


@each_method
def test_each_method_minimizes_exactly_its_terms(name: str) -> None:
    levels, with_entropy, _, target_samples = PARTS[name]
    method, batch = build(name), inputs()
    updates = list(updates_of(method, batch))
    assert METHODS[name].target_samples == target_samples
    assert [each.players for each in updates] == ([("discriminators",), ENCODER] if levels else [ENCODER])
    assert set(method.players()) == {player for each in updates for player in each.players}
    assert sum(each.images for each in updates) == NUM_SOURCE + (NUM_TARGET if target_samples != "none" else 0)

    # `updates` was asked on without an optimizer step in between, so both see the same discriminators.
    found = losses(method, batch)
    of_encoder = updates[-1].loss
    assert_close(of_encoder, encoder_total(name, found), **EXACT)
    assert_close(
        gradients(of_encoder, method.model),
        gradients(encoder_total(name, found), method.model),
        rtol=1e-9,
        atol=1e-14,
    )
    if isinstance(method, GSDA):
        expected = discriminator_total(name, found)
        discriminators = method.discriminators
        assert_close(updates[0].loss, expected, **EXACT)
        assert_close(
            gradients(updates[0].loss, discriminators),
            gradients(expected, discriminators),
            rtol=1e-9,
            atol=1e-14,
        )
        assert all(gradient.abs().max() == 0 for gradient in gradients(of_encoder, discriminators))
        assert all(gradient.abs().max() == 0 for gradient in gradients(updates[0].loss, method.model))

    named = {name: term for each in updates for name, term in each.terms.items()}
    expected_names = {"classification"} | ({"entropy"} if with_entropy else set())
    expected_names |= {f"{kind}_{level}" for kind in ("adversarial", "gradient_norm") for level in levels}
    if len(levels) == 3:
        expected_names.add("synchronization")  # logged by `glb-cls-grp` too, which does not minimize it
    assert set(named) == expected_names
    for term, value in found.items():
        logged = named.get(f"adversarial_{term}", named.get(term))
        if logged is not None:
            assert_close(logged, value.detach(), **EXACT)
    assert not any(term.requires_grad for term in named.values())


@each_method
def test_warm_up_is_training_on_the_source_alone(name: str) -> None:
    method, batch = build(name), inputs()
    nothing = replace(batch, target_images=torch.full_like(batch.target_images, float("nan")))
    (update,) = method.source_updates(nothing, at())
    assert update.players == ENCODER
    assert set(update.terms) == {"classification"}
    assert update.images == NUM_SOURCE
    (expected,) = updates_of(build("source-only"), inputs())
    assert_close(update.loss, expected.loss, **EXACT)
    assert_close(
        gradients(update.loss, method.model)[0],
        gradients(losses(method, batch)["classification"], method.model)[0],
    )


@each_adversarial_method
def test_the_encoder_runs_once_and_meets_the_moved_discriminators(name: str) -> None:
    method, batch = build(name), inputs()
    assert isinstance(method, GSDA)
    assert isinstance(method.model.backbone, CountingBackbone)
    updates = updates_of(method, batch)
    next(updates)
    with torch.no_grad():
        for parameter in method.discriminators.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    second = next(updates)
    assert method.model.backbone.calls == 1
    assert_close(second.loss, encoder_total(name, losses(method, batch)), **EXACT)
    assert next(updates, None) is None


@each_adversarial_method
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_reversal_gives_each_player_the_gradient_of_its_own_step(name: str, weight: float) -> None:
    settings = replace(SETTINGS, adversarial_weight=weight)
    alternating, batch = build(name, settings), inputs()
    reversal = build(name, replace(settings, update="reversal"))
    discriminator_step, encoder_step = updates_of(alternating, batch)
    (both,) = updates_of(reversal, batch)
    assert both.players == (*ENCODER, "discriminators")
    assert_close(
        gradients(both.loss, reversal.model),
        gradients(encoder_step.loss, alternating.model),
        **EXACT,
    )
    # What the weight scales reaches the encoder alone.
    discriminators = [of_discriminators(method) for method in (reversal, alternating)]
    assert_close(
        gradients(both.loss, discriminators[0]),
        gradients(discriminator_step.loss, discriminators[1]),
        **EXACT,
    )
    assert set(both.terms) == {*discriminator_step.terms, *encoder_step.terms}


def of_discriminators(method: Method) -> nn.Module:
    (module,) = method.players()["discriminators"].modules
    return module


def test_reversal_gives_features_the_gradient_of_the_encoder_step() -> None:
    found = []
    for update in ("alternating", "reversal"):
        method = build("gsda", replace(SETTINGS, update=update))  # type: ignore[arg-type]
        kept: list[Tensor] = []
        method.model.bottleneck.register_forward_hook(lambda _module, _inputs, output, kept=kept: kept.append(output))
        *_, last = updates_of(method, inputs())
        found.append(torch.autograd.grad(last.loss, kept[0])[0])
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-16)
    assert (found[0].norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("update", ["alternating", "reversal"])
def test_sync_ramp_is_what_softens_synchronization_at_the_start(update: str) -> None:
    at_start = []
    for sync_ramp in (True, False):
        method = build("gsda", replace(SETTINGS, sync_ramp=sync_ramp, update=update))  # type: ignore[arg-type]
        *_, last = updates_of(method, inputs(), ramp=0.0)
        at_start.append(gradients(last.loss, method.model))
    method = build("gsda")
    found = losses(method, inputs())
    softened = total_of(found, classification=1.0, entropy=0.3)
    in_full = total_of(found, classification=1.0, entropy=0.3, synchronization=0.7)
    assert_close(at_start[0], gradients(softened, method.model), rtol=1e-9, atol=1e-14)
    assert_close(at_start[1], gradients(in_full, method.model), rtol=1e-9, atol=1e-14)


# ---------------------------------------------------------------------------------------- class weights, as in PADA

PREDICTED = torch.tensor([[0.1, 0.5, 0.4, 0.0], [0.3, 0.5, 0.2, 0.0]])  # sums 0.4, 1, 0.6, 0
CLASS_WEIGHTS = torch.tensor([0.4, 1.0, 0.6, 0.0], dtype=torch.float64)
each_update = pytest.mark.parametrize("update", ["alternating", "reversal"])


def with_pada(name: str, update: str = "alternating") -> Method:
    return build(name, replace(SETTINGS, update=update), "pada")  # type: ignore[arg-type]


def all_gradients(method: Method, batch: Batch) -> dict[str, Tensor]:
    """Of every update, by player and parameter; all of them see the same discriminators."""
    found = {}
    for update in updates_of(method, batch):
        for player in update.players:
            for number, module in enumerate(method.players()[player].modules):
                names = (f"{player}.{number}.{name}" for name, _ in module.named_parameters())
                found |= dict(zip(names, gradients(update.loss, module), strict=True))
    return found


@each_update
@each_method
def test_class_weights_weigh_source_samples_in_every_loss_of_a_method(name: str, update: str) -> None:
    method, batch = with_pada(name, update), inputs()
    method.on_evaluation(seen(PREDICTED))
    found = losses(method, batch, CLASS_WEIGHTS)
    updates = list(updates_of(method, batch))
    named = {term: value for each in updates for term, value in each.terms.items()}
    for term, value in found.items():
        logged = named.get(f"adversarial_{term}", named.get(term))
        if logged is not None:
            assert_close(logged, value.detach(), rtol=1e-6, atol=0)  # the weights are kept in float32
    assert_close(
        gradients(updates[-1].loss, method.model),
        gradients(encoder_total(name, found), method.model),
        rtol=1e-5,
        atol=1e-8,
    )
    if isinstance(method, GSDA):
        assert_close(
            gradients(updates[0].loss, method.discriminators),
            gradients(discriminator_total(name, found), method.discriminators),
            rtol=1e-5,
            atol=1e-8,
        )
    plain = losses(method, batch)
    assert not torch.isclose(plain["classification"], found["classification"], rtol=1e-2)


@each_update
@each_method
def test_a_class_without_weight_has_no_part_in_any_gradient(name: str, update: str) -> None:
    method, batch = with_pada(name, update), inputs()
    absent = batch.source_labels == 3
    assert 0 < absent.sum() < NUM_SOURCE
    images = torch.where(absent.unsqueeze(1), 10 * batch.source_images + 1, batch.source_images)
    changed = replace(batch, source_images=images)
    method.on_evaluation(seen(PREDICTED))
    found, same = all_gradients(method, batch), all_gradients(method, changed)
    for parameter, gradient in found.items():
        assert_close(gradient, same[parameter], rtol=1e-12, atol=1e-18)
        assert gradient.any(), parameter
    method.on_evaluation(seen(torch.ones(1, NUM_CLASSES)))
    assert any(
        not torch.allclose(one, other)
        for one, other in zip(all_gradients(method, batch).values(), all_gradients(method, changed).values())
    )


@each_method
def test_before_the_first_evaluation_every_class_counts_equally(name: str) -> None:
    weighted, plain, batch = all_gradients(with_pada(name), inputs()), all_gradients(build(name), inputs()), inputs()
    assert_close(weighted, plain, rtol=1e-9, atol=1e-15)
    method = with_pada(name)
    method.on_evaluation(seen(PREDICTED))
    (warm_up,) = method.source_updates(batch, at())
    expected = losses(method, batch, CLASS_WEIGHTS)["classification"]
    assert_close(warm_up.loss, expected, rtol=1e-6, atol=0)


def test_class_weights_are_state_and_float32_and_absent_unless_asked_for() -> None:
    method = with_pada("gsda").float()
    assert torch.equal(method.state_dict()["source_class_weights"], torch.ones(NUM_CLASSES))
    method.on_evaluation(seen(PREDICTED))
    kept = method.state_dict()["source_class_weights"]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, target_class_weights(PREDICTED))
    plain = build("gsda")
    plain.on_evaluation(seen(PREDICTED))
    assert set(method.state_dict()) - set(plain.state_dict()) == {"source_class_weights"}


def test_groups_follow_the_seed() -> None:
    def division(seed: int) -> Tensor:
        model = AdaptationModel(nn.Linear(5, 9), 9, 10, ModelSettings(bottleneck_dim=8))
        method = build_method("gsda", model, replace(SETTINGS, groups=3), TaskFacts(10, seed=seed))
        assert isinstance(method, GSDA)
        return method.discriminators.groups.membership

    assert torch.equal(division(0), division(0))
    assert not torch.equal(division(0), division(1))


@each_method
def test_each_method_has_the_settings_of_its_parts_alone(name: str) -> None:
    settings = METHODS[name].settings
    assert isinstance(settings, AdversarialSettings) == bool(PARTS[name][0])
    assert isinstance(settings, GSDASettings) == (name in ("glb", "glb-cls", "glb-cls-grp", "gsda"))


def resolved(groups: int) -> int:
    settings = GSDA.resolve(replace(SETTINGS, groups=groups), NUM_CLASSES, "cpu")
    assert isinstance(settings, GSDASettings)
    return settings.groups


def test_groups_are_of_about_five_classes_unless_asked_otherwise() -> None:
    assert [resolved(groups) for groups in (0, 1, 4)] == [1, 1, 4]
    many = GSDA.resolve(replace(SETTINGS, groups=0), 65, "cpu")
    assert isinstance(many, GSDASettings)
    assert many.groups == 13
    with pytest.raises(UsageError, match=r"^--groups: found 5; expected 1 to 4, the number of classes$"):
        resolved(5)


def test_a_backend_is_chosen_or_refused() -> None:
    assert GSDA.resolve(SETTINGS, NUM_CLASSES, "cpu").backend in available_backends("cpu")
    with pytest.raises(UsageError, match=r"^--backend: found nosuch; expected one that can run here"):
        GSDA.resolve(replace(SETTINGS, backend="nosuch"), NUM_CLASSES, "cpu")


def test_adversarial_settings_do_without_alpha_beta_and_groups() -> None:
    settings = AdversarialSettings(hidden_dim=7)
    (of_discriminators_, of_encoder) = updates_of(build("dann", settings), inputs())
    expected = updates_of(build("dann"), inputs())
    assert_close([of_discriminators_.loss, of_encoder.loss], [each.loss for each in expected], **EXACT)


def test_unknown_methods_are_named() -> None:
    with pytest.raises(UsageError) as error:
        preset("digits", "gsad")
    assert str(error.value).startswith("--method: found 'gsad'; expected source-only, entropy, dann, glb, glb-cls")
