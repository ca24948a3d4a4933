"""Encoder (backbone and bottleneck) and classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Annotated, Literal, NamedTuple

import torch
import torchvision
from msgspec import Meta
from torch import Tensor, nn

from gsda_fast.errors import UsageError

LENET = "lenet"

Head = Callable[[int, int], nn.Module]
"""Builds a classifier: (N, feature_dim) to (N, num_classes) logits."""


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    backbone: str = "resnet50"
    """A classification model of torchvision by name, or lenet (16x16 grey images)."""
    weights: str = "IMAGENET1K_V1"
    """Initial backbone weights: a name that torchvision knows, the path of a file, or none."""
    bottleneck_dim: Annotated[int, Meta(ge=1)] = 256
    """Size of the features that the discriminators and the classifier see (D)."""
    bottleneck_norm: Literal["none", "batch"] = "none"
    """BatchNorm after the bottleneck's linear layer."""
    bottleneck_activation: Literal["none", "relu"] = "none"
    """What follows then."""
    bottleneck_dropout: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Probability of dropout at the bottleneck's end."""


class ModelOutput(NamedTuple):
    """features (N, D) and logits (N, r)."""

    features: Tensor
    logits: Tensor


class AdaptationModel(nn.Module):
    """Backbone, bottleneck and classifier.

    Args:
        backbone: maps images (N, C, H, W) to (N, backbone_dim).
        backbone_dim: its output size. num_classes: r. settings: the bottleneck's layers.
        head: builds the classifier from the sizes of features and classes.

    Attributes:
        autocast_dtype: what products run in; None: in the dtype of the parameters.
    """

    autocast_dtype: torch.dtype | None = None

    def __init__(
        self, backbone: nn.Module, backbone_dim: int, num_classes: int, settings: ModelSettings, head: Head = nn.Linear
    ) -> None:
        super().__init__()
        self.feature_dim = settings.bottleneck_dim
        self.backbone = backbone
        layers: list[nn.Module] = [nn.Linear(backbone_dim, settings.bottleneck_dim)]
        if settings.bottleneck_norm == "batch":
            layers.append(nn.BatchNorm1d(settings.bottleneck_dim))
        if settings.bottleneck_activation == "relu":
            layers.append(nn.ReLU())
        if settings.bottleneck_dropout:
            layers.append(nn.Dropout(settings.bottleneck_dropout))
        self.bottleneck = nn.Sequential(*layers)
        self.classifier = head(settings.bottleneck_dim, num_classes)

    def forward(self, images: Tensor) -> ModelOutput:
        """images (N, C, H, W) -> features (N, D), in the autocast dtype, and logits (N, r), never below float32."""
        with torch.autocast(images.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            features = self.bottleneck(self.backbone(images))
            logits = self.classifier(features)
        return ModelOutput(features, logits.to(torch.promote_types(logits.dtype, torch.float32)))


def build_model(settings: ModelSettings, num_classes: int, head: Head = nn.Linear) -> AdaptationModel:
    """Build the network of `settings`, in channels_last memory format.

    Args:
        num_classes: r. head: builds the classifier from the sizes of features and classes.

    Raises:
        UsageError: a backbone or weights that do not exist, or that do not fit.
    """
    if settings.backbone == LENET:
        backbone, dim = _lenet()
        if settings.weights != "none":
            raise UsageError("--weights", found=settings.weights, expected="none, the only choice for lenet")
    else:
        backbone, dim = _torchvision_backbone(settings.backbone, settings.weights)
    model = AdaptationModel(backbone, dim, num_classes, settings, head)
    return model.to(memory_format=torch.channels_last)


def fetch_weights(settings: ModelSettings) -> None:
    """Puts the backbone's pretrained weights, where it starts from such, into PyTorch's cache, unless they are there.

    Raises:
        UsageError: they can neither be found nor fetched.
    """
    weights = _known_weights(settings.backbone).get(settings.weights)
    if weights is not None:
        with _fetching(weights):
            weights.get_state_dict(progress=True, check_hash=True)


def _known_weights(backbone: str) -> dict[str, torchvision.models.WeightsEnum]:
    """The weights that torchvision has for a backbone, by name."""
    if backbone not in torchvision.models.list_models(module=torchvision.models):
        return {}
    return {entry.name: entry for entry in torchvision.models.get_model_weights(backbone)}


@contextmanager
def _fetching(weights: torchvision.models.WeightsEnum) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the second one for a file with another digest
        raise UsageError(
            "--weights",
            found=f"{weights.name}, which could not be fetched ({shorten(str(error), 160, placeholder=' ...')})",
            expected="a connection, or weights on this machine",
            remedy=f"fetch {weights.url} elsewhere and give --weights PATH, or --weights none for a random start",
        ) from error


def _lenet() -> tuple[nn.Module, int]:
    """LeNet's convolutions for 16x16 grey images: (N, 1, 16, 16) -> (N, 512)."""
    layers = [
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers), 512


def _torchvision_backbone(name: str, weights: str) -> tuple[nn.Module, int]:
    models = torchvision.models.list_models(module=torchvision.models)
    if name not in models:
        raise UsageError(
            "--backbone", found=name, expected=f"{LENET} or a torchvision model such as resnet50, resnet101, vit_b_16"
        )
    path = Path(weights)
    known = _known_weights(name)
    if weights in known:
        with _fetching(known[weights]):
            network = torchvision.models.get_model(name, weights=known[weights])
    elif weights == "none":
        network = torchvision.models.get_model(name)
    elif path.is_file():
        network = torchvision.models.get_model(name)
        _load(network, path)
    else:
        raise UsageError("--weights", found=weights, expected=f"none, an existing file, or one of {', '.join(known)}")
    where, last = _last_linear(network)
    if last is None or getattr(network, "aux_logits", False):
        raise UsageError(
            "--backbone", found=name, expected="a model with one output, a linear classifier, such as resnet50"
        )
    network.set_submodule(where, nn.Identity())
    return network, last.in_features


def output_layer(backbone: str) -> str:
    """Name of the layer of a torchvision model whose place the bottleneck takes; "" for lenet."""
    if backbone == LENET:
        return ""
    with torch.device("meta"):
        return _last_linear(torchvision.models.get_model(backbone))[0]


def _last_linear(network: nn.Module) -> tuple[str, nn.Linear | None]:
    linear = [(where, module) for where, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else ("", None)


def _load(network: nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, UnpicklingError) as error:
        # The keys that do not fit follow on later lines; a large network has hundreds of them.
        told = shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        raise UsageError("--weights", found=f"{path} ({told})", expected="a state dict of the backbone") from error
