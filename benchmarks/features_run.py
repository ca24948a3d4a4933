"""Whole training on embeddings, in turns: this project, and the same training as it is usually written.

    OMP_NUM_THREADS=1 python -m benchmarks.features_run --output benchmarks/results/features-run-cpu.md

One run: read both files, build, train with the preset of the task `features` (warm-up, adaptation, an evaluation of the
target and new pseudo-labels every fifty steps), and evaluate. No contender writes a file. They are

- ours;
- the same training with the strong autograd baseline as the head, and torch's fused SGD for the discriminators;
- a loop as people write it: a module for each discriminator, `autograd.grad(create_graph=True)` for each, a
  `DataLoader` over a `TensorDataset`, `torch.optim.SGD`.

Contenders take turns, and a ratio is the median of those within rounds, so that it does not depend on what else the
machine was doing at the time. The features are random clusters, with as many classes and groups as the data set has.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import gsda_kernels as gk
from benchmarks.adversarial_part import ratio
from benchmarks.contenders import BASELINE, strong_autograd_baseline
from benchmarks.shapes import SHAPES, HeadInputs, HeadShape
from gsda_fast.assemble import build_trainer, resolve
from gsda_fast.config import Config, configure
from gsda_fast.data.batches import Batch
from gsda_fast.losses import entropy
from gsda_fast.methods import METHODS, Step, Update
from gsda_fast.methods.discriminators import Discriminators
from gsda_fast.methods.groups import ClassGroups
from gsda_fast.methods.gsda import GSDA, GSDASettings
from gsda_fast.methods.objective import class_probabilities, synchronization_loss
from gsda_fast.training.pseudo_labels import confident_labels
from gsda_fast.training.schedules import Schedule
from gsda_fast.training.trainer import Report

OURS = "ours"
LOOP = "loop as people write it"

DIM, ROWS = 1280, 3000
"""Numbers in a row, those of EfficientNet-Lite0; rows of each domain, about as many as a domain of Office-Home has."""
STEPS = {"visda": 350, "office31": 175, "office-home": 70}
"""Fewer than the preset's 700, at which the slow contenders would take an hour; warm-up stays the same part of them."""

_REPOSITORY = Path(__file__).resolve().parent.parent


class BaselineDiscriminators(Discriminators):
    """The same parameters, and the strong autograd baseline to compute their terms."""

    def forward(
        self,
        features: Tensor,
        class_probabilities: Tensor,
        domain: Tensor,
        num_source: int | None = None,
        sample_weight: Tensor | None = None,
        *,
        frozen: bool = False,
        **_: Any,
    ) -> gk.AdversarialTerms:
        parameters = [each.detach() if frozen else each for each in self._stacked]
        weight = self._pair_weight(features, class_probabilities, sample_weight)
        none = features.new_empty(0)
        inputs = HeadInputs(features, gk.DiscriminatorWeights(*parameters), weight, domain, weight.numel(), none, none)
        return gk.AdversarialTerms(*strong_autograd_baseline(inputs))


class BaselineGSDA(GSDA):
    """GSDA whose discriminators are moved along gradients in memory, by their optimizer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        stacked = self.discriminators
        self.discriminators = BaselineDiscriminators(stacked.w1.shape[2], stacked.groups, stacked.w1.shape[1])
        self.discriminators.load_state_dict(stacked.state_dict())

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        return super().updates(batch, replace(step, descent=lambda player: None))


@contextmanager
def baseline_method() -> Iterator[str]:
    """Put `BaselineGSDA` among the methods, for as long as it is needed, and return its name."""
    name = "gsda-autograd"
    METHODS[name] = replace(METHODS["gsda"], method=BaselineGSDA)
    try:
        yield name
    finally:
        del METHODS[name]


def ours(config: Config) -> list[Report]:
    """Return the reports of a run."""
    trainer = build_trainer(*resolve(config))
    reports = list(trainer.run(lambda: None))
    trainer.loader.close()
    return reports


def with_baseline(config: Config) -> list[Report]:
    """Return those of the same run with the strong autograd baseline."""
    with baseline_method() as name:
        return ours(replace(config, run=replace(config.run, method=name)))


class Network(nn.Module):
    """Bottleneck and classifier over normalised rows."""

    def __init__(self, dim: int, bottleneck: int, num_classes: int) -> None:
        super().__init__()
        self.bottleneck = nn.Linear(dim, bottleneck)
        self.classifier = nn.Linear(bottleneck, num_classes)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.bottleneck(F.rms_norm(rows, rows.shape[-1:])))
        return features, self.classifier(features)


def discriminator(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def loop_terms(
    discriminators: Sequence[nn.Module], features: Tensor, weight: Tensor, domain: Tensor
) -> gk.AdversarialTerms:
    """Return losses and gradient norms of the discriminators, one after the other, with double backward.

    Args:
        features: (N, D), requiring a gradient. weight: (N, K). domain: (N,), 1 source, 0 target.
    """
    losses, norms = [], []
    for k, each in enumerate(discriminators):
        logit = each(features).squeeze(1)
        loss = (weight[:, k] * F.binary_cross_entropy_with_logits(logit, domain, reduction="none")).mean()
        (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
        losses.append(loss)
        norms.append(gradient.norm(dim=1).sum())
    return gk.AdversarialTerms(torch.stack(losses), torch.stack(norms))


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _read(path: Path | str | None) -> tuple[Tensor, Tensor]:
    with np.load(str(path)) as arrays:
        return torch.from_numpy(arrays["features"]).float(), torch.from_numpy(arrays["labels"])


def plain_loop(config: Config) -> float:
    """Train as a script of one file would, and return the target's accuracy in per cent.

    What both contenders above take from the settings it takes as well: steps, rates, widths, schedules, pseudo-labels.
    Its batches are those of a shuffled `DataLoader`, so that its losses are not theirs step by step.
    """
    method, run, optimizer = config.method, config.run, config.optimizer
    assert isinstance(method, GSDASettings)
    torch.manual_seed(run.seed)
    (source_rows, source_labels), (target_rows, target_labels) = (
        _read(path) for path in (config.data.source, config.data.target)
    )
    num_classes = int(source_labels.max()) + 1
    groups = ClassGroups.random(num_classes, method.groups, run.seed)
    network = Network(source_rows.shape[1], config.model.bottleneck_dim, num_classes)
    discriminators = nn.ModuleList(
        discriminator(config.model.bottleneck_dim, method.hidden_dim)
        for _ in range(1 + groups.num_groups + num_classes)
    )
    schedule = Schedule(run.steps, run.warmup, config.pseudo_labels.refresh_every, optimizer.decay)
    rule = {"momentum": optimizer.momentum, "nesterov": True, "weight_decay": optimizer.weight_decay}
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=optimizer.learning_rate, **rule) for module in (network, discriminators)
    ]
    of_network, of_discriminators = optimizers

    def shuffled(dataset: TensorDataset | Subset[Any]) -> Iterator[Any]:
        return _endless(DataLoader(dataset, batch_size=run.batch_size, shuffle=True, drop_last=True))

    source, whole_target = TensorDataset(source_rows, source_labels), TensorDataset(target_rows)
    of_source, of_target = shuffled(source), shuffled(whole_target)
    domain = torch.cat([torch.ones(run.batch_size), torch.zeros(run.batch_size)])
    accuracy = 0.0
    for step in range(run.steps):
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = optimizer.learning_rate * schedule.learning_rate_factor(step)
        rows, labels = next(of_source)
        if schedule.warming_up(step):
            loss = F.cross_entropy(network(rows)[1], labels)
        else:
            (of_other,) = next(of_target)
            features, logits = network(torch.cat([rows, of_other]))
            probabilities = class_probabilities(logits, labels)
            weight = torch.cat(
                [torch.ones(len(probabilities), 1), probabilities @ groups.membership.T, probabilities], dim=1
            )
            ramp = schedule.adversarial_ramp(step)
            beta = method.beta * ramp
            terms = loop_terms(discriminators, features.detach().requires_grad_(), weight, domain)
            of_discriminators.zero_grad()
            (terms.loss.sum() + beta * synchronization_loss(terms.gradient_norm, groups)).backward()
            of_discriminators.step()
            discriminators.requires_grad_(False)  # the encoder's step needs no gradients of them
            terms = loop_terms(discriminators, features, weight, domain)
            discriminators.requires_grad_(True)
            against = beta * synchronization_loss(terms.gradient_norm, groups) - ramp * terms.loss.sum()
            loss = F.cross_entropy(logits[: len(rows)], labels) + method.alpha * entropy(logits[len(rows) :])
            loss = loss + method.adversarial_weight * against
        of_network.zero_grad()
        loss.backward()
        of_network.step()
        if schedule.is_evaluated_after(step + 1):
            with torch.no_grad():
                of_whole = torch.cat([network(part)[1].softmax(1) for (part,) in DataLoader(whole_target, 256)])
            accuracy = 100 * float((of_whole.argmax(1) == target_labels).float().mean())
            sure = np.flatnonzero(confident_labels(of_whole, config.pseudo_labels.confidence_threshold) >= 0)
            enough = len(sure) >= run.batch_size
            of_target = shuffled(Subset(whole_target, sure.tolist()) if enough else whole_target)
    return accuracy


CONTENDERS: dict[str, Callable[[Config], object]] = {OURS: ours, BASELINE: with_baseline, LOOP: plain_loop}


def write_domains(folder: Path, num_classes: int, rows: int, dim: int) -> None:
    """Write `source.npz` and `target.npz`: clusters about centres that both share, the target's moved."""
    numbers = np.random.default_rng(0)
    centres = numbers.normal(size=(num_classes, dim))
    for name, shift in (("source", 0.0), ("target", 0.5)):
        labels = numbers.permutation(np.arange(rows) % num_classes)
        features = centres[labels] + 2 * numbers.normal(size=(rows, dim)) + shift
        np.savez(folder / f"{name}.npz", features=features.astype(np.float32), labels=labels)


def config_of(shape: HeadShape, folder: Path, steps: int, **options: Any) -> Config:
    """Return the preset's settings for the domains in a folder, on this number of steps."""
    files = {"source": folder / "source.npz", "target": folder / "target.npz"}
    given = {"groups": shape.num_groups, "device": "cpu", "threads": torch.get_num_threads(), "warmup": 2 * steps // 7}
    return configure("features", "gsda", steps=steps, **files, **{**given, **options})


def seconds_in_turns(config: Config) -> dict[str, float]:
    """Return seconds of a whole run by each contender, one after the other."""
    # On one thread the processor's own time, which others on the machine do not add to.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    short = replace(config, run=replace(config.run, steps=2, warmup=1))
    found = {}
    for name, contender in CONTENDERS.items():
        contender(short)  # what a process does once, and memory that is taken for the first time
        start = clock()
        contender(config)
        found[name] = clock() - start
    return found


def table(found: dict[str, list[dict[str, float]]], steps: dict[str, int], made_on: str, command: str) -> str:
    """Return a Markdown page: shape by contender, seconds of a whole run, and how many times longer than ours."""
    lines = [
        "# Whole training on embeddings, on a CPU",
        "",
        f"{made_on}.",
        "",
        f"Random features, {ROWS} + {ROWS} rows of {DIM}; the preset of the task `features`: 48 + 48 rows a step,",
        "bottleneck and discriminators 256 wide. Reading, warm-up, adaptation and evaluations; no files are written.",
        "Fewer steps than the preset's 700, two sevenths of them warm-up as there. Medians over the rounds; ratios are",
        "those within rounds.",
        "",
        f"    {command}",
        "",
        "| shape | steps | contender | rounds | s | times ours |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for shape, rounds in found.items():
        label = f"{shape}, r {SHAPES[shape].num_classes}, K {SHAPES[shape].num_discriminators}"
        for name in CONTENDERS:
            own, of_ours = ([each[which] for each in rounds] for which in (name, OURS))
            cells = f"{len(rounds)} | {statistics.median(own):.1f} | {ratio(own, of_ours):.2f}"
            lines.append(f"| {label} | {steps[shape]} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Return the kind of CPU, the threads, the versions and the revision that a result is of."""
    cpu, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    git = ["git", "-C", str(_REPOSITORY), "rev-parse", "--short=10", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = f"PyTorch {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}"
    return f"{cpu}, {threads} thread(s), {versions}, revision {revision}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every shape (default: " + ", ".join(map(str, STEPS.values())))
    parser.add_argument("--output", type=Path, help="a Markdown file beside what is printed")
    options = parser.parse_args(arguments)
    steps = {shape: options.steps or STEPS[shape] for shape in options.shapes}
    command = " ".join(["python -m benchmarks.features_run", *(sys.argv[1:] if arguments is None else arguments)])
    if torch.get_num_threads() == 1:
        command = f"OMP_NUM_THREADS=1 {command}"
    found: dict[str, list[dict[str, float]]] = {}
    page = ""
    with tempfile.TemporaryDirectory() as temporary:
        for _ in range(options.rounds):
            for name in options.shapes:
                folder = Path(temporary) / name
                if not folder.exists():
                    folder.mkdir()
                    write_domains(folder, SHAPES[name].num_classes, ROWS, DIM)
                of_round = seconds_in_turns(config_of(SHAPES[name], folder, steps[name]))
                found.setdefault(name, []).append(of_round)
                page = table(found, steps, machine(), command)
                if options.output is not None:
                    # After every shape of a round, so that what was measured survives a run that is cut off.
                    options.output.write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
