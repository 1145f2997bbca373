"""Tables that say of which foreign tensors each of ours is made, and the few reshapings that this takes.

A `Rule` names one of our parameters and the `Piece`s it is joined of. How we lay out what others keep apart:
key and value [kv_head, 2, d] (joined per head), gate and value of a gated MLP [unit, 2] (joined per unit). Query rows are
[kv_head, group, d], which is everybody's order of heads. Invariants: `{}` in a name stands for the layer; every tensor of the
source is used by a rule or named as of no use, or the conversion ends with its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from bd3_scale.checkpoint.fragments import Fragment
from bd3_scale.checkpoint.region import Region
from bd3_scale.convert.source import Source
from bd3_scale.errors import CheckpointError

MEAN_ROWS = 1 << 14
"""Rows summed at a time for the mean of an embedding, in fp64."""


@dataclass(frozen=True)
class Piece:
    """A foreign tensor, or a part of its output rows."""

    name: str
    transposed: bool = False
    """Stored [in, out], as GPT-2's Conv1D does."""
    part: tuple[int, int] = (0, 1)
    """(index, count): which of so many equal parts of the rows."""

    def read(self, read: Callable[[str], torch.Tensor], name: str) -> torch.Tensor:
        tensor = read(name)
        tensor = tensor.t() if self.transposed else tensor
        index, count = self.part
        if len(tensor) % count:
            raise CheckpointError(f"{name} has {len(tensor)} rows, which are not {count} equal parts")
        return tensor.chunk(count)[index] if count > 1 else tensor


@dataclass(frozen=True)
class Rule:
    """Our parameter `name` of these pieces. `rows`: what its first dimension counts, if something of the recipe:
    vocabulary (cut to the tokenizer's ids; MASK's row is added: the mean of an embedding, zeros of a head), ids (all, with MASK),
    positions (cut to the context)."""

    name: str
    pieces: tuple[Piece, ...]
    join: str = "one"
    """one | heads (rows of one head of each piece in turn) | units (one row of each in turn)."""
    rows: str = ""
    mask: int | None = None
    """Of a vocabulary that has MASK already: the row that is taken for it."""
    plus: float = 0.0
    """Added to every number; then it is multiplied by `times`."""
    times: float = 1.0


@dataclass(frozen=True)
class KeyMap:
    """The whole of a network: `layer` rules once per layer, `whole` rules once."""

    whole: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ("",)
    """What may stand before all foreign names; the first that fits is taken."""
    no_use: str = "$^"
    """Regular expression of whole foreign names (without prefix) that hold nothing to convert."""

    def rules(self, layers: int) -> list[Rule]:
        """All rules, layers filled in."""
        return [*self.whole, *(_of_layer(rule, layer) for layer in range(layers) for rule in self.layer)]


@dataclass(frozen=True)
class Sizes:
    """What the shapes of ours depend on."""

    text_ids: int
    """Ids of the tokenizer; MASK is the one after."""
    words: np.ndarray
    """Those of them that stand for text: int64."""
    end_of_text: int
    context: int
    head_size: int
    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Our names and full shapes, as the network of the recipe has them."""


class LazyFragment(Fragment):
    """A whole tensor for `store.save` that is made when it is written, and forgotten."""

    def __init__(self, kind: str, name: str, shape: Sequence[int], make: Callable[[], torch.Tensor]) -> None:
        for key, value in {"kind": kind, "name": name, "region": Region.whole(tuple(shape)), "_make": make}.items():
            object.__setattr__(self, key, value)

    @property
    def value(self) -> torch.Tensor:  # type: ignore[override]
        values = self._make()  # type: ignore[attr-defined]
        if tuple(values.shape) != self.region.shape:
            raise CheckpointError(f"{self.name} is {list(values.shape)} in the source, but this network needs {list(self.region.shape)}")
        return values.contiguous().view(-1)


def prefix_of(names: Iterable[str], key_map: KeyMap) -> str:
    """The prefix under which the first of the map's names stands. Raises CheckpointError."""
    names, first = set(names), key_map.whole[0].pieces[0].name
    for prefix in key_map.prefixes:
        if prefix + first in names:
            return prefix
    raise CheckpointError(
        f"there is no tensor {key_map.prefixes[0] + first}; the weights are of another architecture than config.json says"
    )


def makers(source: Source, key_map: KeyMap, layers: int, sizes: Sizes) -> dict[str, Callable[[], torch.Tensor]]:
    """Our name -> how to make its tensor; checked to be all of ours, and of all of theirs. Raises CheckpointError."""
    prefix = prefix_of(source.shapes, key_map)
    rules = key_map.rules(layers)
    needed = {full_name(prefix, piece.name) for rule in rules for piece in rule.pieces}
    missing = sorted(needed - set(source.shapes))
    if missing:
        raise CheckpointError(f"{source.path}: tensor {missing[0]} is missing")
    source.require(sorted(needed))
    unknown = [name for name in sorted(set(source.shapes) - needed) if not re.fullmatch(key_map.no_use, name.removeprefix(prefix))]
    if unknown:
        raise CheckpointError(f"{source.path}: tensor {unknown[0]} belongs to nothing that can be converted")
    if set(sizes.expected) != {rule.name for rule in rules}:
        odd = min(set(sizes.expected) ^ {rule.name for rule in rules})
        raise CheckpointError(f"{source.path}: parameter {odd} is in only one of the source and the network of the recipe")

    for rule in rules:
        # Of tensors that have a shape and no numbers.
        made = _make(rule, lambda name: torch.empty(source.shapes[name], device="meta"), prefix, sizes)
        found, wanted = tuple(made.shape), sizes.expected[rule.name]
        if found != wanted:
            names = ", ".join(full_name(prefix, one.name) for one in rule.pieces)
            raise CheckpointError(
                f"{source.path}: {rule.name} would be {list(found)}, made of {names}, "
                f"but this network needs {list(wanted)}; take the config.json that belongs to the weights"
            )

    def maker(rule: Rule) -> Callable[[], torch.Tensor]:
        return lambda: _make(rule, source.read, prefix, sizes)

    return {rule.name: maker(rule) for rule in rules}


def _make(rule: Rule, read: Callable[[str], torch.Tensor], prefix: str, sizes: Sizes) -> torch.Tensor:
    pieces = [piece.read(read, full_name(prefix, piece.name)) for piece in rule.pieces]
    tensor = pieces[0] if rule.join == "one" else interleave(pieces, sizes.head_size if rule.join == "heads" else 1)
    if rule.plus or rule.times != 1:
        tensor = (tensor.float() + rule.plus) * rule.times
    if rule.rows == "vocabulary":
        return with_mask(tensor, sizes, rule.mask, head=rule.name != "embedding.weight")
    if rule.rows == "positions":
        return tensor[: sizes.context]
    return tensor


def interleave(tensors: Sequence[torch.Tensor], group: int) -> torch.Tensor:
    """`group` rows of each in turn: k, v [heads * d, ...] with group = d -> [heads, 2, d, ...] flattened."""
    if any(tensor.shape != tensors[0].shape for tensor in tensors) or len(tensors[0]) % group:
        raise CheckpointError(f"tensors of {[list(tensor.shape) for tensor in tensors]} cannot be joined {group} rows at a time")
    return torch.stack([tensor.unflatten(0, (-1, group)) for tensor in tensors], 1).flatten(0, 2)


def separate(rule: Rule, tensor: torch.Tensor, head_size: int) -> list[torch.Tensor]:
    """The pieces that `tensor` was joined of, where none of them was turned or is part of another: what a conversion back needs."""
    if any(piece.transposed or piece.part != (0, 1) for piece in rule.pieces) or (rule.plus, rule.times) != (0, 1):
        raise ValueError(f"{rule.name} is made of parts of tensors, or of other numbers")
    if rule.join == "one":
        return [tensor]
    group = head_size if rule.join == "heads" else 1
    return [piece.flatten(0, 1) for piece in tensor.unflatten(0, (-1, len(rule.pieces), group)).unbind(1)]


def with_mask(rows: torch.Tensor, sizes: Sizes, mask: int | None = None, *, head: bool) -> torch.Tensor:
    """The rows of the tokenizer's ids and one for MASK: row `mask` where there is one, else the mean of the words' rows, or zeros of a
    head. Special ids may be more than the rows (Gemma 3's of images): they get that mean, too."""
    text_ids, words, known = sizes.text_ids, sizes.words, min(len(rows), sizes.text_ids)
    if known <= max(int(words[-1]), sizes.end_of_text):
        raise CheckpointError(f"the weights have {len(rows)} ids, but the tokenizer has {text_ids}; name the tokenizer of the weights")
    result = rows.new_zeros(text_ids + 1, *rows.shape[1:], dtype=torch.float32)
    result[:known] = rows[:known]
    if known < text_ids or not (head or mask is not None):  # rows of ids that no text has were never trained, and may be anything
        total = rows.new_zeros(rows.shape[1:], dtype=torch.float64)
        for part in torch.from_numpy(words).split(MEAN_ROWS):
            total += rows[part].sum(0, dtype=torch.float64)
        result[known : text_ids + (not head)] = (total / len(words)).float()
    if mask is not None:
        if not 0 <= mask < len(rows):
            raise CheckpointError(f"config.json has mask_token_id = {mask}, but the weights have {len(rows)} ids")
        result[text_ids] = rows[mask]
    return result


def _of_layer(rule: Rule, layer: int) -> Rule:
    pieces = tuple(Piece(piece.name.replace("{}", str(layer)), piece.transposed, piece.part) for piece in rule.pieces)
    return replace(rule, name=rule.name.replace("{}", str(layer)), pieces=pieces)


def full_name(prefix: str, name: str) -> str:
    """A name that starts with / stands outside the prefix."""
    return name[1:] if name.startswith("/") else prefix + name


def same(*names: str) -> tuple[Rule, ...]:
    """Rules for parameters that have our names already."""
    return tuple(Rule(name, (Piece(name),)) for name in names)
