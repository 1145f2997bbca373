"""A recipe's run on this machine, as one rank of the whole world after another: what the cluster would refuse is refused here.

A world of N ranks is torch's fake process group: this process is one of its ranks, collectives return at once with whatever is in
their buffers. In it, for the ranks where layouts differ (first, tensor peer, middle stage, last):

1. the layout is built, group by group, as `distributed/layout.py` does on the cluster;
2. every stage is built at its real size, and the rank's own run a micro-batch forwards and backwards, with fake tensors (shapes
   without data): what one stage hands on is what the next expects, parts of parameters make up the whole network;
3. the engine itself (DeepSpeed, megatron-core or FSDP, optimizer, schedule, EMA) takes two steps with real numbers, in a network with as
   many layers, heads and stages, but narrow.

What it cannot find: what depends on data, on the device's kernels, on real communication. It runs on the CPU whatever the recipe is
for. Invariants: the process has no process group before and none afterwards; nothing is written.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from bd3_scale.attention import kernels
from bd3_scale.compiling import wrap_blocks
from bd3_scale.costs import pipeline_stages
from bd3_scale.costs.parameter_shapes import parameter_shapes
from bd3_scale.distributed import layout as layouts
from bd3_scale.distributed.context_share import ContextShare
from bd3_scale.distributed.layout import Layout
from bd3_scale.engines.build import build_engine
from bd3_scale.errors import TrainingError, one_line
from bd3_scale.model.layers import TensorParallelFactory, full_shape
from bd3_scale.model.transformer import Transformer
from bd3_scale.objectives.network_inputs import NetworkInputs
from bd3_scale.objectives.table import Objective, ObjectiveSchedule, selected_multiple
from bd3_scale.optimizers.ema import ExponentialAverage
from bd3_scale.planning.cluster_plan import ClusterPlan
from bd3_scale.recipe import Recipe

NARROW_VOCABULARY = 257


def rehearse(cluster: ClusterPlan) -> list[str]:
    """A line for people for each part that passed. Raises TrainingError for the first that does not; needs a process without a
    process group."""
    if dist.is_initialized():
        raise RuntimeError("a rehearsal makes worlds of its own, and this process is in one")
    cluster = replace(cluster, recipe=_for_this_machine(cluster.recipe))
    lines = []
    for rank, name in ranks_of_interest(cluster).items():
        began = time.perf_counter()
        with _explained(rank, cluster.world_size), fake_world(cluster, rank) as layout:
            _check_layout(cluster, layout)
            built = build_stages(cluster, layout)
            shape = run_stages(cluster, layout, built)
            lines.append(
                f"rank {rank} of {cluster.world_size} ({name}): layers {_layers(cluster, layout)}, "
                f"{sum(p.numel() for chunk in _own(layout, built) for p in chunk.parameters()):,} parameters, hidden states {shape}, "
                f"{time.perf_counter() - began:.1f} s"
            )
    # DeepSpeed 3 compares the ranks by broadcasts, which a fake world only answers rightly on rank 0.
    deepspeed_3 = cluster.parallel.zero == 3 and cluster.parallel.resolved_engine == "deepspeed"
    for rank in [0] if deepspeed_3 else [0, cluster.world_size - 1]:
        began = time.perf_counter()
        with _explained(rank, cluster.world_size):
            kind = run_engine(cluster, rank)
        lines.append(f"rank {rank}: two steps of {kind} with a narrow network, {time.perf_counter() - began:.1f} s")
        if cluster.world_size == 1:
            break
    return lines


def ranks_of_interest(cluster: ClusterPlan) -> dict[int, str]:
    """{rank: what it stands for}. Ranks are numbered with the tensor rank fastest, then context, data, pipeline (`layout.ORDER`)."""
    parallel = cluster.parallel
    stage = cluster.world_size // parallel.pipeline
    found = {0: "first"}
    if parallel.tensor > 1:
        found[parallel.tensor - 1] = "tensor peer"
    if parallel.pipeline > 2:
        found[parallel.pipeline // 2 * stage] = "middle stage"
    return found | {cluster.world_size - 1: "last"} if cluster.world_size > 1 else found


@contextlib.contextmanager
def fake_world(cluster: ClusterPlan, rank: int) -> Iterator[Layout]:
    """This process as `rank` of the world, with the groups of the layout."""
    try:
        dist.init_process_group("fake", rank=rank, world_size=cluster.world_size, store=FakeStore())
        yield layouts.start(cluster.parallel, "cpu")
    finally:
        layouts.stop()


@contextlib.contextmanager
def _explained(rank: int, world_size: int) -> Iterator[None]:
    """Say on which rank something failed; libraries print to where nobody parses it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except Exception as error:
        text = one_line(error, 400)
        raise TrainingError(
            f"the rehearsal fails on rank {rank} of {world_size}: {type(error).__name__}: {text}; change the layout (--search lists some) "
            "or report this, because `validate` let it pass"
        ) from error


def _for_this_machine(recipe: Recipe) -> Recipe:
    """The same recipe with what is a matter of the device left out: the kernel of attention, compilation."""
    model = replace(recipe.model, attention="auto", head_loss="eager")
    return replace(recipe, model=model, training=replace(recipe.training, compile="none"))


def _check_layout(cluster: ClusterPlan, layout: Layout) -> None:
    """The numbers of the layout are those that its order of ranks has."""
    parallel = cluster.parallel
    rest, tensor_rank = divmod(layout.rank, parallel.tensor)
    rest, context_rank = divmod(rest, parallel.context)
    pipeline_rank, data_rank = divmod(rest, cluster.replicas)
    found = layout.tensor_rank, layout.context_rank, layout.data_rank, layout.pipeline_rank, layout.data
    expected = tensor_rank, context_rank, data_rank, pipeline_rank, cluster.replicas
    if found != expected:
        raise ValueError(f"tensor, context, data, pipeline rank and replicas are {found}, expected {expected}")


# -- Stages at their real size -----------------------------------------------------------------------------------------


def build_stages(cluster: ClusterPlan, layout: Layout) -> list[Transformer]:
    """All chunks of the pipeline as this tensor rank holds them, with fake weights; together they are the whole network."""
    recipe, tensor = cluster.recipe, layout.tensor
    built: list[Transformer] = []
    together: set[str] = set()
    for layers in cluster.chunks:
        with FakeTensorMode():
            factory = TensorParallelFactory(tensor, sequence=recipe.parallel.sequence)
            chunk = Transformer(recipe.model, cluster.vocabulary, cluster.vocabulary - 1, factory, layers)
        expected = parameter_shapes(recipe.model, cluster.vocabulary, layers, tensor)
        found = {name: full_shape(p, tensor) for name, p in chunk.named_parameters()}
        if found != {name: (one.shape, one.divided) for name, one in expected.items()}:
            raise ValueError(f"layers {layers.start} to {layers.stop - 1} hold other parameters than the plan counts")
        together |= found.keys()
        built.append(chunk)
    if missing := parameter_shapes(recipe.model, cluster.vocabulary).keys() - together:
        raise ValueError(f"no stage holds {', '.join(sorted(missing))}")
    return built


def _own(layout: Layout, built: list[Transformer]) -> list[Transformer]:
    return built[layout.pipeline_rank :: layout.pipeline]


def _layers(cluster: ClusterPlan, layout: Layout) -> str:
    return " and ".join(
        f"{chunk.start}-{chunk.stop - 1}" for chunk in pipeline_stages.of_rank(cluster.chunks, layout.pipeline, layout.pipeline_rank)
    )


def run_stages(cluster: ClusterPlan, layout: Layout, built: list[Transformer]) -> list[int]:
    """A micro-batch through the rank's own stages, forwards and backwards; the first rank runs all stages, each on what the one before
    hands on, for every block size of the run. Returns the shape of the hidden states that stages exchange."""
    recipe = cluster.recipe
    start = 0
    shape: list[int] = []
    for phase in cluster.phases:
        objective = _objective(cluster, start, cluster.device.type, phase.block_size)  # in the cluster's shapes
        start += phase.steps
        if layout.rank > 0 and start < cluster.recipe.total_steps:
            continue
        rows = cluster.shares(phase).micro_batch
        inputs = _share(cluster, layout, cluster.device.type).of(_inputs(objective, rows, cluster.vocabulary, recipe.run.seed))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors: dict[str, Any] = {name: mode.from_tensor(value) for name, value in vars(inputs).items() if isinstance(value, Tensor)}
            fake = replace(inputs, **tensors)
            # As megatron-core's schedules have it: rows of the stream on this rank, micro-batch, hidden.
            batch = cluster.batch(phase)
            shape = [batch.held(batch.computed(False)) // rows, rows, recipe.model.hidden]
            handed: Tensor | None = None
            for chunk in built if layout.rank == 0 else _own(layout, built):
                received = None if chunk.first else (torch.empty(shape) if handed is None else handed.detach()).requires_grad_()
                handed = _forward_backward(chunk, fake, received, shape, recipe.training.recompute)
        kernels.forget_masks()  # they were made without data
    return shape


def _forward_backward(chunk: Transformer, inputs: NetworkInputs, received: Tensor | None, shape: list[int], recompute: str) -> Tensor:
    chunk.train()
    wrap_blocks(chunk.blocks.values(), recompute=recompute, compile="none")
    output = chunk(inputs, received)
    if chunk.last:
        output[0].backward()
    else:
        if list(output.shape) != shape:
            raise ValueError(f"a stage hands on hidden states of shape {list(output.shape)}, but the next one expects {shape}")
        output.backward(torch.empty_like(output))
    if received is not None and (received.grad is None or list(received.grad.shape) != shape):
        raise ValueError("a stage hands back no gradient of its hidden states")
    without = [name for name, parameter in chunk.named_parameters() if parameter.grad is None]
    if without:
        raise ValueError(f"parameters have no gradient: {', '.join(without[:4])}")
    for parameter in chunk.parameters():
        parameter.grad = None
    output = output[0] if chunk.last else output
    return output


def _objective(cluster: ClusterPlan, step: int, device: str = "cpu", block_size: int | None = None) -> Objective:
    """That of a step, or of one of a mixture's block sizes."""
    schedule = ObjectiveSchedule.of(cluster.recipe, cluster.vocabulary - 1, document_end=0, device=device)
    return schedule.at(step) if block_size is None or len(schedule.shares) == 1 else schedule.of_size(block_size)


def _share(cluster: ClusterPlan, layout: Layout, device: str = "cpu") -> ContextShare:
    pad_to, ring = selected_multiple(cluster.parallel, device), cluster.parallel.context_exchange == "ring"
    return ContextShare(layout.context_rank, layout.context, pad_to, ring)


def _inputs(objective: Any, rows: int, vocabulary: int, seed: int, first: int = 0, batch: int | None = None) -> NetworkInputs:
    tokens = np.random.default_rng(seed + first).integers(0, vocabulary - 1, (rows, objective.context))
    return objective.training_inputs(tokens, np.arange(first, first + rows), 0, seed, batch or rows)


# -- The engine, narrow ------------------------------------------------------------------------------------------------


def narrow(cluster: ClusterPlan) -> ClusterPlan:
    """The situation with the same layers, heads, stages and ranks, and as little of everything else as the rules allow."""
    recipe = cluster.recipe
    tensor, context, pipeline = recipe.parallel.tensor, recipe.parallel.context, recipe.parallel.pipeline
    model = replace(
        recipe.model,
        context=8 * tensor * (2 * context if context > 1 else 1),
        hidden=2 * recipe.model.heads,
        head_width=2,
        mlp_hidden=2 * tensor,
        conditioning_size=4,
    )
    shares = cluster.shares()
    draws = recipe.objective.draws
    micro_batches, rows = min(shares.micro_batches, 2 * pipeline), min(shares.micro_batch, 2)
    return replace(
        cluster,
        recipe=replace(
            recipe,
            model=model,
            objective=replace(recipe.objective, block_size=8 if recipe.objective.traits.in_blocks else None),
            training=replace(recipe.training, global_batch=rows * draws * micro_batches * cluster.replicas, precision=cluster.precision),
            parallel=replace(recipe.parallel, micro_batch=rows, stage_layers=[len(chunk) for chunk in cluster.chunks]),
        ),
        vocabulary=NARROW_VOCABULARY,
    )


def run_engine(cluster: ClusterPlan, rank: int) -> str:
    """Two steps of the real engine as `rank`; what is in received buffers is anybody's guess, so no number is looked at. Returns
    the engine's name."""
    small = narrow(cluster)
    recipe = small.recipe
    with fake_world(small, rank) as layout:
        objective = _objective(small, 0)
        engine = build_engine(recipe, layout, small.vocabulary, small.vocabulary - 1)
        average = ExponentialAverage(engine.masters, recipe.training.ema, engine.publish, engine.settle) if recipe.training.ema else None
        batch, rows = recipe.batches.largest, small.shares().micro_batch
        share = batch // layout.data
        first = layout.data_rank * share
        for step in range(2):
            inputs = [
                _share(small, layout).of(_inputs(objective, rows, small.vocabulary, recipe.run.seed, start, batch))
                for start in range(first, first + share, rows)
            ]
            engine.forward_backward(inputs, batch * objective.scored_tokens_per_row)
            engine.step(recipe.training.learning_rate)
            if average is not None:
                average.update(step + 1)
        name = f"{recipe.parallel.resolved_engine}, ZeRO {recipe.parallel.zero}, {len(inputs)} micro-batches"
        engine.close()
    return name
