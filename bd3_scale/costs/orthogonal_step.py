"""What Muon moves and computes in a step, from the recipe alone: hidden matrices go to an owner each and back (matrix_owners.py).

Of a matrix of n elements among k ranks of which the owner holds the share h, 2 w n (1 - h) bytes move; w: 2 in bf16, else 4. Spread
over the k ranks each sends 2 w n (1 - h) / k. t: tensor ranks, d: data-parallel ranks that share what ZeRO divides; h is

| what divides the part of a tensor rank | h |
|---|---|
| nothing (ZeRO 0) | 1 / t |
| its rows, or its elements evenly (fsdp, DeepSpeed 3) | 1 / (t d) |
| a border somewhere (ZeRO 1, 2: all parameters of the rank end to end) | (1 - f) / t, f = m d / 4 r expected, at most 1 - 3 r / 4 m d |

(m: elements of the part, r: of all parameters of the rank. Key heads that tensor ranks share count as t = 1, once on each.)

Newton-Schulz: five steps of 4 A^2 B + 2 A^3 FLOPs on a matrix of A <= B.
Invariant: a test counts what the real engines exchange, and finds these bytes, to within how owners are spread over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bd3_scale.costs.parameter_shapes import layer_parameters, units_of
from bd3_scale.recipe.optimizers import is_hidden
from bd3_scale.recipe.schema import ModelConfig, ParallelConfig

STEPS = 5
"""Of the iteration; torch's."""


def packed(name: str, rows: int, model: ModelConfig) -> tuple[int, int]:
    """(matrices in the weight `name`, neighbouring rows of each): they alternate (see attention.py and layers.py)."""
    if name.endswith("attention.key_value.weight"):
        return 2, model.head_size
    if name.endswith("mlp.up.weight") and model.gated:
        return 2, 1
    return 1, rows


def exchanged_bytes(
    model: ModelConfig, parallel: ParallelConfig, stages: Sequence[range], vocabulary: int, sharers: int, weight: int
) -> int:
    """That a rank sends in a step, on average over those of its stage; `sharers`: ranks that share what ZeRO divides."""
    moved = 0.0
    d = sharers if parallel.zero else 1
    units = [units_of(model, vocabulary, layers, parallel.tensor) for layers in stages]
    held = sum(sum(unit.sizes) for unit in units)
    for (rows, columns), tensor in _matrices(model, parallel.tensor, stages):
        whole = rows * columns
        part = whole / tensor
        if parallel.resolved_engine == "fsdp" or parallel.zero == 3:
            kept = 1 / d
        else:
            cut = part * d / held if d > 1 else 0.0
            kept = 1 - cut / 4 if cut <= 1 else 3 / (4 * cut)
        moved += 2 * weight * part / d * (1 - kept / tensor)
    return round(moved)


def orthogonal_flops(model: ModelConfig, parallel: ParallelConfig, stages: Sequence[range], sharers: int) -> float:
    """Of a rank in a step, on average over those of its stage."""
    total = 0.0
    d = sharers if parallel.zero else 1
    for (rows, columns), tensor in _matrices(model, parallel.tensor, stages):
        a, b = sorted((rows, columns))
        total += STEPS * (4.0 * a * a * b + 2.0 * a**3) / (tensor * d)
    return total


def _matrices(model: ModelConfig, tensor: int, stages: Sequence[range]) -> Iterator[tuple[tuple[int, int], int]]:
    """(rows, columns) of each matrix, undivided and unpacked, and how many tensor ranks divide it."""
    layer: list[tuple[tuple[int, int], int]] = []
    for name, one in layer_parameters(model, tensor).items():
        if is_hidden(name):
            rows, columns = one.shape
            count, _ = packed(name, rows, model)
            layer += [((rows // count, columns), tensor if one.divided >= 0 else 1)] * count
    for layers in stages:
        yield from layer * len(layers)
