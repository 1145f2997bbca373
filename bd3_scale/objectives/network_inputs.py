"""What an objective hands to the network, and what the network's answers say about blocks and rows.

The network answers `NetworkInputs` with one negative log-likelihood (nll), or a score entropy, per selected position; here
these become losses per block and per row. Invariants: sums are divided by data tokens, never by masked ones; token 0 of a row is never
counted; padding adds exactly nothing; the losses of a row depend on no other row of the micro-batch, bit for bit.

Not all tokens of a row need to count (`data.counted`). A block is denoised from its first token that counts to its end: what stands before
that is known, as a prompt is to the sampler, and what stands behind the last one, such as ends of text up to the end of the block, is
predicted, too, because a sampler fills whole blocks and has to learn where a text ends. That adds to the loss (a text that ends is all of
that), and to no count of tokens. Blocks without a token that counts are neither masked nor scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bd3_scale.attention.mask import AttentionPattern, document_segments
from bd3_scale.data.counted import counted, ids
from bd3_scale.errors import DataError
from bd3_scale.objectives.simplex import SimplexNoise


@dataclass(frozen=True)
class NetworkInputs:
    """One micro-batch of m rows of L data tokens, ready for the network. Made on the host, then moved.

    `selected` ascends over its first entries; padding entries follow with position 0, target 0, weight 0. There is always
    at least one entry, so that no kernel meets an empty tensor.
    """

    tokens: Tensor
    """int64 [m, pattern.rows]: [x_t ; x_0] for block diffusion (an x_t for every draw), x_t for masked diffusion, x_0 for the next-token
    loss; for ssdlm x_0 in place of x_t, of which the network sees what `simplex` leaves. Of the clean half the first `clean_rows`."""
    positions: Tensor
    """int64 [pattern.rows]: rotary position of each row of the network, from 0 in every stream."""
    selected: Tensor
    """int64 [n]: flat index b * pattern.scored_rows + i of each scored position of sample b in its scored rows (the first ones)."""
    targets: Tensor
    """int64 [n]: the token to predict at each selected position: token i, for the next-token loss token i + 1."""
    weights: Tensor
    """float32 [n]: loss weight of each selected position; 0 marks padding."""
    dropout_keys: Tensor
    """int64 [m] in [0, 2^32): seed for the dropout of each row."""
    pattern: AttentionPattern
    denoised: np.ndarray
    """int64 [m, B]: tokens of each block of data that can be masked and scored (`DataRows.denoised`); stays on the host."""
    counted: np.ndarray
    """int64 [m]: tokens of each row that count; stays on the host."""
    segments: Tensor | None = None
    """int32 [m, pattern.key_rows]: which document of its row each row of the network is in; None where rows are one text."""
    noise_levels: Tensor | None = None
    """float32: how noisy the input is, for networks conditioned on it; None: for the others. [m]: each row (sedd's sigma). [m, draws B]:
    each noisy block of [x_t ; x_0], whose clean half is then at 0 (ssdlm's time)."""
    uses_cross_entropy: bool = True
    """Whether positions are scored by cross-entropy, or by the score entropy of exp(logits) (see `sedd`)."""
    sparse: bool = False
    """Whether many of the scored rows are not selected: the network's last layer then computes the selected ones alone, and of the
    others keys and values. The answer is the same."""
    simplex: SimplexNoise | None = None
    """What becomes of the words of the scored rows, [m, draws L], before the network sees them (ssdlm; see `simplex`); None: nothing."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NetworkInputs:
        """A copy on `device`. `non_blocking` to CUDA goes through pinned memory, without which it would block."""
        pin = non_blocking and torch.device(device).type == "cuda"

        def move(value: Tensor) -> Tensor:
            value = value.pin_memory() if pin and not value.is_cuda else value
            return value.to(device, non_blocking=non_blocking)

        return self._moved(move)

    def pinned(self) -> NetworkInputs:
        """A copy in pinned memory, from which copies to a device need not wait; what is there already stays."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> NetworkInputs:
        return NetworkInputs(
            tokens=move(self.tokens),
            positions=move(self.positions),
            selected=move(self.selected),
            targets=move(self.targets),
            weights=move(self.weights),
            dropout_keys=move(self.dropout_keys),
            pattern=self.pattern,
            denoised=self.denoised,
            counted=self.counted,
            segments=None if self.segments is None else move(self.segments),
            noise_levels=None if self.noise_levels is None else move(self.noise_levels),
            uses_cross_entropy=self.uses_cross_entropy,
            sparse=self.sparse,
            simplex=None if self.simplex is None else self.simplex.moved(move),
        )


@dataclass(frozen=True)
class DataRows:
    """m rows of data as objectives look at them."""

    tokens: np.ndarray
    """int64 [m, L]: ids."""
    denoised: np.ndarray
    """bool [m, L]: what noise may hit, and what is scored."""
    counted: np.ndarray
    """int64 [m]: tokens that count."""

    @classmethod
    def of(cls, rows: np.ndarray, count: int, pattern: AttentionPattern, mask_id: int) -> DataRows:
        """Of rows int64 [count, L] as readers give them. Raises ValueError for another shape, DataError for an id that is MASK or more."""
        rows = np.asarray(rows, np.int64)
        if rows.shape != (count, pattern.length):
            raise ValueError(f"rows have shape {rows.shape}, their noise {(count, pattern.length)}; both must be [rows, model.context]")
        tokens, counts = ids(rows), counted(rows)
        if tokens.size and tokens.max() >= mask_id:
            raise DataError(
                f"rows hold token ids {tokens.min()}..{tokens.max()}, but data ids must lie in [0, {mask_id}) because "
                f"{mask_id} is MASK; pack the data with the recipe's tokenizer"
            )
        blocks = counts.reshape(count, -1, pattern.block_size)
        begun = np.maximum.accumulate(blocks, axis=2)
        going_on = np.maximum.accumulate(blocks[:, :, ::-1], axis=2)[:, :, ::-1]
        return cls(tokens, (blocks | (begun & ~going_on)).reshape(rows.shape), counts.sum(1))

    def of_blocks(self, block_size: int) -> np.ndarray:
        """`denoised` tokens of each block: int64 [m, B]."""
        return self.denoised.reshape(len(self.tokens), -1, block_size).sum(2)


def network_inputs(
    scored: np.ndarray,
    rows: DataRows,
    selected: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    dropout_keys: np.ndarray,
    pattern: AttentionPattern,
    pad_to: int,
    sparse: bool = False,
) -> NetworkInputs:
    """`NetworkInputs` of the scored rows int64 [m, pattern.scored_rows], the rows of data, and of host arrays of the same names, the
    selected positions padded to a multiple of `pad_to`."""
    capacity = -(-max(len(selected), 1) // pad_to) * pad_to
    padding = (0, capacity - len(selected))
    return NetworkInputs(
        tokens=torch.from_numpy(np.concatenate([scored, rows.tokens[:, : pattern.clean_rows]], axis=1)),
        positions=torch.from_numpy(np.arange(pattern.rows) % pattern.length),
        selected=torch.from_numpy(np.pad(selected, padding)),
        targets=torch.from_numpy(np.pad(targets, padding)),
        weights=torch.from_numpy(np.pad(weights, padding).astype(np.float32)),
        dropout_keys=torch.from_numpy(dropout_keys),
        pattern=pattern,
        denoised=rows.of_blocks(pattern.block_size),
        counted=rows.counted,
        segments=torch.from_numpy(document_segments(rows.tokens, pattern)) if pattern.document_end is not None else None,
        sparse=sparse,
    )


def scored_rows(inputs: NetworkInputs, real: int) -> NetworkInputs:
    """The same inputs of which only the first `real` rows of data are scored: the others become padding, which adds exactly nothing to
    loss, gradients and statistics. Shapes stay as they are."""
    if real == inputs.tokens.shape[0]:
        return inputs
    ours = inputs.selected < real * inputs.pattern.scored_rows
    return replace(
        inputs,
        selected=torch.where(ours, inputs.selected, 0),
        targets=torch.where(ours, inputs.targets, 0),
        weights=torch.where(ours, inputs.weights, 0.0),
    )


@dataclass(frozen=True)
class BlockSamples:
    """Single blocks as one validation pass shows them, m rows of k draws: what the interval tuner lives on."""

    times: np.ndarray
    """float64 [m, k]: t of each block."""
    losses: np.ndarray
    """float64 [m, k]: mean weighted loss of each block, linear schedule; meaningless where `maskable` is 0."""
    masked: np.ndarray
    """int64 [m, k]: masked tokens of each block."""
    maskable: np.ndarray
    """int64 [m, k]: tokens of each block that can be masked (token 0 of a row is none); 0 marks a block to leave out."""


def counted_tokens(pattern: AttentionPattern) -> np.ndarray:
    """Data tokens of each block where all tokens count, int64 [B]: L', one less in the first block (0 there when L' = 1)."""
    counts = np.full(pattern.length // pattern.block_size, pattern.block_size, np.int64)
    counts[0] -= 1
    return counts


def _block_sums(inputs: NetworkInputs, values: np.ndarray) -> np.ndarray:
    """Sum of float64 [n] `values` over each block's selected positions, float64 [m, B] of m noisy rows; padding adds exactly nothing."""
    pattern = inputs.pattern
    rows, blocks = inputs.tokens.shape[0] * pattern.draws, pattern.length // pattern.block_size
    # The last row of a causal pattern is never selected, so that the predicted token i + 1 stays in its own sample.
    predicted = inputs.selected.cpu().numpy() + (pattern.kind == "causal")
    return np.bincount(predicted // pattern.block_size, values, minlength=rows * blocks).reshape(rows, blocks)


def _weighted(inputs: NetworkInputs, nll: Tensor) -> np.ndarray:
    weights = inputs.weights.detach().cpu().double().numpy()
    return np.multiply(weights, nll.detach().cpu().double().numpy(), out=np.zeros_like(weights), where=weights > 0)


def block_losses(inputs: NetworkInputs, nll: Tensor) -> np.ndarray:
    """Mean weighted loss of every block, float64 [m, B], in nats per token of it.

    `nll`: float [n], one per selected position, as the network returns it. Each block's sum is divided by its tokens that can be masked
    (L', L' - 1 in the first block, where all count), not by its masked ones: a block without masked tokens has loss 0. A block that has
    none, as the first one with L' = 1, has the loss nan: leave it out. Of the next-token loss every token is a block.
    """
    counts = np.repeat(inputs.denoised, inputs.pattern.draws, axis=0).astype(np.float64)
    sums = _block_sums(inputs, _weighted(inputs, nll))
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def masked_counts(inputs: NetworkInputs) -> np.ndarray:
    """Scored tokens of every block, int64 [m, B]: the masked ones, for the next-token loss all that count."""
    return _block_sums(inputs, (inputs.weights.cpu().numpy() > 0).astype(np.float64)).astype(np.int64)


def weight_sums(inputs: NetworkInputs) -> np.ndarray:
    """Sum of the loss weights of every block, float64 [m, B]."""
    return _block_sums(inputs, inputs.weights.cpu().double().numpy())


def row_losses(inputs: NetworkInputs, nll: Tensor) -> np.ndarray:
    """Weighted loss of every row of data, float64 [m], in nats, from `validation_inputs` and their nll [n]."""
    return _block_sums(inputs, _weighted(inputs, nll)).sum(axis=1)


def row_nelbo(inputs: NetworkInputs, nll: Tensor) -> np.ndarray:
    """The same in nats per data token that counts: the NELBO of every row; nan of a row without any."""
    sums = row_losses(inputs, nll)
    return np.divide(sums, inputs.counted, out=np.full_like(sums, np.nan), where=inputs.counted > 0)
