"""A mixture gives every source its share at every moment, each in its own order, from any start, on any number of replicas."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_scale.data.manifest import Manifest
from bd3_scale.data.mixture import Mixture
from bd3_scale.data.open import Data, open_data
from bd3_scale.data.order import GlobalOrder
from bd3_scale.data.preparation.prepare import Packing, prepare
from bd3_scale.data.tokenizer import ByteTokenizer
from bd3_scale.errors import DataError
from bd3_scale.recipe.mixture_weights import DIGITS, weights_problem
from bd3_scale.recipe.schema import DataConfig, SourceConfig
from tests.unit.data.conftest import CONTEXT, random_documents

WHOLE = 10**DIGITS


@st.composite
def weights(draw: st.DrawFn) -> list[float]:
    """Exact decimals that sum up to 1: of few digits, and of as many as are allowed."""
    unit = draw(st.sampled_from([WHOLE // 20, WHOLE // 100, 1]))
    cuts = draw(st.lists(st.integers(1, WHOLE // unit - 1), max_size=5, unique=True))
    borders = [0, *sorted(cuts), WHOLE // unit]
    return [(last - first) * unit / WHOLE for first, last in pairwise(borders)]


@settings(max_examples=60)
@given(weights=weights(), start=st.integers(0, 10**9))
def test_every_source_has_its_share_at_every_moment(weights: list[float], start: int) -> None:
    mixture = Mixture(weights)
    samples = np.arange(start, start + min(2 * mixture.period, 3000))
    sources, places = mixture.at(samples)
    given_before = mixture.counts(start)
    for source, weight in enumerate(weights):
        own = sources == source
        assert (places[own] == given_before[source] + np.arange(own.sum())).all(), "its samples follow each other, none left out"
        after = given_before[source] + np.cumsum(own)
        shares = mixture.shares[source] * (samples + 1)  # times the period, exact
        assert (np.abs(after * mixture.period - shares) < mixture.period).all()
        assert mixture.shares[source] / mixture.period == pytest.approx(weight, abs=1e-15)


def test_weights_are_exact_or_refused() -> None:
    assert weights_problem([0.7, 0.2, 0.1]) is None and weights_problem([0.3333, 0.3333, 0.3334]) is None
    for wrong, cure in (([0.7, 0.2], "0.7778, 0.2222"), ([1 / 3, 2 / 3], "0.3333, 0.6667"), ([100, 1e-9], "0.9999, 0.0001")):
        problem = weights_problem(wrong)
        assert problem is not None and problem.endswith(f"set them to {cure}")
        assert weights_problem([float(weight) for weight in cure.split(", ")]) is None, "the cure works"
        with pytest.raises(ValueError, match="must sum up to 1"):
            Mixture(wrong)
    assert "above 0" in str(weights_problem([0.0, 1.0]))


def test_the_schedule_is_what_it_was() -> None:
    """Golden: another schedule would make every older checkpoint resume as another run."""
    sources, places = Mixture([0.5, 0.3, 0.2]).at(np.arange(7, 19))
    assert sources.tolist() == [2, 1, 0, 0, 1, 0, 2, 0, 1, 0, 2, 1] and places.tolist() == [1, 2, 4, 5, 3, 6, 2, 7, 4, 8, 3, 5]


@pytest.mark.parametrize("lengths", [[5, 7, 3], [1, 100, 100], [100, 100, 1], [0, 5, 5]])
def test_held_out_rows_end_with_the_first_source_that_ends(lengths: list[int]) -> None:
    mixture = Mixture([0.5, 0.3, 0.2])
    count = mixture.first_shortage(lengths)
    assert (mixture.counts(count) <= lengths).all() and not (mixture.counts(count + 1) <= lengths).all()


# -- With data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second, smaller data set."""
    folder = tmp_path_factory.mktemp("other") / "tar"
    prepare(
        folder, Packing(ByteTokenizer(), CONTEXT, "bos", "webdataset", shard_bytes=9_000), "random", None, lambda: random_documents(150, 9)
    )
    return folder


def opened(config: DataConfig) -> Data:
    return open_data(config, CONTEXT, leader=True, barrier=lambda: None)


@pytest.fixture
def config(prepared: dict[str, tuple[Path, Manifest]], other: Path, tmp_path: Path) -> DataConfig:
    """70 % of a local folder of MDS, 30 % of a remote one of tar files."""
    first = SourceConfig(str(prepared["mds"][0]), 0.7)
    return DataConfig(tokenizer="bytes", window=2, mixture=[first, SourceConfig(str(tmp_path / "cache"), 0.3, str(other), "webdataset")])


def test_each_source_is_read_as_it_would_be_alone(config: DataConfig) -> None:
    with opened(config) as data:
        sizes = [len(source.train) for source in data.sources]
        assert len(data.train) == sum(sizes) and sizes[1] < sizes[0]
        total = 5 * sizes[1]
        ids = data.order(3).sample_ids(0, total)
        of_second = ids >= sizes[0]
        for own, source, offset in ((ids[~of_second], data.sources[0], 0), (ids[of_second] - sizes[0], data.sources[1], sizes[0])):
            alone = GlobalOrder(source.train.shard_rows, 3, 2).sample_ids(0, len(own))
            assert (own == alone).all()
            numbers = np.arange(len(source.train))
            assert (data.train.rows(offset + numbers[::-1]) == source.train.rows(numbers[::-1])).all()
        assert abs(of_second.sum() - 0.3 * total) < 1 and of_second.sum() > sizes[1], "an epoch of its own"
        for start in (1, total // 3, total - 5):
            assert (data.order(3).sample_ids(start, 5) == ids[start : start + 5]).all()


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_replicas_and_restarts_share_the_same_batches(config: DataConfig, replicas: int) -> None:
    with opened(config) as data:
        order = data.order(3)
        for start in (0, 24, 24 * 1000):  # a jump: nothing of the past is read
            expected = data.train.rows(order.sample_ids(start, 24))
            for replica in range(replicas):
                with data.loader(3, global_batch=24, micro_batch=2, replica=replica, replicas=replicas) as loader:
                    for batch in loader.micro_batches(start):
                        assert (batch.rows == expected[batch.slots]).all()


def test_the_shards_of_a_mixture_are_those_that_are_read(config: DataConfig) -> None:
    with opened(config) as data:
        order, rows = data.order(3), [rows for source in data.sources for rows in source.train.shard_rows]
        first = np.cumsum([0, *rows])
        for start in range(0, 2000, 37):
            needed, following = order.shards(start, 40, 2)
            read = np.searchsorted(first, order.sample_ids(start, 40), side="right") - 1
            early = order.window_places(start, 40) < 0.5
            assert set(read[early]) <= set(order.shards(start, 40, 2, (0.0, 0.5))[0])
            assert early.any() and [order.window_places(start + n, 1)[0] < 0.5 for n in range(40)] == early.tolist()
            assert set(read.tolist()) <= set(needed) and not set(needed) & set(following)


def test_held_out_rows_have_the_same_proportions(config: DataConfig) -> None:
    with opened(config) as data:
        rows = data.validation.rows(np.arange(len(data.validation)))
        sources, places = Mixture([0.7, 0.3]).at(np.arange(len(rows)))
        for number, source in enumerate(data.sources):
            assert (rows[sources == number] == source.validation.rows(places[sources == number])).all()
        assert rows.shape == (len(data.validation), CONTEXT) and min((sources == number).sum() for number in (0, 1)) > 2
        with pytest.raises(IndexError):
            data.validation.rows([len(data.validation)])


def test_data_and_proportions_are_the_fingerprint(config: DataConfig, prepared: dict[str, tuple[Path, Manifest]], tmp_path: Path) -> None:
    first, second = config.mixture
    prints = []
    for mixture in (
        [first, second],
        [replace(first, path=str(prepared["mds"][0].parent / "." / "mds")), replace(second, path=str(tmp_path / "again"))],
        [replace(first, weight=0.6), replace(second, weight=0.4)],
        [second, first],
        [replace(first, path=str(prepared["webdataset"][0]), format="webdataset"), second],
    ):
        with opened(replace(config, mixture=mixture)) as data:
            prints.append(data.fingerprint)
    with opened(DataConfig(path=first.path, tokenizer="bytes")) as alone:
        prints.append(alone.fingerprint)
        assert alone.fingerprint == alone.manifest.fingerprint
    assert prints[0] == prints[1] and len(set(prints)) == len(prints) - 1, "where it lies does not count, what it is does"


def test_sources_that_do_not_fit_are_refused(config: DataConfig, other: Path) -> None:
    first, second = config.mixture
    for wrong, message in (
        (replace(second, format="mds"), "format=webdataset, asked for is format=mds"),
        (replace(second, path=second.path + "-none", remote=None), r"holds no manifest\.json"),
        (replace(second, remote=str(other / "none")), "cannot be fetched"),
    ):
        with pytest.raises(DataError, match=message):
            opened(replace(config, mixture=[first, wrong]))
    with pytest.raises(DataError, match=r"257 ids \(bytes\), data\.tokenizer=gpt2"):
        opened(replace(config, tokenizer="gpt2"))
