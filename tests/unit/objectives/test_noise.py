"""Noise is a pure function of (seed, purpose, indices): strata, marginals, independence of the split, golden values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.keyed_random import generator
from bd3_scale.objectives import noise

GOLDEN = Path(__file__).parents[2] / "golden" / "noise.json"
UNIT = (0.0, 1.0)


def _sample() -> dict[str, list]:
    """A handful of the first numbers of every stream, as they stand in the golden file."""
    slots = np.arange(3)
    times = noise.block_times(0, 5, slots, 3, 4, (0.001, 1.0))
    fixed = noise.validation_times(0, slots, 4)
    return {
        "words": [int(word) for word in generator(0, "golden", 1, 2, 3).bit_generator.random_raw(4)],
        "block_times": times.tolist(),
        "masked_tokens": noise.masked_tokens(0, 5, slots, times, 4).astype(int).tolist(),
        "dropout_keys": noise.dropout_keys(0, 5, slots).tolist(),
        "validation_times": fixed.tolist(),
        "validation_masked_tokens": noise.validation_masked_tokens(0, slots, fixed, 4).astype(int).tolist(),
    }


def test_golden_values() -> None:
    """Changed noise makes every older checkpoint resume as another run, and every NELBO incomparable."""
    assert _sample() == json.loads(GOLDEN.read_text())


def test_another_process_draws_the_same() -> None:
    """As after a restart: nothing depends on the state of the process (hash seeds, caches, generators)."""
    code = (
        "import numpy as np; from bd3_scale.objectives import noise as n; s = np.arange(2, 5); n.block_times(7, 3, s, 6, 8, (.1, .9));"
        "t = n.block_times(7, 11, s, 6, 8, (.1, .9)); print(t.tolist(), n.masked_tokens(7, 11, s, t, 4).tolist(), n.dropout_keys(7, 11, s))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slots = np.arange(2, 5)
    times = noise.block_times(7, 11, slots, 6, 8, (0.1, 0.9))
    expected = f"{times.tolist()} {noise.masked_tokens(7, 11, slots, times, 4).tolist()} {noise.dropout_keys(7, 11, slots)}"
    assert done.stdout.strip() == expected


@settings(max_examples=40)
@given(st.integers(0, 2**64 - 1), st.integers(0, 10**7), st.integers(1, 9), st.integers(1, 12))
def test_each_stratum_is_used_exactly_once_per_step(seed: int, step: int, global_batch: int, blocks: int) -> None:
    times = noise.block_times(seed, step, np.arange(global_batch), global_batch, blocks, UNIT)
    count = global_batch * blocks
    assert times.shape == (global_batch, blocks)
    assert sorted(np.floor(times * count).astype(int).ravel()) == list(range(count))


@settings(max_examples=40)
@given(st.data())
def test_noise_of_a_slot_does_not_depend_on_the_split(data: st.DataObject) -> None:
    """Any replicas and micro-batches, in any order, see what one process with one batch sees."""
    global_batch = data.draw(st.integers(1, 12))
    seed, step = data.draw(st.integers(0, 10**9)), data.draw(st.integers(0, 10**6))
    every = np.arange(global_batch)
    some = np.array(data.draw(st.lists(st.sampled_from(list(every)), unique=True)), np.int64)
    whole, part = (noise.block_times(seed, step, slots, global_batch, 5, (0.2, 0.7)) for slots in (every, some))
    np.testing.assert_array_equal(part, whole[some])
    masked = noise.masked_tokens(seed, step, every, whole, 3)
    np.testing.assert_array_equal(noise.masked_tokens(seed, step, some, part, 3), masked[some])
    np.testing.assert_array_equal(noise.dropout_keys(seed, step, some), noise.dropout_keys(seed, step, every)[some])
    np.testing.assert_array_equal(noise.validation_times(seed, some, 5), noise.validation_times(seed, every, 5)[some])


@pytest.mark.parametrize("global_batch", [1, 4])
def test_marginal_of_t_is_uniform_at_every_block_position_at_micro_batch_1(global_batch: int) -> None:
    """The flaw this guards against: strata laid along the row, so that the first block always has t near 0."""
    steps, blocks, bins = 2000, 8, 10
    slot = np.array([global_batch - 1])
    times = np.concatenate([noise.block_times(1, step, slot, global_batch, blocks, UNIT) for step in range(steps)])
    for position in range(blocks):
        observed = np.histogram(times[:, position], bins, UNIT)[0]
        statistic = np.square(observed - steps / bins).sum() / (steps / bins)
        assert statistic < 29.7, f"block {position}: chi-square {statistic:.1f} with {bins - 1} degrees of freedom (p < 0.0005)"
    # Without replacement from N strata two blocks have correlation about -1/(N - 1), and nothing beyond that.
    correlation = np.corrcoef(times.T)[~np.eye(blocks, dtype=bool)]
    assert np.abs(correlation + 1 / (global_batch * blocks - 1)).max() < 4.5 / np.sqrt(steps)


@settings(max_examples=40)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 100))
def test_times_stay_in_the_interval_and_keep_their_rank(one: float, other: float, step: int) -> None:
    beta, omega = sorted((one, other))
    slots = np.arange(3)
    times = noise.block_times(0, step, slots, 3, 4, (beta, omega))
    assert times.min() >= beta and times.max() <= omega
    unit = noise.block_times(0, step, slots, 3, 4, UNIT)
    np.testing.assert_allclose(times, beta + (omega - beta) * unit, rtol=0, atol=1e-15)


def test_masks_follow_the_probability_and_spare_token_0() -> None:
    rows, block_size = 400, 16
    probabilities = np.tile([0.0, 0.25, 0.9, 1.0], (rows, 1))
    for masked in (
        noise.masked_tokens(3, 0, np.arange(rows), probabilities, block_size),
        noise.validation_masked_tokens(3, np.arange(rows), probabilities, block_size),
    ):
        assert masked.shape == (rows, 64) and masked.dtype == bool
        share = masked.reshape(rows, 4, block_size).mean((0, 2))
        assert share[0] == 0 and share[3] == 1
        error = np.sqrt(probabilities[0] * (1 - probabilities[0]) / (rows * block_size))
        assert (np.abs(share - probabilities[0])[1:3] < 4 * error[1:3]).all()
    everything = noise.masked_tokens(3, 0, np.arange(rows), np.ones((rows, 4)), block_size)
    assert not everything[:, 0].any() and everything[:, 1:].all()


def test_streams_of_different_purpose_or_index_are_unrelated() -> None:
    keys: list[tuple] = [
        ("a",),
        ("b",),
        ("a", 0),
        ("a", 1),
        ("a", 0, 0),
        ("a", 1, 0),
        ("a", 0, 1),
        ("a", 0, 0, 0),
        ("a", 0, 0, 1),
        ("a", 2**63),
    ]
    streams = np.stack([generator(seed, *key).random(4000) for seed in (0, 1, 2**64 - 1) for key in keys])
    correlation = np.corrcoef(streams)[~np.eye(len(streams), dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    assert len(np.unique(streams)) == streams.size
    times = np.full((1, 1), 0.5)
    draws = [noise.masked_tokens(0, step, np.array([slot]), times, 64) for step in range(4) for slot in range(4)]
    draws += [noise.validation_masked_tokens(0, np.array([row]), times, 64) for row in range(4)]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_validation_times_are_stratified_inside_the_row() -> None:
    times = noise.validation_times(9, np.arange(50), 16)
    np.testing.assert_array_equal(np.sort(np.floor((times - 1e-3) / (1 - 1e-3) * 16), axis=1), np.tile(np.arange(16), (50, 1)))
    assert len({tuple(np.argsort(row)) for row in times}) == 50
    pairs = noise.validation_times(9, np.arange(4000), 2)
    assert abs((pairs[:, 0] < pairs[:, 1]).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_what_is_refused() -> None:
    for slots in ([-1], [4]):
        with pytest.raises(ValueError, match="slots must lie in"):
            noise.block_times(0, 0, np.array(slots), 4, 2, UNIT)
    with pytest.raises(ValueError, match="at most 3"):
        generator(0, "x", 1, 2, 3, 4)
    for seed, index in ((-1, 0), (0, -1), (2**64, 0), (0, 2**64)):
        with pytest.raises(ValueError, match="in \\[0, 2\\^64\\)"):
            generator(seed, "x", index)
