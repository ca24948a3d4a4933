"""Each compared method: who moves in a step, its published values, where its gradients go, two ranks as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_inputs import CERTAIN, F1, F2, FEATURES, LABELS, LOGITS, Z1, Z2, Y, gradient, printed, random
from torch import Tensor, nn
from torch.testing import assert_close

from gsda_fast import losses
from gsda_fast.config import TASKS, parse_config, preset
from gsda_fast.data.batches import Batch
from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS, TERMS, AdaptationSettings, Method, Outputs, Step, TaskFacts, Update, build_method
from gsda_fast.methods.adda import ADDA
from gsda_fast.methods.adversarial import DomainDiscriminators, scale_gradient
from gsda_fast.methods.cdan import CDAN
from gsda_fast.methods.fitted import FittedHead
from gsda_fast.methods.heads import TwinClassifier, TwoClassifiers
from gsda_fast.methods.mcd import MCD
from gsda_fast.methods.rtn import RTN
from gsda_fast.methods.sdat import ascent
from gsda_fast.methods.self_ensembling import SelfEnsembling
from gsda_fast.methods.shallow import gfk, subspace_disagreement, tca
from gsda_fast.methods.tpn import TPN
from gsda_fast.model import AdaptationModel, ModelOutput, ModelSettings
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.optim import OptimizerSettings, build_optimizers
from gsda_fast.training.update import Updater

CLASSES, WIDTH, DIM, ROWS = 4, 5, 8, 6
EXACT = {"rtol": 1e-9, "atol": 1e-12}

# Players of each update of an adaptation step, in order.
BOTH = ("encoder", "classifier")
REVERSED = [(*BOTH, "discriminators")]
ALTERNATING = [("discriminators",), BOTH]
UPDATES: dict[str, list[tuple[str, ...]]] = {
    "dan": [BOTH],
    "jan": [BOTH],
    "rtn": [(*BOTH, "residual")],
    "mada": ALTERNATING,
    "adda": [("discriminator",), ("target_encoder",)],
    "mcd": [BOTH, ("classifier",), *[("encoder",)] * 4],
    "cdan": REVERSED,
    "cdan-e": REVERSED,
    "symnets": [BOTH],
    "hafn": [BOTH],
    "safn": [BOTH],
    "bsp-dann": ALTERNATING,
    "bsp-cdan": REVERSED,
    "tpn": [("encoder",)],
    "mcc": [BOTH],
    "mdd": [(*BOTH, "adversary")],
    "self-ensembling": [BOTH],
    "fixmatch": [BOTH],
    "cdan-mcc-sdat": REVERSED,
}
EVERY_METHOD = pytest.mark.parametrize("name", UPDATES)
FITTED = ("tca", "gfk")


def build(name: str, norm: Literal["none", "batch"] = "none", **changes: Any) -> Method:
    """The method as it is by default, small and in float64."""
    torch.manual_seed(0)
    config = preset("digits", name)
    entry = METHODS[name]
    if name == "gfk":
        changes = {"dim": DIM // 2, **changes}  # by default it wants wider features
    settings = entry.method.resolve(replace(config.method, **changes), CLASSES, "cpu")
    head = lambda dim, num: entry.method.classifier(settings, dim, num)  # noqa: E731
    shape = ModelSettings(bottleneck_dim=DIM, bottleneck_norm=norm, bottleneck_activation="relu")
    model = AdaptationModel(nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh()), 9, CLASSES, shape, head)
    task = TaskFacts(CLASSES, 20, 20, 0)
    return build_method(name, model, settings, task, config.adaptation).double()


def batch(rows: int = ROWS, seed: int = 0) -> Batch:
    index = torch.arange(rows)
    images = random(rows, WIDTH, seed=seed), 0.5 + random(rows, WIDTH, seed=seed + 1)
    further = (images[1] + 0.1 * random(rows, WIDTH, seed=seed + 2),)
    return Batch(images[0], index % CLASSES, images[1], index, index, further)


def step(ramp: float = 0.6, **changes: Any) -> Step:
    return Step(torch.tensor(ramp, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), **changes)


def updater(method: Method) -> Updater:
    players = method.players()
    rates = OptimizerSettings(learning_rate=0.05, backbone_learning_rate=0.05)
    return Updater(players, build_optimizers(players, rates, method.trained.backbone), Ranks(), torch.device("cpu"))


def of_players(method: Method) -> dict[str, set[str]]:
    """Names of the parameters of each player."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    return {
        player: {names[id(each)] for module in moved.modules for each in module.parameters()}
        for player, moved in method.players().items()
    }


def snapshot(method: Method) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in method.named_parameters()}


def watched(
    method: Method, updates: Iterator[Update], seen: list[Update], players: dict[str, set[str]]
) -> Iterator[Update]:
    """The same updates; each is checked, once it is made, for what it has moved."""
    for update in updates:
        before = snapshot(method)
        seen.append(update)
        yield update
        moved = {name for name, each in method.named_parameters() if not torch.equal(each, before[name])}
        allowed = set().union(*(players[player] for player in update.players))
        assert moved <= allowed, f"{update.players}: {moved - allowed} moved too"
        for player in update.players:
            assert moved & players[player], f"{player} did not move"


def test_every_compared_method_is_here() -> None:
    own = {"source-only", "entropy", "dann", "glb", "glb-cls", "glb-cls-grp", "gsda"}
    assert set(UPDATES) | set(FITTED) | own == set(METHODS)


@EVERY_METHOD
def test_a_step_moves_its_players_and_nobody_else(name: str) -> None:
    method, seen = build(name, norm="batch").train(), []
    list(method.start())
    made = updater(method)
    players = of_players(method)
    made.step(0, watched(method, method.updates(batch(), step()), seen, players))
    made.require_finite()
    assert [update.players for update in seen] == UPDATES[name]
    for update in seen:
        assert not any(term.requires_grad for term in update.terms.values())
        assert all(term.shape == () and torch.isfinite(term) for term in update.terms.values())
    assert sum(update.images for update in seen) >= 2 * ROWS
    assert all(update.terms for update in seen[: 2 if name == "mcd" else None])


@pytest.mark.parametrize("name", [*UPDATES, *FITTED])
def test_warm_up_trains_on_the_source(name: str) -> None:
    method, seen = build(name).train(), []
    given = batch()
    nothing = replace(given, target_images=torch.full_like(given.target_images, torch.nan))
    made = updater(method)
    made.step(0, watched(method, method.source_updates(nothing, step()), seen, of_players(method)))
    made.require_finite()
    expected = (*BOTH, "residual") if name == "rtn" else BOTH
    assert [update.players for update in seen] == [expected]
    assert set(seen[0].terms) == {"classification"}


@EVERY_METHOD
def test_state_that_is_loaded_goes_on_alike(name: str) -> None:
    """Nothing that a step depends on lies outside the state dict."""
    method = build(name, norm="batch").train()
    list(method.start())
    updater(method).step(0, method.updates(batch(), step()))
    other = build(name, norm="batch").train()
    for parameter in other.parameters():
        parameter.data.add_(1)
    other.load_state_dict(method.state_dict())
    for each in (method, other):
        torch.manual_seed(5)
        updater(each).step(1, each.updates(batch(seed=2), step()))
    for (where, mine), theirs in zip(method.state_dict().items(), other.state_dict().values()):
        assert torch.equal(mine, theirs), where


@EVERY_METHOD
def test_source_labels_are_the_only_labels_and_matter(name: str) -> None:
    given = batch()
    shuffled = replace(given, source_labels=given.source_labels.roll(1))

    def first_loss(each: Batch) -> Tensor:
        method = build(name).eval()
        list(method.start())
        updates = list(method.updates(each, step()))
        return torch.stack([update.loss.detach() for update in updates])

    alike = torch.equal(first_loss(given), first_loss(shuffled))
    assert alike == (name == "adda")


# --------------------------------------------------------------------------------------------------- several processes


class Peers:
    """Ranks in one process: each gets from the others what they gave, at the same call, in the round before."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.before: list[dict[str, list[Tensor]]] = []

    def round(self, run: Callable[..., Any]) -> list[Any]:
        """Run all ranks once: `run(rank, gather=..., mean=...)`; alone in the first round."""
        given: list[dict[str, list[Tensor]]] = [{"gather": [], "mean": []} for _ in range(self.count)]

        def others(rank: int, call: str, value: Tensor) -> list[Tensor]:
            number = len(given[rank][call])
            given[rank][call].append(value.detach())
            return [each[call][number] for each in self.before]

        def gather(rank: int, rows: Tensor) -> Tensor:
            parts = others(rank, "gather", rows)
            if not parts:
                return rows
            parts[rank] = rows if not rows.is_floating_point() else rows * self.count - (self.count - 1) * rows.detach()
            return torch.cat(parts)

        def mean(rank: int, value: Tensor) -> Tensor:
            parts = others(rank, "mean", value)
            if not parts:
                return value.detach()
            parts[rank] = value.detach()
            return torch.stack(parts).mean(0)

        results = [run(rank, gather=partial(gather, rank), mean=partial(mean, rank)) for rank in range(self.count)]
        self.before = given
        return results


def half(whole: Batch, rank: int) -> Batch:
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    names = ("source_images", "source_labels", "target_images", "source_index", "target_index")
    further = tuple(view[rows] for view in whole.further_views)
    return Batch(*(getattr(whole, name)[rows] for name in names), further)


@EVERY_METHOD
def test_two_ranks_are_one(name: str) -> None:
    """Gradients of each update, averaged over the ranks: those of the whole batch in one process."""
    method = build(name).eval()  # no dropout, and no BatchNorm, which couples rows by itself
    list(method.start())
    whole = batch()

    def updates(of: Batch, **changes: Any) -> list[tuple[Tensor, list[Tensor]]]:
        each = copy.deepcopy(method)
        found = []
        for update in each.updates(of, step(**changes)):
            learning = [parameter for parameter in each.parameters() if parameter.requires_grad]
            found.append((update.loss.detach(), list(gradient(update.loss, *learning))))
        return found

    peers = Peers(2)
    # What is exchanged may depend on what was exchanged before it: SDAT gathers behind a mean of gradients.
    for _ in range(4):
        ranks = peers.round(lambda rank, **changes: updates(half(whole, rank), **changes))
    alone = updates(whole)
    assert len(alone) == len(ranks[0])
    for (loss, gradients), first, second in zip(alone, *ranks):
        assert_close((first[0] + second[0]) / 2, loss, **EXACT)
        for mine, a, b in zip(gradients, first[1], second[1]):
            assert_close((a + b) / 2, mine, **EXACT)


@pytest.mark.parametrize("name", ["dan", "jan", "rtn", "mcc", "bsp-cdan", "tpn", "hafn"])
def test_without_gathering_two_ranks_are_not_one(name: str) -> None:
    """The test above can fail: these are not linear in the batch."""
    method, whole = build(name).eval(), batch()

    def loss(of: Batch) -> Tensor:
        return next(iter(copy.deepcopy(method).updates(of, step()))).loss.detach()

    apart = (loss(half(whole, 0)) + loss(half(whole, 1))) / 2
    assert abs(float(apart - loss(whole))) > 1e-8  # a hundred times what that test lets pass


# ------------------------------------------------------------------------------------------------------ tiny inputs


class Table(nn.Module):
    """A network that gives written-down features and logits: image number i is row i."""

    autocast_dtype = None

    def __init__(self, features: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.features, self.logits = nn.Parameter(features.clone()), nn.Parameter(logits.clone())
        self.feature_dim = features.shape[1]
        self.backbone, self.bottleneck, self.classifier = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> ModelOutput:
        return ModelOutput(self.features[images], self.logits[images])


def tabled(name: str, features: Tensor, logits: Tensor, labels: Tensor, **changes: Any) -> tuple[Any, Batch]:
    n = len(labels)
    entry = METHODS[name]
    settings = replace(entry.settings, **changes)
    task = TaskFacts(logits.shape[1])
    method = entry.method(Table(features, logits), settings, task, **entry.variant).double()  # type: ignore[arg-type]
    index = torch.arange(n)
    return method, Batch(index, labels, n + torch.arange(len(features) - n), index, index)


def test_published_digits_of_rtn() -> None:
    method, given = tabled("rtn", FEATURES, LOGITS, LABELS, trade_off=0.3, entropy_weight=0.3)
    first, _, second = method.residual
    first.weight.data = torch.tensor([[0.5, -0.25], [1, 0.5]]).double()
    first.bias.data = torch.tensor([0.1, -0.1]).double()
    second.weight.data = torch.tensor([[0.2, 0.4], [-0.3, 0.1]]).double()
    second.bias.data = torch.tensor([0, 0.05]).double()
    (update,) = method.updates(given, step(1.0))
    assert {name: printed(term) for name, term in update.terms.items()} == {
        "discrepancy": -0.471274,
        "entropy": 0.445048,
        "classification": 0.235101,
    }
    assert printed(update.loss) == 0.227234


def test_published_digits_of_mcd(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = nn.Parameter(torch.cat([Z1, Z2])), nn.Parameter(torch.cat([Z2, CERTAIN]))
    method, given = tabled("mcd", torch.zeros(4, 2).double(), torch.zeros(4, 3).double(), Y, balance=0.01)
    method.settings = MCD.resolve(method.settings, 3, "cpu")
    monkeypatch.setattr(method, "_both", lambda features: logits)
    # Heads' logits: source (Z1, Z2), target (Z2, CERTAIN).
    updates = list(method.updates(given, step()))
    assert [printed(update.loss) for update in updates] == [1.510382, 1.086677, *[0.423705] * 4]


def test_published_digits_of_mada() -> None:
    method, given = tabled("mada", FEATURES, LOGITS, LABELS, hidden_dim=2, dropout=0.0)
    for s, name in zip((1, 3, 2, 5, 4, 6), ("w1", "b1", "w2", "b2", "w3", "b3")):
        parameter = getattr(method.discriminators, name)
        entries = [((5 * i + 3 * s) % 13 - 5) / 5 for i in range(parameter.numel())]
        parameter.data = torch.tensor(entries, dtype=torch.float64).reshape(parameter.shape)
    of_discriminators, of_encoder = method.updates(given, step(1.0))
    assert printed(of_discriminators.loss) == pytest.approx(0.692115 + 1.063679, abs=2e-6)
    (found,) = gradient(-of_encoder.loss, method.model.features)
    assert printed(found[0]) == [0.001866, -0.001120]
    assert printed(found[4]) == [-0.039356, 0.074183]


def test_published_digits_of_adda() -> None:
    """The losses are those of logits 1, -0.5 | 0.25, 2."""
    method = build("adda").eval()
    assert isinstance(method, ADDA)
    logits = torch.tensor([[1], [-0.5], [0.25], [2]]).double()

    class Given(nn.Module):
        def forward(self, features: Tensor, frozen: bool = False) -> Tensor:
            return logits[-len(features) :] + 0 * features.sum()

    method.discriminator = Given()  # type: ignore[assignment]
    discriminator, mapping = method.updates(batch(2), step())
    assert printed(discriminator.loss) == 1.060052
    assert printed(mapping.loss) == 0.351434
    # One of four is told apart: the source row with a logit above 0.
    for gate, counts in ((0.25, 1.0), (0.26, 0.0)):
        method.settings = replace(method.settings, gate=gate)
        _, gated = method.updates(batch(2), step())
        assert float(gated.loss.detach()) == counts * float(mapping.loss.detach())
        assert gated.terms["mapping"] == mapping.loss
    method.settings = replace(method.settings, gate=0.0, objective="reversal")
    _, against = method.updates(batch(2), step())
    right = -F.binary_cross_entropy_with_logits(logits[2:], torch.zeros_like(logits[2:]))
    assert_close(against.loss, right, **EXACT)


def test_published_gradient_through_cdans_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    held, free = (
        tabled("cdan-e", torch.cat([F1[:2], F2[:2]]), torch.cat([Z1, Z2]), Y, entropy_weight=kind)
        for kind in ("held", "official")
    )
    domain_logits = torch.tensor([[0.5], [-1], [2], [0]], dtype=torch.float64)
    found = []
    for method, given in (held, free):
        monkeypatch.setattr(method.discriminators, "forward", lambda seen, frozen=False: domain_logits + 0 * seen.sum())
        (update,) = method.updates(given, step(1.0))
        assert printed(update.terms["adversarial"]) == 1.152912
        supervised = F.cross_entropy(method.model.logits[:2], Y)
        found.append(gradient(update.loss - supervised, method.model.logits)[0])
    assert not found[0].any()
    assert printed(found[1][0]) == [-0.009881, 0.004922, 0.004959]
    assert printed(found[1][2]) == [0.017552, -0.035104, 0.017552]


def test_bsp_is_the_authors_penalty_at_their_batch() -> None:
    outputs = Outputs(torch.cat([F1, F2]), LOGITS, 3)
    assert printed(TERMS["bsp"](outputs, LABELS, step())) == pytest.approx(36 / 3 * 33.302776, abs=1e-5)
    twice = Outputs(torch.cat([F1, F1, F2, F2]), torch.cat([LOGITS, LOGITS]), 6)
    assert_close(TERMS["bsp"](twice, LABELS, step()), TERMS["bsp"](outputs, LABELS, step()), **EXACT)


def test_terms_are_the_losses() -> None:
    outputs = Outputs(FEATURES, LOGITS, 3)
    source, target, logits = FEATURES[:3], FEATURES[3:], LOGITS[3:]
    expected = {
        "entropy": losses.entropy(logits),
        "mcc": losses.minimum_class_confusion(logits),
        "bnm": losses.nuclear_norm(logits),
        "bsp": 12 * (losses.spectral_penalty(source) + losses.spectral_penalty(target)),
        "hafn": losses.hard_feature_norm(source, target, 25.0),
        "safn": torch.tensor(2.0).double(),
    }
    assert set(expected) == set(TERMS)
    for name, right in expected.items():
        assert_close(TERMS[name](outputs, LABELS, step()), right, **EXACT)


# --------------------------------------------------------------------------------------------- where gradients go


@pytest.mark.parametrize("name", ["mada", "cdan", "cdan-e"])
def test_both_ways_of_playing_have_the_same_gradients(name: str) -> None:
    """Before anybody has moved: reversal in one update is what the two alternating ones ask for."""
    changes = {"dropout": 0.0, "adversarial_weight": 0.7}
    apart = build(name, update="alternating", **changes)
    together = build(name, update="reversal", **changes)
    together.load_state_dict(apart.state_dict())
    first, second = (list(method.updates(batch(), step())) for method in (apart, together))
    parameters = dict(apart.named_parameters())
    both = [gradient(update.loss, *parameters.values()) for update in first]
    joint = gradient(second[0].loss, *dict(together.named_parameters()).values())
    for where, of_discriminators, of_encoder, found in zip(parameters, *both, joint):
        right, other = (of_discriminators, of_encoder)[:: 1 if where.startswith("discriminators") else -1]
        assert_close(found, right, **EXACT)
        assert not other.any(), f"{where} has a gradient in the other player's update"


@pytest.mark.parametrize("name", ["cdan", "mada"])
def test_probabilities_that_condition_are_constants(name: str) -> None:
    """The classifier moves by the source alone."""
    method = build(name)
    *_, update = method.updates(batch(), step())
    supervised = method.classification(method.outputs(batch()).source_logits, batch(), step())
    for found, right in zip(*(gradient(x, *method.model.classifier.parameters()) for x in (update.loss, supervised))):
        assert_close(found, right, **EXACT)


def test_randomised_cdan_keeps_its_projections() -> None:
    method = build("cdan", randomised=16)
    assert isinstance(method, CDAN)
    stored = method.state_dict()
    assert stored["feature_projection"].shape == (DIM, 16)
    before = method.feature_projection.clone()
    updater(method).step(0, method.updates(batch(), step()))
    assert torch.equal(method.feature_projection, before)
    assert method.discriminators.w1.shape[-1] == 16


def test_stacked_discriminators_are_the_loop() -> None:
    torch.manual_seed(0)
    module = DomainDiscriminators(5, 3, 7).double()
    features, scale = random(4, 5), random(4, 3, seed=1).abs()
    found = module(features, scale)
    for k in range(3):
        hidden = torch.relu((scale[:, k, None] * features) @ module.w1[k].T + module.b1[k])
        hidden = torch.relu(hidden @ module.w2[k].T + module.b2[k])
        assert_close(found[:, k], hidden @ module.w3[k, 0] + module.b3[k, 0], **EXACT)
    on_loss = module(features) * scale
    assert (found - on_loss).abs().max() > 0.01
    assert not module(features, frozen=True).requires_grad
    dropped = DomainDiscriminators(5, 3, 7, dropout=0.5).double()
    assert not torch.equal(dropped(features), dropped(features))
    assert torch.equal(dropped.eval()(features), dropped(features))


def test_scaled_gradients() -> None:
    x = random(3).requires_grad_()
    y = scale_gradient(x, torch.tensor(-0.4, dtype=torch.float64))
    assert torch.equal(y, x)
    assert_close(gradient(y @ random(3, seed=1), x)[0], -0.4 * random(3, seed=1), **EXACT)


def test_rtn_moves_its_residual_by_the_source_and_predicts_without_it() -> None:
    method = build("rtn", trade_off=1.0, entropy_weight=1.0)
    assert isinstance(method, RTN)
    weights = list(method.residual.parameters())
    (update,) = method.updates(batch(), step())
    found = gradient(update.loss, *weights)
    assert all(each.any() for each in found)
    logits = method.outputs(batch()).source_logits
    supervised = method.classification(logits + method.residual(logits), batch(), step())
    for each, right in zip(found, gradient(supervised, *weights)):
        assert_close(each, right, **EXACT)
    assert 0 < method.residual[0].weight.abs().max() < 0.1
    assert not [name for name in method.model.state_dict() if "residual" in name]
    before = method.model(batch().source_images).logits
    method.residual[2].bias.data += 5
    assert torch.equal(method.model(batch().source_images).logits, before)


def test_jan_moves_the_classifier_through_both_domains() -> None:
    """Beside the source's cross-entropy it moves by the discrepancy, of the source's predictions and the target's."""
    method, given = build("jan", ramp=False), batch()
    (update,) = method.updates(given, step())
    weights = list(method.model.classifier.parameters())
    outputs = method.outputs(given)

    def discrepancy(held: str) -> Tensor:
        domains = {
            domain: (getattr(outputs, f"{domain}_features"), getattr(outputs, f"{domain}_logits").softmax(1))
            for domain in ("source", "target")
        }
        if held:
            domains[held] = (domains[held][0], domains[held][1].detach())
        return losses.joint_mmd(domains["source"], domains["target"])

    supervised = method.classification(outputs.source_logits, given, step())
    found = gradient(update.loss - supervised, *weights)
    for each, right in zip(found, gradient(discrepancy(""), *weights)):
        assert_close(each, right, **EXACT)
    for domain in ("source", "target"):
        assert (found[0] - gradient(discrepancy(domain), *weights)[0]).abs().max() > 1e-6


def test_symnets_routes_each_loss_to_its_player() -> None:
    method, given = build("symnets"), batch()
    (update,) = method.updates(given, step())
    head = method.model.classifier
    assert isinstance(head, TwinClassifier)
    outputs = method.outputs(given)
    logits = head.both(outputs.features)
    n = ROWS
    classifiers = losses.symmetric_classifier_loss(logits[:n], given.source_labels, logits[n:])
    features = losses.symmetric_feature_loss(logits[:n], given.source_labels, logits[n:], step().ramp)
    for module, own, other in (
        (head, classifiers, features),
        (method.model.bottleneck, features, classifiers),
        (method.model.backbone, features, classifiers),
    ):
        parameters = list(module.parameters())
        for found, right, wrong in zip(*(gradient(x, *parameters) for x in (update.loss, own, other))):
            assert_close(found, right, **EXACT)
            assert (found - wrong).abs().max() > 1e-4
    assert torch.equal(method.model(given.target_images).logits, logits[n:, CLASSES:])
    assert method._apart
    both = build("symnets", predicts="mean")
    both.load_state_dict(method.state_dict())
    mean = (logits[n:, :CLASSES].softmax(1) + logits[n:, CLASSES:].softmax(1)) / 2
    assert_close(both.model(given.target_images).logits.softmax(1), mean, rtol=1e-6, atol=1e-7)


def test_mdd_reverses_what_reaches_the_encoder() -> None:
    method, given = build("mdd", reversal=0.1).eval(), batch()
    (update,) = method.updates(given, step(0.6))
    outputs = method.outputs(given)
    adversarial = method.adversary(outputs.features)
    disparity = losses.margin_disparity(
        outputs.source_logits, adversarial[:ROWS], outputs.target_logits, adversarial[ROWS:], 4.0
    )
    supervised = F.cross_entropy(outputs.source_logits, given.source_labels)
    for module, right in (
        (method.adversary, disparity),
        (method.model.classifier, supervised),
        (method.model.backbone, supervised - 0.06 * disparity),
    ):
        parameters = list(module.parameters())
        for found, expected in zip(gradient(update.loss, *parameters), gradient(right, *parameters)):
            assert_close(found, expected, **EXACT)


def test_mcds_classifiers_differ_and_predict_together() -> None:
    method = build("mcd").eval()
    head = method.model.classifier
    assert isinstance(head, TwoClassifiers)
    first, second = head.both(random(3, DIM))
    assert (first - second).abs().max() > 1e-3
    mean = (first.softmax(1) + second.softmax(1)) / 2
    assert_close(head(random(3, DIM)).softmax(1), mean, rtol=1e-6, atol=1e-7)
    weight = build("mcd").settings.discrepancy_weight
    assert weight == 1
    assert MCD.resolve(METHODS["mcd"].settings, 65, "cpu").discrepancy_weight == pytest.approx(65 / 3)


# ----------------------------------------------------------------------------------------------------------- ADDA, TPN


def test_adda_starts_from_the_source_and_leaves_it_alone() -> None:
    method, given = build("adda", norm="batch"), batch()
    assert isinstance(method, ADDA)
    updater(method).step(0, method.source_updates(given, step()))
    list(method.start())
    method.eval()
    with torch.no_grad():
        assert torch.equal(method.source_encoder(given.source_images), method.model(given.source_images).features)
    method.train()
    frozen = copy.deepcopy(method.source_encoder.state_dict())
    classifier = copy.deepcopy(method.model.classifier.state_dict())
    made = updater(method)
    for number in range(3):
        made.step(number, method.updates(given, step()))
    for before, now in ((frozen, method.source_encoder), (classifier, method.model.classifier)):
        assert all(torch.equal(each, now.state_dict()[name]) for name, each in before.items())
    statistics = method.model.bottleneck[1].running_mean
    assert not torch.equal(statistics, frozen["layers.1.1.running_mean"])  # of target images, in training
    rates = build_optimizers(method.players(), OptimizerSettings(learning_rate=1.0), method.trained.backbone)
    assert 0 < method.settings.encoder_rate < 1
    assert rates["target_encoder"].param_groups[-1]["lr"] == pytest.approx(method.settings.encoder_rate)


def test_adda_needs_a_warm_up() -> None:
    with pytest.raises(UsageError, match="--warmup: found 0 with --method adda; expected steps on the source first"):
        parse_config(["digits", "--method", "adda", "--warmup", "0"], "train")
    assert all(preset(task, "adda").run.warmup > 0 for task in TASKS)


def test_tpn_predicts_by_distance_to_running_means() -> None:
    method, given = build("tpn"), batch()
    assert isinstance(method, TPN)
    means = losses.class_means(method.model(given.source_images).features, given.source_labels, CLASSES).detach()
    made = updater(method)
    made.step(0, method.updates(given, step()))
    assert_close(method.prototypes, means, **EXACT)
    again = losses.class_means(method.model(given.source_images).features, given.source_labels, CLASSES).detach()
    made.step(1, method.updates(given, step()))
    assert_close(method.prototypes, 0.9 * means + 0.1 * again, **EXACT)
    features, logits = method.model(given.target_images)
    by_distance = (-(features[:, None] - method.prototypes).square().sum(2)).softmax(1)
    assert_close(logits.softmax(1), by_distance, **EXACT)
    unseen = build("tpn")
    assert isinstance(unseen, TPN)
    before = unseen.model.classifier.weight.detach().clone()
    few = replace(given, source_labels=given.source_labels % 2)
    updater(unseen).step(0, unseen.updates(few, step()))
    assert torch.equal(unseen.model.classifier.weight[2:], before[2:])  # classes that have not been seen


# ------------------------------------------------------------------------------------- two views, and the flat minimum


def test_the_teacher_is_the_running_mean_of_the_student() -> None:
    method, given = build("self-ensembling", norm="batch").train(), batch()
    assert isinstance(method, SelfEnsembling)
    made = updater(method)
    made.step(0, method.source_updates(given, step()))
    assert_close(method.model.state_dict(), method.student.state_dict(), rtol=0, atol=0)
    list(method.start())
    expected = {name: each.clone() for name, each in method.model.named_parameters()}
    for number in range(3):
        made.step(number, method.updates(given, step()))
        for name, each in method.student.named_parameters():
            expected[name] = 0.99 * expected[name] + 0.01 * each.detach()
    for name, each in method.model.named_parameters():
        assert_close(each, expected[name], **EXACT)
        assert each.grad is None
        assert not torch.equal(each, dict(method.student.named_parameters())[name])
    own, students = (network.bottleneck[1].running_mean for network in (method.model, method.student))
    assert not torch.equal(own, students)  # of the target's second view alone
    assert not any(name.startswith("model.") for names in of_players(method).values() for name in names)


def test_published_digits_of_self_ensembling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student Z1, teacher CERTAIN: they agree but for .034379, and half is kept at .97."""
    method, given = build("self-ensembling", confidence=0.97, consistency_weight=2.0, balance=0.1), batch(2)
    logits = torch.cat([Z2, Z1]).requires_grad_()
    monkeypatch.setattr(method, "outputs", lambda batch: Outputs(logits, logits, 2))
    monkeypatch.setattr(method.model, "forward", lambda images: ModelOutput(CERTAIN, CERTAIN))
    (update,) = method.updates(given, step())
    gap = losses.consistency(Z1, CERTAIN, 0.97)
    assert 0 < gap < 0.034379
    supervised = F.cross_entropy(Z2, given.source_labels)
    assert_close(update.loss, supervised + 2 * (gap + 0.1 * losses.class_balance(Z1, 0.5)), **EXACT)
    assert float(update.terms["kept"]) == 0.5
    assert update.images == 6


def test_equal_views_have_nothing_to_teach() -> None:
    method, given = build("self-ensembling", confidence=0.0).eval(), batch()
    list(method.start())
    same = replace(given, further_views=(given.target_images,))
    (update,) = method.updates(same, step())
    assert float(update.terms["consistency"]) == 0
    assert next(iter(method.updates(given, step()))).terms["consistency"] > 0


def test_fixmatch_trains_on_the_strong_view() -> None:
    method, given = build("fixmatch", confidence=0.2), batch()
    (update,) = method.updates(given, step())
    weak, strong = (method.model(x).logits for x in (given.target_images, given.further_views[0]))
    unlabelled = losses.confident_cross_entropy(strong, weak, 0.2)
    supervised = F.cross_entropy(method.model(given.source_images).logits, given.source_labels)
    assert unlabelled > 0
    assert_close(update.loss, supervised + unlabelled, **EXACT)
    assert type(method).strong_view
    assert (type(method).target_views, METHODS["self-ensembling"].method.target_views) == (2, 2)


def test_published_digits_of_the_ascent() -> None:
    found = ascent([torch.tensor([3.0, 4.0]), torch.tensor([12.0])], 0.05)
    assert printed(torch.cat(found)) == pytest.approx([0.011538, 0.015385, 0.046154])
    assert not torch.cat(ascent([torch.zeros(2), torch.zeros(1)], 0.05)).any()


def test_sdat_takes_its_gradients_higher_up() -> None:
    """Weights moved by hand and moved back: what the update finds, and the weights are where they were."""
    method, given = build("cdan-mcc-sdat", radius=0.3, dropout=0.0), batch()
    before = snapshot(method)
    (update,) = method.updates(given, step())
    parameters = list(method.parameters())
    found = gradient(update.loss, *parameters)
    assert all(torch.equal(each, before[name]) for name, each in method.named_parameters())

    def task(outputs: Outputs) -> Tensor:
        own = F.cross_entropy(outputs.source_logits, given.source_labels)
        return own + losses.minimum_class_confusion(outputs.target_logits)

    moving = list(method.model.parameters())
    gradients = gradient(task(method.outputs(given)), *moving)
    length = torch.cat([each.flatten() for each in gradients]).norm()
    for parameter, each in zip(moving, gradients):
        parameter.data += 0.3 * each / length
    outputs = method.outputs(given)
    against = scale_gradient(outputs.features, -step().ramp)
    adversarial = method.judge(against, outputs.logits, given, step(), frozen=False).loss  # type: ignore[operator]
    right = task(outputs) + adversarial
    assert_close(update.loss, right, **EXACT)
    for mine, theirs in zip(found, gradient(right, *parameters)):
        assert_close(mine, theirs, **EXACT)
    plain = build("cdan", dropout=0.0)
    plain.load_state_dict(before)
    assert abs(float(next(iter(plain.updates(given, step()))).loss - update.loss)) > 1e-3


# ---------------------------------------------------------------------------------------------------------- TCA and GFK


class Known:
    """What an evaluation gives: features of both domains."""

    def __init__(self, dim: int) -> None:
        draw = np.random.default_rng(0)
        self.source_labels = torch.arange(24) % CLASSES
        centres = 3 * draw.normal(size=(CLASSES, dim))
        source = centres[self.source_labels] + draw.normal(size=(24, dim))
        target = centres[np.arange(17) % CLASSES] * 1.2 + 0.5 + draw.normal(size=(17, dim))
        self.of = {"source": torch.from_numpy(source).float(), "target": torch.from_numpy(target).float()}
        self.probabilities = torch.full((17, CLASSES), 1 / CLASSES)

    def features(self, domain: Literal["source", "target"]) -> Tensor:
        return self.of[domain]


def nearest(source: np.ndarray, labels: Tensor, target: np.ndarray) -> list[int]:
    d = ((target[:, None] - source) ** 2).sum(2)
    return [int(each) for each in labels[d.argmin(1)]]


def standardised(rows: Tensor) -> np.ndarray:
    array = rows.double().numpy()
    found: np.ndarray = (array - array.mean(0)) / array.std(0)
    return found


@pytest.mark.parametrize("name", FITTED)
def test_fitted_methods_predict_the_nearest_source_sample(name: str) -> None:
    method = build(name, dim=3).float().eval()
    scores = Known(DIM)
    head = method.model.classifier
    assert isinstance(head, FittedHead)
    features = scores.features("target")
    assert torch.equal(head(features), head.linear(features))
    method.on_evaluation(scores)
    source, target = scores.features("source").double().numpy(), features.double().numpy()
    if name == "tca":
        fitted: Any = tca(source, target, 3)
    else:
        source, target = standardised(scores.features("source")), standardised(features)
        fitted = gfk(source, target, 3)
    expected = nearest(fitted.transform(source), scores.source_labels, fitted.transform(target))
    logits = head(features)
    assert logits.argmax(1).tolist() == expected
    assert logits.shape == (17, CLASSES)
    gaps = logits.topk(2).values
    assert float((gaps[:, 0] - gaps[:, 1]).median()) == pytest.approx(1, rel=1e-4)
    head.train()
    assert torch.equal(head(features), head.linear(features))  # warm-up's, which trains


@pytest.mark.parametrize("name", FITTED)
def test_fitted_methods_are_loaded_exported_and_fitted_once(name: str) -> None:
    method = build(name, dim=3).float().eval()
    scores = Known(DIM)
    method.on_evaluation(scores)
    features = scores.features("target")
    before = method.model.classifier(features)
    other = build(name, dim=3).float().eval()
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.model.classifier(features), before)
    scores.of["source"] = scores.of["source"].flip(0)
    method.on_evaluation(scores)
    assert torch.equal(method.model.classifier(features), before)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(method.model.classifier, (features,), dynamic_shapes=({0: rows},))
    assert_close(program.module()(features[:5]), before[:5], rtol=1e-5, atol=1e-4)
    assert list(method.updates(batch(), step())) == []


def test_gfk_needs_twice_its_dimension_before_anything_is_trained() -> None:
    with pytest.raises(UsageError, match=rf"--dim: found {DIM // 2 + 1}; expected at most {DIM // 2}, half"):
        build("gfk", dim=DIM // 2 + 1)


def test_gfk_needs_as_many_rows_as_its_dimension() -> None:
    rows = random(40, DIM).numpy()
    with pytest.raises(UsageError, match="dim: found 4; expected 1 to 3, half of the features' width and no more than"):
        gfk(rows, rows[:3], 4)


def test_gfk_chooses_its_dimension() -> None:
    method, scores = build("gfk", dim=0).float().eval(), Known(DIM)
    method.on_evaluation(scores)
    dim = subspace_disagreement(standardised(scores.features("source")), standardised(scores.features("target")))
    assert method.model.classifier.weights.shape == (DIM, 2 * dim)


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", [*UPDATES, *FITTED])
@pytest.mark.parametrize("recipe", ["common", "paper"])
def test_presets_of_every_task_are_valid(name: str, recipe: str) -> None:
    for task in TASKS:
        config = preset(task, name, recipe)
        config.validate()
        METHODS[name].method.resolve(config.method, 65, "cpu")


def test_recipes_of_the_authors() -> None:
    paper = preset("visda", "safn", "paper")
    assert paper.adaptation == AdaptationSettings({"safn": 0.003}, "none", "apart")
    assert paper.model.bottleneck_dim == 1000
    assert preset("office31", "safn", "paper").adaptation.add == {"safn": 0.05, "entropy": 0.1}
    assert preset("visda", "safn").model == TASKS["visda"].model
    assert preset("office31", "cdan", "paper").data.test_crops == 10
    assert preset("office-home", "mdd", "paper").method.margin == 3  # type: ignore[attr-defined]
    assert preset("digits", "bsp-cdan").adaptation.add == {"bsp": 1e-4}
    assert preset("digits", "bsp-cdan").method.hidden_dim == 32  # type: ignore[attr-defined]
    assert preset("digits", "dan", "paper").optimizer == TASKS["digits"].optimizer


def test_options_are_a_methods_own() -> None:
    found = parse_config(["digits", "--method", "cdan", "--entropy-weight", "held"], "train")
    assert found.method.entropy_weight == "held"  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        parse_config(["digits", "--method", "dan", "--entropy-weight", "held"], "train")
    with pytest.raises(UsageError, match="--class-weights: found with --method symnets"):
        parse_config(["digits", "--method", "symnets", "--class-weights", "pada"], "train")
