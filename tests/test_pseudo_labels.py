import numpy as np
import torch

from gsda_fast.training.pseudo_labels import confident_labels


def test_confident_samples_get_their_predicted_class() -> None:
    probabilities = torch.tensor([[0.1, 0.9], [0.75, 0.25], [0.5, 0.5], [0.74, 0.26], [0.0, 1.0]])
    labels = confident_labels(probabilities, threshold=0.75)
    assert labels.tolist() == [1, 0, -1, -1, 1]  # a sample that just reaches the threshold trains
    assert isinstance(labels, np.ndarray)
    assert labels.dtype == np.int64


def test_threshold_zero_takes_every_sample_and_above_one_none() -> None:
    probabilities = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert confident_labels(probabilities, 0.0).tolist() == probabilities.argmax(1).tolist()
    assert set(confident_labels(probabilities, 1.1).tolist()) == {-1}


def test_a_diverged_prediction_is_not_confident() -> None:
    probabilities = torch.tensor([[float("nan"), float("nan")], [0.1, 0.9]])
    assert confident_labels(probabilities, 0.5).tolist() == [-1, 1]
