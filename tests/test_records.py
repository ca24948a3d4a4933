import dataclasses
import json

import numpy as np
import pytest

from gsda_fast.results.records import Features, RunResult, Selection, loss_terms

RESULT = RunResult(
    task="digits", source="mnist", target="fonts", method="gsda", seed=1, steps=4,
    accuracy=Selection(80.0, 82.5, 81.0), mean_per_class=Selection(70.0, None, 71.0), per_class=(50.0, None),
    classes=("cat", "dog"), images_per_second=None, seconds=1.5, test_crops=10,
    label_free_by={"entropy": {"accuracy": 79.0, "mean_per_class": None}}, unreadable_files=3,
)  # fmt: skip


def test_a_result_comes_back_from_json() -> None:
    assert RunResult.from_json(json.loads(json.dumps(dataclasses.asdict(RESULT)))) == RESULT


def test_what_an_earlier_version_lacked_has_its_default_and_what_a_later_one_added_is_ignored() -> None:
    stored = dataclasses.asdict(RESULT) | {"unheard_of": 1}
    for name in ("label_free_by", "test_crops", "label_free_criterion", "unreadable_files"):
        del stored[name]
    found = RunResult.from_json(stored)
    assert (found.label_free_by, found.test_crops, found.label_free_criterion) == ({}, 1, "mutual_information")
    assert found.unreadable_files == 0
    del stored["accuracy"]
    with pytest.raises(ValueError, match="accuracy"):
        RunResult.from_json(stored)


def test_the_accuracies_have_three_choices() -> None:
    assert dataclasses.asdict(RESULT)["accuracy"] == {"last": 80.0, "best": 82.5, "label_free": 81.0}


def test_loss_terms_are_what_the_harness_has_not_measured() -> None:
    records = [
        {"step": 1, "classification": 1.0, "learning_rate": 0.1, "adversarial_ramp": 0.0, "images_per_second": 9.0},
        {"step": 2, "entropy": 0.1, "wasserstein": 2.0, "gradient_norm_domain": 1.0, "data_wait": 0.1,
         "domain_accuracy": 0.5},
        {"step": 3, "accuracy": 1.0, "mean_per_class": 1.0, "mutual_information": 1.0, "score_entropy": 0.1,
         "mfu": 0.5, "classification": 2.0},
    ]  # fmt: skip
    assert loss_terms(records) == ["classification", "entropy", "wasserstein"]


def test_features_at_a_moment() -> None:
    features = Features(np.zeros(2), np.zeros(3), source_warmup=np.ones((2, 4)), target_warmup=np.ones((3, 4)))
    found = features.at("warmup")
    assert found is not None
    assert [len(rows) for rows in found] == [2, 3]
    assert features.at("final") is None
