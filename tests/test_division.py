import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from test_distributed import free_port, largest_error, stopped_and_resumed
from torch import Tensor, nn

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config
from gsda_fast.data.batches import Batch
from gsda_fast.errors import TrainingError, UsageError
from gsda_fast.methods import AdaptationSettings, Division, Step, TaskFacts, build_method
from gsda_fast.methods.discriminators import Discriminators
from gsda_fast.methods.division import AdversarialRows, balanced_shares
from gsda_fast.methods.groups import ClassGroups
from gsda_fast.methods.gsda import GSDA, GSDASettings
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.training.distributed import Ranks, digest, join
from gsda_fast.training.optim import OptimizerSettings, build_optimizers
from gsda_fast.training.update import StepOutcome, Updater
from gsda_kernels import AdversarialTerms

NUM_CLASSES, BATCH, DIM, HIDDEN, STEPS = 4, 6, 5, 7, 10
PARTS = 4  # of the whole batch: what 1, 2 or 4 ranks share out among them
OPTIMIZER = OptimizerSettings(learning_rate=0.05, backbone_learning_rate=0.05)


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        levels: of groups; 0/1 matrices, K = 1 + groups + classes. classes: that occur in the source.
        in_place: the discriminators' step is made without gradients in memory.
    """

    method: str = "gsda"
    update: Any = "alternating"
    levels: tuple[list[list[int]], ...] = ([[1, 1, 0, 0], [0, 0, 1, 1]],)
    class_weights: Any = "none"
    classes: int = NUM_CLASSES
    optimizer: OptimizerSettings = OPTIMIZER
    backend: str = "torch"
    in_place: bool = True
    compiled: bool = False


CASES = {
    "K 7": Case(),
    "native": Case(backend="auto"),
    "along gradients": Case(in_place=False),
    "reversal": Case(update="reversal"),
    "empty classes": Case(classes=2),
    "hierarchy": Case(levels=([[1, 1, 1, 0], [0, 0, 0, 1]], [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])),
    "overlap": Case(levels=([[1, 1, 1, 0], [0, 0, 1, 1]],)),
    "weights of classes": Case(class_weights="pada"),
    "reversal with weights of classes": Case(update="reversal", class_weights="pada"),
    "no synchronization": Case(method="glb-cls"),
    "Adam": Case(optimizer=replace(OPTIMIZER, optimizer="adam", learning_rate=1e-3, backbone_learning_rate=1e-3)),
    "compiled": Case(compiled=True),
    "compiled reversal": Case(compiled=True, update="reversal"),
}


class Setup:
    """A method in float64, its updater, and a batch of `PARTS` equal parts."""

    def __init__(self, case: Case, ranks: Ranks | None = None, *, divided: bool = True) -> None:
        torch.manual_seed(0)
        self.ranks = ranks or Ranks()
        model = AdaptationModel(
            nn.Sequential(nn.Linear(DIM, 9), nn.Tanh()), 9, NUM_CLASSES, ModelSettings(bottleneck_dim=8)
        )
        settings = GSDASettings(
            alpha=0.3, beta=2.0, groups=2, hidden_dim=HIDDEN, update=case.update, backend=case.backend
        )
        task, adaptation = TaskFacts(NUM_CLASSES), AdaptationSettings(class_weights=case.class_weights)
        method = build_method(case.method, model, settings, task, adaptation)
        assert isinstance(method, GSDA)
        if case.method == "gsda":
            method.discriminators = Discriminators(8, ClassGroups(case.levels), HIDDEN, backend=case.backend)
        self.method = method.double().eval()
        self.method.on_evaluation(SimpleNamespace(probabilities=torch.tensor([[0.9, 0.1, 0.0, 0.2]])))  # type: ignore[arg-type]
        if divided:
            self.method.divide(Division(self.method.costs_of_parts(), self.ranks))
        if case.compiled:
            self.method.discriminators.compile(backend="aot_eager", dynamic=False)
        players = self.method.players()
        self.optimizers = build_optimizers(players, case.optimizer, model.backbone)
        self.updater = Updater(players, self.optimizers, self.ranks, torch.device("cpu"))
        ramp, progress = (torch.tensor(each, dtype=torch.float64) for each in (0.6, 0.1))
        self.step = Step(ramp, progress, self.ranks.mean, self.ranks.gather_rows)
        if case.in_place:
            self.step = replace(self.step, descent=self.updater.descent)
        generator = torch.Generator().manual_seed(8)
        images = torch.randn((PARTS, 2, BATCH, DIM), dtype=torch.float64, generator=generator)
        labels = torch.randint(case.classes, (PARTS, BATCH), generator=generator)
        each = PARTS // self.ranks.world_size
        own = slice(each * self.ranks.rank, each * (self.ranks.rank + 1))
        index = torch.arange(each * BATCH)
        self.batch = Batch(
            images[own, 0].flatten(0, 1), labels[own].flatten(), images[own, 1].flatten(0, 1), index, index
        )

    def take(self, step: int) -> StepOutcome:
        return self.updater.step(step, self.method.updates(self.batch, self.step))

    def whole(self, value: Tensor) -> Tensor:
        division = self.method.division
        return value.detach().clone() if division is None else division.whole(value)

    def state(self) -> dict[str, Tensor]:
        """Parameters and momentum, put together."""
        found = {f"model.{name}": each.detach().clone() for name, each in self.method.model.named_parameters()}
        for name, each in self.method.discriminators.named_parameters():
            found[f"discriminators.{name}"] = self.whole(each)
            for what, value in self.optimizers["discriminators"].state[each].items():
                if value.dim():
                    found[f"discriminators.{name} {what}"] = self.whole(value)
        return found

    def gradients(self) -> dict[str, Tensor]:
        named = [(f"model.{name}", each) for name, each in self.method.model.named_parameters()]
        own = self.method.discriminators.named_parameters()
        found = {name: each.grad.clone() for name, each in named if each.grad is not None}
        return found | {f"discriminators.{name}": self.whole(each.grad) for name, each in own if each.grad is not None}


def trained(case: Case, ranks: Ranks | None = None, *, divided: bool = True) -> dict[str, Any]:
    """What the first step's gradients and terms are, and the state after ten steps."""
    setup = Setup(case, ranks, divided=divided)
    first = setup.take(0)
    # As the log has them: means over the ranks.
    metrics = {name: setup.ranks.mean(value) for name, value in first.metrics.items()}
    found = {"gradients": setup.gradients(), "terms": {**first.terms, **metrics}}
    for step in range(1, STEPS):
        setup.take(step)
    return {**found, "state": setup.state()}


class Traffic:
    """What collectives are given, in order: name and bytes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        def counting(name: str, given: Callable[..., int]) -> Any:
            original = getattr(dist, name)

            def call(*arguments: Any, **options: Any) -> Any:
                self.calls.append((name, given(*arguments)))
                return original(*arguments, **options)

            return mock.patch.object(dist, name, call)

        with (
            counting("all_gather", lambda parts, tensor: sum(part.nbytes for part in parts)),
            counting("reduce_scatter", lambda total, parts: sum(part.nbytes for part in parts)),
            counting("all_reduce", lambda tensor: tensor.nbytes),
        ):
            yield


def stopped_by(ranks: Ranks, spoil: Callable[[Setup], None]) -> dict[str, Any]:
    """What a spoilt second step of the last rank does to all of them."""
    setup = Setup(Case(), ranks)
    setup.take(0)
    before = setup.state()
    if ranks.rank == ranks.world_size - 1:
        spoil(setup)
    try:
        setup.take(1)
    except TrainingError as error:
        message = str(error)
    else:
        message = ""
    after = setup.state()
    return {"message": message, "moved": {name.split(".")[0] for name in after if not after[name].equal(before[name])}}


def with_bad_image(setup: Setup) -> None:
    setup.batch.source_images[0, 0] = torch.nan


def with_bad_flag(setup: Setup) -> None:
    descend = setup.method.discriminators.descend_

    def flagged(*arguments: Any) -> Any:
        return descend(*arguments)[0], torch.ones(())

    setup.method.discriminators.descend_ = flagged  # type: ignore[method-assign]


def traffic_of_a_step(ranks: Ranks, *, divided: bool) -> list[tuple[str, int]]:
    setup, traffic = Setup(Case(), ranks, divided=divided), Traffic()
    with traffic.counted():
        setup.take(0)
    return traffic.calls


def cases_of(world_size: int) -> dict[str, Case]:
    """Those that are tried with so many processes: a compiler in each of four takes longer than all else."""
    return {name: case for name, case in CASES.items() if world_size < 4 or not case.compiled}


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join("cpu", timeout=60) as ranks:
        found: dict[str, Any] = {name: trained(case, ranks) for name, case in cases_of(world_size).items()}
        found["traffic"] = traffic_of_a_step(ranks, divided=True)
        found["traffic undivided"] = traffic_of_a_step(ranks, divided=False)
        found["bad image"] = stopped_by(ranks, with_bad_image)
        found["bad flag"] = stopped_by(ranks, with_bad_flag)
        found["stopped and resumed"] = stopped_and_resumed(ranks, divide=True)
        torch.save(found, Path(folder) / f"{rank}.pt")


@functools.cache
def expected_of(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What one process finds that owns all, along gradients, and the state that it begins with."""
    case = replace(CASES[name], compiled=False, in_place=False)
    return trained(case, divided=False), Setup(case, divided=False).state()


@pytest.fixture(scope="module", params=[1, 2, 4])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 1, 2 or 4 processes found."""
    if request.param == 1:
        return [{name: trained(case) for name, case in CASES.items()}]
    folder = tmp_path_factory.mktemp("world")
    run_ranks(work, (request.param, free_port(), str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.fixture(scope="module")
def several(world: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(world) == 1:
        pytest.skip("of several processes")
    return world


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_one_process_that_owns_all(world: list[dict[str, Any]], name: str) -> None:
    if name not in cases_of(len(world)):
        pytest.skip("tried with fewer processes")
    expected, begun = expected_of(name)
    moved = {key: value for key, value in expected["state"].items() if " " not in key}
    for part in ("model", "discriminators"):
        before = {key: value for key, value in begun.items() if " " not in key}
        assert largest_error(moved, before, part) > 1e-3
    # Adam divides by gradients' sizes, those of nearly none included.
    tolerance = 1e-12 if name != "Adam" else 1e-8
    for found in world:
        of_found = found[name]
        for part in ("model", "discriminators"):
            assert largest_error(of_found["state"], expected["state"], part) < tolerance
        in_the_end = {key: expected["gradients"][key] for key in of_found["gradients"]}
        assert any(key.startswith("model") for key in in_the_end)
        assert largest_error(of_found["gradients"], in_the_end, "") < 1e-12
    for term, value in expected["terms"].items():
        mean = torch.stack([found[name]["terms"][term] for found in world]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-11, atol=1e-15)
    # The encoder is the same everywhere, bit for bit.
    assert len({digest(found[name]["state"]) for found in world}) == 1


def test_what_goes_over_the_network_is_what_the_documentation_says(several: list[dict[str, Any]]) -> None:
    world_size, rows, number = len(several), 2 * BATCH * PARTS, 8
    setup = Setup(Case(), divided=False)
    encoder, discriminators = (
        sum(each.nbytes for each in module.parameters()) for module in (setup.method.model, setup.method.discriminators)
    )
    longest = max(share.stop - share.start for share in balanced_shares(setup.method.costs_of_parts(), world_size))
    terms = ("all_gather", world_size * 2 * longest * number)
    features = rows * setup.method.model.feature_dim * number
    for found in several:
        own = [(name, count) for name, count in found["traffic"] if count > 200 or name != "all_reduce"]
        assert own == [
            ("all_gather", features + rows * NUM_CLASSES * number),
            terms,
            terms,
            ("reduce_scatter", features),
            ("all_reduce", encoder),
        ]
        # Indicators of the guard, a few float32 numbers an update.
        assert [name for name, count in found["traffic"] if (name, count) not in own] == ["all_reduce"] * 2
        undivided = [count for name, count in found["traffic undivided"] if count > 200]
        assert undivided == [discriminators, encoder]


def test_a_bad_number_of_one_rank_stops_all_of_them_untouched(several: list[dict[str, Any]]) -> None:
    for found in several:
        assert found["bad image"]["message"].startswith("step 2: ")
        assert found["bad image"]["moved"] == set()


def test_a_bad_gradient_of_one_owner_stops_all_of_them(several: list[dict[str, Any]]) -> None:
    for found in several:
        assert found["bad flag"]["message"].startswith("step 2: gradient norm of the discriminators not finite")
        assert found["bad flag"]["moved"] == {"discriminators"}


def test_a_run_goes_on_bit_for_bit_from_a_state_that_is_whole(several: list[dict[str, Any]]) -> None:
    for found in several:
        different = found["stopped and resumed"]
        assert different.pop("without buffers") != []
        assert different.pop("generators") != []
        assert different == {f"look {look}": [] for look in (0, 2, 5, 11)}


# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_classes", [4, 12, 31, 65])
def test_shares_are_balanced_and_none_is_empty(num_classes: int, world_size: int) -> None:
    groups = ClassGroups.random(num_classes, max(1, num_classes // 5), 0)
    costs = Discriminators(2, groups, 2).expected_pairs()
    # The domain's discriminator sees every sample, a class's the target and its own.
    assert costs[0] == 2
    assert costs[-1] == 1 + 1 / num_classes
    assert sum(costs) == pytest.approx(len(costs) + 3)  # a source sample takes part in 3
    if len(costs) < world_size:
        with pytest.raises(ValueError, match=rf"costs: found {len(costs)}; expected at least {world_size}"):
            balanced_shares(costs, world_size)
        return
    shares = balanced_shares(costs, world_size)
    assert [index for share in shares for index in range(len(costs))[share]] == list(range(len(costs)))
    loads = [sum(costs[share]) for share in shares]
    assert min(loads) > 0
    assert max(loads) <= sum(costs) / world_size + max(costs)


def test_as_many_discriminators_as_ranks_are_one_each() -> None:
    assert balanced_shares([9.0, 1.0, 1.0], 3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    with pytest.raises(ValueError, match="costs: found 2; expected at least 3, one for each rank"):
        balanced_shares([1.0, 1.0], 3)


@dataclass(frozen=True)
class Alike:
    """Ranks that all say what this one says."""

    rank: int
    world_size: int

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.world_size

    def reduce_scatter(self, parts: Any) -> Tensor:
        return sum(parts)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_travel_exactly_in_one_piece(dtype: torch.dtype, weighted: bool) -> None:
    features = torch.randn(3, 5).to(dtype).requires_grad_()
    rows = AdversarialRows(
        features, torch.rand(3, 4), torch.tensor([1.0, 1.0, 0.0]), 2, torch.rand(3) if weighted else None
    )
    everyone = Division([1.0, 1.0], Alike(1, 2)).everyone(rows)
    assert torch.equal(everyone.features, torch.cat([features, features]))
    assert torch.equal(everyone.class_probabilities, torch.cat([rows.class_probabilities] * 2))
    assert everyone.domain.tolist() == [1, 1, 0, 1, 1, 0]
    assert everyone.num_source == 4
    if rows.sample_weight is None:
        assert everyone.sample_weight is None
    else:
        assert torch.equal(everyone.sample_weight, torch.cat([rows.sample_weight] * 2))  # type: ignore[arg-type]
    weight = torch.arange(30.0).reshape(6, 5).to(dtype)
    (everyone.features * weight).sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad, 2 * (weight[:3] + weight[3:]))


def test_only_own_terms_carry_a_gradient() -> None:
    division = Division([1.0, 1.0, 1.0], Alike(1, 2))
    assert division.own == slice(1, 3)
    own = AdversarialTerms(*(torch.rand(2, requires_grad=True) for _ in range(2)))
    whole = division.terms(own)
    assert [len(term) for term in whole] == [3, 3]
    (whole.loss @ torch.tensor([1.0, 2.0, 4.0])).backward()
    assert own.loss.grad is not None
    assert own.loss.grad.tolist() == [2, 4]


# ----------------------------------------------------------------------------------------------- settings and mistakes


@dataclass(frozen=True)
class Absent(Ranks):
    """Ranks of which the others are not there."""

    others: tuple[tuple[str, Any], ...] = ()

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, {**value, **dict(self.others)}]


def divided_into(ranks: Ranks, *options: str) -> int:
    """How many discriminators the first rank keeps."""
    config, *domains = resolve(parse_config(["digits", "--device", "cpu", *options], "train"), ranks.world_size)
    trainer = build_trainer(config, *domains, ranks)
    trainer.loader.close()
    assert isinstance(trainer.method, GSDA)
    assert (trainer.method.division is not None) == (len(trainer.method.discriminators.w1) < 14)
    return len(trainer.method.discriminators.w1)


def test_several_processes_divide_by_default() -> None:
    # 1 domain (2 pairs), 3 groups (1.3), 10 classes (1.1): 8.2 of 17 for the first.
    assert divided_into(Absent(0, 2)) == 6
    assert divided_into(Absent(0, 2), "--divide-discriminators", "off") == 14
    assert divided_into(Ranks(), "--divide-discriminators", "on") == 14
    assert divided_into(Absent(0, 15)) == 14
    assert divided_into(Absent(0, 2), "--precision", "fp16") == 14


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ((), "on with 15 processes and 14 discriminators that can be divided"),
        (("--method", "mada"), "on with 15 processes and 0 discriminators that can be divided"),
        (("--precision", "fp16", "--groups", "10"), "on with --precision fp16"),
    ],
)
def test_what_cannot_be_divided_is_named(options: tuple[str, ...], found: str) -> None:
    with pytest.raises(UsageError, match=f"^--divide-discriminators: found {found}; expected at least as many"):
        divided_into(Absent(0, 15), "--divide-discriminators", "on", *options)


def test_ranks_with_other_discriminators_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^discriminators: found 14 in process 0 and 13 in process 1; expected the same"
    ):
        divided_into(Absent(0, 2, others=(("discriminators", 13),)))
