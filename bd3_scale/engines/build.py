"""From a recipe to a model that trains: the one place where parallelism is put around the network, in one fixed order.

stages and tensor (each rank makes its slice of the layers, the linears their part of the weights) -> activation checkpointing ->
compile -> device, ZeRO and schedule -> weights by name, each rank its own share. Until then the network is on the host and nothing
has been written to it, so that it takes no memory (or, for fsdp, it is on the meta device).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bd3_scale.costs import pipeline_stages
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.costs.sizes import VOCABULARY_MULTIPLE
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.engine import Engine
from bd3_scale.engines.optimizers import OptimizerSettings
from bd3_scale.model.compiling import compiled_whole
from bd3_scale.model.layers import Linears
from bd3_scale.model.transformer import Transformer
from bd3_scale.recipe import Recipe, resolve_precision

COMPILE_MODES = {"blocks": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""torch's name of what `training.compile` says. No CUDA graphs: they hold addresses, which micro-batches under way, recomputation and
ZeRO 3 change."""


def build_engine(recipe: Recipe, layout: Layout, vocabulary: int, mask_id: int) -> Engine:
    """The recipe's network for `vocabulary` ids (MASK included), with initial weights, under its engine."""
    training, parallel = recipe.training, recipe.parallel
    bf16 = resolve_precision(recipe, layout.device.type) == "bf16"
    chunks = []
    for layers in layers_of_rank(recipe, layout, vocabulary):
        linears = Linears(parallel.tensor, sequence=parallel.sequence, vocabulary_multiple=VOCABULARY_MULTIPLE[layout.device.type])
        with torch.device("meta") if parallel.resolved_engine == "fsdp" else nullcontext():
            model = Transformer(recipe.model, vocabulary, mask_id, linears, layers)
        mark_partial_gradients(model)
        apply_outside(model.blocks.values(), recompute=training.recompute, compile=training.compile)
        chunks.append(model)
    betas = training.betas[0], training.betas[1]
    numbers = betas, training.epsilon, training.weight_decay, training.clip, training.spike_deviations
    settings = OptimizerSettings(*numbers, training.optimizer, training.momentum, recipe.model, bf16)
    engine: Engine
    if parallel.resolved_engine == "fsdp":
        from bd3_scale.engines.fsdp_engine import FsdpEngine

        shard, looked_up = parallel.shard or layout.data, not recipe.objective.traits.on_simplex
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
    linears = model.linears
    shapes = parameter_shapes(model.config, 0, model.layers, linears.tensor, linears.sequence)
    for name, parameter in model.named_parameters():
        parameter.sequence_parallel = shapes[name].partial  # type: ignore[attr-defined]


def layers_of_rank(recipe: Recipe, layout: Layout, vocabulary: int) -> list[range]:
    """The layers of this rank's stage, one range per virtual stage."""
    chunks = pipeline_stages.chunks_of(
        recipe, layout.data, vocabulary, pipeline_stages.phases_of(recipe, vocabulary - 1, layout.device.type)
    )
    return pipeline_stages.of_rank(chunks, layout.pipeline, layout.pipeline_rank)


RECOMPUTED = {"attention": "attention_half", "mlp": "mlp_half", "layer": "forward"}
"""`training.recompute` -> the method of a block whose inputs alone are kept."""


def apply_outside(blocks: Iterable[nn.Module], *, recompute: str, compile: str, backend: str | None = None) -> None:
    """What surrounds the layers, in this order: compile, then activation checkpointing. (Tensor before, ZeRO after.)

    Compiled code is recomputed whole, by running it again: inside of it the compiler would choose what is kept. It is methods that
    are compiled, not modules, so that an engine's hooks around a layer stay outside. `backend`: as in `compiled_whole`.
    """
    parts = ("attention_half", "mlp_half") if recompute in ("attention", "mlp") else ("forward",)
    for block in blocks:
        for part in parts:
            method = getattr(block, part)
            if compile != "none":
                method = compiled_whole(method, COMPILE_MODES[compile], backend)
            setattr(block, part, _recomputed(method) if RECOMPUTED.get(recompute) == part else method)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # Dropout is keyed, not drawn: a recomputation needs no generator state.
        return torch.utils.checkpoint.checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return run
