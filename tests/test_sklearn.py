"""The estimator keeps scikit-learn's contract, and what it adds: a target, and scores without labels."""

import pickle
from typing import Any

import numpy as np
import pytest
import sklearn
from clouds import clouds
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import gsda_fast
from gsda_fast.errors import UsageError
from gsda_fast.results.metrics import SCORES
from gsda_fast.sklearn import AdaptedClassifier, label_free

SHORT = {"steps": 40, "warmup": 20, "batch_size": 16}
OPTIONS = {"refresh_every": 20, "hidden_dim": 8}

EXPECTED_FAILURES: dict[str, str] = {}
"""Checks of scikit-learn that do not hold, and why. None: fitted without a target, it is a plain classifier."""


@parametrize_with_checks(
    [AdaptedClassifier("source-only", steps=60, warmup=0, options={"feature_norm": "none", "refresh_every": 60})],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
)
def test_scikit_learns_own_checks(estimator: AdaptedClassifier, check: Any) -> None:
    check(estimator)


SOURCE, TARGET = clouds(90, 0, 0, ["b", "c", "a"]), clouds(60, 0.5, 1, ["b", "c", "a"])


def small(method: str = "gsda", **options: Any) -> AdaptedClassifier:
    return AdaptedClassifier(method, **SHORT, **options, options=OPTIONS)


@pytest.fixture(scope="module")
def fitted() -> AdaptedClassifier:
    return small().fit(*SOURCE, TARGET[0])


def test_it_is_what_adapt_gives(fitted: AdaptedClassifier) -> None:
    adapted = gsda_fast.adapt(SOURCE, TARGET, progress=False, **SHORT, **OPTIONS)
    assert fitted.classes_.tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(fitted.predict_proba(TARGET[0]), adapted.probabilities, atol=1e-6)
    assert fitted.predict(TARGET[0]).tolist() == adapted.predict(TARGET[0]).tolist()
    assert fitted.score(*TARGET) > 0.9


def test_a_target_makes_a_difference_and_no_target_is_source_only(fitted: AdaptedClassifier) -> None:
    alone = small().fit(*SOURCE)
    assert alone.trained_.config.run.method == "source-only"
    assert fitted.trained_.config.run.method == "gsda"
    assert not np.array_equal(alone.predict_proba(TARGET[0]), fitted.predict_proba(TARGET[0]))


def test_it_is_silent_unless_it_is_verbose(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, for rich
    shown = []
    for verbose in (False, True):
        fitted = small(verbose=verbose).fit(*SOURCE)
        shown.append(capfd.readouterr().err)
        fitted.predict(TARGET[0])
        shown.append(capfd.readouterr().err)
    assert shown[:2] == ["", ""]
    assert "no accuracy" in shown[2]
    assert "predict" in shown[3]
    assert "60/60" in shown[3]


def test_scores_look_at_the_target_alone(fitted: AdaptedClassifier) -> None:
    for name, score in SCORES.items():
        value = label_free(name)(fitted, SOURCE[0][:3], SOURCE[1][:3])
        assert abs(value) == fitted.target_scores_[name]
        assert (value > 0) == score.higher_is_better
    with pytest.raises(UsageError, match="label_free: found 'accuracy'"):
        label_free("accuracy")


def test_a_grid_search_chooses_without_labels() -> None:
    search = GridSearchCV(small(), {"learning_rate": [1e-6, 0.02]}, scoring=label_free(), cv=2, error_score="raise")
    search.fit(*SOURCE, X_target=TARGET[0])
    assert search.best_params_ == {"learning_rate": 0.02}
    assert search.cv_results_["mean_test_score"][1] == pytest.approx(search.best_score_)
    assert search.predict(TARGET[0][:2]).shape == (2,)


def test_a_pipeline_sends_the_target_through_its_steps() -> None:
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = small().set_fit_request(X_target=True)
        pipeline = make_pipeline(StandardScaler(), classifier, transform_input=["X_target"])
        pipeline.fit(*SOURCE, X_target=TARGET[0])
    scaler = StandardScaler().fit(SOURCE[0])
    expected = small().fit(scaler.transform(SOURCE[0]), SOURCE[1], scaler.transform(TARGET[0]))
    np.testing.assert_array_equal(
        pipeline.predict_proba(TARGET[0]), expected.predict_proba(scaler.transform(TARGET[0]))
    )
    assert label_free()(pipeline, None) == expected.target_scores_["mutual_information"]


def test_it_survives_a_pickle(fitted: AdaptedClassifier) -> None:
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(TARGET[0]), fitted.predict_proba(TARGET[0]))


def test_a_mistake_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="--steps: found 0"):
        AdaptedClassifier(steps=0).fit(*SOURCE, TARGET[0])
    with pytest.raises(ValueError, match="X has 5 features, but AdaptedClassifier is expecting 6"):
        small().fit(*SOURCE, TARGET[0][:, :5])
    with pytest.raises(ValueError, match="--hidden-dim: found an option of"):
        AdaptedClassifier("mcc", options=OPTIONS).fit(*SOURCE)
    with pytest.raises(ValueError, match="found one class"):
        small().fit(SOURCE[0], ["a"] * 90, TARGET[0])
