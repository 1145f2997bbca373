"""What is made ahead is what would be made when it is needed, to the bit; only the thread is another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bd3_scale.data.loader import Loader
from bd3_scale.errors import DataError
from bd3_scale.objectives.network_inputs import NetworkInputs, scored_rows
from bd3_scale.objectives.table import BlockDiffusion, Objective, SimplexDiffusion
from bd3_scale.recipe import Recipe
from bd3_scale.recipe.schema import ModelConfig, TrainingConfig
from bd3_scale.recipe.stages import batch_schedule
from bd3_scale.training.feed import Feed

LENGTH, MASK, BATCH, SEED = 32, 50, 7, 3
ROWS = np.random.default_rng(0).integers(0, MASK, (200, LENGTH))
EARLY, LATE = BlockDiffusion(MASK, LENGTH, LENGTH), BlockDiffusion(MASK, LENGTH, 4)


class _Data:
    """Rows in their order, over and over; `bad` is a row that holds MASK."""

    fetches = False

    def __init__(self, prefetch: int, bad: int | None = None) -> None:
        self.prefetch, self.bad = prefetch, bad

    def sample_ids(self, position: int, count: int) -> np.ndarray:
        return np.arange(position, position + count) % len(ROWS)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        rows = ROWS[indices]
        rows[indices == self.bad] = MASK
        return rows

    def counts(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), LENGTH - 1)

    def loader(self, seed: int, **how: Any) -> Loader:
        return Loader(self, self, prefetch=self.prefetch, **how)  # type: ignore[arg-type]


def _feed(
    data: _Data,
    objective_at: Callable[[int], Objective],
    replica: int = 0,
    replicas: int = 2,
    step: int = 0,
    device: str = "cpu",
    batch: Any = BATCH,
) -> Feed:
    recipe = Recipe(model=ModelConfig(context=LENGTH), training=TrainingConfig(global_batch=batch))
    recipe = replace(recipe, run=replace(recipe.run, seed=SEED), parallel=replace(recipe.parallel, micro_batch=2))
    here = {"data_rank": replica, "data": replicas, "context_rank": 0, "context": 1, "replicas_of_this_host": range(replicas)}
    layout = SimpleNamespace(device=torch.device(device), **here)
    return Feed(recipe, layout, data, objective_at, step=step, samples=batch_schedule(batch).samples_before(step))  # type: ignore[arg-type]


def _same(found: list[NetworkInputs], expected: list[NetworkInputs]) -> bool:
    def parts(inputs: NetworkInputs) -> list[torch.Tensor]:
        words = [] if inputs.simplex is None else list(vars(inputs.simplex).values())
        return [value for value in [*vars(inputs).values(), *words] if isinstance(value, torch.Tensor)]

    assert [inputs.pattern for inputs in found] == [inputs.pattern for inputs in expected]
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(parts(one), parts(other), strict=True)]
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


def _directly(
    objective: Objective, step: int, data: _Data, replica: int, replicas: int, samples: int | None = None, batch: int = BATCH
) -> list[NetworkInputs]:
    with Loader(data, data, global_batch=batch, micro_batch=2, replica=replica, replicas=replicas, prefetch=0) as loader:  # type: ignore[arg-type]
        return [
            scored_rows(objective.training_inputs(part.rows, part.slots, step, SEED, batch), part.real)
            for part in loader.micro_batches(step * BATCH if samples is None else samples)
        ]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("kind", ["bd3", "ssdlm"])
def test_inputs_are_those_of_the_step_whoever_makes_them(prefetch: int, kind: str) -> None:
    """Over a change of the block size, a jump back and a start in the middle, on every replica."""
    late = LATE if kind == "bd3" else SimplexDiffusion(MASK, LENGTH, 8)

    def objective_at(step: int) -> Objective:
        return EARLY if step < 4 else late

    data = _Data(prefetch)
    for replica in range(3):
        feed = _feed(data, objective_at, replica, 3, step=2)
        for step in (2, 3, 4, 5, 6, 2, 3, 9):
            taken = feed.take(step, step * BATCH)
            assert taken.objective == objective_at(step)
            assert _same(taken.inputs, _directly(objective_at(step), step, data, replica, 3))
        feed.close()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_ramp_gives_every_step_the_batch_that_it_would_have_alone(prefetch: int) -> None:
    """Rows, slots and noise (strata over the whole batch) of a step are those of a run that always had its batch, from its samples on."""
    ramp, data = [[0, 3], [7, BATCH], [20, 4], [21, 11]], _Data(prefetch)
    batches = batch_schedule(ramp)
    assert [(phase.step, phase.samples, phase.rows) for phase in batches.phases] == [(0, 0, 3), (3, 9, 7), (5, 23, 11)]
    for replica in range(3):
        feed = _feed(data, lambda step: LATE, replica, 3, step=2, batch=ramp)
        for step in (2, 3, 4, 5, 6, 2, 3, 9):
            taken = feed.take(step, batches.samples_before(step))
            place = batches.samples_before(step), batches.rows_at(step)
            assert _same(taken.inputs, _directly(LATE, step, data, replica, 3, *place))
        feed.close()


def test_a_tuning_reaches_steps_that_were_made_ahead() -> None:
    data, objective = _Data(3), LATE
    feed = _feed(data, lambda step: objective)
    for step in range(12):
        if step in (3, 8):
            objective = replace(objective, interval=(0.1 * step, 0.95))
        taken = feed.take(step, step * BATCH)
        assert taken.objective == objective and _same(taken.inputs, _directly(objective, step, data, 0, 2))
    feed.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_caller_makes_nothing_that_is_made_ahead(prefetch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[str] = []
    original = BlockDiffusion.training_inputs

    def noted(self: BlockDiffusion, *given: Any) -> NetworkInputs:
        makers.append(threading.current_thread().name)
        return original(self, *given)

    monkeypatch.setattr(BlockDiffusion, "training_inputs", noted)
    before = threading.active_count()
    feed = _feed(_Data(prefetch), lambda step: LATE)
    for step in range(6):
        feed.take(step, step * BATCH)
    assert {name.startswith("data-loader") for name in makers} == {prefetch > 0}
    feed.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_row_that_is_none_is_said_where_its_step_is_taken(prefetch: int) -> None:
    feed = _feed(_Data(prefetch, bad=2 * BATCH), lambda step: LATE)
    for step in range(2):
        feed.take(step, step * BATCH)
    with pytest.raises(DataError, match="is MASK"):
        feed.take(2, 2 * BATCH)
    feed.take(3, 3 * BATCH)
    feed.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_everything_waits_in_pinned_memory() -> None:
    data, objective = _Data(2), SimplexDiffusion(MASK, LENGTH, 8, pad_to=256)
    feed = _feed(data, lambda step: objective, device="cuda")
    for step in range(3):
        taken = feed.take(step, step * BATCH)
        for inputs in taken.inputs:
            words = [] if inputs.simplex is None else list(vars(inputs.simplex).values())
            assert all(value.is_pinned() for value in [*vars(inputs).values(), *words] if isinstance(value, torch.Tensor))
        assert _same(taken.inputs, _directly(objective, step, data, 0, 2))
    feed.close()
