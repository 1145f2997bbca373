"""Self-attention of one layer: projections, rotary positions by id, the kernel of the device, the cache.

Query and key/value are two linears because the last layer needs keys and values of all rows, and queries of few. Heads are laid
out so that dividing a weight's rows keeps whole heads together: query [kv_head, group, d], key/value [kv_head, 2, d].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from bd3_scale.attention.context_keys import all_keys
from bd3_scale.attention.kernels import attend
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.model.norms import AllHeadsNorm, HeadNorm
from bd3_scale.model.selected import SelectedRows
from bd3_scale.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from bd3_scale.model.transformer import ForwardContext

DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of torch's kernels: all but cuDNN's, which makes a plan for each shape that it meets, and a cache that grows has a new one every time."""

Rotary = tuple[Tensor, Tensor] | None
"""cos and sin, fp32 [rows, 1, 1, head_size / 2], or of every sample, [rows, batch, 1, head_size / 2]; None: nothing is turned."""


def rotary_tables(positions: Tensor, config: ModelConfig, layers: range) -> dict[str | None, Rotary]:
    """Of every kind that these layers have (`ModelConfig.rotary_of`), angles of the given position ids (int64 [rows], or [batch, rows]);
    once per forward, shared by all layers."""
    kinds = {config.rotary_of(layer) for layer in layers}
    return {kind: _rotary_table(positions, config, kind) if kind else None for kind in kinds}


def _rotary_table(positions: Tensor, config: ModelConfig, kind: str) -> tuple[Tensor, Tensor]:
    size, local = config.head_size, config.rotary_local if kind == "local" else None
    base = config.rotary_base if local is None else local[0]
    rate = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    if config.rotary_scaling is not None and local is None:
        factor, low, high, context = config.rotary_scaling
        turns = context * rate / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        rate = rate * (kept + (1 - kept) / factor)
    where = positions[:, None] if positions.dim() == 1 else positions.t()
    angle = (where.float()[..., None] * rate)[:, :, None, :]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the second half of the head dimension against the first. x [rows, batch, heads, d]."""
    if rotary is None:
        return x
    cos, sin = (t[: x.shape[0]] for t in rotary)
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Rows that ask, [query rows, batch, hidden], and x [rows, batch, hidden], of which keys and values come -> as those that ask;
    under tensor parallelism each rank attends with its heads."""

    def __init__(self, config: ModelConfig, factory: TensorParallelFactory, index: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.rotary_kind = config.rotary_of(index)
        bias = config.attention_bias != "none"
        self.query = factory.column(config.hidden, config.heads * config.head_size, bias)
        self.key_value = factory.key_value(config.hidden, config.kv_heads, config.head_size, bias)
        whole, normed = config.query_key_norm_width == "heads", config.query_key_norm
        self.query_norm = (AllHeadsNorm(config.heads, config, factory) if whole else HeadNorm(config)) if normed else None
        self.key_norm = (AllHeadsNorm(config.kv_heads, config, factory) if whole else HeadNorm(config)) if normed else None
        self.output = factory.row(config.heads * config.head_size, config.hidden, config.attention_bias == "all")

    def project(self, asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of the rows that ask, k and v of all: [rows, batch, heads of this rank, d], not yet rotated."""
        q = self.query(asking).unflatten(-1, (-1, self.head_size))
        k, v = self.key_value(x).unflatten(-1, (-1, 2, self.head_size)).unbind(-2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k, v

    def forward(self, asking: Tensor, x: Tensor, shared: ForwardContext, mask: Any, selected: SelectedRows | None = None) -> Tensor:
        """`asking`: the first rows of x; or, [n, hidden], those that are `selected`. `mask`: FlexAttention's for that many rows."""
        rotary, stream = shared.rotary[self.rotary_kind], shared.stream
        q, k, v = self.project(asking, x)
        q, k, v = stream.gather_halves(q) if selected is None else selected.spread(q), stream.gather_halves(k), stream.gather_halves(v)
        k, v = all_keys(rotate(k, rotary), v, stream.pattern)
        out = attend(rotate(q, rotary), k, v, stream.pattern, shared.kernel, shared.segments, mask).flatten(2)
        return self.output(stream.split_halves(out) if selected is None else selected.collect(out))

    def decode(
        self, x: Tensor, rotaries: dict[str | None, Rotary], mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the cached rows and to these, under `sdpa_kernel(DECODING)`: (output, rotated k, v) of these; nothing is stored."""
        q, k, v = self.project(x, x)
        q, k = rotate(torch.cat([q, k], 2), rotaries[self.rotary_kind]).split([q.shape[2], k.shape[2]], 2)
        seen_k, seen_v = (k, v) if past is None else (torch.cat([past[0], k]), torch.cat([past[1], v]))
        q, seen_k, seen_v = (t.permute(1, 2, 0, 3) for t in (q, seen_k, seen_v))
        out = F.scaled_dot_product_attention(q, seen_k, seen_v, attn_mask=mask, enable_gqa=q.shape[1] != seen_k.shape[1])
        return self.output(out.permute(2, 0, 1, 3).flatten(2)), k, v


class KeyValueCache:
    """Rotated K and V of the finished rows of all layers, in position order; at most `capacity` rows.

    Rotary positions are relative, so that rows keep their place when older ones are dropped.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.storage = torch.zeros(2, layers, capacity, batch, kv_heads, head_size, dtype=dtype, device=device)
        self.positions = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def length(self) -> int:
        return len(self.positions)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.storage[0, index, : self.length], self.storage[1, index, : self.length]

    def append(self, keys: list[Tensor], values: list[Tensor], positions: Tensor) -> None:
        """Add rows (one [n, batch, kv_heads, d] per layer). Raises ValueError beyond the capacity."""
        start, stop = self.length, self.length + len(positions)
        if stop > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} rows: {stop} do not fit; drop the oldest first")
        self.storage[0, :, start:stop] = torch.stack(keys)
        self.storage[1, :, start:stop] = torch.stack(values)
        self.positions = torch.cat([self.positions, positions])

    def drop(self, count: int) -> None:
        """Forget the `count` oldest rows."""
        left = self.length - count
        self.storage[:, :, :left] = self.storage[:, :, count : self.length].clone()
        self.positions = self.positions[count:]


class SlotCache:
    """Rotated K and V of texts that go on at their own pace: each slot is a ring of the last `capacity` rows of its text.

    Position q lies at place q % capacity. A slot that is cleared belongs to another text: what lies there is not seen any more.
    """

    def __init__(
        self, layers: int, slots: int, capacity: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.storage = torch.zeros(2, layers, capacity, slots, kv_heads, head_size, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        """Rows read of the text of each slot, on the host."""

    def clear(self, slot: int) -> None:
        self.lengths[slot] = 0

    def rows(self, slots: list[int], kept: list[bool]) -> SlotRows:
        """The cache of one call on these slots, of which those that are `kept` keep its rows."""
        return SlotRows(self, torch.tensor(slots), torch.tensor(kept))


class SlotRows:
    """What a call on some slots sees and leaves (`Transformer.decode`)."""

    def __init__(self, cache: SlotCache, slots: Tensor, kept: Tensor) -> None:
        self.cache, self.slots, self.kept = cache, slots, kept
        lengths = cache.lengths[slots]
        self.length = min(int(lengths.max()), cache.capacity)
        newest = lengths[:, None] - 1
        positions = newest - (newest - torch.arange(self.length)) % cache.capacity
        self.positions = positions.masked_fill(newest < 0, -1)
        """int64 [b, length] on the host: of the rows that `layer` gives; negative where there is none."""
        self._all = len(slots) == len(cache.lengths) and bool((slots == torch.arange(len(slots))).all())
        self._slots = slots.to(cache.storage.device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V [length, b, kv_heads, d]."""
        keys, values = self.cache.storage[:, index, : self.length]
        return (keys, values) if self._all else (keys.index_select(1, self._slots), values.index_select(1, self._slots))

    def append(self, keys: list[Tensor], values: list[Tensor], positions: Tensor) -> None:
        """Rows [n, b, kv_heads, d] per layer at `positions` int64 [b, n], one after another in each slot; n at most the capacity."""
        kept = self.kept.nonzero()[:, 0].to(positions.device)
        places, slots = positions[kept].t() % self.cache.capacity, self._slots[kept]
        for storage, new in zip(self.cache.storage, (keys, values), strict=True):
            storage[:, places, slots] = torch.stack(new).index_select(2, kept)
        self.cache.lengths[self.slots[self.kept]] += positions.shape[1]
