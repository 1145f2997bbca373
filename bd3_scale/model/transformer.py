"""The network: embedding, blocks, head. Reads like single-device code; parallelism is applied from outside.

Hidden states are [rows, batch, hidden], sequence first. Training rows are the two stream halves [x_t ; x_0], both with
positions 0..L-1. Any contiguous slice of the layers is a stage: the first embeds, the last has the head, and in between
hidden states are handed on. Invariants: parameters have the same names in a stage as in the whole network; only scored
(noisy) rows reach the head, and there only the selected positions; in the last layer the other rows yield keys and
values and nothing else (`selected.py`); a forward keeps no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from bd3_scale.attention.kernels import block_mask_of
from bd3_scale.compiling import of_any_size
from bd3_scale.distributed.sequence_shards import Stream
from bd3_scale.model.attention import DECODING, Attention, KeyValueCache, Rotary, SlotCache, SlotRows, rotary_tables
from bd3_scale.model.layers import (
    MLP,
    DropoutWords,
    KeyedDropout,
    LearnedPositions,
    Modulation,
    NoiseCondition,
    RowGroups,
    TensorParallelFactory,
    dropout_channels,
    dropout_keys,
    modulate,
)
from bd3_scale.model.loss_head import Head
from bd3_scale.model.norms import Norm
from bd3_scale.model.selected import SelectedRows
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.simplex import SimplexNoise
from bd3_scale.recipe.schema import ModelConfig


@dataclass(frozen=True)
class Rows:
    """The rows that a layer hands on, as this rank holds them: the first `count` of those that it gets, [count, batch, hidden]; or
    `selected` ones, [n / ranks, hidden]."""

    count: int
    groups: RowGroups | None = None
    """Which rows are conditioned alike; None: all of a sample."""
    selected: SelectedRows | None = None

    @property
    def conditioned(self) -> RowGroups | SelectedRows | None:
        return self.groups if self.selected is None else self.selected


@dataclass(frozen=True)
class ForwardContext:
    """What all layers of one forward use."""

    rotary: dict[str | None, Rotary]
    """By the kind that a layer has."""
    stream: Stream
    condition: Tensor | None
    """[batch or 1, conditioning_size]; where rows are in groups, [groups + 1, batch, conditioning_size]."""
    every: Rows
    """All rows."""
    scored: Rows
    """What is left of them behind the last layer."""
    kernel: str = "auto"
    """Of attention (see `attention.kernels.attend`)."""
    mask: Any = None
    """FlexAttention's of all rows; None where the kernel needs none."""
    scored_mask: Any = None
    """That of the last layer, where only scored rows ask."""
    segments: Tensor | None = None
    """int32 [batch, rows whose keys are asked for], where documents of a row are kept apart."""

    def handed_on(self, last: bool) -> Rows:
        return self.scored if last else self.every


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or, as `model.norm_place` has it, x + norm(attention(x)), or both, and so on. With
    adaLN each branch is shifted, scaled and gated."""

    def __init__(self, config: ModelConfig, factory: TensorParallelFactory, index: int) -> None:
        super().__init__()
        self.norms_after = config.norm_place == "after"
        self.attention_norm = Norm(config)
        self.attention = Attention(config, factory, index)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, factory)
        both = config.norm_place == "both"
        self.attention_output_norm = Norm(config) if both else None
        self.mlp_output_norm = Norm(config) if both else None
        self.modulation = Modulation(config, 6) if config.conditioning == "adaln" else None
        self.attention_dropout = KeyedDropout(config.dropout, 0)
        self.mlp_dropout = KeyedDropout(config.dropout, 1)

    def forward(self, x: Tensor, shared: ForwardContext, last: bool, words: DropoutWords | None) -> Tensor:
        """x [rows, batch, hidden] -> the same; in the `last` layer only the scored rows, or, [n, hidden], the selected ones."""
        modulation = self._modulation(shared.condition)
        rows = shared.handed_on(last)
        x = self.attention_half(x, modulation[:3], shared, last, words)
        return self.mlp_half(x if rows.selected is None else of_any_size(x, 0), modulation[3:], rows, words)

    def attention_half(
        self, x: Tensor, modulation: tuple[Tensor, ...], shared: ForwardContext, last: bool, words: DropoutWords | None
    ) -> Tensor:
        """The first sum; `modulation`: (shift, scale, gate), or nothing without adaLN."""
        rows = shared.handed_on(last)
        entering = modulated(self._before(self.attention_norm, x), modulation, shared.every.groups)
        if rows.selected is None:
            x, asking = x[: rows.count], entering[: rows.count]
        else:
            # Normed once more: to take them from the entering rows, too, would move them among the ranks a second time.
            x = rows.selected.take(x)
            asking = modulated(self._before(self.attention_norm, x), modulation, rows.selected)
        y = self.attention(asking, entering, shared, shared.scored_mask if last else shared.mask, rows.selected)
        y = self.attention_dropout(self._after(self.attention_norm, self.attention_output_norm, y), words)
        return gated_add(x, y, modulation, rows.conditioned)

    def mlp_half(self, x: Tensor, modulation: tuple[Tensor, ...], rows: Rows | None, words: DropoutWords | None) -> Tensor:
        """The second; without `rows` (decoding) all rows of a sample are conditioned alike."""
        conditioned = rows.conditioned if rows is not None else None
        y = self.mlp(modulated(self._before(self.mlp_norm, x), modulation, conditioned))
        y = self.mlp_dropout(self._after(self.mlp_norm, self.mlp_output_norm, y), words)
        return gated_add(x, y, modulation, conditioned)

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.norms_after else norm(x)

    def _after(self, norm: nn.Module, own: nn.Module | None, y: Tensor) -> Tensor:
        """`own`: the norm that stands behind alone."""
        if own is not None:
            return own(y)
        return norm(y) if self.norms_after else y

    def decode(
        self,
        x: Tensor,
        rotary: dict[str | None, Rotary],
        condition: Tensor | None,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same on rows that attend to a cache: (x, rotated k, v)."""
        modulation = self._modulation(condition)
        y, k, v = self.attention.decode(modulated(self._before(self.attention_norm, x), modulation[:3]), rotary, mask, past)
        x = gated_add(x, self._after(self.attention_norm, self.attention_output_norm, y), modulation[:3])
        return self.mlp_half(x, modulation[3:], None, None), k, v

    def _modulation(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        """(shift, scale, gate) of each half; nothing without adaLN."""
        return () if self.modulation is None or condition is None else tuple(self.modulation(condition))


def modulated(x: Tensor, modulation: tuple[Tensor, ...], groups: RowGroups | SelectedRows | None = None) -> Tensor:
    return _by_groups(groups, modulate, (x,), modulation[:2]) if modulation else x


def gated_add(x: Tensor, y: Tensor, modulation: tuple[Tensor, ...], groups: RowGroups | SelectedRows | None = None) -> Tensor:
    return _by_groups(groups, _gated, (x, y), modulation[2:]) if modulation else x + y


def _gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, y)


def _by_groups(
    groups: RowGroups | SelectedRows | None, function: Callable[..., Tensor], rows: tuple[Tensor, ...], vectors: tuple[Tensor, ...]
) -> Tensor:
    return function(*rows, *vectors) if groups is None else groups.apply(function, rows, vectors)


class Transformer(nn.Module):
    """A BD3-LM, or the stage of one that has `layers`. `vocabulary` is V, MASK (its last id) included; weights are empty
    until `initialise` or a checkpoint fills them."""

    def __init__(
        self, config: ModelConfig, vocabulary: int, mask_id: int, factory: TensorParallelFactory | None = None, layers: range | None = None
    ) -> None:
        super().__init__()
        self.config, self.factory = config, factory or TensorParallelFactory()
        self.kernel = config.attention
        layers = range(config.layers) if layers is None else layers
        self.layers = layers
        self.first, self.last = layers.start == 0, layers.stop == config.layers
        if self.first or (self.last and config.tied_head):
            self.embedding = self.factory.embedding(vocabulary, config.hidden)
        self.positions = LearnedPositions(config) if self.first and config.positions == "learned" else None
        self.blocks = nn.ModuleDict({str(index): Block(config, self.factory, index) for index in layers})
        adaptive = config.conditioning == "adaln"
        self.condition = NoiseCondition(config) if adaptive else None
        if self.last:
            self.final_norm = Norm(config)
            self.final_modulation = Modulation(config, 2) if adaptive else None
            self.head = Head(config, self.factory, vocabulary, mask_id, self.embedding.weight if config.tied_head else None)

    def forward(self, inputs: NetworkInputs, x: Tensor | None = None) -> Any:
        """The last stage (and the whole network): the objective's sum over the micro-batch, (sum of weight * nll as fp32
        scalar, nll fp32 [n] without gradient). Other stages: hidden states for the next one, whose `x` they are."""
        stream = self.factory.stream(inputs.pattern)
        rows = stream.row_ids(inputs.tokens.device)
        if x is None:
            tokens = inputs.tokens if inputs.simplex is not None else stream.in_gathered_order(inputs.tokens)
            x = self._embedded(tokens, inputs.positions[rows], inputs.simplex)
        rotary = rotary_tables(inputs.positions, self.config, self.layers)
        levels, pattern = inputs.noise_levels, inputs.pattern
        by_block = levels is not None and levels.dim() == 2
        condition = self._condition(F.pad(levels, (0, 1)) if levels is not None and by_block else levels, x)  # clean rows are at 0
        each, groups = None if condition is None else self.factory.shared_by_rows(condition), None
        if each is not None and by_block:
            each, groups = _of_groups(each, stream)
        every = Rows(stream.rows, groups)
        scored = self._scored(every, stream, inputs)
        shared = ForwardContext(rotary, stream, each, every, scored, self.kernel, *self._masks(inputs), inputs.segments)
        words = self._dropout_words(inputs, pattern.undivided_rows(rows), scored.selected)
        for (block, is_last), word in zip(self._layers(), words, strict=True):
            x = block(x, shared, is_last, word)
        if not self.last:
            return x
        x = self.factory.all_rows(x)
        if not inputs.sparse:
            x = x.transpose(0, 1).flatten(0, 1)[inputs.selected]
        place: tuple[Tensor, ...] = (inputs.selected // pattern.scored_rows,)
        if by_block:
            place = (inputs.selected % pattern.scored_rows // pattern.block_size, *place)
        final = self._final(x, condition, place)
        return self.head(final, inputs.targets, inputs.weights, inputs.uses_cross_entropy)

    def _embedded(self, tokens: Tensor, positions: Tensor, simplex: SimplexNoise | None) -> Tensor:
        """int64 [batch, all rows] -> [rows of this rank, batch, hidden]; `positions` int64 of the rows of this rank. The first rows
        are noised by `simplex`."""
        x = self.embedding(tokens, simplex)
        return x if self.positions is None else self.positions(x, positions)

    def _scored(self, every: Rows, stream: Stream, inputs: NetworkInputs) -> Rows:
        """The rows that the network's last layer hands on; stages without it do not ask."""
        if not (self.last and inputs.sparse):
            return replace(every, count=stream.scored)
        if every.groups is not None:
            raise ValueError("a network of which only some rows are scored cannot be conditioned on the noise of each block")
        selected = SelectedRows.of(inputs.selected, stream, len(inputs.tokens))
        return Rows(len(selected.row_ids), None, selected)

    def _masks(self, inputs: NetworkInputs) -> tuple[Any, Any]:
        """Of FlexAttention, outside of compiled code, which could not make them: for all rows and for the scored ones."""
        pattern, device = inputs.pattern, inputs.tokens.device
        every = block_mask_of(self.kernel, pattern, pattern.rows, device, inputs.segments)
        return every, block_mask_of(self.kernel, pattern, pattern.scored_rows, device, inputs.segments) if self.last else None

    def _dropout_words(self, inputs: NetworkInputs, rows: Tensor, selected: SelectedRows | None) -> list[DropoutWords | None]:
        """Of every layer; `rows`: which of the undivided stream this rank holds; the last layer may have `selected` some."""
        if not self.training or self.config.dropout == 0.0:
            return [None] * len(self.layers)
        channels = dropout_channels(self.config.hidden, rows.device)
        keys = dropout_keys(inputs.dropout_keys, self.layers).unbind()
        words: list[DropoutWords | None] = [DropoutWords(each, rows, channels) for each in keys]
        if selected is not None:
            words[-1] = DropoutWords(of_any_size(keys[-1][:, selected.samples], 1), selected.row_ids, channels)
        return words

    def _layers(self) -> Iterable[tuple[nn.Module, bool]]:
        """The blocks, each with whether it is the network's last."""
        return ((block, int(index) + 1 == self.config.layers) for index, block in self.blocks.items())

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KeyValueCache | SlotRows | None,
        mask: Tensor | None,
        commit: bool = False,
        last: int = 0,
        noise_levels: Tensor | None = None,
        simplex: SimplexNoise | None = None,
    ) -> Tensor:
        """Run rows against the cache: tokens int64 [b, n], positions int64 [n], or [b, n] -> logits fp32 [b, last, V] of the last rows.

        `mask` bool [n, cached + n], or [b, 1, n, cached + n] (cached rows first); None: everything is visible. `commit` appends
        the K and V of these rows to the cache; with last = 0 the head does not run. `noise_levels` float32: as in
        `NetworkInputs`, [b], or [b, n] of every row. `simplex` [b, k] noises the words of the last k rows.
        """
        noisy = 0 if simplex is None else simplex.keys.shape[1]
        if noisy:  # the embedding has noised rows first
            x = self._embedded(tokens.roll(noisy, 1), positions.roll(noisy, -1), simplex).roll(-noisy, 0)
        else:
            x = self._embedded(tokens, positions, None)
        rotary = rotary_tables(positions, self.config, self.layers)
        condition = self._condition(noise_levels, x)
        keys, values = [], []
        with sdpa_kernel(DECODING):
            for index, block in enumerate(self.blocks.values()):
                assert isinstance(block, Block)
                x, k, v = block.decode(x, rotary, condition, mask, cache.layer(index) if cache is not None else None)
                keys.append(k)
                values.append(v)
        if commit:
            if cache is None:
                raise ValueError("commit needs a cache")
            cache.append(keys, values, positions)
        if last == 0:
            return x.new_zeros((tokens.shape[0], 0, 0), dtype=torch.float32)
        condition = condition[-last:] if condition is not None and condition.dim() == 3 else condition
        wanted = self._final(x[-last:], condition).transpose(0, 1)
        return self.head(wanted.flatten(0, 1)).unflatten(0, (tokens.shape[0], last))

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for `capacity` rows of `batch` sequences, on the network's device."""
        return KeyValueCache(*self._cache_shape(batch, capacity))

    def new_slots(self, slots: int, capacity: int) -> SlotCache:
        """An empty cache for as many texts that begin and end at their own time, of `capacity` rows each."""
        return SlotCache(*self._cache_shape(slots, capacity))

    def _cache_shape(self, batch: int, capacity: int) -> tuple[int, int, int, int, int, torch.dtype, torch.device]:
        weight, config = self.embedding.weight, self.config
        kv_heads = max(1, config.kv_heads // self.factory.tensor)
        return config.layers, batch, capacity, kv_heads, config.head_size, weight.dtype, weight.device

    def _condition(self, noise_levels: Tensor | None, x: Tensor) -> Tensor | None:
        """[batch, conditioning_size], or [1, ...] for all alike, or [k, batch, ...] of levels [batch, k]; None without adaLN."""
        if self.condition is None:
            if noise_levels is not None:
                raise ValueError("noise levels are given to a network without conditioning, which would ignore them")
            return None
        # Block diffusion is not conditioned on time (paper, appendix): sigma = 0 for every row.
        levels = torch.zeros(1, device=x.device) if noise_levels is None else noise_levels
        condition: Tensor = self.condition(levels.t())
        return condition

    def _final(self, x: Tensor, condition: Tensor | None, place: tuple[Tensor, ...] = ()) -> Tensor:
        """x [..., batch, hidden]; or, with `place`, [n, hidden], each of which has the condition at its place: int64 [n] for every
        dimension of `condition` but the last."""
        x = self.final_norm(x)
        if self.final_modulation is None or condition is None:
            return x
        shift, scale = self.final_modulation(condition)
        if place and condition.shape[:-1].numel() > 1:
            shift, scale = shift[place], scale[place]
        return modulate(x, shift, scale)


def _of_groups(condition: Tensor, stream: Stream) -> tuple[Tensor, RowGroups]:
    """Conditions [B + 1, batch, size] of a row's blocks and, last, of its clean half -> those of the rows that a rank holds.

    Where ranks divide the rows inside of blocks, a group is the largest part of a block that no rank's border cuts.
    """
    block_size = stream.pattern.block_size
    groups = RowGroups(stream.scored, math.gcd(stream.scored, block_size))
    if stream.ranks > 1:
        first = torch.arange(0, stream.scored, groups.size, device=condition.device) + stream.rank * stream.scored
        condition = torch.cat([condition[first // block_size], condition[-1:]])
    return condition, groups
