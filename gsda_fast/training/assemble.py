"""From a configuration to a trainer: every automatic choice made, every part built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

import gsda_kernels
from gsda_fast.config import Config
from gsda_fast.data.benchmarks import ImageRecipe, find_benchmark
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.loaders import open_loader, resolve_loader
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.errors import UsageError
from gsda_fast.methods import build_method
from gsda_fast.model import LENET, build_model
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.schedules import Schedule
from gsda_fast.training.trainer import Trainer

_EVALUATION_BATCH = 256


def resolve(config: Config) -> tuple[Config, ImageDomain, ImageDomain]:
    """The configuration with every automatic choice made, and the domains that it names.

    Raises:
        UsageError: data, a device or a backend that is not there.
    """
    data = config.data
    source, target = open_pair(config.task, data.source, data.target, data.data_root, data.quarantine)
    run, name = config.run, config.run.device
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise UsageError("--device", found="cuda", expected="cpu or auto: PyTorch finds no CUDA device here")
    device: Literal["cpu", "cuda"] = "cuda" if name != "cpu" and cuda else "cpu"
    groups = config.adversarial.groups or max(1, round(source.num_classes / 5))
    refresh_every = config.pseudo_labels.refresh_every or -(-len(target) // run.batch_size)
    loader = resolve_loader(config.data, source, target, torch.device(device))
    default_output = Path("runs") / RunFolder.default_name(config.task, source.name, target.name, run.method, run.seed)
    resolved = replace(
        config,
        run=replace(run, device=device, output=run.output or default_output),
        data=replace(config.data, source=source.name, target=target.name, loader=loader),
        adversarial=replace(config.adversarial, groups=groups, backend=_backend(config.adversarial.backend, device)),
        pseudo_labels=replace(config.pseudo_labels, refresh_every=refresh_every),
    )
    return resolved, source, target


def _backend(name: str, device: str) -> str:
    try:
        return gsda_kernels.resolve_backend(name, device)
    except ValueError as error:
        raise UsageError("--backend", found=name, expected=f"one that can run here ({error})") from error


def _require_fit(backbone: str, recipe: ImageRecipe) -> None:
    """Whether the backbone takes the task's images, asked before a folder is made for the run."""
    if (backbone == LENET) != (recipe.channels == 1):
        raise UsageError(
            "--backbone",
            found=backbone,
            expected="lenet for the 16x16 grey images of digits, a torchvision model for the colour images of all else",
        )


def build_trainer(config: Config, source: ImageDomain, target: ImageDomain) -> Trainer:
    """The trainer of a resolved configuration, at step 0.

    Raises:
        UsageError: a method, a backbone or weights that do not exist or do not fit.
    """
    device = torch.device(config.run.device)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    recipe = find_benchmark(config.task).recipe
    _require_fit(config.model.backbone, recipe)
    model = build_model(config.model, source.num_classes)
    method = build_method(config.run.method, model, config.adversarial, source.num_classes, config.run.seed)
    plan = SamplingPlan(
        source.labels,
        len(target),
        recipe=recipe,
        batch_size=config.run.batch_size,
        seed=config.run.seed,
        balance_target=config.pseudo_labels.balance_target,
    )
    return Trainer(
        method.to(device),
        open_loader(config.data, source, target, recipe, batch_size=_EVALUATION_BATCH, device=device),
        plan,
        target,
        Schedule(config.run.steps, config.run.warmup, config.pseudo_labels.refresh_every),
        config.optimizer,
        confidence_threshold=config.pseudo_labels.confidence_threshold,
        device=device,
        log_every=config.run.log_every,
    )
