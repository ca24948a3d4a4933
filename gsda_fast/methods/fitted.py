"""TCA and GFK as methods: fitted once, on the features of the network that warm-up has trained on the source."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from gsda_fast.data.batches import Batch
from gsda_fast.errors import UsageError
from gsda_fast.methods.base import AdaptationSettings, Method, MethodSettings, Scores, TaskFacts
from gsda_fast.methods.shallow import Array, gfk, subspace_disagreement, tca
from gsda_fast.methods.step import Step, Update
from gsda_fast.model import AdaptationModel

_FAR = 1e30
"""The distance of a class without source rows: no prediction, and no infinity either."""
_SAMPLE = 1000
"""Target rows by which the temperature is chosen."""


@dataclass(frozen=True)
class TCASettings(MethodSettings):
    """Components that both domains share."""

    dim: Annotated[int, Meta(ge=1)] = 100
    """Components, at most one fewer than samples."""
    mu: Annotated[float, Meta(ge=0)] = 1.0
    """Weight of the components' complexity against the domain gap; the larger, the less adaptation."""
    landmarks: Annotated[int, Meta(ge=1)] = 2000
    """Samples that span the components; all are taken where there are no more."""


# Ten classes span few components; the nearest of a hundred follows what does not tell classes apart.
_DIGITS: dict[str, dict[str, Any]] = {"method": {"dim": 20}}
_FEATURES: dict[str, dict[str, Any]] = {"method": {"dim": 10, "mu": 0.1}}
TCA_PRESETS = {"digits": _DIGITS, "digits-partial": _DIGITS, "features": _FEATURES, "pictures-features": _FEATURES}


@dataclass(frozen=True)
class GFKSettings(MethodSettings):
    """Subspaces and the way between them."""

    dim: Annotated[int, Meta(ge=0)] = 20
    """Dimension of each domain's subspace, at most half of the features'; 0: by the subspaces' disagreement."""
    standardise: bool = True
    """Scale each feature, in each domain by itself, to mean 0 and variance 1."""


class FittedHead(nn.Module):
    """A linear classifier until it is fitted, then the nearest source sample in an embedding of the features.

    Logits are minus the squared distances to the nearest sample of each class, over a temperature.

    Attributes:
        linear: what warm-up trains.
        centre, scale: (D,) of the target's features. landmarks: (q, D), or none for a linear embedding.
        bandwidth: 0-d. weights: (q, m) or (D, m). rows: (n_s, m), embedded source samples; none before the fit.
        labels: (n_s,) int64. temperature: 0-d.
    """

    centre: Tensor
    scale: Tensor
    landmarks: Tensor
    bandwidth: Tensor
    weights: Tensor
    rows: Tensor
    labels: Tensor
    temperature: Tensor

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, num_classes)
        self.register_buffer("centre", torch.zeros(feature_dim))
        self.register_buffer("scale", torch.ones(feature_dim))
        self.register_buffer("landmarks", torch.zeros(0, feature_dim))
        self.register_buffer("bandwidth", torch.ones(()))
        self.register_buffer("weights", torch.zeros(0, 0))
        self.register_buffer("rows", torch.zeros(0, 0))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("temperature", torch.ones(()))

    @property
    def fitted(self) -> bool:
        """Whether predictions come from the source's samples."""
        return len(self.rows) > 0

    def embed(self, features: Tensor) -> Tensor:
        """Return the embedding of standardised features, (N, D) to (N, m)."""
        if len(self.landmarks) == 0:
            return features @ self.weights
        return (-_squared_distances(features, self.landmarks) / self.bandwidth).exp() @ self.weights

    def distances(self, features: Tensor) -> Tensor:
        """Return the squared distance of each sample to the nearest source sample of each class, (N, r)."""
        with torch.autocast(features.device.type, enabled=False):
            embedded = self.embed((features.to(self.rows.dtype) - self.centre) / self.scale)
            each = _squared_distances(embedded, self.rows)
            # By shape and not by len(), which would fix the number of rows in an exported program.
            nearest = each.new_full((each.shape[0], self.linear.out_features), _FAR)
            return nearest.scatter_reduce(1, self.labels.expand(each.shape[0], -1), each, "amin")

    def forward(self, features: Tensor) -> Tensor:
        if self.training or not self.fitted:
            logits: Tensor = self.linear(features)
            return logits
        return -self.distances(features) / self.temperature

    def fit(self, **tensors: Tensor) -> None:
        """Set buffers, of whatever sizes, by name."""
        for name, tensor in tensors.items():
            own = getattr(self, name)
            setattr(self, name, tensor.to(own).contiguous())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # How many samples there are is a matter of the data, which a network that is loaded does not know.
        for name, own in list(self.named_buffers(recurse=False)):
            stored = state_dict.get(prefix + name)
            if isinstance(stored, Tensor):
                setattr(self, name, torch.empty_like(stored, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Shallow(Method):
    """A map fitted on the features of warm-up's end, and the nearest source sample in it."""

    fits = True
    refuses = ("add", "class_weights")

    def __init__(
        self,
        model: AdaptationModel,
        settings: Any,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        self.seed = task.seed

    @classmethod
    def classifier(cls, settings: Any, feature_dim: int, num_classes: int) -> FittedHead:
        return FittedHead(feature_dim, num_classes)

    @abstractmethod
    def embedding(self, source: Array, target: Array) -> dict[str, Array]:
        """Fit on (n, D) float64 features; return what `FittedHead` embeds with."""

    def updates(self, batch: Batch, step: Step) -> Iterator[Update]:
        yield from ()

    def on_evaluation(self, scores: Scores) -> None:
        super().on_evaluation(scores)
        head = self.model.classifier
        assert isinstance(head, FittedHead)
        if head.fitted:
            return
        source, target = (scores.features(domain).double().numpy() for domain in ("source", "target"))
        moments = [(each.mean(0), each.std(0)) for each in (source, target)]
        if not getattr(self.settings, "standardise", False):
            moments = [(np.zeros_like(mean), np.ones_like(std)) for mean, std in moments]
        # A feature that never changes says nothing at any scale.
        moments = [(mean, np.where(std > 0, std, 1)) for mean, std in moments]
        source, target = ((each - mean) / std for each, (mean, std) in zip((source, target), moments))
        buffers = {name: torch.from_numpy(array) for name, array in self.embedding(source, target).items()}
        head.fit(centre=torch.from_numpy(moments[1][0]), scale=torch.from_numpy(moments[1][1]), **buffers)
        place = head.weights.device
        head.fit(rows=head.embed(torch.from_numpy(source).to(head.weights)), labels=scores.source_labels.to(place))
        some = np.linspace(0, len(target) - 1, min(_SAMPLE, len(target))).astype(int)
        # Such that the nearest class is about e times as probable as the next one.
        first, second = head.distances(scores.features("target")[some].to(place)).topk(2, largest=False).values.T
        head.fit(temperature=(second - first).median().clamp_min(torch.finfo(first.dtype).tiny))


class TransferComponents(Shallow):
    """Transfer component analysis (TCA: Pan et al., IEEE TNN 2011), of a Gaussian kernel."""

    settings: TCASettings

    def embedding(self, source: Array, target: Array) -> dict[str, Array]:
        dim = min(self.settings.dim, len(source) + len(target) - 1, self.settings.landmarks)
        fitted = tca(source, target, dim, self.settings.mu, max_landmarks=self.settings.landmarks, seed=self.seed)
        assert fitted.bandwidth is not None
        return {
            "landmarks": fitted.landmarks,
            "weights": fitted.weights,
            "bandwidth": np.asarray(fitted.bandwidth),
        }


class GeodesicFlow(Shallow):
    """Geodesic flow kernel (GFK: Gong et al., CVPR 2012)."""

    settings: GFKSettings

    def __init__(
        self,
        model: AdaptationModel,
        settings: GFKSettings,
        task: TaskFacts,
        adaptation: AdaptationSettings | None = None,
    ) -> None:
        super().__init__(model, settings, task, adaptation)
        bound = model.feature_dim // 2
        if settings.dim > bound:
            expected = f"at most {bound}, half of the features' width, or 0"
            raise UsageError("--dim", found=str(settings.dim), expected=expected)

    def embedding(self, source: Array, target: Array) -> dict[str, Array]:
        dim = self.settings.dim or subspace_disagreement(source, target)
        return {"weights": gfk(source, target, dim).factor}


def _squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return (N, M), without the digits that a common offset takes."""
    centre = others.mean(0)
    rows, others = rows - centre, others - centre
    squared = rows.square().sum(1)[:, None] + others.square().sum(1) - 2 * rows @ others.T
    return squared.clamp_min(0)
