"""From a configuration to a trainer: every automatic choice made, every part built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from gsda_fast.config import Config
from gsda_fast.data.benchmarks import Benchmark, Preprocessing, find_benchmark
from gsda_fast.data.domains import ImageDomain, open_pair
from gsda_fast.data.feature_loader import require_same_size
from gsda_fast.data.loaders import open_loader, require_room, resolve_loader
from gsda_fast.data.sampling import SamplingPlan
from gsda_fast.data.synthetic_loader import synthetic_pair
from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS, Division, Method, TaskFacts, build_method
from gsda_fast.model import FEATURES, LENET, ModelSettings, build_model, input_format
from gsda_fast.results.run_folder import RunFolder, flat_settings
from gsda_fast.training.distributed import Ranks, digest
from gsda_fast.training.generators import seed_generators
from gsda_fast.training.precision import AUTOCAST_DTYPES, set_arithmetic
from gsda_fast.training.rooflines import device_floors, forget_peak_memory
from gsda_fast.training.schedules import Schedule
from gsda_fast.training.trainer import Trainer

_EVALUATION_BATCH = 256


def resolve(config: Config, world_size: int = 1) -> tuple[Config, ImageDomain, ImageDomain]:
    """Return the configuration with every automatic choice made, and the domains that it names.

    Args:
        config: as given by the user. world_size: number of processes, which decides how long a pass over the target is.

    Raises:
        UsageError: data, a device or a backend that is not there.
    """
    data = config.data
    require_room(data.test_crops, preprocessing_of(config))
    if data.synthetic and find_benchmark(config.task).embedded:
        raise UsageError("--synthetic", found=f"the task {config.task}", expected="a task of images")
    if data.synthetic:
        source, target = synthetic_pair(find_benchmark(config.task))
    else:
        names = data.source, data.target, data.data_root, data.quarantine
        source, target = open_pair(config.task, *names, data.orientation)
    # A pack has other pixels than the raw files, so a run says that it reads one, also where GSDA_DATA names it.
    data_root = data.data_root if source.packed is None else source.root
    run = config.run
    default_output = RunFolder.default_path(config.task, source.name, target.name, run.method, run.seed)
    named = replace(
        config,
        run=replace(run, output=run.output or default_output),
        # The whole path: a relative one would mean another folder elsewhere.
        data=replace(data, source=source.name, target=target.name, data_root=data_root and data_root.absolute()),
    )
    return with_choices(named, source, target, world_size), source, target


def preprocessing_of(config: Config) -> Preprocessing:
    """Return how an image file becomes an image of a run: as the task has it, in the format of the backbone.

    Raises:
        UsageError: a backbone of timm that is not there; a crop for a network of one size.
    """
    backbone, crop = config.model.backbone, config.data.crop
    preprocessing, wanted = find_benchmark(config.task).preprocessing, input_format(backbone)
    if wanted is not None:
        preprocessing = preprocessing.for_backbone(wanted.side, wanted.mean, wanted.std)
    if crop in (0, preprocessing.crop):
        return preprocessing
    if backbone in (LENET, FEATURES) or (wanted is not None and wanted.fixed):
        raise UsageError("--crop", found=f"{crop}, for {backbone}", expected="0: it takes inputs of one size")
    return preprocessing.with_crop(crop)


def with_choices(config: Config, source: ImageDomain, target: ImageDomain, world_size: int) -> Config:
    """Return the same with every automatic choice made that depends on the machine and on these domains.

    Raises:
        UsageError: a device, a loader or a backend that is not there.
    """
    run, data, device = config.run, config.data, choose_device(config)
    loader = data.loader if data.synthetic else resolve_loader(data, source, target, torch.device(device))
    model, method = _with_rows(config.model, source, target), METHODS[run.method].method
    if method.fits:
        run = replace(run, warmup=run.steps - 1)
    refresh_every = config.pseudo_labels.refresh_every or -(-len(target) // (run.batch_size * world_size))
    return replace(
        config,
        run=replace(run, device=device),
        data=replace(data, loader=loader),
        model=model,
        method=method.resolve(config.method, source.num_classes, device),
        pseudo_labels=replace(config.pseudo_labels, refresh_every=refresh_every),
        precision=config.precision.resolved(device, config.distributed.sync_batchnorm),
    )


def _with_rows(model: ModelSettings, source: ImageDomain, target: ImageDomain) -> ModelSettings:
    """Return the network with the size of the rows, where the domains are rows.

    Raises:
        UsageError: rows of different sizes, or of another size than asked for; a backbone that takes none.
    """
    if source.rows is None:
        return model
    if model.backbone != FEATURES:
        raise UsageError("--backbone", found=model.backbone, expected=f"{FEATURES}, for a task of features")
    require_same_size(source, target)
    if model.input_dim not in (0, source.rows.dim):
        raise UsageError("--input-dim", found=str(model.input_dim), expected=f"{source.rows.dim}, the size of a row")
    return replace(model, input_dim=source.rows.dim)


def _require_fit(backbone: str, benchmark: Benchmark) -> None:
    """Raise where the backbone does not take the task's images, before a folder is made for the run."""
    kind = FEATURES if benchmark.embedded else LENET if benchmark.preprocessing.channels == 1 else ""
    if backbone != kind and (kind or backbone in (FEATURES, LENET)):
        raise UsageError(
            "--backbone",
            found=backbone,
            expected="lenet for the 16x16 grey images of digits, features for tasks of features, a torchvision model, "
            "efficientnet-lite0 or timm:NAME for the colour images of all else",
        )


def _divide(method: Method, config: Config, ranks: Ranks) -> None:
    """Let each rank keep a share of the method's discriminators, where the settings ask for it or leave it open.

    Raises:
        UsageError: it is asked for, and there is nothing to divide, or not enough.
    """
    costs, wanted = method.costs_of_parts(), config.distributed.divide_discriminators
    if not ranks.several or wanted == "off":
        return
    found = None
    if len(costs) < ranks.world_size:
        found = f"{ranks.world_size} processes and {len(costs)} discriminators that can be divided"
    elif config.precision.precision == "fp16":
        # A rank whose own gradients overflow would lower its scale alone.
        found = "--precision fp16"
    if found is None:
        method.divide(Division(costs, ranks))
    elif wanted == "on":
        raise UsageError(
            "--divide-discriminators",
            found=f"on with {found}",
            expected="at least as many discriminators as processes, and no scaled losses",
            remedy="leave it at auto, or start fewer processes",
        )


def choose_device(config: Config) -> Literal["cpu", "cuda"]:
    """Return where to train.

    Raises:
        UsageError: a GPU is asked for and not there.
    """
    cuda = torch.cuda.is_available()
    if config.run.device == "cuda" and not cuda:
        raise UsageError("--device", found="cuda", expected="cpu or auto: PyTorch finds no CUDA device here")
    return "cuda" if config.run.device != "cpu" and cuda else "cpu"


def build_trainer(
    config: Config,
    source: ImageDomain,
    target: ImageDomain,
    ranks: Ranks | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Return the trainer of a resolved configuration, at step 0.

    Args:
        config, source, target: from `resolve`. ranks: the processes of the run; this one alone if None.
        stop: see `Trainer`.

    Raises:
        UsageError: a method, a backbone or weights that do not exist or do not fit; ranks that differ.
    """
    ranks = ranks or Ranks()
    device = torch.device(f"cuda:{ranks.local_rank}" if config.run.device == "cuda" else "cpu")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    set_arithmetic(device, config.precision.precision)
    seed_generators(config.run.seed)
    preprocessing = preprocessing_of(config)
    _require_fit(config.model.backbone, find_benchmark(config.task))
    entry = METHODS[config.run.method]
    model = build_model(config.model, source.num_classes, partial(entry.method.classifier, config.method))
    model.autocast_dtype = AUTOCAST_DTYPES[config.precision.precision]
    if config.distributed.sync_batchnorm:
        if device.type != "cuda":
            raise UsageError(
                "--sync-batchnorm", found=f"device {device.type}", expected="GPUs, the only ones it runs on"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    task = TaskFacts(source.num_classes, len(source), len(target), config.run.seed)
    method = build_method(config.run.method, model, config.method, task, config.adaptation)
    method.to(device)
    forget_peak_memory(device)
    if config.precision.compile == "on":
        method.compile_parts("reduce-overhead" if config.precision.cuda_graphs else None)
    ranks.require_equal(
        {
            **flat_settings(config.to_dict()),
            "source images": source.identity,
            "target images": target.identity,
            "discriminators": len(method.costs_of_parts()),
            "initial parameters": digest(method.state_dict()),
        }
    )
    _divide(method, config, ranks)
    # Parameters are drawn by now, as many as the method has; what is drawn from here on (dropout) is drawn for this
    # rank's own images, and is the same for every method until warm-up ends.
    seed_generators(config.run.seed + ranks.rank)
    scale = ranks.world_size if config.distributed.scale_learning_rate else 1
    optimizer = replace(
        config.optimizer,
        learning_rate=scale * config.optimizer.learning_rate,
        backbone_learning_rate=scale * config.optimizer.backbone_learning_rate,
    )
    plan = SamplingPlan(
        source.labels,
        len(target),
        preprocessing=preprocessing,
        batch_size=config.run.batch_size,
        seed=config.run.seed,
        world_size=ranks.world_size,
        balance_target=config.pseudo_labels.balance_target,
        target_views=method.target_views,
        strong_view=method.strong_view,
    )
    return Trainer(
        method,
        open_loader(
            config.data,
            source,
            target,
            preprocessing,
            batch_size=_EVALUATION_BATCH,
            device=device,
            dtype=model.autocast_dtype or torch.float32,
        ),
        plan,
        target,
        Schedule(config.run.steps, config.run.warmup, config.pseudo_labels.refresh_every, optimizer.decay),
        optimizer,
        confidence_threshold=config.pseudo_labels.confidence_threshold if entry.target_samples == "confident" else None,
        device=device,
        log_every=config.run.log_every,
        ranks=ranks,
        scale_losses=config.precision.precision == "fp16",
        test_crops=config.data.test_crops,
        stop=stop,
        cuda_graphs=config.precision.cuda_graphs,
        floors=device_floors(
            device,
            config.precision.precision,
            config.model,
            preprocessing,
            num_classes=source.num_classes,
            images=2 * config.run.batch_size,
        ),
    )
