"""The averaged weights: the ramped recursion, and the exchange that gives everything back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

from bd3_scale.optimizers.ema import ExponentialAverage
from bd3_scale.recipe import load
from bd3_scale.recipe.schema import TrainingConfig
from bd3_scale.training.schedules import learning_rate, rate_of


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
    cosine = TrainingConfig(learning_rate=1.0, warmup=10, learning_rate_schedule="cosine", final_fraction=0.1)
    rates = [learning_rate(cosine, step, 110) for step in range(10, 111)]
    assert rates[0] == 1.0 and abs(rates[50] - 0.55) < 1e-9 and abs(rates[-1] - 0.1) < 1e-9
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_a_decay_starts_from_any_checkpoint_of_wsd() -> None:
    wsd = TrainingConfig(learning_rate=1.0, warmup=10, learning_rate_schedule="wsd", decay=25, final_fraction=0.2)
    for total in (60, 100):
        rates = [learning_rate(wsd, step, total) for step in range(total + 1)]
        assert rates[:10] == [(step + 1) / 10 for step in range(10)] and set(rates[10 : total - 24]) == {1.0}
        assert abs(rates[total - 9] - (0.2 + 0.8 * (1 - 0.8))) < 1e-9 and abs(rates[total] - 0.2) < 1e-9
        assert all(later < earlier for earlier, later in pairwise(rates[total - 25 :]))


def test_the_rate_warms_up_again_where_the_block_size_changes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    training = "training: {steps: 100, learning_rate: 1.0, warmup: 10, rewarmup: 4}"
    path.write_text(f"{training}\nobjective: {{block_size: [[0, 32], [40, 8], [70, 4]]}}")
    recipe = load(path)
    rates = [rate_of(recipe, step) for step in range(100)]
    assert rates[40:44] == rates[70:74] == [0.25, 0.5, 0.75, 1.0] and rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert {rate for step, rate in enumerate(rates) if 10 <= step < 40 or 44 <= step < 70 or step >= 74} == {1.0}
