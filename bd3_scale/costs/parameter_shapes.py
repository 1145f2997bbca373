"""The parameters of a network from its configuration alone: name -> shape, what tensor ranks divide, whose gradient they know in part.

Parameter counts, bytes of state and of communication, names of converted weights, and what engines sum over the tensor ranks all
follow from this table. `Units` are the same parameters as one tensor rank of a stage holds them, in the groups that
`engines/fsdp_engine.py` gathers and reduces at a time: `fully_shard` divides every parameter along its rows, and pads them to as many
for each sharer, so that bytes follow from shapes, not from numbers of elements.

Invariant: equal to `Transformer(...).named_parameters()`, for every kind of model and stage (a test compares them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from bd3_scale.costs.sizes import SINUSOIDS, padded_vocabulary
from bd3_scale.recipe.optimizers import is_hidden
from bd3_scale.recipe.schema import ModelConfig

Shape = tuple[int, int]
"""Rows, elements of a row."""


@dataclass(frozen=True)
class Parameter:
    shape: tuple[int, ...]
    """Undivided, without padding."""
    divided: int = -1
    """Dimension that the tensor ranks divide; -1: each holds all of it."""
    partial: bool = False
    """Whether each tensor rank holds all of it, but computes only its part of the gradient, so that whoever trains must sum it over
    them. To forget one is a small, silent error of the gradient."""

    def held(self, tensor: int) -> Shape:
        """Of one of the tensor ranks."""
        rows, *row = (size // tensor if axis == self.divided else size for axis, size in enumerate(self.shape))
        return rows, prod(row)


Parameters = dict[str, Parameter]


def parameter_shapes(
    config: ModelConfig, vocabulary: int, layers: range | None = None, tensor: int = 1, sequence: bool = False
) -> Parameters:
    """Canonical name -> parameter, of the stage that has `layers` (None: of the whole network); `vocabulary` is V, MASK included."""
    layers = range(config.layers) if layers is None else layers
    each = layer_parameters(config, tensor, sequence)
    blocks = {f"blocks.{index}.{name}": parameter for index in layers for name, parameter in each.items()}
    before, behind = _around(config, vocabulary, layers, sequence)
    return before | blocks | behind


def layer_parameters(config: ModelConfig, tensor: int = 1, sequence: bool = False) -> Parameters:
    """Of one layer. What acts on the rows between the linears is known in part where `sequence` divides these."""
    hidden, head, bias = config.hidden, config.head_size, config.attention_bias
    width, up = config.heads * head, config.mlp_size * (2 if config.gated else 1)
    shared = config.kv_heads % tensor != 0  # fewer key heads than ranks: each holds the weight of all, and computes one
    found = _norm("attention_norm", config, sequence)
    found |= _linear("attention.query", width, hidden, bias != "none", 0)
    found |= _linear("attention.key_value", 2 * config.kv_heads * head, hidden, bias != "none", -1 if shared else 0, shared)
    if config.query_key_norm and config.query_key_norm_width == "heads":
        found["attention.query_norm.weight"] = Parameter((width,), 0)
        found["attention.key_norm.weight"] = Parameter((config.kv_heads * head,), -1 if shared else 0, shared)
    elif config.query_key_norm:  # every rank norms its own heads, with one weight
        found |= {f"attention.{name}_norm.weight": Parameter((head,), partial=tensor > 1) for name in ("query", "key")}
    found |= _linear("attention.output", hidden, width, bias == "all", 1, sequence)
    found |= _norm("mlp_norm", config, sequence)
    found |= _linear("mlp.up", up, hidden, config.mlp_bias, 0) | _linear("mlp.down", hidden, config.mlp_size, config.mlp_bias, 1, sequence)
    if config.norm_place == "both":
        found |= _norm("attention_output_norm", config, sequence) | _norm("mlp_output_norm", config, sequence)
    if config.conditioning == "adaln":
        found |= _linear("modulation", 6 * hidden, config.conditioning_size, True, -1, sequence)
    return found


def _around(config: ModelConfig, vocabulary: int, layers: range, sequence: bool) -> tuple[Parameters, Parameters]:
    """What a stage holds before its layers and behind them."""
    hidden, size, adaptive = config.hidden, config.conditioning_size, config.conditioning == "adaln"
    first, last = layers.start == 0, layers.stop == config.layers
    before: Parameters = {}
    behind: Parameters = {}
    if first or (last and config.tied_head):
        before["embedding.weight"] = Parameter((vocabulary, hidden), 0)
    if first and config.positions == "learned":
        before["positions.weight"] = Parameter((config.context, hidden), partial=sequence)
    if adaptive:  # on every stage
        behind |= _linear("condition.mlp.0", size, SINUSOIDS, True) | _linear("condition.mlp.2", size, size, True)
    if last:
        behind |= _norm("final_norm", config)  # of all scored rows, on every rank alike
        behind |= _linear("final_modulation", 2 * hidden, size, True) if adaptive else {}
        behind |= {} if config.tied_head else {"head.weight": Parameter((vocabulary, hidden), 0)}
        behind |= {"head.bias": Parameter((vocabulary,), 0)} if config.head_bias else {}
    return before, behind


def _linear(name: str, outputs: int, inputs: int, bias: bool, divided: int = -1, partial: bool = False) -> Parameters:
    """`partial`: of what is not divided; along its inputs (1) the weight is, and its bias is not."""
    found = {f"{name}.weight": Parameter((outputs, inputs), divided, partial and divided < 0)}
    return found | {f"{name}.bias": Parameter((outputs,), 0 if divided == 0 else -1, partial and divided != 0)} if bias else found


def _norm(name: str, config: ModelConfig, partial: bool = False) -> Parameters:
    return {f"{name}.{kind}": Parameter((config.hidden,), partial=partial) for kind in ("weight", "bias")[: 1 + config.norm_bias]}


# -- What one rank holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Of one chunk of the network, on one tensor rank."""

    embedding: list[Shape]
    """Empty where the chunk does not embed, and where it scores with the same weight."""
    layer: list[Shape]
    matrices: list[Shape]
    """Of `layer`, its hidden matrices."""
    layers: int
    head: list[Shape]
    """Empty where the chunk does not score, and where it scores with the embedding's weight."""
    rest: list[Shape]

    @property
    def groups(self) -> list[list[Shape]]:
        """What is gathered together, in the order of a forward; the rest, which the root gathers first, at the end."""
        return [group for group in (self.embedding, *[self.layer] * self.layers, self.head, self.rest) if group]

    @property
    def hidden(self) -> list[Shape]:
        """The hidden matrices (`recipe/optimizers.py`) of all layers."""
        return self.matrices * self.layers

    @property
    def sizes(self) -> list[int]:
        """Elements of every parameter."""
        return [rows * width for group in self.groups for rows, width in group]


def units_of(config: ModelConfig, vocabulary: int, layers: range, tensor: int = 1, vocabulary_multiple: int = 1) -> Units:
    """Of the chunk that has `layers`; `vocabulary` is V, MASK included."""
    before, behind = _around(config, padded_vocabulary(vocabulary, tensor, vocabulary_multiple), layers, False)
    first, last, tied = layers.start == 0, layers.stop == config.layers, config.tied_head
    embeds, scores = first and not (last and tied), last and not tied
    groups: dict[str, list[Shape]] = {"embedding": [], "head": [], "rest": []}
    for name, parameter in (behind | before).items():
        module = name.split(".")[0]
        alone = (module == "embedding" and embeds) or (module == "head" and scores)
        groups[module if alone else "rest"].append(parameter.held(tensor))
    each = layer_parameters(config, tensor)
    layer = [parameter.held(tensor) for parameter in each.values()]
    matrices = [parameter.held(tensor) for name, parameter in each.items() if is_hidden(name)]
    return Units(layer=layer, matrices=matrices, layers=len(layers), **groups)


def elements(shapes: Iterable[Shape]) -> int:
    return sum(rows * width for rows, width in shapes)


def shard(shapes: Iterable[Shape], sharers: int) -> int:
    """Elements that one of the sharers keeps, with padding."""
    return sum(-(-rows // sharers) * width for rows, width in shapes)


def whole(shapes: Iterable[Shape], sharers: int) -> int:
    """Elements that they gather, with padding."""
    return sharers * shard(shapes, sharers)
