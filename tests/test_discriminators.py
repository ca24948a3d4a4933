import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import gsda_kernels
from gsda_fast import ClassGroups, Discriminators
from gsda_fast.methods import discriminators as module_under_test
from gsda_fast.methods.discriminators import domain_accuracy

GROUPS = [[1, 1, 0, 0], [0, 0, 1, 1]]
NUM_CLASSES, FEATURE_DIM, HIDDEN_DIM, NUM_SOURCE, NUM_TARGET = 4, 5, 6, 6, 7


def build(
    levels: tuple[str, ...] = ("domain", "group", "class"), groups: object = GROUPS, **options: object
) -> Discriminators:
    torch.manual_seed(0)
    return Discriminators(FEATURE_DIM, ClassGroups([groups]), HIDDEN_DIM, levels, **options)  # type: ignore[arg-type]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features, class probabilities and domain labels of a joint batch, source rows first."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(NUM_SOURCE + NUM_TARGET, FEATURE_DIM, dtype=dtype, generator=generator)
    labels = torch.arange(NUM_SOURCE) % NUM_CLASSES
    predicted = torch.randn(NUM_TARGET, NUM_CLASSES, dtype=dtype, generator=generator).softmax(1)
    probabilities = torch.cat([F.one_hot(labels, NUM_CLASSES).to(dtype), predicted])
    domain = torch.cat([torch.ones(NUM_SOURCE), torch.zeros(NUM_TARGET)])
    return features, probabilities, domain


def logits(module: Discriminators, features: Tensor) -> Tensor:
    """(N, K), each discriminator as a plain network of its own."""
    columns = []
    for w1, b1, w2, b2, w3, b3 in zip(module.w1, module.b1, module.w2, module.b2, module.w3, module.b3):
        hidden = F.relu(F.linear(F.relu(F.linear(features, w1, b1)), w2, b2))
        columns.append(hidden @ w3 + b3)
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (("domain",), ("domain",)),
        (("group",), ("group",)),
        (("class",), ("class",)),
        (("class", "domain"), ("domain", "class")),
        (("group", "domain"), ("domain", "group")),
        (("class", "group"), ("group", "class")),
        (("class", "group", "domain"), ("domain", "group", "class")),
    ],
)
def test_each_choice_of_levels_has_its_discriminators_in_one_order(
    levels: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    sizes = {"domain": 1, "group": 2, "class": NUM_CLASSES}
    module = build(levels)
    assert module.levels == expected
    assert module.num_discriminators == len(module.w1) == sum(sizes[level] for level in levels)
    start = 0
    for level in expected:
        assert module.level_slice(level) == slice(start, start + sizes[level])
        start += sizes[level]
    values = torch.arange(float(start))
    by_level = torch.split(values, [sizes[level] for level in expected])
    assert {name: float(x) for name, x in module.sum_per_level(values).items()} == {
        level: float(part.sum()) for level, part in zip(expected, by_level)
    }


@pytest.mark.parametrize("levels", [(), ("domain", "groups")])
def test_unknown_levels(levels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels: found .*; expected one or more of domain, group, class"):
        build(levels)


@pytest.mark.parametrize("levels", [("domain", "group", "class"), ("domain", "class"), ("group",)])
def test_losses_weigh_each_sample_by_one_its_groups_and_its_classes(levels: tuple[str, ...]) -> None:
    module = build(levels).double()
    features, probabilities, domain = batch(torch.float64)
    columns = {
        "domain": torch.ones(len(features), 1, dtype=torch.float64),
        "group": probabilities @ torch.tensor(GROUPS, dtype=torch.float64).T,
        "class": probabilities,
    }
    weight = torch.cat([columns[level] for level in levels], dim=1)
    z, label = logits(module, features), domain.double().unsqueeze(1)
    cross_entropy = -(label * F.logsigmoid(z) + (1 - label) * F.logsigmoid(-z))
    out = module(features, probabilities, domain, NUM_SOURCE)
    assert_close(out.loss, (weight * cross_entropy).mean(0), atol=1e-14, rtol=1e-12)


def test_the_whole_domain_weighs_exactly_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture_weights(monkeypatch)
    features, probabilities, domain = batch()
    probabilities[NUM_SOURCE:] *= 1 + 1e-3  # as a sum of rounded probabilities is not one
    build()(features, probabilities, domain)
    assert torch.equal(seen[0][:, 0], torch.ones(len(features)))


@pytest.mark.parametrize(
    "backend", [name for name, why in gsda_kernels.available_backends("cpu").items() if why is None]
)
def test_a_prediction_that_is_no_number_makes_terms_that_are_none(backend: str) -> None:
    """Of a network that has diverged: the guard of training then names the terms, on a CPU as on a GPU."""
    features, probabilities, domain = batch()
    probabilities[-1] = torch.nan
    terms = build(backend=backend)(features, probabilities, domain, NUM_SOURCE)
    assert terms.loss[1:].isnan().all()
    assert terms.loss[0].isfinite()


def capture_weights(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    original = gsda_kernels.adversarial_terms

    def spy(features: Tensor, disc: object, weight: Tensor, *rest: object, **options: object) -> object:
        seen.append(weight)
        return original(features, disc, weight, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module_under_test, "adversarial_terms", spy)
    return seen


def test_sample_weights_multiply_those_of_every_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (features, probabilities, domain) = build(), batch()
    captured = capture_weights(monkeypatch)
    plain = module(features, probabilities, domain)
    factor = torch.linspace(0, 2, len(features))
    out = module(features, probabilities, domain, NUM_SOURCE, sample_weight=factor)
    assert_close(captured[1], captured[0] * factor.unsqueeze(1))
    # The denominator stays the number of samples, so that all levels keep one scale.
    losses = F.binary_cross_entropy_with_logits(
        logits(module, features), domain.unsqueeze(1).expand(-1, module.num_discriminators), reduction="none"
    )
    assert_close(out.loss, (captured[1] * losses).mean(0))
    assert not torch.allclose(out.gradient_norm, plain.gradient_norm)


def test_overlapping_groups_weigh_by_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture_weights(monkeypatch)
    features, probabilities, domain = batch()
    build(groups=[[1, 1, 1, 0], [0, 0, 1, 1]])(features, probabilities, domain, NUM_SOURCE)
    shares = torch.tensor([[1, 1, 0.5, 0], [0, 0, 0.5, 1]])
    assert_close(seen[0][:, 1:3], probabilities @ shares.T)
    assert_close(seen[0][:, 1:3].sum(1), torch.ones(len(features)))


def test_each_slice_is_initialised_as_a_linear_layer_of_its_own() -> None:
    torch.manual_seed(0)
    dim, hidden = 64, 100
    module = Discriminators(dim, ClassGroups.random(10, 3, seed=0), hidden)
    fan_in = {"w1": dim, "b1": dim, "w2": hidden, "b2": hidden, "w3": hidden, "b3": hidden}
    for name, fan in fan_in.items():
        bound, values = 1 / math.sqrt(fan), module.get_parameter(name).detach()
        assert values.abs().max() <= bound, name
        # A uniform distribution's standard deviation; the fan-in of the whole stack would be 64 to 100 times larger.
        tolerance = 0.5 if values.numel() < 100 else 0.06
        assert_close(float(values.std()), bound / math.sqrt(3), rtol=tolerance, atol=0)
    first, second = module.w1.detach()[:2]
    assert not torch.equal(first, second)
    assert [tuple(parameter.shape) for parameter in module.parameters()] == [
        (14, 100, 64),
        (14, 100),
        (14, 100, 100),
        (14, 100),
        (14, 100),
        (14,),
    ]


def test_frozen_holds_the_parameters_and_lets_the_features_learn() -> None:
    module = build()
    features, probabilities, domain = batch()
    held, free = (
        module(features.requires_grad_(), probabilities, domain, NUM_SOURCE, frozen=frozen) for frozen in (True, False)
    )
    assert_close(held.loss, free.loss)
    parameters = list(module.parameters())
    total = held.loss.sum() + held.gradient_norm.sum()
    gradients = torch.autograd.grad(total, [features, *parameters], allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1:] == (None,) * len(parameters)
    free_gradients = torch.autograd.grad(free.loss.sum() + free.gradient_norm.sum(), [features, *parameters])
    assert all(gradient.abs().sum() > 0 for gradient in free_gradients)
    assert_close(free_gradients[0], gradients[0])


@pytest.mark.parametrize("groups", [GROUPS, [[1, 1, 1, 1], [0, 0, 1, 1]]])
@pytest.mark.parametrize("levels", [("domain", "group", "class"), ("domain", "class"), ("group",), ("class",)])
def test_the_bound_on_pairs_holds_for_one_hot_source_rows(levels: tuple[str, ...], groups: list[list[int]]) -> None:
    module = build(levels, groups)
    features, probabilities, domain = batch()
    bounded = module(features, probabilities, domain, NUM_SOURCE)
    free = module(features, probabilities, domain)
    assert torch.isfinite(bounded.loss).all()
    assert_close(bounded, free)


def test_source_rows_that_exceed_the_bound_give_nan_and_no_wrong_number() -> None:
    module = build()
    features, probabilities, domain = batch()
    probabilities[:NUM_SOURCE] = 1 / NUM_CLASSES
    out = module(features, probabilities, domain, NUM_SOURCE)
    assert out.loss.isnan().all()
    assert out.gradient_norm.isnan().all()
    assert torch.isfinite(module(features, probabilities, domain).loss).all()


def test_dropped_pairs_are_those_of_the_target_below_the_threshold() -> None:
    features, probabilities, domain = batch()
    out = build(min_weight=0.3)(features, probabilities, domain, NUM_SOURCE)
    exact = build()
    weight = torch.cat([torch.ones(len(features), 1), probabilities @ torch.tensor(GROUPS).float().T, probabilities], 1)
    weight[NUM_SOURCE:][weight[NUM_SOURCE:] < 0.3] = 0
    z = logits(exact, features)
    cross_entropy = F.binary_cross_entropy_with_logits(z, domain.unsqueeze(1).expand_as(z), reduction="none")
    assert_close(out.loss, (weight * cross_entropy).mean(0))


def test_probabilities_carry_no_gradient() -> None:
    features, probabilities, domain = batch()
    features.requires_grad_(), probabilities.requires_grad_()
    out = build()(features, probabilities, domain)
    gradients = torch.autograd.grad(
        out.loss.sum() + out.gradient_norm.sum(), [features, probabilities], allow_unused=True
    )
    assert gradients[0] is not None
    assert gradients[1] is None


@pytest.mark.parametrize("term", ["loss", "gradient_norm"])
@pytest.mark.parametrize("level", ["domain", "group", "class"])
def test_samples_of_both_domains_feel_every_level(level: str, term: str) -> None:
    module = build()
    features, probabilities, domain = batch()
    out = module(features.requires_grad_(), probabilities, domain, NUM_SOURCE)
    (gradient,) = torch.autograd.grad(module.sum_per_level(getattr(out, term))[level], features)
    felt = gradient.norm(dim=1) > 0
    # A ReLU network may be flat at a sample, but not at a whole domain.
    assert felt[:NUM_SOURCE].float().mean() > 0.5
    assert felt[NUM_SOURCE:].float().mean() > 0.5


def test_the_factor_on_the_features_gradient_leaves_the_discriminators_alone() -> None:
    module = build().double()
    features, probabilities, domain = batch(torch.float64)
    features.requires_grad_()
    gradients = []
    for scale in (1.0, -0.3):
        out = module(features, probabilities, domain, NUM_SOURCE, loss_feature_scale=scale)
        gradients.append(torch.autograd.grad(out.loss.sum(), [features, *module.parameters()]))
    assert_close(gradients[1][0], -0.3 * gradients[0][0])
    assert_close(gradients[1][1:], gradients[0][1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_stay_float32_under_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture_weights(monkeypatch)
    module = build()
    features, probabilities, domain = batch()
    plain = module(features, probabilities, domain, NUM_SOURCE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(features.to(dtype), probabilities, domain, NUM_SOURCE)
    assert out.loss.dtype == out.gradient_norm.dtype == torch.float32
    # The weights are sums of probabilities: in bfloat16 they would be off by up to 0.4 %.
    assert torch.equal(seen[0], seen[1])
    if dtype == torch.float32:
        assert torch.equal(out.loss, plain.loss)


def test_stored_discriminators_bring_their_division_along() -> None:
    stored, other = build(), build(groups=[[1, 0, 1, 0], [0, 1, 0, 1]])
    features, probabilities, domain = batch()
    other.load_state_dict(stored.state_dict())
    assert_close(other(features, probabilities, domain), stored(features, probabilities, domain))


def test_domain_accuracy_counts_the_rows_whose_domain_is_named() -> None:
    domain = torch.tensor([1.0, 1.0, 0.0, 0.0])
    z = torch.tensor([[2.0, -1.0], [0.5, 1.0], [-3.0, 1.0], [0.0, -1.0]])
    assert float(domain_accuracy(z[:, :1], domain)) == 1.0  # a logit of 0 names the target
    assert float(domain_accuracy(torch.zeros(4, 1), domain)) == 0.5
    assert float(domain_accuracy(z, domain)) == pytest.approx(6 / 8)
    share = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.3, 0.7]])
    assert float(domain_accuracy(z, domain, share)) == pytest.approx((0.9 + 1.0 + 0.2 + 1.0) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_domain_accuracy_is_that_of_the_domains_discriminator(dtype: torch.dtype) -> None:
    module = build()
    features, _, domain = batch()
    found = module.domain_accuracy(features.to(dtype), domain)
    named = logits(module, features.to(dtype).float())[:, 0] > 0
    assert found is not None
    assert 0 < float(found) < 1
    assert float(found) == pytest.approx(float((named == (domain > 0)).float().mean()))
    assert build(("group", "class")).domain_accuracy(features, domain) is None
    module.keep(slice(1, 3))
    assert module.domain_accuracy(features, domain) is None
