"""`python -m gsda_fast.export RUN`: the network of a run in files that load without this project."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gsda_fast.commands import UNSAID, parse_command_line, program, run_command
from gsda_fast.console import echo, plain_console
from gsda_fast.errors import UsageError
from gsda_fast.files import atomic_file
from gsda_fast.options import CheckpointOptions
from gsda_fast.results.run_folder import EXPORTED, RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from gsda_fast.model import AdaptationModel
    from gsda_fast.trained import TrainedModel


@dataclass(frozen=True, kw_only=True)
class ExportSettings(CheckpointOptions):
    """Write the network of a run, encoder and classifier, in two files that load without this project.

    model.safetensors has its parameters, model.pt2 a program of torch.export; both say what the network was made for.
    """

    output: Annotated[Path | None, UNSAID] = None
    """Folder for model.safetensors and model.pt2; `export` in the run's folder if not given."""


def export(settings: ExportSettings) -> list[Path]:
    """Write two files with the same float32 network, for images (N, C, crop, crop) normalised as `facts` says.

    - ``model.safetensors``: parameters and buffers, named ``backbone.* bottleneck.* classifier.*``; the metadata has
      the facts as JSON under ``facts``.
    - ``model.pt2``: a program of `torch.export` for any N >= 1 returning features (N, D) and logits (N, r); its extra
      file ``facts.json`` has the same facts.

    Returns:
        The files.

    Raises:
        UsageError: no run, no such checkpoint, a damaged one, or a folder that cannot be written.
    """
    # Here and below, so that --help need not wait for PyTorch.
    import safetensors.torch
    import torch

    from gsda_fast.trained import load_trained

    trained = load_trained(settings.run, settings.checkpoint)
    folder = settings.output or RunFolder(settings.run).exported
    description = json.dumps(facts(trained))
    network = _network(trained.model).to(memory_format=torch.contiguous_format)
    weights, program = (folder / name for name in EXPORTED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(weights) as file:
            file.write(safetensors.torch.save(network.state_dict(), {"format": "pt", "facts": description}))
        with atomic_file(program) as file:
            torch.export.save(_program(network, trained), file, extra_files={"facts.json": description})
    except OSError as error:
        raise UsageError("--output", found=f"{folder} ({error.strerror})", expected="a folder to write") from error
    return [weights, program]


_OF_ROWS = ("input_dim", "feature_norm", "hidden")


def facts(trained: TrainedModel) -> dict[str, Any]:
    """Return all that one has to know to use the network.

    What it was trained as, its layers, its images, its classes.
    """
    from gsda_fast.model import FEATURES, output_layer

    config, model, preprocessing = trained.config, trained.config.model, trained.preprocessing
    return {
        "task": config.task,
        "source": config.data.source,
        "target": config.data.target,
        "method": config.run.method,
        "seed": config.run.seed,
        "step": trained.step,
        "backbone": model.backbone,
        "output_layer": output_layer(model.backbone),
        **({name: getattr(model, name) for name in _OF_ROWS} if model.backbone == FEATURES else {}),
        "bottleneck_dim": model.bottleneck_dim,
        "bottleneck_activation": model.bottleneck_activation,
        **{name: dataclasses.asdict(preprocessing)[name] for name in ("resize", "crop", "channels", "mean", "std")},
        **({} if model.backbone == FEATURES else {"orientation": trained.config.data.orientation}),
        "classes": trained.classes,
    }


def _network(model: AdaptationModel) -> nn.Module:
    from torch import nn

    class Network(nn.Module):
        """Encoder and classifier as they are kept: float32, and nothing of this project in what comes out."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.bottleneck, self.classifier = model.backbone, model.bottleneck, model.classifier

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            features = self.bottleneck(self.backbone(images))
            return features, self.classifier(features)

    return Network()


def _program(network: nn.Module, trained: TrainedModel) -> ExportedProgram:
    import torch

    from gsda_fast.model import FEATURES

    model, preprocessing = trained.config.model, trained.preprocessing
    # Two images (or rows): a batch of one would be taken for a constant.
    row = (
        (model.input_dim,)
        if model.backbone == FEATURES
        else (preprocessing.channels, preprocessing.crop, preprocessing.crop)
    )
    images = torch.zeros(2, *row)
    return torch.export.export(
        network, (images,), dynamic_shapes={"images": {0: torch.export.Dim("images", min=1)}}, strict=False
    )


def main() -> None:
    settings = parse_command_line(lambda: tyro.cli(ExportSettings, args=sys.argv[1:], prog=program("export")))
    with plain_console().status("exporting"):
        files = export(settings)
    for path in files:
        echo(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run_command(main)
