"""From a recipe to a model that trains: the one place where parallelism is put around the network, in one fixed order.

stages and tensor (each rank makes its slice of the layers, the linears their part of the weights) -> activation checkpointing ->
compile -> device, ZeRO and schedule -> weights by name, each rank its own share. Until then the network is on the host and nothing
has been written to it, so that it takes no memory (or, for fsdp, it is on the meta device).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from bd3_scale.compiling import wrap_blocks
from bd3_scale.costs import pipeline_stages
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.costs.sizes import VOCABULARY_MULTIPLE
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.engine import Engine
from bd3_scale.model.layers import TensorParallelFactory
from bd3_scale.model.transformer import Transformer
from bd3_scale.optimizers.settings import OptimizerSettings
from bd3_scale.recipe import Recipe, resolve_precision


def build_engine(recipe: Recipe, layout: Layout, vocabulary: int, mask_id: int) -> Engine:
    """The recipe's network for `vocabulary` ids (MASK included), with initial weights, under its engine."""
    training, parallel = recipe.training, recipe.parallel
    bf16 = resolve_precision(recipe.training, layout.device.type) == "bf16"
    chunks = []
    for layers in layers_of_rank(recipe, layout, vocabulary):
        factory = TensorParallelFactory(
            parallel.tensor, sequence=parallel.sequence, vocabulary_multiple=VOCABULARY_MULTIPLE[layout.device.type]
        )
        with torch.device("meta") if parallel.resolved_engine == "fsdp" else nullcontext():
            model = Transformer(recipe.model, vocabulary, mask_id, factory, layers)
        mark_partial_gradients(model)
        wrap_blocks(model.blocks.values(), recompute=training.recompute, compile=training.compile)
        chunks.append(model)
    betas = training.betas[0], training.betas[1]
    numbers = betas, training.epsilon, training.weight_decay, training.clip, training.spike_deviations
    settings = OptimizerSettings(*numbers, training.optimizer, training.momentum, recipe.model, bf16)
    engine: Engine
    if parallel.resolved_engine == "fsdp":
        from bd3_scale.engines.fsdp_engine import FsdpEngine

        shard, looked_up = (parallel.shard or layout.data) * layout.context, not recipe.objective.traits.on_simplex
        engine = FsdpEngine(chunks, layout, settings, zero=parallel.zero, shard=shard, bf16=bf16, looked_up=looked_up)
    elif parallel.resolved_engine == "megatron":
        from bd3_scale.engines.megatron_engine import MegatronEngine

        engine = MegatronEngine(chunks, layout, settings, zero=parallel.zero, bf16=bf16)
    else:
        from bd3_scale.engines.zero_engine import ZeroEngine

        engine = ZeroEngine(chunks[0], layout, settings, zero=parallel.zero, bf16=bf16)
    engine.initialise(recipe.model, recipe.run.seed)
    return engine


def mark_partial_gradients(model: Transformer) -> None:
    """Mark the parameters whose gradient each tensor rank knows in part, with megatron-core's own word: `sequence_parallel`."""
    factory = model.factory
    shapes = parameter_shapes(model.config, 0, model.layers, factory.tensor, factory.sequence)
    for name, parameter in model.named_parameters():
        parameter.sequence_parallel = shapes[name].partial  # type: ignore[attr-defined]


def layers_of_rank(recipe: Recipe, layout: Layout, vocabulary: int) -> list[range]:
    """The layers of this rank's stage, one range per virtual stage."""
    phases = pipeline_stages.phases_of(recipe, vocabulary - 1, layout.device.type)
    chunks = pipeline_stages.chunks_of(recipe.model, recipe.objective, recipe.parallel, layout.data, vocabulary, phases)
    return pipeline_stages.of_rank(chunks, layout.pipeline, layout.pipeline_rank)
