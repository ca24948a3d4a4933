import math

import pytest
import torch

from gsda_fast.results.metrics import AccuracyHistory, EvaluationFigures, evaluation_figures
from gsda_fast.results.run_folder import Selection


def one_hot(classes: list[int], num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def figures(
    accuracy: float | None, mutual_information: float, mean_per_class: float | None = None
) -> EvaluationFigures:
    return EvaluationFigures(accuracy, mean_per_class, (), mutual_information, torch.zeros(0, 0))


def test_figures_by_hand() -> None:
    # class 0: 3 of 4 right, class 1: 0 of 1, class 2: absent, class 3: 2 of 3
    labels = torch.tensor([0, 0, 0, 0, 1, 3, 3, 3])
    found = evaluation_figures(labels, one_hot([0, 0, 0, 2, 0, 3, 3, 1], 4))
    assert found.accuracy == 62.5
    assert found.per_class == (75.0, 0.0, None, pytest.approx(200 / 3, abs=1e-12))
    assert found.mean_per_class == pytest.approx((75 + 0 + 200 / 3) / 3, abs=1e-12)
    assert found.confusion.dtype == torch.int64
    assert found.confusion.tolist() == [[3, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 2]]


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], math.log(2)),  # certain and spread: the largest
        ([[1.0, 0.0], [1.0, 0.0]], 0.0),  # certain, one class
        ([[0.5, 0.5], [0.5, 0.5]], 0.0),  # spread, uncertain
        (
            [[0.9, 0.1], [0.3, 0.7]],
            -0.6 * math.log(0.6)
            - 0.4 * math.log(0.4)
            + (0.9 * math.log(0.9) + 0.1 * math.log(0.1) + 0.3 * math.log(0.3) + 0.7 * math.log(0.7)) / 2,
        ),
    ],
)
def test_mutual_information_by_hand(probabilities: list[list[float]], expected: float) -> None:
    found = evaluation_figures(torch.tensor([0, 1]), torch.tensor(probabilities, dtype=torch.float64))
    assert found.mutual_information == pytest.approx(expected, abs=1e-12)


def test_counts_are_exact_beyond_float32() -> None:
    n = 2**24 + 2  # a float32 count stops at 2**24
    predictions = torch.tensor([[1.0, 0.0]], dtype=torch.float16).expand(n, 2)
    found = evaluation_figures(torch.zeros(n, dtype=torch.int64), predictions)
    assert found.confusion.tolist() == [[n, 0], [0, 0]]


def test_unlabelled_target_has_no_accuracy() -> None:
    found = evaluation_figures(torch.full((3,), -1), one_hot([0, 1, 1], 2))
    assert (found.accuracy, found.mean_per_class, found.per_class) == (None, None, (None, None))
    assert found.mutual_information == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_samples_without_a_label_count_for_mutual_information_alone() -> None:
    found = evaluation_figures(torch.tensor([0, -1]), one_hot([0, 1], 2))
    assert found.accuracy == 100.0
    assert int(found.confusion.sum()) == 1
    assert found.mutual_information == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        (torch.tensor([2]), torch.ones(1, 2) / 2),
        (torch.tensor([-2]), torch.ones(1, 2) / 2),
        (torch.tensor([0, 1]), torch.ones(1, 2) / 2),
        (torch.tensor([0]), torch.ones(2)),
        (torch.zeros(0, dtype=torch.int64), torch.ones(0, 2)),
    ],
)
def test_bad_input(labels: torch.Tensor, probabilities: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^labels.*found .*expected"):
        evaluation_figures(labels, probabilities)


def test_selection() -> None:
    history = AccuracyHistory()
    for step, entry in enumerate(
        (figures(50.0, 1.0, 40.0), figures(90.0, 1.5, 60.0), figures(70.0, 2.0, 65.0), figures(60.0, 1.9, 64.0)),
        start=1,
    ):
        history.add(100 * step, entry)
    assert history.accuracy == Selection(last=60.0, best=90.0, label_free=70.0)
    assert history.mean_per_class == Selection(last=64.0, best=65.0, label_free=65.0)
    assert history.label_free_step == 300


def test_selection_takes_the_first_of_equal_and_no_nan() -> None:
    history = AccuracyHistory()
    for step, entry in enumerate(
        (figures(1.0, math.nan), figures(2.0, 1.0), figures(3.0, 1.0), figures(4.0, math.nan))
    ):
        history.add(step, entry)
    assert history.accuracy == Selection(last=4.0, best=4.0, label_free=2.0)


def test_selection_without_labels_or_evaluations() -> None:
    history = AccuracyHistory()
    assert history.accuracy == Selection()
    assert history.label_free_step is None
    history.add(1, figures(None, 0.5))
    assert history.accuracy == Selection()
    assert history.label_free_step == 1


def test_history_steps_must_increase() -> None:
    history = AccuracyHistory()
    history.add(5, figures(1.0, 1.0))
    with pytest.raises(ValueError, match="step: found 5 after 5"):
        history.add(5, figures(2.0, 1.0))


def test_history_goes_on_from_its_state() -> None:
    whole, first = AccuracyHistory(), AccuracyHistory()
    entries = [figures(50.0, 3.0, 1.0), figures(90.0, 1.0, 2.0), figures(70.0, 2.0, 3.0)]
    for step, entry in enumerate(entries):
        whole.add(step, entry)
    for step, entry in enumerate(entries[:2]):
        first.add(step, entry)
    resumed = AccuracyHistory()
    resumed.load_state_dict(first.state_dict())
    resumed.add(2, entries[2])
    assert resumed.state_dict() == whole.state_dict()
    assert (resumed.accuracy, resumed.mean_per_class) == (whole.accuracy, whole.mean_per_class)
    # Without the state, best and label-free would differ: the test can fail.
    alone = AccuracyHistory()
    alone.add(2, entries[2])
    assert alone.accuracy != whole.accuracy
