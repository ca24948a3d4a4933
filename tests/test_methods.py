"""What every method of the table is held to, whoever wrote it: a new entry is tested here without a line of its own."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from msgspec import Meta
from processes import run_ranks
from rich.console import Console
from same_state import differences
from test_distributed import free_port
from test_kill import outcome
from torch import Tensor, nn
from torch.testing import assert_close

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config, preset
from gsda_fast.data.batches import Batch
from gsda_fast.errors import Stopped, UsageError
from gsda_fast.evaluate import EvaluateSettings, evaluate
from gsda_fast.export import ExportSettings, export
from gsda_fast.methods import METHODS, Entry, Method, MethodSettings, Player, Step, TaskFacts, Update, build_method
from gsda_fast.methods.base import ENCODER, Scores
from gsda_fast.model import AdaptationModel, ModelSettings
from gsda_fast.results.page import write_page
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.train import train
from gsda_fast.trained import load_trained, read_settings
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.distributed import Ranks, join
from gsda_fast.training.optim import OptimizerSettings, build_optimizers
from gsda_fast.training.trainer import Trainer
from gsda_fast.training.update import Updater

pytestmark = pytest.mark.filterwarnings("ignore:domain .* found .* images")

NUM_CLASSES, BATCH, DIM = 4, 8, 5
RANKS = 2
OPTIMIZER = OptimizerSettings(learning_rate=0.02, backbone_learning_rate=0.01)
each_method = pytest.mark.parametrize("name", METHODS)

NOT_OVER_RANKS: dict[str, str] = {}
"""Methods of which two ranks are not one with the whole batch, and why not."""


def build(name: str) -> Method:
    """A method as `train digits` sets it up, on vectors, in float64, with BatchNorm and dropout at rest."""
    torch.manual_seed(0)
    entry, config = METHODS[name], preset("digits", name)
    settings = entry.method.resolve(config.method, NUM_CLASSES, "cpu")
    backbone = nn.Sequential(nn.Linear(DIM, 9), nn.Tanh())

    def head(feature_dim: int, num_classes: int) -> nn.Module:
        return entry.method.classifier(settings, feature_dim, num_classes)

    model = AdaptationModel(backbone, 9, NUM_CLASSES, ModelSettings(bottleneck_dim=40), head)  # wide enough for gfk
    task = TaskFacts(NUM_CLASSES, RANKS * BATCH, RANKS * BATCH, seed=0)
    method = build_method(name, model, settings, task, config.adaptation).double().eval()
    list(method.start())
    return method


def batch_of(method: Method, parts: slice = slice(None)) -> Batch:
    """`RANKS` equal parts, in each of which every class occurs."""
    generator = torch.Generator().manual_seed(2)
    shape = (2 + method.target_views, RANKS, BATCH, DIM)
    source, target, *views = torch.randn(shape, dtype=torch.float64, generator=generator)[:, parts].flatten(1, 2)
    labels = (torch.arange(RANKS * BATCH) % NUM_CLASSES).reshape(RANKS, BATCH)[parts].flatten()
    index = torch.arange(RANKS * BATCH).reshape(RANKS, BATCH)[parts].flatten()
    return Batch(source, labels, target, index, index, tuple(views[: method.target_views - 1]))


def at_half(ranks: Ranks | None = None) -> Step:
    ramp, progress = (torch.tensor(value, dtype=torch.float64) for value in (0.9, 0.5))
    return Step(ramp, progress) if ranks is None else Step(ramp, progress, ranks.mean, ranks.gather_rows)


def updater_of(method: Method, ranks: Ranks | None = None) -> Updater:
    players = method.players()
    optimizers = build_optimizers(players, OPTIMIZER, method.trained.backbone)
    return Updater(players, optimizers, ranks or Ranks(), torch.device("cpu"))


def parameters_of(method: Method) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in method.named_parameters()}


@each_method
@pytest.mark.parametrize("phase", ["warm-up", "adaptation"])
def test_an_update_moves_exactly_the_players_that_it_names(name: str, phase: str) -> None:
    method = build(name)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    of_player = {
        player: {names[id(parameter)] for module in made.modules for parameter in module.parameters()}
        for player, made in method.players().items()
    }
    seen: list[tuple[tuple[str, ...], list[str]]] = []

    def watched() -> Iterator[Update]:
        source_updates, updates = method.source_updates, method.updates
        for update in (source_updates if phase == "warm-up" else updates)(batch_of(method), at_half()):
            before = parameters_of(method)
            yield update
            moved = differences(parameters_of(method), before)
            seen.append((update.players, [path.removeprefix("state.") for path in moved]))

    outcome_ = updater_of(method).step(0, watched())
    assert bool(seen) == (phase == "warm-up" or not METHODS[name].method.fits)
    for players, moved in seen:
        assert set(moved) <= set().union(*(of_player[player] for player in players))
        for player in players:
            assert set(moved) & of_player[player], f"{player} has not moved"
    if seen:
        assert all(value.isfinite() for value in outcome_.terms.values())
        assert all(value.dim() == 0 and not value.requires_grad for value in outcome_.terms.values())
        assert outcome_.images >= BATCH


ADVERSARIAL = {
    *("dann", "glb", "glb-cls", "glb-cls-grp", "gsda", "bsp-dann", "mada", "adda", "cdan", "cdan-e", "bsp-cdan"),
    "cdan-mcc-sdat",
}
"""Methods with a discriminator of the domain."""


@each_method
def test_domain_accuracy_is_measured_where_the_step_is_logged_and_changes_nothing(name: str) -> None:
    states, metrics = [], []
    for logged in (True, False):
        method = build(name).train()  # with dropout, which a further forward pass would draw anew
        torch.manual_seed(3)
        step = replace(at_half(), logged=logged)
        metrics.append(updater_of(method).step(0, method.updates(batch_of(method), step)).metrics)
        states.append({**method.state_dict(), "generator": torch.get_rng_state()})
    assert differences(*states) == []
    assert metrics[1] == {}
    assert set(metrics[0]) == ({"domain_accuracy"} if name in ADVERSARIAL else set())
    assert all(0 <= float(value) <= 1 and value.dim() == 0 for value in metrics[0].values())


@each_method
def test_the_scored_network_is_in_the_state_and_what_is_trained_has_a_player(name: str) -> None:
    method = build(name)
    assert {name for name in method.state_dict() if name.startswith("model.")} == {
        f"model.{each}" for each in method.model.state_dict()
    }
    held = {id(p) for player in method.players().values() for module in player.modules for p in module.parameters()}
    assert {id(parameter) for parameter in method.trained.parameters()} <= held


# --------------------------------------------------------------------------------------------------------- two ranks


def two_steps(name: str, parts: slice, ranks: Ranks | None) -> dict[str, Tensor]:
    method = build(name)
    updater = updater_of(method, ranks)
    for step in range(2):
        updater.step(step, method.updates(batch_of(method, parts), at_half(ranks)))
    return {key: value for key, value in method.state_dict().items() if value.is_floating_point()}


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join("cpu", timeout=60) as ranks:
        found = {name: two_steps(name, slice(rank, rank + 1), ranks) for name in METHODS if name not in NOT_OVER_RANKS}
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What two processes made of two steps of every method, each with half of the batch."""
    folder = tmp_path_factory.mktemp("world")
    run_ranks(work, (free_port(), str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@each_method
def test_two_ranks_are_one_with_the_whole_batch(name: str, world: list[dict[str, dict[str, Tensor]]]) -> None:
    if name in NOT_OVER_RANKS:
        pytest.skip(NOT_OVER_RANKS[name])
    expected = two_steps(name, slice(None), None)
    before = build(name).state_dict()
    assert METHODS[name].method.fits or any(not torch.equal(before[key], value) for key, value in expected.items())
    for found in world:
        assert_close(found[name], expected, rtol=1e-7, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- whole runs


STEPS = ("--steps", "7", "--warmup", "3", "--refresh-every", "2", "--log-every", "2", "--batch-size", "16")
STEPS = (*STEPS, "--confidence-threshold", "0.11", "--no-verify", "--device", "cpu")


def run(few_digits: Path, name: str, folder: Path) -> None:
    arguments = ["digits", *STEPS, "--data-root", str(few_digits), "--method", name, "--output", str(folder)]
    train(parse_config(arguments, "train"), Console(quiet=True))


def asked_to_stop_in(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run be asked to stop in its step with that number, counted from 1."""
    original: Callable[..., Any] = Trainer._train_step

    def taken(self: Trainer, number: int, batch: Batch) -> Any:
        if number + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, number, batch)

    patch.setattr(Trainer, "_train_step", taken)


@each_method
def test_a_run_resumes_bit_by_bit_and_what_it_leaves_scores_as_it_did(
    name: str, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(few_digits, name, whole)
    # In the middle between two evaluations; of a method that is fitted, after the fit.
    with monkeypatch.context() as patch:
        asked_to_stop_in(patch, 7 if METHODS[name].method.fits else 4)
        with pytest.raises(Stopped):
            run(few_digits, name, parts)
    run(few_digits, name, parts)
    assert differences(outcome(parts), outcome(whole)) == []

    lines = RunFolder(whole).read_metrics()
    assert all(value is None or isinstance(value, float | int) for line in lines for value in line.values())
    predictions = RunFolder(whole).read_predictions()
    assert predictions is not None
    trained = load_trained(whole)
    trainer = build_trainer(*resolve(read_settings(RunFolder(whole))))
    images = torch.cat([images for images, _ in trainer.loader.evaluate("target")])
    trainer.loader.close()
    with torch.no_grad():
        logits = trained.model(images).logits
    assert_close(logits.softmax(1), torch.from_numpy(predictions.probabilities))

    _, program = export(ExportSettings(whole))
    exported = torch.export.load(program).module()(images[:3])
    assert_close(exported[1], logits[:3], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ a method of one's own


@dataclass(frozen=True)
class ToySettings(MethodSettings):
    """Of a method that only this test knows."""

    pull: Annotated[float, Meta(ge=0)] = 0.5
    """How much the domains' means are drawn together."""


class Toy(Method):
    """The least that a method has to say, and a player, a buffer and a term of its own."""

    def __init__(self, model: Any, settings: ToySettings, task: Any, adaptation: Any = None) -> None:
        super().__init__(model, settings, task, adaptation)
        self.settings = settings
        self.scale = nn.Linear(model.feature_dim, model.feature_dim)
        self.register_buffer("evaluations", torch.zeros(()))

    def players(self) -> dict[str, Player]:
        return {**super().players(), "scale": Player((self.scale,), lr_scale=0.5)}

    def on_evaluation(self, scores: Scores) -> None:
        super().on_evaluation(scores)
        self.evaluations += 1

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        outputs = self.outputs(batch)
        source, target = (self.scale(step.gather(rows)) for rows in (outputs.source_features, outputs.target_features))
        distance = (source.mean(0) - target.mean(0)).square().sum()
        yield self.encoder_update(
            outputs, batch, step, self.settings.pull * distance, {"distance": distance}, (*ENCODER, "scale")
        )


def test_a_method_is_one_file_and_an_entry_in_the_table(
    few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "toy", Entry(Toy, ToySettings(), presets={"digits": {"method": {"pull": 0.25}}}))
    test_a_run_resumes_bit_by_bit_and_what_it_leaves_scores_as_it_did("toy", few_digits, tmp_path, monkeypatch)
    folder = RunFolder(tmp_path / "whole")
    assert folder.read_config()["method"] == {"pull": 0.25}
    assert [line["step"] for line in folder.read_metrics() if "distance" in line] == [4, 5, 6, 7]
    state, _ = CheckpointFolder(folder.checkpoints).load_newest()
    assert state is not None
    assert state["method"]["evaluations"] == 3
    _, evaluation, _ = evaluate(EvaluateSettings(folder.path, device="cpu"))
    result = folder.read_result()
    assert result is not None
    assert evaluation.accuracy == result.accuracy.last
    assert "toy" in write_page([folder], tmp_path, points=50).read_text()
    with pytest.raises(UsageError, match="--pull: found -1"):
        parse_config(["digits", "--method", "toy", "--pull", "-1"], "train")
    assert parse_config(["digits", "--method", "toy", "--pull", "2"], "train").method == ToySettings(2.0)
