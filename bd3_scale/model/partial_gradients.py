"""What tensor parallelism needs to know of the model's parameters, said from outside.

The linears divide themselves (model/layers.py). Some parameters every tensor rank holds whole; where the rows (or the key
heads) are divided among the ranks, each rank computes only its part of their gradient. Those are marked with megatron-core's
own word, `sequence_parallel`, and whoever trains sums their gradients over the tensor ranks. Forgetting one is a small,
silent error of the gradient, which is why the layouts' parity test trains adaLN and grouped-query models, too.
"""

from __future__ import annotations

from torch import nn

from bd3_scale.model.layers import SharedKeyValue
from bd3_scale.model.transformer import Block, Transformer


def mark_partial_gradients(model: Transformer) -> None:
    """Mark the parameters of this stage. Biases of row-parallel linears are marked by megatron-core itself."""
    partial: list[nn.Module | None] = []
    if model.linears.sequence:
        partial.append(model.positions)
    for block in model.blocks.values():
        assert isinstance(block, Block)
        if model.linears.sequence:
            # They act on the rows between the linears. The final norm acts on all scored rows, on every rank alike.
            partial += [block.attention_norm, block.mlp_norm, block.modulation]
        if isinstance(block.attention.key_value, SharedKeyValue):
            partial.append(block.attention.key_value)
        if model.linears.tensor > 1:
            # Every rank norms its own heads, with one weight.
            partial += [block.attention.query_norm, block.attention.key_norm]
    for module in partial:
        for parameter in module.parameters() if module is not None else ():
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
