import math

import pytest
import torch

from gsda_fast.results.metrics import (
    SCORES,
    AccuracyHistory,
    EvaluationMetrics,
    entropy,
    evaluation_metrics,
    mutual_information,
    nuclear_norm,
    soft_neighbourhood_density,
    softmax_correlation,
)
from gsda_fast.results.records import Selection


def one_hot(classes: list[int], num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def figures(
    accuracy: float | None, mutual_information: float, mean_per_class: float | None = None
) -> EvaluationMetrics:
    return EvaluationMetrics(
        accuracy, mean_per_class, (), {"mutual_information": mutual_information}, torch.zeros(0, 0)
    )


def test_figures_by_hand() -> None:
    # class 0: 3 of 4 right, class 1: 0 of 1, class 2: absent, class 3: 2 of 3
    labels = torch.tensor([0, 0, 0, 0, 1, 3, 3, 3])
    found = evaluation_metrics(labels, one_hot([0, 0, 0, 2, 0, 3, 3, 1], 4))
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
    found = evaluation_metrics(torch.tensor([0, 1]), torch.tensor(probabilities, dtype=torch.float64))
    assert found.mutual_information == pytest.approx(expected, abs=1e-12)


def test_counts_are_exact_beyond_float32() -> None:
    n = 2**24 + 2  # a float32 count stops at 2**24
    predictions = torch.tensor([[1.0, 0.0]], dtype=torch.float16).expand(n, 2)
    found = evaluation_metrics(torch.zeros(n, dtype=torch.int64), predictions)
    assert found.confusion.tolist() == [[n, 0], [0, 0]]


def test_unlabelled_target_has_no_accuracy() -> None:
    found = evaluation_metrics(torch.full((3,), -1), one_hot([0, 1, 1], 2))
    assert (found.accuracy, found.mean_per_class, found.per_class) == (None, None, (None, None))
    assert found.mutual_information == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_samples_without_a_label_count_for_mutual_information_alone() -> None:
    found = evaluation_metrics(torch.tensor([0, -1]), one_hot([0, 1], 2))
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
        evaluation_metrics(labels, probabilities)


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


# ----------------------------------------------------------------------------------------------------------- scores

ROWS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.05, 0.05, 0.9]], dtype=torch.float64)


def log(value: float) -> float:
    return math.log(value) if value > 0 else 0.0


def test_entropy_by_hand() -> None:
    expected = -sum(p * log(p) for row in ROWS.tolist() for p in row) / 4
    assert float(entropy(ROWS)) == pytest.approx(expected, abs=1e-14)
    assert float(entropy(one_hot([0, 2], 3))) == 0
    assert float(entropy(torch.full((5, 4), 0.25))) == pytest.approx(math.log(4))


def test_soft_neighbourhood_density_by_hand() -> None:
    rows = [[value / math.hypot(*row) for value in row] for row in ROWS.tolist()]
    expected = 0.0
    for i, row in enumerate(rows):
        weights = [math.exp(sum(map(float.__mul__, row, other)) / 0.05) for j, other in enumerate(rows) if j != i]
        shares = [weight / sum(weights) for weight in weights]
        expected -= sum(share * log(share) for share in shares) / len(rows)
    assert float(soft_neighbourhood_density(ROWS)) == pytest.approx(expected, abs=1e-12)


def test_a_dense_neighbourhood_scores_higher() -> None:
    # Two clusters of five, against ten samples that lie apart: log 4 of equal neighbours.
    dense = one_hot([0] * 5 + [1] * 5, 10)
    assert float(soft_neighbourhood_density(dense)) == pytest.approx(math.log(4), abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    apart = torch.rand(10, 10, generator=generator).softmax(dim=1)
    tight = apart[:1].repeat(10, 1)
    assert float(soft_neighbourhood_density(tight)) == pytest.approx(math.log(9))


def test_density_does_not_depend_on_the_chunk_and_is_bounded_by_rows_evenly_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(101, 5, generator=generator).softmax(dim=1)
    whole = float(soft_neighbourhood_density(rows, chunk=1000))
    for chunk in (1, 7, 101):
        assert float(soft_neighbourhood_density(rows, chunk=chunk)) == pytest.approx(whole, abs=1e-12)
    spread = float(soft_neighbourhood_density(rows, max_rows=21))
    assert spread == pytest.approx(float(soft_neighbourhood_density(rows[::5])), abs=1e-12)
    assert spread != pytest.approx(float(soft_neighbourhood_density(rows[:21])), abs=1e-6)
    assert soft_neighbourhood_density(rows, max_rows=21) == soft_neighbourhood_density(rows, max_rows=21)
    assert math.isnan(float(soft_neighbourhood_density(rows[:1])))


def test_memory_of_the_density_is_that_of_a_chunk() -> None:
    seen: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            out = function(*arguments, **(options or {}))
            seen.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        soft_neighbourhood_density(torch.rand(600, 3), max_rows=400, chunk=50)
    assert max(seen) <= 400 * 50


def test_nuclear_norm_by_hand() -> None:
    # Orthogonal columns with 3 and 1 ones: singular values sqrt(3) and 1.
    assert float(nuclear_norm(one_hot([0, 0, 0, 1], 2))) == pytest.approx((3**0.5 + 1) / 4, abs=1e-12)
    assert float(nuclear_norm(torch.full((4, 2), 0.5))) == pytest.approx(2**0.5 / 4)
    gram = torch.linalg.eigvalsh(ROWS.T @ ROWS).sqrt().sum() / 4
    assert float(nuclear_norm(ROWS)) == pytest.approx(float(gram), abs=1e-12)


def test_softmax_correlation_by_hand() -> None:
    assert float(softmax_correlation(one_hot([0, 1, 2], 3))) == pytest.approx(1.0, abs=1e-12)
    # Frequencies 3 : 1 against equal ones, and against their own.
    skewed = one_hot([0, 0, 0, 1], 2)
    assert float(softmax_correlation(skewed)) == pytest.approx(4 / (10**0.5 * 2**0.5), abs=1e-12)
    assert float(softmax_correlation(skewed, torch.tensor([0.75, 0.25]))) == pytest.approx(1.0, abs=1e-12)
    # All correlations equal: r entries on the diagonal of r^2.
    assert float(softmax_correlation(torch.full((5, 4), 0.25))) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_float64_and_survives_a_model_that_diverged(name: str) -> None:
    found = SCORES[name].function(ROWS.float())
    assert (found.dtype, found.ndim) == (torch.float64, 0)
    # Certain, right and spread predictions are better than a constant doubt.
    certain, doubt = (
        float(SCORES[name].function(rows)) for rows in (one_hot([0, 1, 2] * 4, 3), torch.full((12, 3), 1 / 3))
    )
    if name != "soft_neighbourhood_density":  # which sees one dense neighbourhood in either
        assert SCORES[name].merit(certain) > SCORES[name].merit(doubt)
    assert math.isnan(float(SCORES[name].function(torch.full((4, 3), math.nan))))


def test_an_evaluation_has_every_score() -> None:
    found = evaluation_metrics(torch.tensor([0, 1, 2, 2]), ROWS)
    assert found.scores == {name: float(score.function(ROWS)) for name, score in SCORES.items()}
    assert found.mutual_information == float(mutual_information(ROWS))


def test_each_score_chooses_its_own_evaluation() -> None:
    history = AccuracyHistory()
    for step, (accuracy, scores) in enumerate(
        [
            (10.0, {"entropy": 0.3, "nuclear_norm": 0.2, "mutual_information": 1.0}),
            (20.0, {"entropy": 0.1, "nuclear_norm": 0.2, "mutual_information": math.nan}),  # certain: low entropy
            (30.0, {"entropy": 0.2, "nuclear_norm": 0.9, "mutual_information": 2.0}),
            (40.0, {"entropy": math.nan, "nuclear_norm": 0.1, "mutual_information": 1.5}),
        ]
    ):
        history.add(step, EvaluationMetrics(accuracy, accuracy / 2, (), scores, torch.zeros(0, 0)))
    assert history.label_free_by == {
        "mutual_information": {"accuracy": 30.0, "mean_per_class": 15.0},
        "entropy": {"accuracy": 20.0, "mean_per_class": 10.0},
        "nuclear_norm": {"accuracy": 30.0, "mean_per_class": 15.0},
    }
    assert history.accuracy == Selection(40.0, best=40.0, label_free=30.0)
    resumed = AccuracyHistory()
    resumed.load_state_dict(history.state_dict())
    assert resumed.label_free_by == history.label_free_by
