"""The moving average of weights is its formula, and leaves no trace in the model that is validated by it."""

import pytest
import torch

from training.averages import WeightAverage


def test_the_average_is_the_sum_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    history = [torch.randn(5, 3, generator=generator) for _ in range(6)]
    average = WeightAverage([("weight", history[0])], 0.9)
    for weight in history[1:]:
        average.update([("weight", weight), ("another", weight)])
    shares = [0.9**5] + [0.1 * 0.9 ** (5 - step) for step in range(1, 6)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight.double() for share, weight in zip(shares, history, strict=True))
    torch.testing.assert_close(average.weights["weight"].double(), expected, atol=1e-6, rtol=0)
    assert average.weights.keys() == {"weight"}


def test_it_takes_the_place_of_the_weights_for_a_while_and_of_nothing_else():
    live = {"weight": torch.ones(2), "constant": torch.zeros(2)}
    average = WeightAverage([("weight", torch.full((2,), 3.0))], 0.5)
    with pytest.raises(ValueError, match="on purpose"), average.in_place_of(live):
        assert live["weight"].tolist() == [3, 3] and live["constant"].tolist() == [0, 0]
        raise ValueError("on purpose")
    assert live["weight"].tolist() == [1, 1] and average.weights["weight"].tolist() == [3, 3]


def test_it_does_not_share_memory_with_the_weights():
    weight = torch.ones(2)
    average = WeightAverage([("weight", weight)], 0.5)
    weight.fill_(9)
    assert average.weights["weight"].tolist() == [1, 1]
    average.load({"weight": torch.zeros(2)})
    assert average.weights["weight"].tolist() == [0, 0]
