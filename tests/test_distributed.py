import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import Command, run_ranks, start
from same_state import differences
from test_kill import outcome
from test_trainer import NUM_TARGET, build, run
from torch import Tensor, nn
from torch.testing import assert_close

from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import parse_config
from gsda_fast.data.batches import Batch
from gsda_fast.errors import Stopped, TrainingError, UsageError
from gsda_fast.methods import AdaptationSettings, Step, TaskFacts, Update, build_method
from gsda_fast.methods.gsda import GSDASettings
from gsda_fast.methods.objective import target_class_weights
from gsda_fast.model import AdaptationModel, ModelSettings, fetch_weights
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training import distributed
from gsda_fast.training.checkpoint import CheckpointFolder
from gsda_fast.training.distributed import Ranks, digest, join
from gsda_fast.training.optim import OptimizerSettings, build_optimizers
from gsda_fast.training.stopping import StopRequest
from gsda_fast.training.trainer import Trainer
from gsda_fast.training.update import Updater

NUM_CLASSES, BATCH, DIM = 4, 6, 5
DATA_SEED = 8  # of a batch whose parts, 2 or 4, disagree about the signs in L_syn: else its mean would not matter
WORLDS = (2, 4)
OPTIMIZER = OptimizerSettings(learning_rate=0.3, backbone_learning_rate=0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -------------------------------------------------------------------------------------- rows of all ranks as one batch


def of_whole_batch(parts: slice, world_size: int, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Value and gradients of a loss that is no mean over samples, of source and target rows gathered apart."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(DIM, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    images = torch.randn((world_size, 2, BATCH, DIM), dtype=torch.float64, generator=generator)
    source, target = (images[parts, domain].flatten(0, 1) @ weight for domain in (0, 1))
    rows = torch.cat([gather(source), gather(target)])
    # The kernel between every two rows, and the nuclear norm of one domain's.
    value = (-torch.cdist(rows, rows).square()).exp().sum() + torch.linalg.matrix_norm(gather(target).softmax(1), "nuc")
    (gradient,) = torch.autograd.grad(value, weight)
    return {"value": value.detach(), "gradient": gradient, "rows": rows.detach()}


def without_factor(ranks: Ranks, rows: Tensor) -> Tensor:
    """The trap of a gather that gives each rank the gradient of its own rows and no more."""
    everywhere = list(ranks.gather_rows(rows.detach()).split(len(rows)))
    everywhere[ranks.rank] = rows
    return torch.cat(everywhere)


# ----------------------------------------------------------------------------------------- the step, alone and in parts


class Inputs(NamedTuple):
    batch: Batch
    step: Step


class Setup:
    """A method in float64 with frozen BatchNorm, and a batch of `world_size` equal parts."""

    def __init__(self, world_size: int, update: Any = "alternating", class_weights: Any = "none") -> None:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(DIM, 9), nn.BatchNorm1d(9), nn.ReLU())
        # In channels_last, a parameter's elements do not lie in the order of its shape.
        backbone.append(nn.Unflatten(1, (9, 1, 1))).append(nn.Conv2d(9, 7, 3, padding=1)).append(nn.Flatten())
        model = AdaptationModel(backbone, 7, NUM_CLASSES, ModelSettings(bottleneck_dim=8))
        settings = GSDASettings(alpha=0.3, beta=5.0, groups=2, hidden_dim=7, update=update)
        adaptation = AdaptationSettings(class_weights=class_weights)
        self.method = build_method("gsda", model, settings, TaskFacts(NUM_CLASSES), adaptation).double()
        probabilities = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.1, 0.3, 0.6, 0.0]])
        self.method.on_evaluation(SimpleNamespace(probabilities=probabilities))  # type: ignore[arg-type]
        self.method.to(memory_format=torch.channels_last).eval()
        generator = torch.Generator().manual_seed(DATA_SEED)
        shape = (world_size, 2, BATCH, DIM)
        self.images = torch.randn(shape, dtype=torch.float64, generator=generator)
        self.labels = torch.randint(NUM_CLASSES, (world_size, BATCH), generator=generator)

    def inputs(self, parts: slice, mean: Callable[[Tensor], Tensor]) -> Inputs:
        batch = Batch(
            source_images=self.images[parts, 0].flatten(0, 1),
            source_labels=self.labels[parts].flatten(),
            target_images=self.images[parts, 1].flatten(0, 1),
            source_index=torch.arange(self.labels[parts].numel()),
            target_index=torch.arange(self.labels[parts].numel()),
        )
        ramp, progress = (torch.tensor(each, dtype=torch.float64) for each in (0.6, 0.1))
        return Inputs(batch, Step(ramp, progress, mean))

    def updater(self, ranks: Ranks) -> Updater:
        players = self.method.players()
        optimizers = build_optimizers(players, OPTIMIZER, self.method.model.backbone)
        return Updater(players, optimizers, ranks, torch.device("cpu"))

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.method.named_parameters()}

    def step(self, ranks: Ranks, inputs: Inputs) -> dict[str, Any]:
        """The gradients of both updates, and the parameters after two steps."""
        updater = self.updater(ranks)
        updater.step(0, self.method.updates(*inputs))
        gradients = {name: parameter.grad for name, parameter in self.method.named_parameters()}
        gradients = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
        terms = updater.step(1, self.method.updates(*inputs)).terms
        return {"gradients": gradients, "parameters": self.state(), "terms": terms}


class WithoutSecondMean(Ranks):
    """The trap of one wrapped forward pass and two backward passes: the second gradient is never averaged."""

    calls = 0

    def mean_gradients(self, parameters: Any, extra: Tensor | None = None) -> Tensor | None:
        type(self).calls += 1
        return super().mean_gradients(parameters, extra) if type(self).calls % 2 else extra


class PlainAllReduce(torch.autograd.Function):
    """The trap of a plain all-reduce inside a loss: it gives the gradient 1 / world_size of its size."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        total = values.clone()
        dist.all_reduce(total)
        return total / world_size

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.world_size, None


def with_plain_all_reduce(setup: Setup, ranks: Ranks, inputs: Inputs) -> dict[str, Any]:
    from gsda_fast.methods import gsda, objective

    original = objective.synchronization_loss
    naive = lambda norm, groups, _: original(PlainAllReduce.apply(norm, ranks.world_size), groups)  # noqa: E731
    with (
        mock.patch.object(objective, "synchronization_loss", naive),
        mock.patch.object(gsda, "synchronization_loss", naive),
    ):
        return setup.step(ranks, inputs)


def poisoned(updates: Iterator[Update], player: str, poison: bool) -> Iterator[Update]:
    """The updates, one of them with a gradient that is not finite though all of its terms are."""
    for update in updates:
        # The square root's slope at 0 is infinite.
        nothing = (0 * update.loss).sqrt() if poison and player in update.players else 0
        yield update._replace(loss=update.loss + nothing)


def stops(setup: Setup, ranks: Ranks, inputs: Inputs, player: str | None = None) -> dict[str, Any]:
    """What one bad rank does to all: the message, and whether parameters and momentum are as before."""
    updater = setup.updater(ranks)
    updater.step(0, setup.method.updates(*inputs))
    before = digest(setup.state()), [digest_of(optimizer) for optimizer in updater.optimizers.values()]
    bad = ranks.rank == ranks.world_size - 1
    if player is None and bad:
        inputs.batch.source_images[0, 0] = torch.nan
    try:
        updater.step(1, poisoned(setup.method.updates(*inputs), player or "", bad))
    except TrainingError as error:
        message = str(error)
    else:
        message = ""
    after = digest(setup.state()), [digest_of(optimizer) for optimizer in updater.optimizers.values()]
    return {"message": message, "untouched": before == after}


def digest_of(optimizer: torch.optim.Optimizer) -> str:
    return digest({str(number): state["momentum_buffer"] for number, state in enumerate(optimizer.state.values())})


def fail(error: type[TrainingError | Stopped]) -> None:
    raise error("not here")


def failure_of(call: Callable[[], Any]) -> tuple[str, bool]:
    try:
        call()
    except (UsageError, TrainingError, Stopped) as error:
        return str(error), error.reported_elsewhere
    return "", False


def raising(message: str, here: bool) -> str:
    if here:
        raise UsageError(message, found="a mistake", expected="none")
    return "well"


def stopped_and_resumed(ranks: Ranks, *, divide: bool = False) -> dict[str, Any]:
    """Runs that one rank is asked to stop, and that go on from the state that they left; what differs in the end."""
    import test_trainer

    build = partial(test_trainer.build, ranks=ranks, divide=divide)

    def whole() -> dict[str, Any]:
        trainer = build()
        list(trainer.run(lambda: None))
        return test_trainer.without_times(trainer.state_dict())

    def in_two_parts(look: int, incomplete: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any]:
        asked = test_trainer.StopAt(look) if ranks.rank == ranks.world_size - 1 else lambda: False
        trainer = build(stop=asked)
        list(trainer.run(lambda: None))
        assert not trainer.finished
        assert len(set(ranks.gather_objects((trainer.step, trainer.pending is None)))) == 1
        state = deepcopy(trainer.state_dict())
        incomplete(state)
        resumed = build(seed=1)
        resumed.load_state_dict(state)
        list(resumed.run(lambda: None))
        return test_trainer.without_times(resumed.state_dict())

    def without_buffers(state: dict[str, Any]) -> None:
        for own in state["ranks"]:
            own["buffers"] = {}

    def with_the_first_ranks_generators(state: dict[str, Any]) -> None:
        for own in state["ranks"]:
            own["random"] = state["ranks"][0]["random"]

    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    expected = whole()
    found = {f"look {look}": differences(in_two_parts(look), expected) for look in (0, 2, 5, 11)}
    found["without buffers"] = differences(in_two_parts(2, without_buffers), expected)
    found["generators"] = differences(in_two_parts(2, with_the_first_ranks_generators), expected)
    return found


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """Everything that is asked of several processes, in one go: starting them takes longer than what they do."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join("cpu", timeout=60) as ranks:
        own = slice(rank, rank + 1)

        def fresh(update: str = "alternating") -> tuple[Setup, Inputs]:
            setup = Setup(world_size, update)
            return setup, setup.inputs(own, ranks.mean)

        found: dict[str, Any] = {}
        for update in ("alternating", "reversal"):
            setup, inputs = fresh(update)
            found[update] = setup.step(ranks, inputs)
            setup = Setup(world_size, update, "pada")
            found[f"{update} with class weights"] = setup.step(ranks, inputs)
        with mock.patch.object(distributed, "_ALONE_FROM", 50):
            setup, inputs = fresh()
            found["alone"] = setup.step(ranks, inputs)
            found["of which alone"] = {parameter.numel() >= 50 for parameter in setup.method.parameters()}
        trainer = build(class_weights="pada", ranks=ranks)
        run(trainer)
        found["class weights"] = trainer.method.state_dict()["source_class_weights"]
        found["probabilities"] = trainer.probabilities
        setup, inputs = fresh()
        found["second gradient not averaged"] = setup.step(WithoutSecondMean(rank, world_size, rank), inputs)
        setup, _ = fresh()
        found["synchronization per rank"] = setup.step(ranks, setup.inputs(own, Tensor.detach))
        found["plain all-reduce"] = with_plain_all_reduce(*fresh()[:1], ranks, fresh()[1])
        for player in (None, "encoder", "discriminators"):
            setup, inputs = fresh()
            found[f"stop {player}"] = stops(setup, ranks, inputs, player)

        found["gather"] = of_whole_batch(own, world_size, ranks.gather_rows)
        found["gather"]["gradient"] = ranks.mean(found["gather"]["gradient"])
        found["gather without factor"] = ranks.mean(
            of_whole_batch(own, world_size, partial(without_factor, ranks))["gradient"]
        )
        found["stopped and resumed"] = stopped_and_resumed(ranks)

        count = 4 * world_size + 1
        rows = torch.tensor(ranks.shard(count)).unsqueeze(1) * torch.tensor([1.0, 10.0])
        found["gathered"] = ranks.gather(rows, count)
        # Rank r gives q rows to rank q, each (r, q).
        found["buffers"] = nn.BatchNorm1d(2)
        found["buffers"].running_mean.fill_(rank)
        ranks.mean_buffers(found["buffers"])
        found["buffers"] = found["buffers"].state_dict()
        found["max"] = ranks.max(float(rank), torch.device("cpu"))
        found["from first"] = ranks.on_rank_zero(lambda: f"made by {rank}")
        found["from first fails"] = failure_of(lambda: ranks.on_rank_zero(lambda: raising("first", True)))
        for error in (TrainingError, Stopped):
            found[f"from first {error.__name__}"] = failure_of(partial(ranks.on_rank_zero, partial(fail, error)))
        found["together"] = ranks.on_all_ranks(lambda: f"made by {rank}")
        found["together fails"] = failure_of(
            lambda: ranks.on_all_ranks(lambda: raising("last", rank == world_size - 1))
        )
        found["equal"] = failure_of(lambda: ranks.require_equal({"--seed": 0}))
        found["unequal"] = failure_of(lambda: ranks.require_equal({"--seed": 0, "--steps": 5 + rank}))
        torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 or 4 processes found."""
    world_size, folder = request.param, tmp_path_factory.mktemp("world")
    run_ranks(work, (world_size, free_port(), str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def alone(world_size: int, update: str = "alternating", class_weights: str = "none") -> dict[str, Any]:
    setup = Setup(world_size, update, class_weights)
    return setup.step(Ranks(), setup.inputs(slice(None), Tensor.detach))


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor], part: str) -> float:
    """Relative to the largest element of each tensor, over the parameters whose name begins with `part`."""
    assert set(found) == set(expected)
    names = [name for name in expected if name.startswith(part)]
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in names)


@pytest.mark.parametrize("update", ["alternating", "reversal"])
@pytest.mark.parametrize("part", ["model", "discriminators"])
def test_gradients_are_those_of_one_process_with_the_whole_batch(
    world: list[dict[str, Any]], update: str, part: str
) -> None:
    expected = alone(len(world), update)
    for found in world:
        assert largest_error(found[update]["gradients"], expected["gradients"], part) < 1e-12
        assert largest_error(found[update]["parameters"], expected["parameters"], part) < 1e-12


def test_large_gradients_that_travel_alone_arrive_as_well(world: list[dict[str, Any]]) -> None:
    expected = alone(len(world))
    for found in world:
        assert found["of which alone"] == {True, False}
        for part in ("model", "discriminators"):
            assert largest_error(found["alone"]["gradients"], expected["gradients"], part) < 1e-12


@pytest.mark.parametrize("update", ["alternating", "reversal"])
@pytest.mark.parametrize("part", ["model", "discriminators"])
def test_class_weights_are_those_of_the_whole_batch(world: list[dict[str, Any]], update: str, part: str) -> None:
    expected = alone(len(world), update, "pada")
    plain = alone(len(world), update)
    for found in world:
        weighted = found[f"{update} with class weights"]
        assert largest_error(weighted["gradients"], expected["gradients"], part) < 1e-12
        assert largest_error(weighted["parameters"], expected["parameters"], part) < 1e-12
    assert largest_error(plain["gradients"], expected["gradients"], part) > 1e-2


def test_gathered_rows_have_the_value_and_the_gradient_of_the_whole_batch(world: list[dict[str, Any]]) -> None:
    expected = of_whole_batch(slice(None), len(world), lambda rows: rows)
    for found in world:
        assert_close(found["gather"]["value"], expected["value"], rtol=1e-12, atol=0)
        assert largest_error({"": found["gather"]["gradient"]}, {"": expected["gradient"]}, "") < 1e-12
        # Source rows of all ranks in rank order, then the target's.
        assert_close(found["gather"]["rows"], expected["rows"], rtol=1e-12, atol=1e-14)
        assert largest_error({"": found["gather without factor"]}, {"": expected["gradient"]}, "") > 1e-2


def test_one_process_gathers_its_own_rows() -> None:
    expected = of_whole_batch(slice(None), 1, lambda rows: rows)
    assert differences(of_whole_batch(slice(None), 1, Ranks().gather_rows), expected) == []


def test_all_ranks_have_the_class_weights_of_the_whole_target(world: list[dict[str, Any]]) -> None:
    for found in world:
        assert torch.equal(found["probabilities"], world[0]["probabilities"])
        assert torch.equal(found["class weights"], world[0]["class weights"])
        assert torch.equal(found["class weights"], target_class_weights(found["probabilities"]))
        assert len(found["probabilities"]) == NUM_TARGET


def test_the_means_of_the_terms_are_those_of_the_whole_batch(world: list[dict[str, Any]]) -> None:
    expected = alone(len(world))["terms"]
    for name, value in expected.items():
        mean = torch.stack([found["alternating"]["terms"][name] for found in world]).mean()
        # What is no mean over samples is no mean over ranks either, unless it was computed over all of them.
        assert_close(mean, value, rtol=1e-11, atol=0)


def test_all_ranks_have_the_same_parameters_bit_for_bit(world: list[dict[str, Any]]) -> None:
    assert len({digest(found["alternating"]["parameters"]) for found in world}) == 1


@pytest.mark.parametrize(
    ("trap", "part"),
    [
        ("second gradient not averaged", "model"),
        ("plain all-reduce", "model"),
        ("plain all-reduce", "discriminators"),
        ("synchronization per rank", "discriminators"),
    ],
)
def test_a_trap_would_be_seen(world: list[dict[str, Any]], trap: str, part: str) -> None:
    expected = alone(len(world))["gradients"]
    assert largest_error(world[0][trap]["gradients"], expected, part) > 1e-4


def test_a_bad_number_on_one_rank_stops_all_of_them_untouched(world: list[dict[str, Any]]) -> None:
    for found in world:
        message = found["stop None"]["message"]
        assert message.startswith("step 2: ")
        assert "classification" in message
        assert found["stop None"]["untouched"]


@pytest.mark.parametrize("player", ["encoder", "discriminators"])
def test_a_bad_gradient_ends_the_step_on_all_ranks(world: list[dict[str, Any]], player: str) -> None:
    named = "encoder and classifier" if player == "encoder" else player
    for found in world:
        assert found[f"stop {player}"]["message"].startswith(f"step 2: gradient norm of the {named} not finite")
        # Who moved before the bad number has moved, in a run that ends without a state.
        assert found[f"stop {player}"]["untouched"] == (player == "discriminators")


def test_a_run_that_one_rank_is_asked_to_stop_goes_on_bit_for_bit(world: list[dict[str, Any]]) -> None:
    for found in world:
        different = found["stopped and resumed"]
        assert different.pop("without buffers") != []
        assert different.pop("generators") != []
        assert different == {f"look {look}": [] for look in (0, 2, 5, 11)}


def test_rows_are_gathered_in_the_order_of_the_samples(world: list[dict[str, Any]]) -> None:
    expected = torch.arange(4 * len(world) + 1).unsqueeze(1) * torch.tensor([1.0, 10.0])
    for found in world:
        assert_close(found["gathered"], expected, rtol=0, atol=0)


def test_buffers_and_figures_are_those_of_all_ranks(world: list[dict[str, Any]]) -> None:
    for found in world:
        assert_close(found["buffers"]["running_mean"], torch.full((2,), (len(world) - 1) / 2))
        assert found["max"] == len(world) - 1


def test_the_first_rank_decides_and_all_fail_together(world: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(world):
        told = rank > 0
        assert found["from first"] == "made by 0"
        assert found["together"] == f"made by {rank}"
        assert found["from first TrainingError"] == found["from first Stopped"] == ("not here", told)
        assert found["from first fails"] == ("first: found a mistake; expected none", told)
        assert found["together fails"] == ("last: found a mistake; expected none", told)
        assert found["equal"] == ("", False)
        message, of_another = found["unequal"]
        assert message.startswith("--steps: found 5 in process 0 and 6 in process 1")
        assert of_another == told


def test_one_process_needs_no_group() -> None:
    with join("cpu", timeout=1) as ranks:
        assert ranks == Ranks(0, 1, 0)
        assert not dist.is_initialized()
        assert ranks.shard(3) == [0, 1, 2]
        assert ranks.gather_objects("one") == ["one"]


# --------------------------------------------------------------------------------------- waiting for one that has work


def joined(rank: int, port: int, folder: str) -> AbstractContextManager[Ranks]:
    """Two processes that wait for each other for 3 s, from the moment that both have started."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (Path(folder) / f"{rank}.started").touch()
    while len(list(Path(folder).glob("*.started"))) < 2:
        time.sleep(0.01)
    return join("cpu", timeout=3)


def work_for_longer_than_the_timeout(rank: int, port: int, folder: str) -> None:
    found: dict[str, Any] = {}

    def slow(here: bool = True) -> str:
        time.sleep(5 if here else 0)
        return f"made by {rank}"

    def interrupted() -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(600)

    with joined(rank, port, folder) as ranks, StopRequest().listening() as stop:
        found["from first"] = ranks.on_rank_zero(slow)
        found["together"] = ranks.on_all_ranks(lambda: slow(not ranks.first))
        started = time.monotonic()
        found["interrupted"] = failure_of(lambda: ranks.on_rank_zero(stop.interruptible(interrupted)))
        found["seconds"] = time.monotonic() - started
    torch.save(found, Path(folder) / f"{rank}.pt")


def test_work_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    arguments = free_port(), str(tmp_path)
    run_ranks(work_for_longer_than_the_timeout, arguments, nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["from first"] == "made by 0"
        assert found["together"] == f"made by {rank}"
        assert found["interrupted"] == ("", rank > 0)
        assert found["seconds"] < 300  # of 600


def die_at_work(rank: int, port: int, folder: str) -> None:
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    started = time.monotonic()
    try:
        with joined(rank, port, folder) as ranks:
            started = time.monotonic()
            ranks.on_rank_zero(lambda: os.kill(os.getpid(), signal.SIGKILL))
    except TrainingError as error:
        found = {"message": str(error), "seconds": time.monotonic() - started}
        (Path(folder) / "found.json").write_text(json.dumps(found))


def test_one_that_dies_at_its_work_is_missed_within_the_timeout(tmp_path: Path) -> None:
    # As torchrun's, the store outlives the process: no broken connection tells of its end.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = store.port, str(tmp_path)
    first, second = (start(die_at_work, rank, *arguments) for rank in range(2))
    try:
        second.join(300)
        assert first.exitcode == -signal.SIGKILL
        found = json.loads((tmp_path / "found.json").read_text())
    finally:
        second.kill()
    assert "process 1 of 2 lost another one" in found["message"]
    assert "did not answer for 3 s (no sign of life)" in found["message"]
    assert found["seconds"] < 300  # torch itself would wait for half an hour


# -------------------------------------------------------------------------------------------------- pretrained weights


def fetch(rank: int, port: int, folder: str) -> None:
    """Two processes on one machine, on two with a disk in common, on two with disks of their own, on one offline."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fetched: list[str] = []

    def download(url: str, path: str, *_: object, **__: object) -> None:
        if "offline" in path:
            raise OSError("no route to host")
        time.sleep(0.3)  # long enough for another process to see no file yet
        fetched.append(url)
        torch.save({}, path)

    torch.hub.download_url_to_file = download
    found: dict[str, Any] = {}
    with join("cpu", timeout=60) as ranks:
        for name, local_rank, disk in (
            ("one machine", rank, "one"),
            ("disk in common", 0, "common"),
            ("own disks", 0, f"own {rank}"),
            ("offline", rank, "offline"),
        ):
            os.environ["TORCH_HOME"] = str(Path(folder) / disk)
            fetched.clear()
            here, settings = replace(ranks, local_rank=local_rank), ModelSettings("resnet18")
            failure = failure_of(lambda: here.once_per_machine(lambda: fetch_weights(settings)))  # noqa: B023
            found[name] = len(fetched), failure, list((Path(folder) / disk).rglob("resnet18-*.pth")) != []
    torch.save(found, Path(folder) / f"{rank}.pt")


def test_pretrained_weights_are_fetched_once_for_each_disk(tmp_path: Path) -> None:
    run_ranks(fetch, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    good = ("", False)
    assert first["one machine"] == first["disk in common"] == first["own disks"] == (1, good, True)
    assert second["one machine"] == second["disk in common"] == (0, good, True)
    assert second["own disks"] == (1, good, True)
    for rank, found in enumerate((first, second)):
        fetched, (message, of_another), there = found["offline"]
        assert (fetched, of_another, there) == (0, rank > 0, False)
        assert message.startswith("--weights: found IMAGENET1K_V1, which could not be fetched (no route to host)")
        assert re.search(r"fetch https://\S+/resnet18-\w+\.pth elsewhere and give --weights PATH, or", message)


# ---------------------------------------------------------------------------------------------------------- whole runs


STEPS = ("--steps", "40", "--warmup", "20", "--refresh-every", "10", "--log-every", "10", "--threads", "1")


def torchrun_command(*arguments: str, script: Path | None = None, restarts: int = 0) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    what = ["-m", "gsda_fast.train"] if script is None else [str(script)]
    return [*command, "--master_port", str(free_port()), *what, *arguments]


def torchrun(*arguments: str, script: Path | None = None, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = torchrun_command(*arguments, script=script, restarts=restarts)
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def processes(folder: Path, *arguments: str, count: int = 1, before: Any = None) -> list[Command]:
    """`count` processes of a training, as torchrun starts them; one alone has nothing of torchrun."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    written = folder / "written"
    return [
        Command(written / str(rank), "gsda_fast.train", arguments, environment, before)
        for rank, environment in enumerate(own)
    ]


TWO = ("digits", *STEPS, "--batch-size", "16")
SIZES, SHARE = r"network [\d.]+ M parameters, gsda .*", r"(, ([\d.]+) MiB of it in this process)"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = [each.wait() for each in processes(folder.parent, *TWO, "--output", str(folder), count=2)]
    assert [each.returncode for each in done] == [0, 0], done
    # One process speaks.
    assert done[0].stdout.count("2 processes on cpu, 32 + 32 images a step, learning rate 0.05 (not scaled") == 1
    assert done[1].stdout == ""
    (folder.parent / "printed").write_text(done[0].stdout)
    return folder


def test_two_processes_train_as_one_does(two: Path, tmp_path: Path) -> None:
    (alone,) = processes(tmp_path, "digits", *STEPS, "--batch-size", "32", "--output", str(tmp_path / "one"))
    assert alone.wait().returncode == 0, alone.wait().stderr
    # The same sizes, though each of the two has only a share of the discriminators.
    (sizes,), (share,) = (re.findall(pattern, (two.parent / "printed").read_text()) for pattern in (SIZES, SHARE))
    assert [sizes.replace(share[0], "")] == re.findall(SIZES, alone.wait().stdout)
    assert 0.2 < float(share[1]) / float(re.findall(r"beside it \(([\d.]+) MiB", sizes)[0]) < 0.8
    runs = [RunFolder(two), RunFolder(tmp_path / "one")]
    metrics = [run.read_metrics() for run in runs]
    assert [line["step"] for line in metrics[0]] == [line["step"] for line in metrics[1]] == [10, 20, 30, 40]
    first, last = [{**each[0]} for each in metrics], [{**each[-1]} for each in metrics]
    # Rounding, which differs, grows over the steps.
    assert first[0]["classification"] == pytest.approx(first[1]["classification"], rel=1e-4)
    for name in ("classification", "entropy", "adversarial_domain", "synchronization"):
        assert last[0][name] == pytest.approx(last[1][name], rel=0.1)
    results = [run.read_result() for run in runs]
    accuracy = [result.accuracy.last for result in results if result is not None]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=3)


# A worker that something happens to in step 26, which is in the middle between two scorings.
INCIDENT = """
import os, signal, time
from gsda_fast.commands import run_command
from gsda_fast.train import main
from gsda_fast.training.trainer import Trainer

step = Trainer._train_step
def with_incident(self, number, batch):
    if number == 25 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        {incident}
    return step(self, number, batch)
Trainer._train_step = with_incident
run_command(main)
"""
# One write for a line: those of two processes must not mix.
WAITS = """os.write(1, b"in step 26\\n")
        while not self._stop():
            time.sleep(0.02)"""
IS_KILLED = """if self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)"""


def script_with(incident: str, folder: Path) -> Path:
    script = folder / "worker.py"
    script.write_text(INCIDENT.format(incident=incident))
    return script


def test_a_signal_to_torchrun_stops_all_processes_in_good_order(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = torchrun_command(*TWO, "--output", str(folder), script=script_with(WAITS, tmp_path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert any("in step 26" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 1  # torchrun's own
    assert out.splitlines()[-1].startswith("stopped after step 27 of 40, saved in ")
    assert "error: " not in err
    assert CheckpointFolder(folder / "checkpoints").steps() == [20, 27]
    done = torchrun(*TWO, "--output", str(folder))
    assert "resuming after step 27" in done.stdout
    assert differences(outcome(folder), outcome(two)) == []


def test_torchrun_starts_all_processes_again_where_one_is_killed(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = torchrun(*TWO, "--output", str(folder), script=script_with(IS_KILLED, tmp_path), restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming after step 20") == 1
    assert differences(outcome(folder), outcome(two)) == []


def test_another_number_of_processes_is_refused(two: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in two.rglob("*")}
    (two / "result.json").rename(two / "kept")
    done = processes(tmp_path, *TWO, "--output", str(two))[0].wait()
    (two / "kept").rename(two / "result.json")
    assert done.returncode == 2
    assert "error: --nproc_per_node: found 1 process; expected 2 processes, as in " in done.stderr
    after = {path: path.stat().st_mtime_ns for path in two.rglob("*") if path.name != ".lock"}
    assert after == {path: time for path, time in before.items() if path in after}


@pytest.mark.slow
def test_two_processes_reach_the_accuracy_of_one(tmp_path: Path) -> None:
    done = torchrun("digits", "--batch-size", "32", "--output", str(tmp_path / "two"))
    alone = processes(tmp_path, "digits", "--output", str(tmp_path / "one"))[0].wait()
    assert done.returncode == alone.returncode == 0, done.stderr + alone.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one")]
    accuracies = [result["accuracy"]["last"] for result in results]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=5)


def test_the_learning_rate_is_scaled_where_asked() -> None:
    config = parse_config(["digits", "--scale-learning-rate", "--steps", "2", "--warmup", "0"], "train")
    resolved, source, target = resolve(config, world_size=4)

    class Four(Ranks):
        def gather_objects(self, value: Any) -> list[Any]:
            return [value]

    trainer = build_trainer(resolved, source, target, Four(0, 4, 0))
    rates = {group["initial_lr"] for optimizer in trainer.optimizers.values() for group in optimizer.param_groups}
    trainer.loader.close()
    assert rates == {4 * 0.05}
    assert trainer.plan.world_size == 4


def test_a_pass_over_the_target_is_one_of_all_processes() -> None:
    config = parse_config(["digits", "--refresh-every", "0", "--batch-size", "10"], "train")
    steps = [resolve(config, world_size)[0].pseudo_labels.refresh_every for world_size in (1, 4)]
    assert steps == [180, 45]


def test_a_mistake_is_told_once() -> None:
    done = torchrun("digits", "--steps", "0")
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: --steps: found 0; expected a whole number >= 1") == 1


# A process that fails in the middle of a step: one method of training is replaced.
def with_failure(failure: Callable[[], None], rank: int) -> None:
    step = Trainer._train_step

    def failing(self: Trainer, number: int, batch: Batch) -> Any:
        if number == 3 and self.ranks.rank == rank:
            failure()
        return step(self, number, batch)

    Trainer._train_step = failing  # type: ignore[method-assign]


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


# The first holds the store in which processes find each other: nobody may ask it for anything then.
@pytest.mark.parametrize(
    ("lost", "failure", "code"),
    [(1, is_killed, -signal.SIGKILL), (1, signal.pause, None), (0, is_stopped, None)],
    ids=["killed", "hanging", "the first stopped"],
)
def test_a_lost_process_ends_the_others(
    tmp_path: Path, lost: int, failure: Callable[[], None], code: int | None
) -> None:
    # Of the two, one never ends by itself: the other's end is what is tested, not how soon a busy machine gets there.
    arguments = ("digits", *STEPS, "--output", str(tmp_path / "run"), "--timeout", "20")
    started = processes(tmp_path, *arguments, count=2, before=partial(with_failure, failure, lost))
    try:
        done = started[1 - lost].wait()
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert f"process {1 - lost} of 2 lost another one, which ended or did not answer for 20 s" in lines[0]
        assert "Traceback" not in done.stderr
        if code is None:
            assert started[lost].process.is_alive()
        else:
            assert started[lost].wait().returncode == code
    finally:
        for each in started:
            each.process.kill()
            each.process.join()
