"""Adaptation as an estimator of scikit-learn, on embeddings, and its scores that need no label of the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from gsda_fast.api import adapt, console_for, embedded_probabilities
from gsda_fast.config import configure
from gsda_fast.errors import UsageError
from gsda_fast.results.metrics import SCORES
from gsda_fast.results.records import LABEL_FREE_CRITERION


class AdaptedClassifier(ClassifierMixin, BaseEstimator):
    """Train on labelled rows of a source, adapt to unlabelled rows of a target.

    Args:
        method: see `gsda_fast.methods.METHODS`.
        steps, warmup, batch_size, learning_rate: as on the command line; None: the preset of the task `features`.
        random_state: the seed. device: auto, cpu or cuda.
        verbose: show lines and bars on standard error.
        options: any others, by name in snake_case, such as `{"bottleneck_dim": 128}`.

    Attributes:
        classes_: (r,). n_features_in_: size of a row.
        target_scores_: of `gsda_fast.results.metrics.SCORES`, by name, over the target after the last step.
        trained_: encoder and classifier.
    """

    def __init__(
        self,
        method: str = "gsda",
        *,
        steps: int | None = None,
        warmup: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        random_state: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        verbose: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.method, self.steps, self.warmup, self.batch_size = method, steps, warmup, batch_size
        self.learning_rate, self.random_state, self.device = learning_rate, random_state, device
        self.verbose, self.options = verbose, options

    def fit(self, X: Any, y: Any, X_target: Any = None) -> Self:
        """Train, in a temporary folder.

        In a `Pipeline`, `transform_input=["X_target"]` and metadata routing send the target through the steps before.

        Args:
            X: (n, D), the source. y: (n,), its classes.
            X_target: (m, D), the target, without labels; None: there is nothing to adapt to, so the method is
                `source-only` in place of the one asked for, whose own options are checked and left out.

        Raises:
            UsageError: an option that does not fit (a ValueError). TrainingError: a run that cannot go on.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y: found one class; expected two or more, which a classifier tells apart")
        target = X
        if X_target is not None:
            target = validate_data(self, X_target, dtype=X.dtype, reset=False, ensure_min_samples=2)
        named = {name: getattr(self, name) for name in ("steps", "warmup", "batch_size", "learning_rate")}
        options = {name: value for name, value in named.items() if value is not None}
        options |= {"seed": self.random_state, "device": self.device, **(self.options or {})}
        method = self.method
        if X_target is None:
            config = configure("features", method, **options)
            own = {each.name for each in dataclasses.fields(config.method)}
            method, options = "source-only", {name: options[name] for name in options.keys() - own}
        adapted = adapt((X, labels), target, method, progress=self.verbose, **options)
        probabilities = torch.from_numpy(adapted.probabilities)
        self.target_scores_ = {name: float(score.function(probabilities)) for name, score in SCORES.items()}
        self.trained_ = adapted.trained
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float32]:
        """Return class probabilities, (n, r), of rows (n, D)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return embedded_probabilities(self.trained_, X, console_for(self.verbose))

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class, (n,), of rows (n, D)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]


def label_free(name: str = LABEL_FREE_CRITERION) -> Callable[..., float]:
    """Return a scorer, for `scoring=`, that looks at the target alone and at no label: more is better.

    It ignores the rows that it is given, which a cross-validation takes from the source.

    Args:
        name: of `gsda_fast.results.metrics.SCORES`.

    Raises:
        UsageError: there is no such score.
    """
    if name not in SCORES:
        raise UsageError("label_free", found=f"'{name}'", expected=" or ".join(SCORES))

    def scorer(estimator: Any, X: Any, y: Any = None) -> float:
        last = estimator[-1] if hasattr(estimator, "steps") and hasattr(estimator, "named_steps") else estimator
        return SCORES[name].merit(last.target_scores_[name])

    return scorer
