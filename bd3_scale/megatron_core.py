"""What the layout and the layers take of megatron-core: its parallel groups, tensor-parallel layers and the mappings between ranks.

Invariant: this is the first import of megatron-core in a process of ours (see `light_imports`); engines, which take its gradient buffers,
optimizer and schedules from itself, import this room first.
"""

from __future__ import annotations

import warnings

from bd3_scale.light_imports import left_out, uncompiled

with uncompiled(), left_out("wandb", "torch.utils.tensorboard"):
    for text in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=text, category=UserWarning)  # of what nothing here uses

    import megatron.core

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

VERSION: str = megatron.core.__version__

__all__ = [
    "VERSION",
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "set_tensor_model_parallel_attributes",
    "vocab_parallel_cross_entropy",
]
