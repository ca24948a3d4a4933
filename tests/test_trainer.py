import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from same_state import differences
from torch import Tensor, nn
from torch.testing import assert_close

from gsda_fast import discriminator_objective, encoder_objective
from gsda_fast.data.batches import Batch, Crops, Role
from gsda_fast.data.benchmarks import find_benchmark
from gsda_fast.data.domains import ImageDomain
from gsda_fast.data.sampling import IntArray, SamplingPlan
from gsda_fast.errors import TrainingError
from gsda_fast.methods import METHODS, AdaptationSettings, Division, Player, TaskFacts, Update, build_method
from gsda_fast.methods.gsda import GSDA, GSDASettings
from gsda_fast.methods.objective import class_probabilities, target_class_weights
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.optim import OptimizerSettings, build_optimizers, set_learning_rate
from gsda_fast.training.pseudo_labels import confident_labels
from gsda_fast.training.schedules import Schedule
from gsda_fast.training.trainer import Report, Trainer

NUM_CLASSES, NUM_SOURCE, NUM_TARGET, DIM, BATCH_SIZE = 4, 24, 21, 6, 8
SCHEDULE = Schedule(steps=14, warmup=4, refresh_every=3)
SCORED = [4, 7, 10, 13, 14]
THRESHOLD = 0.4
OPTIMIZER = OptimizerSettings(learning_rate=0.1, backbone_learning_rate=0.05)


class TensorLoader:
    """Vectors in place of images, handed out as the plan says; keeps a record of what it was asked for."""

    failed: tuple[tuple[str, str], ...] = ()

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.labels: dict[Role, Tensor] = {
            "source": torch.arange(NUM_SOURCE) % NUM_CLASSES,
            "target": torch.arange(NUM_TARGET) % NUM_CLASSES,
        }
        centres = 2 * torch.randn(NUM_CLASSES, DIM, generator=generator)
        self.images = {
            role: centres[labels] + torch.randn(len(labels), DIM, generator=generator) + (role == "target")
            for role, labels in self.labels.items()
        }
        self.segments: list[tuple[range, SamplingPlan]] = []
        self.training_mode: list[bool] = []
        self.method: nn.Module | None = None

    def train(self, plan: SamplingPlan, steps: range, rank: int = 0) -> Iterator[Batch]:
        self.segments.append((steps, plan))
        for step in steps:
            batch = plan.batch(step, rank)
            source, target = torch.from_numpy(batch.source_index), torch.from_numpy(batch.target_index)
            assert self.method is not None
            self.training_mode.append(self.method.training)
            yield Batch(
                self.images["source"][source],
                self.labels["source"][source],
                self.images["target"][target],
                source,
                target,
            )

    def evaluate(
        self, domain: Role, samples: IntArray | None = None, crops: Crops = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        index = torch.arange(len(self.images[domain])) if samples is None else torch.from_numpy(samples)
        for part in index.split(5):
            yield self.crops(domain, part, crops).flatten(0, 1), part

    def crops(self, domain: Role, index: Tensor, crops: Crops) -> Tensor:
        """(n, crops, DIM): what ten crops are to an image, a vector and its neighbours are here."""
        shifts = torch.linspace(-1, 1, crops).unsqueeze(1) if crops > 1 else torch.zeros(1, 1)
        return self.images[domain][index].unsqueeze(1) + shifts

    def close(self) -> None: ...


def build(
    method: str = "gsda",
    *,
    dropout: float = 0.2,
    schedule: Schedule = SCHEDULE,
    log_every: int = 2,
    seed: int = 0,
    class_weights: Literal["none", "pada"] = "none",
    ranks: Ranks | None = None,
    test_crops: Crops = 1,
    stop: Callable[[], bool] = lambda: False,
    divide: bool = False,
) -> Trainer:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(DIM, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(dropout))
    model = AdaptationModel(backbone, 10, NUM_CLASSES, ModelSettings(bottleneck_dim=5))
    loader = TensorLoader()
    settings = GSDASettings(alpha=0.1, groups=2, hidden_dim=8)
    adaptation = AdaptationSettings({"entropy": 0.1} if method == "entropy" else {}, class_weights)
    built = loader.method = build_method(method, model, settings, TaskFacts(NUM_CLASSES), adaptation)
    paths = [f"{number}.png" for number in range(NUM_TARGET)]
    target = ImageDomain("target", Path("nowhere"), paths, loader.labels["target"].numpy(), tuple("abcd"))
    preprocessing = find_benchmark("digits").preprocessing
    ranks = ranks or Ranks()
    if divide:
        built.divide(Division(built.costs_of_parts(), ranks))
    torch.manual_seed(seed + ranks.rank)
    labels, sizes = loader.labels["source"].numpy(), {"batch_size": BATCH_SIZE, "world_size": ranks.world_size}
    plan = SamplingPlan(labels, NUM_TARGET, preprocessing=preprocessing, seed=0, **sizes)
    return Trainer(
        built,
        loader,
        plan,
        target,
        schedule,
        OPTIMIZER,
        confidence_threshold=THRESHOLD if METHODS[method].target_samples == "confident" else None,
        device=torch.device("cpu"),
        log_every=log_every,
        ranks=ranks,
        test_crops=test_crops,
        stop=stop,
    )


def run(trainer: Trainer) -> tuple[list[Report], list[dict[str, Any]]]:
    """All reports, and the state at every scoring."""
    states: list[dict[str, Any]] = []
    reports = list(trainer.run(lambda: states.append(deepcopy(trainer.state_dict()))))
    return reports, states


def loader_of(trainer: Trainer) -> TensorLoader:
    assert isinstance(trainer.loader, TensorLoader)
    return trainer.loader


# -------------------------------------------------------------------------------------------------------- resuming

TIMES = ("training_seconds", "seconds")
# Every component of the state, by a path into it. Those of a kind are one: the tensors of a model, say, or what an
# optimizer keeps for its parameters. The times, and a GPU's generator, have tests of their own or none here.
COMPONENTS = (
    "step",
    "method.model",
    "method.discriminators",
    "optimizers.encoder.state",
    "optimizers.classifier.state",
    "optimizers.discriminators.state",
    "target_table",
    "history",
    "ranks.0.random.torch",
    "ranks.0.random.numpy",
    "ranks.0.random.python",
    "images_seen",
)
CONSTANT = (
    "classes",
    "scaler",
    "pending",
)
"""Of which a new trainer has the same at a scoring."""
ELSEWHERE = ("ranks.0.random.cuda", "ranks.0.buffers", *TIMES)


def without_times(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in TIMES}


def components(state: Any, path: str = "") -> Iterator[str]:
    """Paths down to what the lists above name, or to a leaf that they lack."""
    known = (*COMPONENTS, *CONSTANT, *ELSEWHERE)
    prefix = next((name for name in known if path == name or path.startswith(f"{name}.")), None)
    if prefix is not None:
        yield prefix
    elif isinstance(state, dict | list) and state:
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for name, value in items:
            yield from components(value, f"{path}.{name}".lstrip("."))
    else:
        yield path


def left_out(state: Any, component: str, fresh: Any, path: str = "") -> Any:
    """The state with one component as it is in a new trainer."""
    if path == component or path.startswith(f"{component}."):
        return fresh
    if isinstance(state, dict):
        return {
            name: left_out(value, component, fresh.get(name), f"{path}.{name}".lstrip("."))
            for name, value in state.items()
        }
    if isinstance(state, list) and isinstance(fresh, list) and len(state) == len(fresh):
        return [left_out(*both, f"{path}.{i}") for i, both in enumerate(zip(state, [component] * len(state), fresh))]
    return state


@pytest.fixture(scope="module")
def uninterrupted() -> list[dict[str, Any]]:
    trainer = build()
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    return run(trainer)[1]


def test_the_components_are_all_there_are(uninterrupted: list[dict[str, Any]]) -> None:
    assert set(components(uninterrupted[1])) == {*COMPONENTS, *CONSTANT, *ELSEWHERE}


def in_a_new_process() -> Trainer:
    """A trainer of which nothing of its own start may remain."""
    trainer = build(seed=1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    return trainer


@pytest.mark.parametrize("scoring", range(len(SCORED) - 1))
def test_resuming_at_any_scoring_ends_in_the_same_state(scoring: int, uninterrupted: list[dict[str, Any]]) -> None:
    resumed = in_a_new_process()
    resumed.load_state_dict(deepcopy(uninterrupted[scoring]))
    reports, states = run(resumed)
    assert [report.step for report in reports if report.evaluation] == SCORED[scoring + 1 :]
    assert differences(without_times(states[-1]), without_times(uninterrupted[-1])) == []


@pytest.mark.parametrize("component", [name for name in COMPONENTS if name != "step"])
def test_leaving_a_component_out_changes_the_run(component: str, uninterrupted: list[dict[str, Any]]) -> None:
    """The negative control of the test above: it would notice each component that a checkpoint lacks."""
    resumed = in_a_new_process()
    fresh = deepcopy(resumed.state_dict())
    incomplete = left_out(deepcopy(uninterrupted[1]), component, fresh)
    assert differences(incomplete, uninterrupted[1]) != []
    resumed.load_state_dict(incomplete)
    _, states = run(resumed)
    assert differences(without_times(states[-1]), without_times(uninterrupted[-1])) != []


def test_leaving_the_step_out_notes_a_scoring_twice(uninterrupted: list[dict[str, Any]]) -> None:
    resumed = build(seed=1)
    resumed.load_state_dict({**deepcopy(uninterrupted[1]), "step": 0})
    with pytest.raises(ValueError, match="step: found 4 after 7"):
        run(resumed)


# -------------------------------------------------------------------------------------------------------- stopping


class StopAt:
    """A wish to stop that is seen at the `call`-th look at it, in steps and between the batches of a scoring."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls > self.call


def told(reports: list[Report]) -> list[tuple[int, dict[str, Any]]]:
    """What reports say but for times and rates."""
    rates = ("images_per_second", "data_wait")
    return [(each.step, {n: v for n, v in each.values.items() if n not in rates}) for each in reports]


LOOKS = 14 + 5 * len(SCORED)  # in every step, and before each of the five batches of a scoring


@pytest.fixture(scope="module")
def all_reports() -> list[tuple[int, dict[str, Any]]]:
    return told(run(build())[0])


@pytest.mark.parametrize("look", range(LOOKS))
def test_stopping_anywhere_and_going_on_is_the_same_run(
    look: int, uninterrupted: list[dict[str, Any]], all_reports: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    trainer = build(stop=StopAt(look))
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    before, _ = run(trainer)
    assert not trainer.finished
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    resumed = in_a_new_process()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    after, _ = run(resumed)
    assert resumed.finished
    assert told(before) + told(after) == all_reports
    assert differences(without_times(resumed.state_dict()), without_times(uninterrupted[-1])) == []


def test_a_wish_to_stop_is_seen_everywhere() -> None:
    """The test above stops at every look that there is, in the middle of a segment, at its end and while scoring."""
    stop = StopAt(LOOKS)
    trainer = build(stop=stop)
    run(trainer)
    assert trainer.finished
    assert stop.calls == LOOKS
    stopped = []
    for look in range(LOOKS):
        trainer = build(stop=StopAt(look))
        run(trainer)
        stopped.append((trainer.step, trainer.pending is not None))
    assert set(stopped) == {(step, False) for step in range(1, 15) if step not in SCORED} | {
        (step, True) for step in SCORED
    }


def test_leaving_the_waiting_figures_out_changes_the_run(all_reports: list[tuple[int, dict[str, Any]]]) -> None:
    trainer = build(stop=StopAt(4 + 2))  # while the target is scored for the first time
    before, _ = run(trainer)
    assert trainer.pending is not None
    resumed = in_a_new_process()
    resumed.load_state_dict({**trainer.state_dict(), "pending": None})
    assert told(before) + told(run(resumed)[0]) != all_reports


def bad_from(trainer: Trainer, first: int) -> None:
    """Loss terms that are not finite from a step on, on a device on which that is seen when the host asks for it."""
    trainer.updater._guard._device = torch.device("cuda")  # reads no flag by itself
    trainer.updater._guard._start_copy = lambda: None  # type: ignore[method-assign]
    updates = trainer.method.updates

    def poisoned(batch: Batch, known: Any) -> Iterator[Update]:
        for update in updates(batch, known):
            yield update._replace(loss=update.loss * torch.nan) if trainer.step >= first else update

    trainer.method.updates = poisoned  # type: ignore[method-assign]


def test_no_state_after_a_bad_number_is_given_away() -> None:
    trainer = build(log_every=100)
    bad_from(trainer, 8)
    states: list[dict[str, Any]] = []
    with pytest.raises(TrainingError, match=r"^step 9: objective of the discriminators.* not finite"):
        run_and_save(trainer, states)
    assert [state["step"] for state in states] == [4, 7]


def test_a_stop_in_the_step_of_the_bad_number_gives_no_state_away() -> None:
    """The wish to stop is known, the number is not: the state itself has to ask."""
    trainer = build(log_every=100)
    bad_from(trainer, 8)
    steps = trainer.updater.step

    def stopped(step: int, updates: Iterator[Update]) -> Any:
        outcome = steps(step, updates)
        trainer.updater._guard.stop = step == 8
        return outcome

    trainer.updater.step = stopped  # type: ignore[method-assign]
    states: list[dict[str, Any]] = []
    with pytest.raises(TrainingError, match=r"^step 9: objective of the discriminators.* not finite"):
        run_and_save(trainer, states)
    assert (trainer.step, [state["step"] for state in states]) == (9, [4, 7])


def run_and_save(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    list(trainer.run(lambda: states.append(trainer.state_dict())))
    states.append(trainer.state_dict())  # as a run that is asked to stop does


# ------------------------------------------------------------------------------------------------------------ state


def test_a_state_goes_through_a_file(uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    torch.save(uninterrupted[2], tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert differences(loaded, uninterrupted[2]) == []
    trainer = build(seed=1)
    trainer.load_state_dict(loaded)
    assert differences(without_times(trainer.state_dict()), without_times(uninterrupted[2])) == []


def test_seconds_of_earlier_attempts_count(uninterrupted: list[dict[str, Any]]) -> None:
    trainer = build()
    trainer.load_state_dict({**deepcopy(uninterrupted[-1]), "seconds": 1000.0, "training_seconds": 900.0})
    assert 1000 <= trainer.seconds < 1100
    assert trainer.training_seconds == 900
    assert list(trainer.run(lambda: None)) == []


def test_the_same_seed_gives_the_same_run(uninterrupted: list[dict[str, Any]]) -> None:
    again, other = run(build())[1][-1], run(build(seed=1))[1][-1]
    assert differences(without_times(again), without_times(uninterrupted[-1])) == []
    assert differences(without_times(other), without_times(uninterrupted[-1])) != []


def test_a_run_with_class_weights_resumes_in_the_same_state() -> None:
    _, states = run(build(class_weights="pada"))
    for weights_left_out in (False, True):
        resumed = build(seed=1, class_weights="pada")
        fresh = deepcopy(resumed.state_dict())
        state = deepcopy(states[1])
        if weights_left_out:
            state = left_out(state, "method.source_class_weights", fresh)
        resumed.load_state_dict(state)
        found = run(resumed)[1][-1]
        assert (differences(without_times(found), without_times(states[-1])) != []) == weights_left_out


# --------------------------------------------------------------------------------------------- what happens when


def test_reports_come_at_log_steps_and_scorings() -> None:
    trainer = build(log_every=4)
    reports, states = run(trainer)
    assert [report.step for report in reports] == [4, 7, 8, 10, 12, 13, 14]
    assert [report.step for report in reports if report.evaluation] == SCORED
    assert [state["step"] for state in states] == SCORED
    for report in reports:
        scored = report.evaluation is not None
        assert {"accuracy", "mean_per_class", "mutual_information"} & set(report.values) == (
            {"accuracy", "mean_per_class", "mutual_information"} if scored else set()
        )
        # Rates are those of the last step done.
        factor, ramp = (f(report.step - 1) for f in (SCHEDULE.learning_rate_factor, SCHEDULE.adversarial_ramp))
        assert report.values["learning_rate"] == pytest.approx(0.1 * factor)
        assert report.values["adversarial_ramp"] == pytest.approx(ramp)
        rate, wait = report.values["images_per_second"], report.values["data_wait"]
        assert rate is not None
        assert wait is not None
        assert rate > 0
        assert 0 <= wait <= 1
        assert ("adversarial_domain" in report.values) == (report.step > SCHEDULE.warmup)
        assert "classification" in report.values
    assert trainer.images_seen == SCHEDULE.steps * 2 * BATCH_SIZE


def test_accuracy_is_that_of_the_target() -> None:
    trainer = build()
    *_, last = run(trainer)[0]
    correct = trainer.predict("target").argmax(1) == loader_of(trainer).labels["target"]
    assert last.evaluation is not None
    assert last.values["accuracy"] == last.evaluation.accuracy == pytest.approx(100 * correct.double().mean().item())
    assert trainer.history.accuracy.last == last.values["accuracy"]
    assert trainer.probabilities is not None
    assert torch.equal(trainer.probabilities, trainer.predict("target"))


def test_ten_crops_are_what_the_figures_average_and_nothing_that_trains() -> None:
    reports, states = run(build(class_weights="pada"))
    ten = build(class_weights="pada", test_crops=10)
    reports_of_ten, states_of_ten = run(ten)
    without = {"history", *TIMES}
    for state, of_ten in zip(states, states_of_ten, strict=True):
        kept, kept_of_ten = ({k: v for k, v in each.items() if k not in without} for each in (state, of_ten))
        assert differences(kept, kept_of_ten) == []
    assert reports[-1].values["mutual_information"] != reports_of_ten[-1].values["mutual_information"]

    loader, model = loader_of(ten), ten.method.model.eval()
    with torch.no_grad():
        crops = loader.crops("target", torch.arange(NUM_TARGET), 10)
        expected = torch.stack([model(crops[:, place]).logits.softmax(1) for place in range(10)]).mean(0)
    assert ten.probabilities is not None
    assert_close(ten.probabilities, expected)
    assert_close(ten.predict("target", 10), expected)
    correct = expected.argmax(1) == loader.labels["target"]
    assert ten.history.accuracy.last == pytest.approx(100 * correct.double().mean().item())


def test_the_plan_follows_every_scoring() -> None:
    trainer = build()
    tables = []
    for report in trainer.run(lambda: tables.append(trainer.plan.target_table)):
        if report.evaluation is not None:
            assert trainer.probabilities is not None
            expected = confident_labels(trainer.probabilities, THRESHOLD)
            assert np.array_equal(trainer.plan.target_table, expected)  # type: ignore[arg-type]
    segments = loader_of(trainer).segments
    assert [steps for steps, _ in segments] == [range(a, b) for a, b in zip([0, *SCORED[:-1]], SCORED)]
    assert segments[0][1].target_table is None
    for (_, plan), table in zip(segments[1:], tables):
        assert plan.target_table is table
    drawn = np.concatenate([table for table in tables if table is not None])
    assert (drawn < 0).any()  # the threshold has something to leave out
    assert (drawn >= 0).any()


@pytest.mark.parametrize(("method", "renewed"), [("source-only", False), ("dann", False), ("entropy", True)])
def test_only_methods_that_want_confident_samples_renew_the_plan(method: str, renewed: bool) -> None:
    trainer = build(method)
    run(trainer)
    assert (trainer.plan.target_table is not None) == renewed


@pytest.mark.parametrize("method", ["source-only", "gsda"])
def test_class_weights_follow_every_scoring(method: str) -> None:
    trainer = build(method, class_weights="pada")
    kept = []
    for report in trainer.run(lambda: None):
        weights = trainer.method.source_class_weights
        assert weights is not None
        if report.step < SCHEDULE.warmup:
            assert torch.equal(weights, torch.ones(NUM_CLASSES))
        elif report.evaluation is not None:
            assert trainer.probabilities is not None
            assert torch.equal(weights, target_class_weights(trainer.probabilities))
            kept.append(weights.tolist())
    assert len({tuple(each) for each in kept}) == len(SCORED)
    other = build(method)
    run(other)
    assert not torch.equal(other.method.model.classifier.weight, trainer.method.model.classifier.weight)


def test_discriminators_rest_during_warm_up() -> None:
    trainer = build(schedule=Schedule(steps=4, warmup=4, refresh_every=3))
    before = deepcopy(trainer.method.state_dict())
    run(trainer)
    after = trainer.method.state_dict()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"model"}


def test_training_and_scoring_have_their_modes() -> None:
    trainer = build()
    run(trainer)
    assert loader_of(trainer).training_mode == [True] * SCHEDULE.steps
    assert torch.equal(trainer.predict("target"), trainer.predict("target"))  # no dropout
    assert not trainer.method.training


def test_predictions_and_features_keep_the_order_of_the_samples() -> None:
    trainer = build()
    run(trainer)
    model, images = trainer.method.model.eval(), loader_of(trainer).images["target"]
    with torch.no_grad():
        features, logits = model(images)
    assert_close(trainer.predict("target"), logits.softmax(1))
    chosen = np.array([20, 3, 7, 0, 11, 12, 2])
    assert_close(torch.from_numpy(trainer.features("target", chosen)), features[chosen])


# ------------------------------------------------------------------------------------ the step, written out by hand


def test_a_run_is_the_two_steps_in_a_loop() -> None:
    """The trainer against both steps in a user's own loop, over two refreshes of the pseudo-labels."""
    schedule = Schedule(steps=6, warmup=0, refresh_every=2)
    trainer, mine = (build(dropout=0.0, schedule=schedule) for _ in range(2))
    run(trainer)

    method, loader, plan = mine.method, loader_of(mine), mine.plan
    assert isinstance(method, GSDA)
    model, discriminators = method.model, method.discriminators
    optimizers = build_optimizers(
        {"all": Player((model,)), "discriminators": Player((discriminators,))}, OPTIMIZER, model.backbone
    )
    domain = torch.tensor([1.0] * BATCH_SIZE + [0.0] * BATCH_SIZE)
    for step in range(schedule.steps):
        set_learning_rate(optimizers, schedule.learning_rate_factor(step))
        ramp = torch.tensor(schedule.adversarial_ramp(step))
        model.train()
        batch = next(loader.train(plan, range(step, step + 1)))
        features, logits = model(torch.cat([batch.source_images, batch.target_images]))
        p = class_probabilities(logits, batch.source_labels)

        terms = discriminators(features.detach(), p, domain, BATCH_SIZE)
        optimizers["discriminators"].zero_grad()
        discriminator_objective(terms, discriminators.groups, beta=1.0 * ramp).total.backward()
        optimizers["discriminators"].step()

        terms = discriminators(features, p, domain, BATCH_SIZE, frozen=True)
        optimizers["all"].zero_grad()
        encoder_objective(
            logits, batch.source_labels, terms, discriminators.groups, alpha=0.1, beta=1.0 * ramp, adversarial_ramp=ramp
        ).total.backward()
        optimizers["all"].step()

        if (step + 1) % schedule.refresh_every == 0:
            model.eval()
            with torch.no_grad():
                probabilities = F.softmax(model(loader.images["target"]).logits, dim=1)
            plan = plan.with_target(confident_labels(probabilities, THRESHOLD))
    assert_close(dict(method.state_dict()), dict(trainer.method.state_dict()), rtol=1e-6, atol=1e-7)


def test_the_rate_of_a_step_is_the_schedules() -> None:
    slow = replace(SCHEDULE, steps=1, warmup=0)
    trainer = build("source-only", dropout=0.0, schedule=slow)
    weight = trainer.method.model.classifier.weight
    before = weight.detach().clone()
    run(trainer)
    gradient, decay, momentum = weight.grad, OPTIMIZER.weight_decay, OPTIMIZER.momentum
    assert gradient is not None
    moved = (gradient + decay * before) * (1 + momentum)  # Nesterov's first step
    assert_close(weight.detach(), before - 0.1 * moved)
