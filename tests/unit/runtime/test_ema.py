"""The averaged weights: the ramped recursion, and the exchange that gives everything back."""

from __future__ import annotations

from itertools import pairwise

import torch

from bd3_scale.runtime.config import TrainingConfig
from bd3_scale.runtime.ema import ExponentialAverage
from bd3_scale.runtime.learning_rate import learning_rate


def test_average_follows_the_ramped_recursion() -> None:
    master = torch.zeros(3)
    ema = ExponentialAverage([master], 0.5, lambda: None)
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 30):
        master += 1.0
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * master.double()
    assert torch.allclose(ema.tensors[0].double(), expected, rtol=1e-6)


def test_swapped_computes_with_the_average_and_gives_the_weights_back() -> None:
    master, published = torch.tensor([1.0, 2.0]), []
    ema = ExponentialAverage([master], 0.9, lambda: published.append(master.clone()))
    master += 5
    with ema.swapped():
        assert master.tolist() == [1.0, 2.0]
    assert master.tolist() == [6.0, 7.0] and ema.tensors[0].tolist() == [1.0, 2.0]
    assert [value.tolist() for value in published] == [[1.0, 2.0], [6.0, 7.0]]


def test_learning_rate_warms_up_then_stays_or_falls_as_a_cosine() -> None:
    constant = TrainingConfig(learning_rate=1.0, warmup=10)
    assert [learning_rate(constant, step, 100) for step in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = TrainingConfig(learning_rate=1.0, warmup=10, schedule="cosine", final_fraction=0.1)
    rates = [learning_rate(cosine, step, 110) for step in range(10, 111)]
    assert rates[0] == 1.0 and abs(rates[50] - 0.55) < 1e-9 and abs(rates[-1] - 0.1) < 1e-9
    assert all(later < earlier for earlier, later in pairwise(rates))
