"""Memory that elementwise kernels of a training step move, and how many kernels there are: the layers and the head, eager or compiled.

Counted is what a kernel reads and writes, operation by operation, of the code in `model/`; vectors (weights of norms, modulations, keys
of dropout) count nothing. Eager code starts a kernel for each operation. Compiled (`training.compile`), Inductor fuses what lies between
two products, and what its kernels then read and write was taken from its own count of one layer (torch 2.13, on CPU, without the copies
that attention wants there): a norm reads its residual's terms anew, gradients of vectors are kernels of their own, dropout costs
nothing but a neighbour's read.

How near that is: for a micro-batch of 8 x 1024 at L' = 16 it gives 309 and 134 GB (1.3B and 110M, eager), 92 and 23 GB (compiled), where
kernels counted on a stub of the CUDA driver moved 301, 139, 95 and 22.7.

Invariant: bytes are proportional to rows, and compiled never more than eager.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_scale.costs.activation_memory import Batch
from bd3_scale.costs.sizes import positions_per_chunk
from bd3_scale.recipe.schema import ModelConfig


@dataclass(frozen=True)
class Passes:
    """Bytes and kernels of a forward, and of the backward behind it."""

    forward: float = 0.0
    backward: float = 0.0
    forward_kernels: float = 0.0
    backward_kernels: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.forward_kernels + other.forward_kernels,
            self.backward_kernels + other.backward_kernels,
        )

    def times(self, count: int) -> Passes:
        return Passes(count * self.forward, count * self.backward, count * self.forward_kernels, count * self.backward_kernels)

    @property
    def bytes(self) -> float:
        return self.forward + self.backward

    @property
    def kernels(self) -> float:
        return self.forward_kernels + self.backward_kernels


HASH = 217
"""Bytes of an element's dropout mask in eager code: the product with the channel, `hash32` and the comparison, in int64."""


def attention_half(batch: Batch, last: bool, compiled: bool) -> Passes:
    """Norm, rotary, dropout, residual of a layer; `last`: of the network's last, where few rows ask."""
    config, w = batch.config, batch.weight
    held, asking = batch.held(batch.computed(False)) * config.hidden, batch.held(batch.computed(last)) * config.hidden
    everything = batch.pattern.rows * batch.rows
    queries = batch.pattern.scored_rows * batch.rows if last else everything
    query = queries * config.heads * config.head_size // batch.tensor
    key = everything * max(1, config.kv_heads // batch.tensor) * config.head_size
    before = config.norm_place != "after"
    total = _norm(held if before else asking, w, compiled, residual_terms=0)
    if config.norm_place == "both":
        total += _norm(asking, w, compiled, residual_terms=0)
    if last and batch.sparse:
        # Taken, normed once more; queries spread and attention's output collected, and the same backwards.
        moved = 2 * w * (2 * asking + 2 * batch.selected * config.heads * config.head_size // batch.tensor + query)
        total += Passes(moved / 2, moved / 2, 4, 6) + (_norm(asking, w, compiled, residual_terms=0) if before else Passes())
    if config.positions == "rotary":
        total += _rotary(query, w, compiled) + _rotary(key, w, compiled)
    if config.query_key_norm:
        total += _norm(query, w, compiled) + _norm(key, w, compiled)
    # Gradients of keys and values are put side by side (rotary's kernel has the keys where it is fused); the kernel's own correction of
    # the scores' gradient reads its output and that one's gradient; the gradients of the rows that ask and of all rows are added (compiled
    # in the norm's kernel).
    total += Passes(0, (2 if compiled else 4) * w * key + 2 * w * query + (0 if compiled else 3) * w * asking, 0, 3)
    biases = {"none": 0, "query_key_value": 2, "all": 3}[config.attention_bias]
    total += Passes(0, w * (query + 2 * key) if biases else 0, 0, biases)
    return total + _output_side(asking, config, w, compiled)


def mlp_half(batch: Batch, last: bool, compiled: bool) -> Passes:
    """Norm, activation, dropout, residual."""
    config, w = batch.config, batch.weight
    rows = batch.computed(last)
    held, units = batch.held(rows) * config.hidden, rows * (config.mlp_size // batch.tensor)
    gated = config.gated
    swiglu = Passes(3 * w, 5 * w, 1, 1) if compiled else Passes(5 * w, 13 * w, 2, 4)
    activation = swiglu if gated else Passes(2 * w, 3 * w, 1, 1)
    # Compiled, attention's residual is added here, and once more with the MLP's: neither sum is kept.
    total = _norm(held, w, compiled, residual_terms=5) + _of(units, activation)
    if config.norm_place == "both":
        total += _norm(held, w, compiled, residual_terms=0)
    if config.mlp_bias:
        total += Passes(0, w * (units * (2 if gated else 1) + held), 0, 2)
    return total + _output_side(held, config, w, compiled)


def head_passes(batch: Batch, vocabulary: int) -> Passes:
    """The cross-entropy and its gradient, formed in the forward, chunk by chunk; and the sum of the weight's gradient over chunks."""
    config, w, n = batch.config, batch.weight, batch.selected
    fused = batch.fused_loss
    share = -(-vocabulary // batch.tensor)
    chunks = -(-n // positions_per_chunk(share, batch.device, batch.fused_loss))
    cast = w + 4 if w < 4 else 0
    # Eager: copy to fp32; maximum; subtract; exp; sum; divide; weigh; back. Fused: maximum, sum, gradient in place of the logits.
    logits = 4 * w if fused else 2 * cast + 4 + 8 + 8 + 4 + 8 + 8
    # The first chunk's product to fp32, that of others added to it; scaled and rounded at the end.
    weights = share * config.hidden * (cast + (chunks - 1) * (w + 8) + 4 + w)
    bias = w * n * share if config.head_bias else 0
    return Passes(n * share * logits + weights + bias, 0, chunks * (12 if fused else 26), 4)


def embedding_passes(batch: Batch, vocabulary: int) -> Passes:
    """Rows looked up; a gradient of zeros into which those of the rows are added."""
    rows = batch.held(batch.computed(False)) * batch.config.hidden
    weight = -(-vocabulary // batch.tensor) * batch.config.hidden
    return Passes(2 * batch.weight * rows, batch.weight * (weight + 3 * rows), 6, 8)


def final_norm(batch: Batch, compiled: bool) -> Passes:
    return _norm(batch.selected * batch.config.hidden, batch.weight, compiled)


def _of(elements: float, one: Passes) -> Passes:
    return Passes(elements * one.forward, elements * one.backward, one.forward_kernels, one.backward_kernels)


def _norm(elements: float, w: int, compiled: bool, residual_terms: int | None = None) -> Passes:
    """In fp32. With `residual_terms` (None: no residual passes it) the gradient of the residual is added to the norm's, and compiled, so
    many reads and writes of residuals are added."""
    if compiled:
        return _of(elements, Passes(2 * w, 5 * w, 1, 3) if residual_terms is None else Passes((2 + residual_terms) * w, 7.5 * w, 1, 3))
    cast = w + 4 if w < 4 else 0
    casts = 2 if cast else 0
    backward = 2 * cast + 12 + 8 + (0 if residual_terms is None else 3 * w)
    return _of(elements, Passes(2 * cast + 8, backward, 2 + casts, 3 + casts))


def _rotary(elements: float, w: int, compiled: bool) -> Passes:
    """Four products of halves, a sum, a difference, and halves put together; in fp32."""
    if compiled:
        return _of(elements, Passes(3 * w, 3 * w, 1, 1))
    cast = w + 4 if w < 4 else 0
    return _of(elements, Passes(2 * cast + 16 + 12 + 8, 2 * cast + 4 + 16 + 12 + 8, 9, 10))


def _output_side(elements: float, config: ModelConfig, w: int, compiled: bool) -> Passes:
    """Modulation on the way in, dropout, gate, and the sum with the residual."""
    adaptive = config.conditioning == "adaln"
    total = Passes()
    if compiled:
        return total + (_of(elements, Passes(1.75 * w, 6 * w, 2, 9)) if adaptive else total)
    if config.dropout:
        total += _of(elements, Passes(HASH + 1 + 4 * w, 1 + 4 * w, 36, 2))
    total += _of(elements, Passes(3 * w, 0, 1, 0))
    if adaptive:
        total += _of(elements, Passes(4 * w, 13 * w, 4, 8)) + Passes(0, 0, 4, 8)
    return total
