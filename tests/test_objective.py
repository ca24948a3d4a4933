"""Each loss recomputed by hand, and the sign and destination of every gradient of eqs. 14-17."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gsda_fast import ClassGroups, Discriminators, discriminator_objective, encoder_objective, synchronization_loss
from gsda_fast.losses import entropy
from gsda_fast.methods.objective import class_probabilities, classification_loss, target_class_weights
from gsda_kernels import AdversarialTerms, DiscriminatorWeights, adversarial_terms

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ eqs. 3-5


def cross_entropy_by_hand(logits: list[list[float]], labels: list[int]) -> float:
    return sum(math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(logits, labels)) / len(labels)


def entropy_by_hand(logits: list[list[float]]) -> float:
    total = 0.0
    for row in logits:
        weights = [math.exp(x) for x in row]
        for weight in weights:
            p = weight / sum(weights)
            total -= p * math.log(p)
    return total / len(logits)


@FLOATS
def test_entropy_is_eq_5(dtype: torch.dtype) -> None:
    logits = 3 * random(5, 4, dtype=dtype)
    assert_close(float(entropy(logits)), entropy_by_hand(logits.tolist()), **tolerance(dtype))
    assert_close(float(entropy(torch.zeros(2, 4, dtype=dtype))), math.log(4), **tolerance(dtype))


def test_entropy_of_a_certain_prediction_is_zero_and_its_gradient_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    value = entropy(logits)
    value.backward()
    assert value == 0
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


@FLOATS
def test_classification_loss_is_eqs_3_to_5(dtype: torch.dtype) -> None:
    logits, labels = random(9, 4, dtype=dtype), torch.tensor([3, 0, 1, 1])
    objective = encoder_objective(logits, labels, alpha=0.3)
    source = cross_entropy_by_hand(logits[:4].tolist(), labels.tolist())
    target = entropy_by_hand(logits[4:].tolist())
    assert_close(float(objective.total), source + 0.3 * target, **tolerance(dtype))
    assert_close(float(objective.terms["classification"]), source, **tolerance(dtype))
    assert_close(float(objective.terms["entropy"]), target, **tolerance(dtype))
    assert set(objective.terms) == {"classification", "entropy"}


def test_without_alpha_the_target_takes_no_part() -> None:
    labels = torch.tensor([3, 0, 1, 1])
    logits = random(9, 4).requires_grad_()
    objective = encoder_objective(logits, labels)
    (gradient,) = torch.autograd.grad(objective.total, logits)
    assert (gradient[:4] != 0).all()
    assert (gradient[4:] == 0).all()
    assert set(objective.terms) == {"classification"}
    assert_close(encoder_objective(logits[:4], labels).total, objective.total)


@FLOATS
def test_class_probabilities_are_true_classes_then_predictions(dtype: torch.dtype) -> None:
    logits = random(5, 3, dtype=dtype).requires_grad_()
    p = class_probabilities(logits, torch.tensor([2, 0]))
    assert p[:2].tolist() == [[0, 0, 1], [1, 0, 0]]
    expected = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits[2:].tolist()]
    assert_close(p[2:], torch.tensor(expected, dtype=dtype), **tolerance(dtype))
    assert p.dtype == dtype
    assert not p.requires_grad


@FLOATS
def test_class_weights_are_the_mean_prediction_over_its_maximum(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.85, 0.05, 0.0], [0.3, 0.4, 0.3, 0.0]], dtype=dtype)
    weights = target_class_weights(probabilities)  # sums 0.9, 1.5, 0.6, 0
    assert weights.dtype == dtype
    assert_close(weights, torch.tensor([0.6, 1.0, 0.4, 0.0], dtype=dtype), **tolerance(dtype))


@FLOATS
def test_weighted_classification_loss_by_hand(dtype: torch.dtype) -> None:
    logits, labels, weight = random(4, 3, dtype=dtype), [2, 0, 1, 1], [0.5, 1.0, 0.0, 0.25]
    rows = logits.tolist()
    by_hand = sum(w * cross_entropy_by_hand([row], [y]) for row, y, w in zip(rows, labels, weight)) / 1.75
    for scale in (1.0, 0.01):  # a common factor of the weights says nothing
        given = scale * torch.tensor(weight, dtype=dtype)
        assert_close(float(classification_loss(logits, torch.tensor(labels), given)), by_hand, **tolerance(dtype))


def test_weights_of_one_are_none_and_weights_of_zero_no_loss() -> None:
    logits, labels = random(5, 3).requires_grad_(), torch.tensor([0, 1, 2, 2, 1])
    plain = classification_loss(logits, labels)
    assert torch.equal(plain, F.cross_entropy(logits, labels))
    assert_close(classification_loss(logits, labels, torch.ones(5, dtype=torch.float64)), plain)
    nothing = classification_loss(logits, labels, torch.zeros(5))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_parts_of_a_batch_share_the_sum_of_its_weights() -> None:
    logits, labels = random(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    weight = torch.tensor([1.0, 0.1, 0.6, 0.0, 0.2, 0.1], dtype=torch.float64)
    whole = classification_loss(logits, labels, weight)
    halves = [slice(0, 3), slice(3, 6)]
    shared = [classification_loss(logits[h], labels[h], weight[h], lambda _: weight.mean()) for h in halves]
    assert_close((shared[0] + shared[1]) / 2, whole, rtol=1e-12, atol=0)
    alone = [classification_loss(logits[h], labels[h], weight[h]) for h in halves]
    assert not torch.isclose((alone[0] + alone[1]) / 2, whole, rtol=1e-2)


def test_class_probabilities_of_half_precision_logits_are_float32() -> None:
    logits = random(5, 3).to(torch.bfloat16)
    p = class_probabilities(logits, torch.tensor([2, 0]))
    assert p.dtype == torch.float32
    assert_close(p[2:].sum(1), torch.ones(3), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- eqs. 10-12


@FLOATS
def test_synchronization_loss_is_eqs_10_to_12(dtype: torch.dtype) -> None:
    groups = ClassGroups([[[1, 0, 1, 0, 0], [0, 1, 0, 1, 1]]])
    norms = random(1 + 2 + 5, dtype=dtype).abs()
    s_dom, s_grp, s_cls = float(norms[0]), norms[1:3].tolist(), norms[3:].tolist()
    eq_10 = (abs(s_grp[0] - s_cls[0] - s_cls[2]) + abs(s_grp[1] - s_cls[1] - s_cls[3] - s_cls[4])) / 2
    eq_11 = abs(s_dom - sum(s_grp))
    assert_close(float(synchronization_loss(norms, groups)), eq_10 + eq_11, **tolerance(dtype))


@FLOATS
def test_a_hierarchy_synchronizes_neighbouring_levels(dtype: torch.dtype) -> None:
    coarse, fine = [[1, 1, 1, 0], [0, 0, 0, 1]], [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    norms = random(1 + 2 + 3 + 4, dtype=dtype).abs()
    dom, (c0, c1), (f0, f1, f2), s = float(norms[0]), norms[1:3].tolist(), norms[3:6].tolist(), norms[6:].tolist()
    expected = abs(dom - c0 - c1)
    expected += (abs(c0 - f0 - f1) + abs(c1 - f2)) / 2
    expected += (abs(f0 - s[0] - s[2]) + abs(f1 - s[1]) + abs(f2 - s[3])) / 3
    assert_close(float(synchronization_loss(norms, ClassGroups([coarse, fine]))), expected, **tolerance(dtype))


@FLOATS
def test_overlapping_groups_share_their_classes(dtype: torch.dtype) -> None:
    groups = ClassGroups([[[1, 1, 0], [0, 1, 1]]])
    norms = random(1 + 2 + 3, dtype=dtype).abs()
    dom, g0, g1, s0, s1, s2 = norms.tolist()
    expected = abs(dom - g0 - g1) + (abs(g0 - s0 - s1 / 2) + abs(g1 - s1 / 2 - s2)) / 2
    assert_close(float(synchronization_loss(norms, groups)), expected, **tolerance(dtype))


@pytest.mark.parametrize(
    "levels",
    [
        [[[1, 1, 0, 0], [0, 0, 1, 1]]],
        [[[1, 1, 1, 0], [0, 1, 1, 1]]],  # overlapping
        [[[1, 1, 1, 0], [0, 0, 0, 1]], [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]],
    ],
)
def test_a_synchronised_state_has_no_loss(levels: list[list[list[int]]]) -> None:
    groups = ClassGroups(levels)
    per_class = random(groups.num_classes).abs()
    parts = [per_class]
    for level in reversed(range(len(levels))):
        parts.insert(0, groups.shares_below(level).double() @ parts[0])
    synchronised = torch.cat([per_class.sum().reshape(1), *parts])
    assert synchronization_loss(synchronised, groups) < 1e-14
    for k in range(len(synchronised)):
        disturbed = synchronised.clone()
        disturbed[k] += 0.1
        assert synchronization_loss(disturbed, groups) > 0.01


def test_the_gradient_of_synchronization_is_the_sign_of_each_gap() -> None:
    groups = ClassGroups([[[1, 1, 0], [0, 0, 1]]])
    norms = torch.tensor([5.0, 1.0, 3.0, 2.0, 1.0, 0.5], requires_grad=True)  # 5 > 1 + 3, 1 < 2 + 1, 3 > 0.5
    (gradient,) = torch.autograd.grad(synchronization_loss(norms, groups), norms)
    assert gradient.tolist() == [1, -1 - 0.5, -1 + 0.5, 0.5, 0.5, -0.5]


def test_signs_are_those_of_the_mean_over_ranks() -> None:
    groups = ClassGroups([[[1, 1, 0], [0, 0, 1]]])
    # Here and there the gaps have opposite signs, so that the sum of two local losses would be far from zero.
    here = torch.tensor([5.0, 1.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    there = torch.tensor([1.0, 4.0, 1.0, 0.5, 0.5, 2.5], dtype=torch.float64, requires_grad=True)
    everywhere = (here + there) / 2
    expected = synchronization_loss(everywhere, groups)
    expected_gradients = torch.autograd.grad(expected, [here, there])

    local = [synchronization_loss(norms, groups, lambda _: everywhere.detach()) for norms in (here, there)]
    for value, norms, gradient in zip(local, (here, there), expected_gradients):
        assert_close(value, expected)
        # Data-parallel training averages the gradients of two ranks, which makes the factor of one half.
        assert_close(torch.autograd.grad(value, norms)[0] / 2, gradient)
    alone = synchronization_loss(here, groups).detach()
    assert not math.isclose(float(alone), float(expected.detach()), rel_tol=0.1)


def test_the_reduction_over_ranks_gets_no_graph() -> None:
    seen: list[Tensor] = []

    def mean_over_ranks(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    norms = random(6).abs().requires_grad_()
    synchronization_loss(norms, ClassGroups([[[1, 1, 0], [0, 0, 1]]]), mean_over_ranks)
    assert [x.requires_grad for x in seen] == [False]


@pytest.mark.parametrize("shape", [(5,), (7,), (1, 6)])
def test_gradient_norms_of_another_division(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gradient_norm: found shape .*; expected \(6,\)"):
        synchronization_loss(torch.zeros(shape), ClassGroups([[[1, 1, 0], [0, 0, 1]]]))


# ---------------------------------------------------------------------------------------------------- eqs. 13, 16


def some_terms(groups: ClassGroups, dtype: torch.dtype) -> AdversarialTerms:
    k = 1 + groups.num_groups + groups.num_classes
    return AdversarialTerms(random(k, dtype=dtype, seed=1).abs(), random(k, dtype=dtype, seed=2).abs())


@FLOATS
def test_what_the_discriminators_minimize_is_eq_13(dtype: torch.dtype) -> None:
    groups = ClassGroups.random(4, 2, seed=0)
    terms = some_terms(groups, dtype)
    sync = synchronization_loss(terms.gradient_norm, groups)
    objective = discriminator_objective(terms, groups, beta=0.7)
    assert_close(float(objective.total), sum(terms.loss.tolist()) + 0.7 * float(sync), **tolerance(dtype))
    assert {name: float(x) for name, x in objective.terms.items()} == {
        "adversarial": pytest.approx(sum(terms.loss.tolist())),
        "synchronization": pytest.approx(float(sync)),
    }
    assert_close(float(discriminator_objective(terms).total), sum(terms.loss.tolist()), **tolerance(dtype))
    assert set(discriminator_objective(terms).terms) == {"adversarial"}


@FLOATS
@pytest.mark.parametrize("as_tensor", [False, True])
def test_what_the_encoder_minimizes_is_eq_16(dtype: torch.dtype, as_tensor: bool) -> None:
    groups = ClassGroups.random(4, 2, seed=0)
    terms, logits, labels = some_terms(groups, dtype), random(6, 4, dtype=dtype), torch.tensor([0, 3, 1])
    beta, ramp = (torch.tensor(x, dtype=dtype) if as_tensor else x for x in (0.7, 0.4))
    objective = encoder_objective(
        logits, labels, terms, groups, alpha=0.2, beta=beta, adversarial_ramp=ramp, adversarial_weight=3.0
    )
    own = cross_entropy_by_hand(logits[:3].tolist(), labels.tolist()) + 0.2 * entropy_by_hand(logits[3:].tolist())
    sync, adversarial = float(synchronization_loss(terms.gradient_norm, groups)), sum(terms.loss.tolist())
    assert_close(float(objective.total), own + 3.0 * (0.7 * sync - 0.4 * adversarial), **tolerance(dtype))
    assert set(objective.terms) == {"classification", "entropy", "adversarial", "synchronization"}
    assert_close(float(objective.terms["adversarial"]), adversarial, **tolerance(dtype))
    assert_close(float(objective.terms["synchronization"]), sync, **tolerance(dtype))


def test_named_terms_are_unweighted_and_detached() -> None:
    groups = ClassGroups.random(4, 2, seed=0)
    terms = AdversarialTerms(*(x.requires_grad_() for x in some_terms(groups, torch.float64)))
    logits, labels = random(6, 4).requires_grad_(), torch.tensor([0, 3, 1])
    for objective in (
        discriminator_objective(terms, groups, beta=9.0),
        encoder_objective(logits, labels, terms, groups, alpha=0.2, beta=9.0, adversarial_weight=3.0),
    ):
        assert objective.total.requires_grad
        assert not any(term.requires_grad for term in objective.terms.values())
        assert_close(objective.terms["adversarial"], terms.loss.sum().detach())


# ---------------------------------------- eqs. 14-17: which parameters move, and in which direction, in each step


class Game:
    """A small encoder, classifier and discriminators with one batch, in float64."""

    alpha, beta, ramp, weight, num_source = 0.3, 0.7, 0.4, 1.0, 6

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.groups = ClassGroups.random(4, 2, seed=0)
        self.encoder = nn.Linear(5, 8).double()
        self.classifier = nn.Linear(8, 4).double()
        self.discriminators = Discriminators(8, self.groups, hidden_dim=7).double()
        self.images = random(self.num_source + 7, 5)
        self.labels = torch.arange(self.num_source) % 4
        self.domain = (torch.arange(len(self.images)) < self.num_source).double()
        self.features = self.encoder(self.images)
        self.logits = self.classifier(self.features)
        self.probabilities = class_probabilities(self.logits, self.labels)

    def terms(self, features: Tensor, frozen: bool) -> AdversarialTerms:
        out: AdversarialTerms = self.discriminators(
            features, self.probabilities, self.domain, self.num_source, frozen=frozen
        )
        return out

    def discriminator_step(self) -> Tensor:
        terms = self.terms(self.features.detach(), frozen=False)
        return discriminator_objective(terms, self.groups, beta=self.beta).total

    def encoder_step(self, **changes: float) -> Tensor:
        options = {"alpha": self.alpha, "beta": self.beta, "adversarial_ramp": self.ramp} | changes
        terms = self.terms(self.features, frozen=True)
        return encoder_objective(self.logits, self.labels, terms, self.groups, **options).total  # type: ignore[arg-type]

    def classification_loss(self) -> Tensor:
        own = F.cross_entropy(self.logits[: self.num_source], self.labels)
        return own + self.alpha * entropy(self.logits[self.num_source :])

    def level_losses(self) -> dict[str, Tensor]:
        """The loss of each level (eqs. 6-8) and the synchronization (eq. 12), with everything free to learn."""
        terms = self.terms(self.features, frozen=False)
        sync = synchronization_loss(terms.gradient_norm, self.groups)
        return {**self.discriminators.sum_per_level(terms.loss), "synchronization": sync}


def gradients(total: Tensor, module: nn.Module) -> list[Tensor]:
    """A gradient for each parameter, zeros where nothing arrives; `total` can be asked again."""
    found = torch.autograd.grad(total, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), found)]


def receives_nothing(total: Tensor, module: nn.Module) -> bool:
    found = torch.autograd.grad(total, list(module.parameters()), retain_graph=True, allow_unused=True)
    return all(gradient is None for gradient in found)


def combined(parts: list[tuple[float, Tensor]], module: nn.Module) -> list[Tensor]:
    """The gradient of a weighted sum, term by term."""
    sums = [torch.zeros_like(parameter) for parameter in module.parameters()]
    for factor, part in parts:
        sums = [total + factor * gradient for total, gradient in zip(sums, gradients(part, module))]
    return sums


@pytest.fixture
def game() -> Game:
    return Game()


EXACT = {"rtol": 1e-10, "atol": 1e-14}


def rows_of(level: str, game: Game) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda tensors: [tensor[game.discriminators.level_slice(level)] for tensor in tensors]


def test_eq_14_discriminators_descend_their_own_losses(game: Game) -> None:
    """Without synchronization, each level's discriminators get the gradient of their own level's loss, and plus it."""
    total = discriminator_objective(game.terms(game.features.detach(), frozen=False)).total
    losses = game.level_losses()
    for level in ("domain", "group", "class"):
        own = rows_of(level, game)
        found, expected = (own(gradients(loss, game.discriminators)) for loss in (total, losses[level]))
        assert_close(found, expected, **EXACT)
        assert all(gradient.abs().max() > 0 for gradient in found)
    assert receives_nothing(total, game.encoder)
    assert receives_nothing(total, game.classifier)


def test_eq_15_discriminators_also_descend_synchronization(game: Game) -> None:
    total, losses = game.discriminator_step(), game.level_losses()
    parts = [(1.0, losses["domain"]), (1.0, losses["group"]), (1.0, losses["class"])]
    with_sync = combined([*parts, (game.beta, losses["synchronization"])], game.discriminators)
    assert_close(gradients(total, game.discriminators), with_sync, **EXACT)
    # It reaches the discriminators of every level, through J: the weights, but not the output's bias alone.
    for level in ("domain", "group", "class"):
        w1, *_ = rows_of(level, game)(gradients(losses["synchronization"], game.discriminators))
        assert w1.abs().max() > 0
    assert receives_nothing(total, game.encoder)
    assert receives_nothing(total, game.classifier)


def test_eq_16_the_encoder_ascends_the_discriminators_losses_and_descends_the_rest(game: Game) -> None:
    total, losses = game.encoder_step(), game.level_losses()
    levels = [(-game.ramp, losses[level]) for level in ("domain", "group", "class")]
    expected = combined(
        [(1.0, game.classification_loss()), (game.beta, losses["synchronization"]), *levels], game.encoder
    )
    assert_close(gradients(total, game.encoder), expected, **EXACT)
    for part in losses.values():
        assert max(gradient.abs().max() for gradient in gradients(part, game.encoder)) > 1e-4
    assert receives_nothing(total, game.discriminators)


def test_eq_17_the_classifier_descends_the_classification_loss_alone(game: Game) -> None:
    total = game.encoder_step()
    found = gradients(total, game.classifier)
    assert_close(found, gradients(game.classification_loss(), game.classifier), **EXACT)
    assert all(gradient.abs().max() > 0 for gradient in found)
    for part in game.level_losses().values():
        assert receives_nothing(part, game.classifier)


def test_the_players_pull_the_features_in_opposite_directions(game: Game) -> None:
    free = game.features.detach().requires_grad_()
    as_discriminators = discriminator_objective(game.terms(free, frozen=False)).total
    as_encoder = encoder_objective(
        game.logits.detach(), game.labels, game.terms(free, frozen=True), adversarial_ramp=game.ramp
    ).total
    (down,), (up,) = (torch.autograd.grad(total, free) for total in (as_discriminators, as_encoder))
    assert_close(up, -game.ramp * down, **EXACT)
    assert (down.norm(dim=1) > 0).float().mean() > 0.5


def test_synchronization_pulls_both_players_the_same_way(game: Game) -> None:
    free = game.features.detach().requires_grad_()
    without, with_sync = [], []
    for frozen in (False, True):
        for beta, out in ((0.0, without), (game.beta, with_sync)):
            terms = game.terms(free, frozen)
            if frozen:
                total = encoder_objective(
                    game.logits.detach(), game.labels, terms, game.groups, beta=beta, adversarial_ramp=game.ramp
                ).total
            else:
                total = discriminator_objective(terms, game.groups, beta=beta).total
            out.append(torch.autograd.grad(total, free)[0])
    of_discriminators, of_encoder = (b - a for a, b in zip(without, with_sync))
    assert_close(of_encoder, of_discriminators, rtol=1e-8, atol=1e-14)
    assert of_encoder.abs().max() > 1e-6


def test_the_ramp_multiplies_the_discriminators_losses_alone(game: Game) -> None:
    zero, one = (gradients(game.encoder_step(adversarial_ramp=ramp), game.encoder) for ramp in (0.0, 1.0))
    losses = game.level_losses()
    ramped = combined([(-1.0, losses[level]) for level in ("domain", "group", "class")], game.encoder)
    assert_close([b - a for a, b in zip(zero, one)], ramped, rtol=1e-9, atol=1e-13)


def test_the_adversarial_weight_multiplies_the_whole_adversarial_part(game: Game) -> None:
    found = gradients(game.encoder_step(adversarial_weight=2.5), game.encoder)
    losses = game.level_losses()
    parts = [(1.0, game.classification_loss()), (2.5 * game.beta, losses["synchronization"])]
    parts += [(-2.5 * game.ramp, losses[level]) for level in ("domain", "group", "class")]
    assert_close(found, combined(parts, game.encoder), **EXACT)


def test_an_encoder_without_source_or_target_rows_is_told_so() -> None:
    logits = torch.randn(4, 3)
    with pytest.raises(ValueError, match="source_labels: found none; expected at least one source row"):
        encoder_objective(logits, torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits: found 4 rows, all of the source; expected target rows, or alpha = 0"):
        encoder_objective(logits, torch.tensor([0, 1, 2, 0]), alpha=0.1)
    assert encoder_objective(logits, torch.tensor([0, 1, 2, 0])).total.isfinite()


@pytest.mark.parametrize("empty", ["no source", "no target", "no confident sample of the target", "no weight at all"])
def test_terms_of_one_domain_alone_are_finite(empty: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(6, 4, requires_grad=True)
    disc = DiscriminatorWeights(*(torch.randn(s) for s in [(3, 8, 4), (3, 8), (3, 8, 8), (3, 8), (3, 8), (3,)]))
    domain = torch.tensor([1.0, 1, 1, 0, 0, 0])
    weight = torch.rand(6, 3)
    if empty.endswith(("source", "target")) and empty.count(" ") == 1:
        domain = torch.full((6,), float(empty == "no target"))
    elif empty == "no weight at all":
        weight = torch.zeros(6, 3)
    else:
        weight[3:] = 0
    terms = adversarial_terms(features, disc, weight, domain, backend="reference")
    objective = discriminator_objective(terms)
    (objective.total + terms.gradient_norm.sum()).backward()
    assert objective.total.isfinite()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"features: found shape \(0, 4\)"):
        adversarial_terms(features[:0], disc, weight[:0], domain[:0])
