from __future__ import annotations

import math

import pytest
import torch

from hasten.errors import BadInput
from hasten.metrics.inception_score import class_accuracy, inception_score


def test_ends_of_the_scale_even_when_samples_come_in_label_order() -> None:
    labels = torch.arange(10).repeat_interleave(200)
    sure = 100.0 * torch.nn.functional.one_hot(labels, 10)
    score, _ = inception_score(sure)
    assert 9.5 < score <= 10  # unshuffled, each of the ten parts would hold one class and score 1
    assert inception_score(torch.zeros(100, 10))[0] == pytest.approx(1)
    assert inception_score(torch.tensor([[3.0, 1.0]]).expand(50, 2))[0] == pytest.approx(1)


def test_equals_the_formula_on_two_samples() -> None:
    p, q = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    mean = (p + q) / 2
    expected = math.exp(0.5 * float((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()))
    assert inception_score(torch.stack([p, q]).log(), splits=1)[0] == pytest.approx(expected, rel=1e-12)


def test_accuracy_and_its_interval() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 0])]
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 1])
    value, (low, high) = class_accuracy(logits, labels)
    assert value == pytest.approx(0.8)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))  # Wilson, n = 10
    value, (low, high) = class_accuracy(torch.eye(3), torch.arange(3))
    assert value == high == 1.0
    assert low < 0.5


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="divided into 10 splits"):
        inception_score(torch.zeros(5, 3))
    with pytest.raises(BadInput, match="do not belong"):
        class_accuracy(torch.zeros(5, 3), torch.zeros(4))
