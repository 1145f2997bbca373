"""Bytes of activations on one rank, from the recipe alone: what a forward leaves behind for its backward, and how often.

Counted are the tensors that autograd keeps, operation by operation, of one micro-batch of b rows (n: rows of the network that a
rank computes, (k + 1) L b for block diffusion with k draws; r: the part of them that it holds between the linears,
n / tensor under sequence parallelism; w: bytes of a weight that computes; h hidden; q, k: width of the query heads and of the key
heads on this rank; m: MLP units on this rank). Kept by one layer:

| what | bytes |
|---|---|
| the two norms: input in fp32, statistics | 8 r h, some |
| their outputs, which the linears take (adaLN: before and after the modulation) | 2 w r h (4 w r h) |
| attention, tiled | w (3 n q + n k + v), and the log-sum-exp; FlexAttention: one n q less |
| v, which is kept with the fused key/value output that it is a view of | 2 w n k, w n k where rows are put in order |
| under context parallelism that gathers, instead k and v of all rows that are asked for, put in order | 2 w (n + L b (C - 1) / C) k |
| MLP: GELU, SwiGLU and GEGLU | 2 w n m, 4 w n m |
| dropout masks, bool; adaLN: what the gates multiply | 2 r h; 2 w r h |

In the last layer everything behind keys and values is of the scored rows alone: of the selected ones, which are normed once more, and
for which attention keeps its queries and outputs of the whole scored half and gathers theirs; or, where every token is scored, of that
half. Vectors of each sample's noise (sedd) are repeated for the selected rows. The head keeps the gradient of its weight
in fp32, formed in the forward (model/loss_head.py). Of what `training.recompute` names (a layer, or the half of it with the attention or
the MLP) the input alone is kept, w r h, and one at a time is whole. A half frees about as many bytes as the other for a FLOP of computing
it again.
A pipeline rank keeps as many micro-batches as its schedule has under way. Invariant: a test measures all of it on CPU.
With `training.compile` Inductor computes some of this again instead of keeping it: the numbers are then an upper bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bd3_scale.attention.mask import AttentionPattern
from bd3_scale.costs.pipeline_stages import micro_batch_group
from bd3_scale.costs.sizes import VOCABULARY_MULTIPLE, padded_vocabulary, positions_per_chunk
from bd3_scale.recipe.environment import resolve_attention
from bd3_scale.recipe.objective_kinds import KINDS, Kind
from bd3_scale.recipe.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one tensor rank; under context parallelism the share of one rank, which `pattern` is."""

    config: ModelConfig
    pattern: AttentionPattern
    rows: int
    """b, rows of L data tokens, each with all its draws."""
    selected: int
    """Scored positions that reach the head."""
    tensor: int = 1
    sequence: bool = False
    weight: int = 4
    """Bytes of a number in the weights that compute: 2 in bf16."""
    device: str = "cpu"
    kind: Kind = KINDS["bd3"]

    @property
    def sparse(self) -> bool:
        """Whether the last layer computes the selected rows alone."""
        return not self.kind.scores_every_token

    @property
    def kernel(self) -> str:
        """tiled | flex | dense | sdpa (patterns of one half)."""
        pattern = self.pattern
        masked = pattern.ring or pattern.kind == "block_diffusion" or (pattern.kind == "causal" and pattern.context_ranks > 1)
        if not masked and self.config.attention != "dense":
            return "sdpa"
        chosen = resolve_attention(self.config.attention, self.device)
        return "flex" if chosen.startswith("flex") else chosen  # its backends keep the same

    @property
    def fused_loss(self) -> bool:
        """Whether the head's loss is compiled."""
        return self.config.head_loss == "fused" and self.kind.uses_cross_entropy

    def computed(self, last: bool) -> int:
        """Rows that the MLP of a layer computes, of the whole micro-batch; `last`: of the network's last."""
        if last and self.sparse:
            return self.selected
        return self.rows * (self.pattern.scored_rows if last else self.pattern.rows)

    def held(self, rows: int) -> int:
        """Of `rows` of a whole micro-batch, those on this rank between the linears."""
        return rows // (self.tensor if self.sequence else 1)

    @property
    def hidden_states(self) -> int:
        """Bytes of what a layer hands on to the next, on this rank."""
        return self.weight * self.held(self.computed(False)) * self.config.hidden


@dataclass(frozen=True)
class Kept:
    """Bytes that one forward of a chunk of layers leaves for its backward."""

    layers: int
    """Of the layers, and the rotary tables."""
    head: int
    """Of the final norm and the head: its input's and its weight's gradient."""
    boundary: int
    """Hidden states that the schedule keeps beside autograd."""

    @property
    def total(self) -> int:
        return self.layers + self.head + self.boundary


def layer_bytes(batch: Batch, last: bool) -> int:
    """What one layer keeps without recomputation; `last`: the network's last one, whose other rows yield keys and values only."""
    return attention_half_bytes(batch, last) + mlp_half_bytes(batch, last)


def recomputed_bytes(batch: Batch, last: bool, recompute: str) -> int:
    """The part of `layer_bytes` that `training.recompute` does not keep."""
    attention, mlp = attention_half_bytes(batch, last), mlp_half_bytes(batch, last)
    return {"none": 0, "attention": attention, "mlp": mlp, "layer": attention + mlp}[recompute]


def input_bytes(batch: Batch, last: bool, recompute: str) -> int:
    """What is kept in its place: the input of that part of the layer, of which the MLP's has the scored rows alone in the last layer."""
    rows = batch.computed(last and recompute == "mlp")
    return 0 if recompute == "none" else batch.weight * batch.held(rows) * batch.config.hidden


def attention_half_bytes(batch: Batch, last: bool) -> int:
    """Norm, modulation, attention, its dropout and gate."""
    config, before, after = batch.config, batch.held(batch.computed(False)), batch.held(batch.computed(last))
    taken = _input_side_bytes(batch, after, last) if last and batch.sparse else 0
    shared_keys = config.kv_heads % batch.tensor != 0
    # Gathered outside of the linear, and so kept whole.
    gathered = batch.weight * config.hidden * batch.pattern.rows * batch.rows if shared_keys and batch.sequence else 0
    return _input_side_bytes(batch, before) + taken + gathered + attention_bytes(batch, last) + _output_side_bytes(batch, after, last)


def mlp_half_bytes(batch: Batch, last: bool) -> int:
    """Norm, modulation, MLP, its dropout and gate."""
    rows = batch.computed(last)
    units = batch.config.mlp_size // batch.tensor * (4 if batch.config.gated else 2)
    mlp = batch.weight * rows * units
    return _input_side_bytes(batch, batch.held(rows), last) + mlp + _output_side_bytes(batch, batch.held(rows), last)


def _input_side_bytes(batch: Batch, rows: int, last: bool = False) -> int:
    copies = (2 if batch.config.conditioning == "adaln" else 1) + _repeated(batch, last)
    norm = norm_bytes(batch, rows) if batch.config.norm_place != "after" else 0
    return norm + batch.weight * batch.config.hidden * rows * copies


def _output_side_bytes(batch: Batch, rows: int, last: bool) -> int:
    dropout = 1 if batch.config.dropout else 0
    gate = batch.weight if batch.config.conditioning == "adaln" else 0
    norm = norm_bytes(batch, rows) if batch.config.norm_place != "before" else 0
    return norm + (dropout + gate + batch.weight * _repeated(batch, last)) * rows * batch.config.hidden


def _repeated(batch: Batch, last: bool) -> int:
    """Vectors that each row has of its own: the scale on the way into a half, the gate on the way out."""
    return 1 if last and batch.sparse and batch.kind.noise_conditioned else 0


def norm_bytes(batch: Batch, rows: int, width: int | None = None) -> int:
    """A norm over `width` (default: hidden) of `rows` vectors: its fp32 input and statistics."""
    width = batch.config.hidden if width is None else width
    if batch.config.norm == "rmsnorm":
        return rms_bytes(batch, rows, width)
    return 4 * rows * width + 8 * rows


def rms_bytes(batch: Batch, rows: int, width: int, composed: bool = False) -> int:
    """CUDA has one kernel for it; on CPU, or over tensor ranks, it is `composed`, and the normed rows are kept before the weight multiplies
    them."""
    return (4 if batch.device == "cuda" and not composed else 8) * rows * width + 4 * rows


def attention_bytes(batch: Batch, last: bool) -> int:
    """From the outputs of query and key/value linears to the input of the output linear."""
    config, pattern, w = batch.config, batch.pattern, batch.weight
    heads, key_heads = config.heads // batch.tensor, max(1, config.kv_heads // batch.tensor)
    everything = pattern.rows * batch.rows
    # Tiles are whole, whatever the clean half is short of.
    whole = pattern.streams * pattern.length * batch.rows if batch.kernel == "tiled" and pattern.clean_rows else everything
    queries = pattern.scored_rows * batch.rows if last else whole
    selected = batch.selected if last and batch.sparse else 0
    query, key = queries * heads * config.head_size, everything * key_heads * config.head_size
    reordered = batch.sequence and pattern.rows != pattern.scored_rows  # `Stream.together` copies
    rotated = config.positions == "rotary"
    normed = config.query_key_norm
    keys_and_values = (2 * key if normed or not reordered else 0) + (key if reordered else 0)  # v; with k as the linear gives it
    keys_and_values += key if rotated or reordered or normed else 0  # k
    if pattern.context_ranks > 1 and not pattern.ring:
        asked = pattern.key_rows * batch.rows * key_heads * config.head_size
        keys_and_values = 2 * asked + (2 * key if normed else 0)
    # q; the output; for the tiles, and by flash attention, in an order of their own, so that the rows are copied once more.
    # Of those that are selected, what they are copied to is gathered.
    copied = batch.kernel == "tiled" or (batch.kernel == "sdpa" and batch.device == "cuda")
    outputs = selected * heads * config.head_size if selected else (query if copied else 0)
    total = w * (2 * query + outputs + keys_and_values) + 4 * queries * heads
    if batch.kernel == "dense":
        total += w * (pattern.scored_rows if last else pattern.rows) * pattern.key_rows  # the mask, in numbers
    if normed:
        together = config.query_key_norm_width == "heads"
        for rows, count in ((selected or queries, heads), (everything, key_heads)):
            vectors, width = (rows, count * config.head_size) if together else (rows * count, config.head_size)
            total += rms_bytes(batch, vectors, width, composed=together and batch.tensor > 1)
        total -= 4 * key if w == 4 and not together else 0  # k before the norm is part of the fused output
    return total


def kept_bytes(batch: Batch, layers: range, vocabulary: int, *, recompute: str, pipeline: bool, interleaved: bool) -> Kept:
    """What one forward of the chunk that holds `layers` keeps; `vocabulary` is V, MASK included."""
    config, pattern, w = batch.config, batch.pattern, batch.weight
    first, last = layers.start == 0, layers.stop == config.layers
    each = [
        layer_bytes(batch, end) - recomputed_bytes(batch, end, recompute) + input_bytes(batch, end, recompute)
        for end in (index + 1 == config.layers for index in layers)
    ]
    rotary = 4 * pattern.rows * config.head_size * len({config.rotary_of(layer) for layer in layers} - {None})
    masked = 9 * pattern.rows * batch.rows if first and batch.tensor > 1 else 0  # the ids of other ranks
    chosen = 24 * batch.selected if last and batch.sparse else 0  # where the selected rows lie
    # The schedule holds what came from the stage before, which autograd keeps as it is, or in fp32 only, for the first norm.
    kept_as_it_is = w == 4 or recompute in ("attention", "layer") or config.norm_place == "after"
    received = batch.hidden_states if pipeline and not first and not kept_as_it_is else 0
    sent = batch.hidden_states if interleaved and not last else 0
    return Kept(sum(each) + rotary + masked + chosen, head_bytes(batch, vocabulary) if last else 0, received + sent)


def head_bytes(batch: Batch, vocabulary: int) -> int:
    """The final norm of the selected positions; the gradients that the head forms in its forward."""
    config, hidden, n = batch.config, batch.config.hidden, batch.selected
    share = padded_vocabulary(vocabulary, batch.tensor, VOCABULARY_MULTIPLE[batch.device]) // batch.tensor
    copies = (1 if config.conditioning == "adaln" else 0) + _repeated(batch, True)
    norm = norm_bytes(batch, n) + batch.weight * n * hidden * copies
    return norm + batch.weight * n * hidden + 4 * share * (hidden + config.head_bias)


def logits_bytes(batch: Batch, vocabulary: int) -> int:
    """Alive at a time in the head: a chunk's logits, their fp32 copy, its exponentials, their gradient in the weight's type; fused, the
    gradient takes the place of the logits."""
    share = -(-vocabulary // batch.tensor)
    chunk = min(positions_per_chunk(share, batch.device, batch.fused_loss), batch.selected)
    if batch.fused_loss:
        return chunk * share * batch.weight
    return chunk * share * ((4 + 4) if batch.weight == 4 else (2 + 4 + 4 + 2))


def working_bytes(batch: Batch, *, recompute: str) -> int:
    """Beside what is kept, in a backward: the part of a layer that is computed again, and the gradients inside one MLP."""
    config, everything = batch.config, batch.pattern.rows * batch.rows
    units = config.mlp_size // batch.tensor * (3 if config.gated else 2)
    gradients = batch.weight * everything * units + 2 * batch.hidden_states
    return recomputed_bytes(batch, False, recompute) + gradients


def exchange_bytes(batch: Batch, parallel: ParallelConfig, pipeline_rank: int) -> int:
    """Buffers of communication while a step runs: hidden states on their way, forwards and backwards, to and from each neighbour;
    under sequence parallelism megatron-core's buffer for the rows of all tensor ranks."""
    state = batch.hidden_states
    before, after = pipeline_rank > 0, pipeline_rank < parallel.pipeline - 1 or parallel.virtual_stages > 1
    gathered = batch.weight * batch.pattern.rows * batch.rows * batch.config.hidden if batch.sequence else 0
    return (2 * (before + after) * state if parallel.pipeline > 1 else 0) + gathered


# -- How many micro-batches are under way ------------------------------------------------------------------------------


def under_way(parallel: ParallelConfig, pipeline_rank: int, micro_batches: int) -> Iterator[Counter[int]]:
    """After every forward of a step on this pipeline rank: {virtual stage: forwards whose backward has not run}.

    The orders are those of megatron-core's 1F1B and interleaved schedules.
    """
    pipeline, virtual = parallel.pipeline, parallel.virtual_stages
    if virtual == 1:
        warmup = pipeline - pipeline_rank - 1
        order = [0] * micro_batches
    else:
        group = micro_batch_group(micro_batches, pipeline)
        warmup = 2 * (pipeline - pipeline_rank - 1) + (virtual - 1) * group
        starts = range(0, micro_batches, group)
        order = [chunk for start in starts for chunk in range(virtual) for _ in range(start, min(start + group, micro_batches))]
    held: Counter[int] = Counter()
    for count, chunk in enumerate(order):
        held[chunk] += 1
        yield Counter(held)
        if count >= min(warmup, len(order)):
            held[virtual - 1 - order[count - warmup]] -= 1


def most_bytes(kept: Sequence[Kept], parallel: ParallelConfig, pipeline_rank: int, micro_batches: int) -> Kept:
    """The most that a rank keeps at a time, given what one forward of each of its virtual stages keeps."""
    together = (
        Kept(*(sum(getattr(kept[chunk], name) * count for chunk, count in held.items()) for name in ("layers", "head", "boundary")))
        for held in under_way(parallel, pipeline_rank, micro_batches)
    )
    return max(together, key=lambda one: one.total)
