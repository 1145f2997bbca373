"""From a recipe to a model that trains: the one place where parallelism is put around the network, in one fixed order.

tensor (the linears are made for the group) -> weights by name -> activation checkpointing -> compile -> device -> ZeRO.
"""

from __future__ import annotations

from bd3_scale.config import Recipe, resolve_precision
from bd3_scale.model.initialise import initialise
from bd3_scale.model.layers import Linears
from bd3_scale.model.transformer import Transformer
from bd3_scale.parallel.engine import OptimizerSettings, ZeroEngine, apply_outside
from bd3_scale.parallel.layout import Layout


def build_engine(recipe: Recipe, layout: Layout, vocabulary: int, mask_id: int) -> ZeroEngine:
    """The recipe's network for `vocabulary` ids (MASK included), with initial weights, under its engine."""
    training, parallel = recipe.training, recipe.parallel
    model = Transformer(recipe.model, vocabulary, mask_id, Linears(parallel.tensor))
    initialise(model, recipe.model, recipe.run.seed, layout.tensor_rank, layout.tensor)
    apply_outside(model.blocks, recompute=training.recompute, compile=training.compile)
    settings = OptimizerSettings((training.betas[0], training.betas[1]), training.epsilon, training.weight_decay, training.clip)
    return ZeroEngine(
        model.to(layout.device),
        layout,
        settings,
        zero=parallel.zero,
        micro_batch=recipe.micro_batch(layout.data),
        accumulation=training.global_batch // (recipe.micro_batch(layout.data) * layout.data),
        bf16=resolve_precision(recipe, layout.device.type) == "bf16",
    )
