"""Shapes of the parameters that one tensor rank of a stage holds, in the groups that `fsdp.py` gathers and reduces at a time.

`fully_shard` divides every parameter along its rows, and pads them to as many for each sharer: bytes follow from shapes, not from
numbers of elements. Invariant: a test compares with the network's own parameters, for every kind of model and stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bd3_scale.costs.flops import SINUSOIDS
from bd3_scale.recipe.schema import ModelConfig

Shape = tuple[int, int]
"""Rows, elements of a row."""


@dataclass(frozen=True)
class Units:
    """Of one chunk of the network."""

    embedding: list[Shape]
    """Empty where the chunk does not embed, and where it scores with the same weight."""
    layer: list[Shape]
    layers: int
    head: list[Shape]
    """Empty where the chunk does not score, and where it scores with the embedding's weight."""
    rest: list[Shape]

    @property
    def groups(self) -> list[list[Shape]]:
        """What is gathered together, in the order of a forward; the rest, which the root gathers first, at the end."""
        return [group for group in (self.embedding, *[self.layer] * self.layers, self.head, self.rest) if group]


def units_of(config: ModelConfig, vocabulary: int, layers: range, tensor: int = 1, vocabulary_multiple: int = 1) -> Units:
    """Of the chunk that has `layers`; `vocabulary` is V, MASK included."""
    hidden, head = config.hidden, config.head_size
    query, key_value = config.heads * head // tensor, 2 * config.kv_heads * head
    if config.kv_heads % tensor == 0:  # else each rank holds the weight of all key heads
        key_value //= tensor
    units = config.mlp_size // tensor
    up = units * (2 if config.mlp == "swiglu" else 1)
    vector = (hidden, 1)
    norm = [vector] * (2 if config.norm_bias else 1)
    size = config.conditioning_size if config.conditioning == "adaln" else 0
    layer = [(query, hidden), (key_value, hidden), (hidden, query), (up, hidden), (hidden, units), *norm, *norm]
    layer += [(query, 1), (key_value, 1)] if config.attention_bias != "none" else []
    layer += [vector] if config.attention_bias == "all" else []
    layer += [(up, 1), vector] if config.mlp_bias else []
    layer += [(head, 1), (head, 1)] if config.query_key_norm else []
    layer += [(6 * hidden, size), (6 * hidden, 1)] if size else []
    share = -(-vocabulary // (tensor * vocabulary_multiple)) * vocabulary_multiple
    first, last, tied = layers.start == 0, layers.stop == config.layers, config.tied_head
    scores = [(share, 1)] if last and config.head_bias else []
    rest = [(config.context, hidden)] if first and config.positions == "learned" else []
    rest += [(size, SINUSOIDS), (size, 1), (size, size), (size, 1)] if size else []  # on every stage
    rest += norm + ([(2 * hidden, size), (2 * hidden, 1)] if size else []) if last else []
    rest += [(share, hidden), *scores] if last and tied else []
    return Units(
        embedding=[(share, hidden)] if first and not (last and tied) else [],
        layer=layer,
        layers=len(layers),
        head=[(share, hidden), *scores] if last and not tied else [],
        rest=rest,
    )


def elements(shapes: Iterable[Shape]) -> int:
    return sum(rows * width for rows, width in shapes)


def shard(shapes: Iterable[Shape], sharers: int) -> int:
    """Elements that one of the sharers keeps, with padding."""
    return sum(-(-rows // sharers) * width for rows, width in shapes)


def whole(shapes: Iterable[Shape], sharers: int) -> int:
    """Elements that they gather, with padding."""
    return sharers * shard(shapes, sharers)
