"""NELBO and perplexity of a checkpoint on any prepared rows, with standard error, by any number of processes.

What is measured is what validation measures during training (training/validation.py): t ~ U[1e-3, 1] and weight 1/t whatever
training did, exact where L' = 1 and for the next-token loss. With one draw, the run's own seed and its own held-out rows
the number is that of its validation. Invariants: a row's noise depends on (seed, draw, row index) alone; each row counts
once however the ranks share them; mean and error are taken over all rows in their order, so that one process and many give
the same number wherever their forwards do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bd3_scale.data.formats.row_reader import ShardReader
from bd3_scale.data.loader import Rows
from bd3_scale.data.manifest import MANIFEST, SPLITS, Manifest
from bd3_scale.distributed.context_share import ContextShare
from bd3_scale.distributed.layout import Layout
from bd3_scale.errors import DataError, RecipeError
from bd3_scale.files import expanded
from bd3_scale.generation.load_model import LoadedNetwork
from bd3_scale.objectives.network_inputs import row_losses
from bd3_scale.tuning.estimates import per_token, perplexity

MICRO_BATCH = 8
"""Rows of a forward, where the caller does not say."""


@dataclass(frozen=True)
class Likelihood:
    """nats per data token over a set of rows."""

    row_losses: np.ndarray
    """float64 [rows], nats, each the mean over its draws."""
    row_tokens: np.ndarray
    """int64 [rows]: tokens that count."""
    draws: int
    """Draws of noise per row; 1 where the likelihood is exact."""
    exact: bool
    """Whether this is the likelihood itself and not a bound of it."""

    @property
    def row_nelbo(self) -> np.ndarray:
        """float64 [rows], nats per data token of each."""
        return self.row_losses / self.row_tokens

    @property
    def nelbo(self) -> float:
        """Of all rows, nats per data token."""
        return self._moments[0]

    @property
    def standard_error(self) -> float:
        """Of the NELBO, over rows (data and noise together); nan for one row."""
        return self._moments[1]

    @property
    def perplexity(self) -> float:
        """exp of the NELBO."""
        return perplexity(self.nelbo)

    @property
    def _moments(self) -> tuple[float, float]:
        return per_token(self.row_losses, self.row_tokens)


def open_rows(folder: Path, split: str, loaded: LoadedNetwork) -> ShardReader:
    """The rows of one split of a prepared data folder for this network.

    Raises DataError where the folder is missing or damaged, and where its rows have another context, tokenizer or other
    special tokens than those the network was trained on.
    """
    folder = expanded(folder).absolute()
    if split not in SPLITS:
        raise RecipeError(f"split is {split!r}; set one of {', '.join(SPLITS)}")
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder}: holds no {MANIFEST}, so it is no prepared data folder; prepare it with bd3 prepare")
    manifest = Manifest.load(folder / MANIFEST)
    manifest.require(folder, context=loaded.recipe.model.context, tokenizer=loaded.tokenizer)
    trained = loaded.recipe.data.row_special
    if manifest.row_special != trained:
        raise DataError(
            f"{folder}: its rows have the special tokens {manifest.row_special!r}, the checkpoint was trained on rows with {trained!r}; "
            f"prepare the text again with --row-special {trained}"
        )
    return ShardReader(folder, split, context=loaded.recipe.model.context, tokenizer=loaded.tokenizer, manifest=manifest)


def require_likelihood(loaded: LoadedNetwork) -> None:
    """Raise RecipeError for an objective whose loss bounds no likelihood."""
    if not loaded.objective.traits.has_likelihood_bound:
        raise RecipeError(
            f"the checkpoint was trained with objective.kind={loaded.objective.kind}, which has no likelihood, nor a bound of it, and no "
            "perplexity; compare its texts: bd3 evaluate generation"
        )


@torch.no_grad()
def evaluate_likelihood(
    loaded: LoadedNetwork,
    rows: Rows,
    layout: Layout,
    *,
    count: int | None = None,
    draws: int = 1,
    seed: int | None = None,
    micro_batch: int = MICRO_BATCH,
    progress: bool = False,
) -> Likelihood:
    """The likelihood of the first `count` rows (None: all); collective in the world, with the same result on every rank.

    `draws`: passes with noise of their own, whose mean is taken row by row; the first is that of `seed` (None: the run's).
    Raises RecipeError for numbers that cannot work, DataError for rows that cannot be read.
    """
    require_likelihood(loaded)
    objective, exact = loaded.objective, loaded.objective.block_size == 1
    seed = loaded.recipe.run.seed if seed is None else seed
    for name, value in (("rows", count), ("draws", draws), ("micro-batch", micro_batch)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value} but must be at least 1")
    if not 0 <= seed < 2**63 - draws:
        raise RecipeError(f"seed is {seed} but must lie in [0, 2^63); set 0, for example")
    if exact and draws > 1:
        raise RecipeError(f"draws is {draws}, but this checkpoint has an exact likelihood without noise; leave it out")
    total = len(rows) if count is None else min(count, len(rows))
    if total == 0:
        raise DataError("there are no rows to evaluate; name another split")
    share = ContextShare(layout.context_rank, layout.context)
    mine = np.arange(layout.data_rank, total, layout.data, dtype=np.int64)
    values, counts = np.zeros(len(mine)), np.zeros(len(mine), np.int64)
    with tqdm(total=len(mine) * draws, unit="row", disable=None if progress and layout.is_main_rank else True) as bar:
        for first in range(0, len(mine), micro_batch):
            part = slice(first, first + micro_batch)
            tokens = rows.rows(mine[part])
            for draw in range(draws):
                inputs = objective.validation_inputs(tokens, mine[part], seed + draw)
                nll = share.joined(inputs, loaded.network(share.of(inputs).to(loaded.device))[1])
                values[part] += row_losses(inputs, layout.sum_of_context(nll)) / draws
                counts[part] = inputs.counted
                bar.update(len(tokens))
    losses, row_tokens = np.empty(total), np.empty(total, np.int64)
    # Tensor and context peers score the same rows: one of them speaks for the replica.
    for places, *found in layout.all_gather((mine, values, counts) if layout.reports_for_replica else (mine[:0], values[:0], counts[:0])):
        losses[places], row_tokens[places] = found
    return Likelihood(losses, row_tokens, draws, exact)
